# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file per op under the op's name; installed as `pyvseg.kernels`. They know tensors and nothing else."""
