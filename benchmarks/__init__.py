# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: what is fast, by how much, and how far from what the machine allows."""
