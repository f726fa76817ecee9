# SPDX-License-Identifier: Apache-2.0
"""One file per op; each yields its cases, see `benchmarks.harness.Case`."""
