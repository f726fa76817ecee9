# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints of Tube-Link: panoptic, instances, semantic."""

from __future__ import annotations

from collections.abc import Iterator

from pyvseg.layers.backbones import RESNET50, SWIN_B, SWIN_L
from pyvseg.models.categories import CITYSCAPES, KITTI_STEP_THINGS, OVIS, VIPSEG, VIPSEG_THINGS, YOUTUBE_VIS_2019, YOUTUBE_VIS_2021
from pyvseg.models.tube_link_instances import TubeLinkInstancesSettings
from pyvseg.models.tube_link_maps import TubeMapSettings
from pyvseg.models.tube_link_panoptic import TubeLinkPanopticSettings
from pyvseg.models.variant import Variant

_WEIGHTS = ("Tube-Link checkpoint (.pth)", "the Tube-Link authors' repository", "MIT")
_LARGE = {"backbone": SWIN_L, "queries": 200}


def variants() -> Iterator[Variant]:
    vipseg = {"r50": {"clip_length": 4}, "swin_b": {"clip_length": 2, "backbone": SWIN_B}, "swin_l": {"clip_length": 2, **_LARGE}}
    for name, sizes in vipseg.items():
        yield _panoptic(f"tube_link_{name}_vipseg", TubeLinkPanopticSettings(classes=124, things=VIPSEG_THINGS, **sizes), VIPSEG, *_WEIGHTS)
    kitti = TubeLinkPanopticSettings(classes=19, things=KITTI_STEP_THINGS, clip_length=2)
    yield _panoptic("tube_link_r50_kitti_step", kitti, CITYSCAPES, "your own checkpoint", "training", "-", "its authors published no weights for it")
    yield from _instances()
    for name, sizes in (("r50", {}), ("swin_l", _LARGE)):
        yield Variant(
            f"tube_link_{name}_vspw", "video semantic segmentation", "tube_link_semantic", TubeMapSettings(classes=124, clip_length=6, **sizes),
            *_WEIGHTS, note="tubes of 6 frames", classes=VIPSEG,
        )  # fmt: skip


def _panoptic(name: str, settings: TubeLinkPanopticSettings, classes: tuple[str, ...], file: str, where: str, licence: str, note: str = "") -> Variant:
    tubes = f"tubes of {settings.clip_length} frames"
    return Variant(
        name, "video panoptic segmentation", "tube_link_panoptic", settings, file, where, licence, note=f"{tubes}; {note}" if note else tubes,
        classes=classes,
    )  # fmt: skip


def _instances() -> Iterator[Variant]:
    data = {
        "ytvis19": ("YouTube-VIS 2019", YOUTUBE_VIS_2019, (480, 854)), "ytvis21": ("YouTube-VIS 2021", YOUTUBE_VIS_2021, (480, 854)),
        "ovis": ("OVIS", OVIS, (360, 640)),
    }  # fmt: skip
    results = {("r50", "ytvis19"): "about 52.8", ("r50", "ytvis21"): "about 47.9"}
    for key, (title, classes, (short, long)) in data.items():
        for name, backbone in (("r50", RESNET50), ("swin_l", SWIN_L)):
            if (name, key) == ("swin_l", "ovis"):
                continue  # not published
            settings = TubeLinkInstancesSettings(classes=len(classes), backbone=backbone, short_side=short, long_side=long)
            published = {f"{title} val AP": results[name, key]} if (name, key) in results else {}
            yield Variant(
                f"tube_link_{name}_{key}", "video instance segmentation", "tube_link", settings, *_WEIGHTS, published, "tubes of 4 frames", classes
            )  # fmt: skip
