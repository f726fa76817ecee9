# SPDX-License-Identifier: Apache-2.0
"""The demo: objects followed through a real clip that ships inside another package."""
