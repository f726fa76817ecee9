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
from pyvseg.models.video_detector import DetectorSettings

DETECTION = "video object detection"
_R50, _R101 = ResNetSizes(50, dilated=True), ResNetSizes(101, dilated=True)


def variants() -> Iterator[Variant]:
    for name, backbone, result in (("r50", _R50, "79.9"), ("r101", _R101, "81.9")):
        yield _variant(f"transvod_{name}_vid", "transvod", TransVODSettings(backbone=backbone), "TransVOD", result)
    settings = TransVODSettings(queries=100, backbone=SWIN_B_PYRAMID)
    yield _variant("transvodpp_swin_b_vid", "transvodpp", settings, "TransVOD++", "90.0")
    settings = TransVODLiteSettings(queries=100, backbone=SWIN_B_PYRAMID)
    yield _variant("transvod_lite_swin_b_vid", "transvod_lite", settings, "TransVOD Lite", "90.1")
    for name, backbone, queries, result in (("r50", _R50, 300, "76.0"), ("r101", _R101, 300, "78.3"), ("swin_b", SWIN_B_PYRAMID, 100, "88.3")):
        settings = DetectorSettings(queries=queries, backbone=backbone)
        called = "TransVOD++" if name == "swin_b" else "TransVOD"
        yield _variant(f"transvod_single_{name}_vid", "transvod_single", settings, called, result, "the detector of single frames: each stands alone")


def _variant(name: str, system: str, settings, called: str, result: str, note: str = "") -> Variant:
    published = {"ImageNet VID val AP50": result}
    return Variant(
        name, DETECTION, system, settings, f"{called} checkpoint (.pth)", f"{called}'s repository", "Apache-2.0", published, note, IMAGENET_VID
    )  # fmt: skip
