# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints for video object detection."""

from __future__ import annotations

from collections.abc import Iterator

from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.pyramid import SWIN_B_PYRAMID
from pyvseg.models.categories import IMAGENET_VID
from pyvseg.models.transvod import TransVODSettings
from pyvseg.models.transvod_lite import TransVODLiteSettings
from pyvseg.models.variant import Variant

DETECTION = "video object detection"


def variants() -> Iterator[Variant]:
    for depth, result in ((50, "79.9"), (101, "81.9")):
        settings = TransVODSettings(backbone=ResNetSizes(depth, dilated=True))
        yield _variant(f"transvod_r{depth}_vid", "transvod", settings, "TransVOD", result)
    settings = TransVODSettings(queries=100, backbone=SWIN_B_PYRAMID)
    yield _variant("transvodpp_swin_b_vid", "transvodpp", settings, "TransVOD++", "90.0")
    settings = TransVODLiteSettings(queries=100, backbone=SWIN_B_PYRAMID)
    yield _variant("transvod_lite_swin_b_vid", "transvod_lite", settings, "TransVOD Lite", "90.1")


def _variant(name: str, system: str, settings, called: str, result: str) -> Variant:
    published = {"ImageNet VID val AP50": result}
    return Variant(
        name, DETECTION, system, settings, f"{called} checkpoint (.pth)", f"{called}'s repository", "Apache-2.0", published, classes=IMAGENET_VID
    )  # fmt: skip
