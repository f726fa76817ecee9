# SPDX-License-Identifier: Apache-2.0
"""Fast open engine for video segmentation."""
