# SPDX-License-Identifier: Apache-2.0
"""Where datasets keep their frames, masks and lists. Readers hand out paths and ids; `pyvseg.video` opens them."""
