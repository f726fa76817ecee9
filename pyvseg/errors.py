# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on. The command line prints their one-line message; a library user catches `PyvsegError`."""


class PyvsegError(Exception):
    """Bad input or a failed job: the message names the input, what is wrong with it and what to do."""


class CheckpointError(PyvsegError):
    """A weights file that cannot be read, is unsafe, or does not fit the model."""


class VideoError(PyvsegError):
    """A video, frame folder or mask that cannot be read or does not fit its video."""


class OutputError(PyvsegError):
    """Results that cannot be written: no permission, no space, or a folder that already holds other results."""
