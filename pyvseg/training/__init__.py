# SPDX-License-Identifier: Apache-2.0
"""Losses, data and the loop that trains models."""
