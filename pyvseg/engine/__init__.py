# SPDX-License-Identifier: Apache-2.0
"""Runs a model over videos: decode, propagate and write overlap in time."""
