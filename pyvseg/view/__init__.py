# SPDX-License-Identifier: Apache-2.0
"""Results as a page for the browser: one HTML file that opens from the file system and asks no network for anything."""

from pyvseg.view.page import write_page

__all__ = ["write_page"]
