# SPDX-License-Identifier: Apache-2.0
"""One module per kind of evaluation: data set and results in, numbers and printed lines out.

A module has `evaluate(options) -> (numbers, lines)`: what goes into the JSON file, with the sequences that were not scored under
"left_out", and what is printed. It raises PyvsegError that names the sequence and what is wrong. A new protocol adds a row here,
a name to `Protocol` and a line to the help of `pyvseg eval`.
"""

import importlib
from collections.abc import Callable
from typing import Literal

Protocol = Literal["davis", "vipseg", "kitti-step", "youtube-vis", "vspw", "imagenet-vid", "cityscapes-dvps"]

_MODULES = {"davis": "davis", "vipseg": "panoptic", "kitti-step": "panoptic", "youtube-vis": "instances", "vspw": "semantic", "imagenet-vid": "boxes", "cityscapes-dvps": "dvps"}


def evaluation(protocol: str) -> Callable:
    """The `evaluate` of a protocol."""
    return importlib.import_module(f"{__name__}.{_MODULES[protocol]}").evaluate
