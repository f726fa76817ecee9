# SPDX-License-Identifier: Apache-2.0
"""Scores of results against ground truth. Label images in, numbers out; nothing here knows a model."""
