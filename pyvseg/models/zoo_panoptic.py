# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints of kMaX-DeepLab, Video-kMaX, PolyphonicFormer and, for instances too, Video K-Net."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyvseg.layers import backbones
from pyvseg.layers.kmax_backbones import CONVNEXT_B, CONVNEXT_L, CONVNEXT_S, CONVNEXT_T, DEEPLAB2_RESNET50, RESNET50
from pyvseg.models.categories import ADE20K_THINGS, CITYSCAPES, COCO_PANOPTIC, KITTI_STEP_THINGS, VIPSEG, VIPSEG_THINGS, YOUTUBE_VIS_2019
from pyvseg.models.kmax_image_results import ImagePanopticSettings
from pyvseg.models.kmax_images import KMaXImageSettings
from pyvseg.models.kmax_panoptic import PanopticSettings
from pyvseg.models.panoptic_linking import LinkSettings
from pyvseg.models.polyphonicformer import PolyphonicFormerSettings
from pyvseg.models.variant import Variant
from pyvseg.models.video_kmax import VideoKMaXSettings
from pyvseg.models.video_knet import VideoKNetSettings, things_first
from pyvseg.models.video_knet_instances import VideoKNetInstancesSettings

VIDEO_PANOPTIC = "video panoptic segmentation"
_NEAR = {"clip_length": 2, "panoptic": PanopticSettings(0.3, 0.5), "linking": LinkSettings(confidence=0.7)}
_ONLINE = {"clip_length": 1, "panoptic": PanopticSettings(0.4, 0.5), "linking": LinkSettings(confidence=0.5)}
_BACKBONES = {"r50": DEEPLAB2_RESNET50, "convnext_l": CONVNEXT_L}


def variants() -> Iterator[Variant]:
    yield from _images()
    yield from _vipseg()
    yield from _kitti_step()
    yield from _video_knet()
    yield from _video_knet_instances()
    yield _polyphonicformer()


def _images() -> Iterator[Variant]:
    where = "the kMaX-DeepLab authors' repository"
    coco = {
        "r50": (RESNET50, 53.3), "convnext_t": (CONVNEXT_T, 55.5), "convnext_s": (CONVNEXT_S, 56.7), "convnext_b": (CONVNEXT_B, 57.2),
        "convnext_l": (CONVNEXT_L, 57.9),
    }  # fmt: skip
    ade20k = {"r50": (RESNET50, 42.2), "convnext_l": (CONVNEXT_L, 50.0)}
    rules = {"coco": ImagePanopticSettings(), "ade20k": ImagePanopticSettings(thing=0.4, stuff=0.4)}
    for data, name, table in (("coco", "COCO", coco), ("ade20k", "ADE20K", ade20k)):
        for key, (backbone, quality) in table.items():
            classes, things = (133, tuple(range(80))) if data == "coco" else (150, ADE20K_THINGS)
            settings = KMaXImageSettings(classes=classes, things=things, backbone=backbone, panoptic=rules[data])
            file = "kmax_r50.pth" if (key, data) == ("r50", "coco") else "kMaX-DeepLab checkpoint (.pth)"
            yield Variant(
                f"kmax_{key}_{data}", VIDEO_PANOPTIC, "kmax", settings, file, where, "Apache-2.0", {f"{name} val PQ": str(quality)},
                "an image model: every frame stands alone", COCO_PANOPTIC if data == "coco" else (),
            )  # fmt: skip


def _vipseg() -> Iterator[Variant]:
    results = {
        ("r50", ""): (39.9, 38.2), ("convnext_l", ""): (51.7, 51.9),
        ("r50", "_online"): (38.7, 36.8), ("convnext_l", "_online"): (49.4, 49.4),
    }  # fmt: skip
    for (backbone, mode), (stq, vpq) in results.items():
        settings = VideoKMaXSettings(classes=124, things=VIPSEG_THINGS, backbone=_BACKBONES[backbone], **(_ONLINE if mode else _NEAR))
        yield Variant(
            f"video_kmax_{backbone}_vipseg{mode}", VIDEO_PANOPTIC, "video_kmax", settings, "Video-kMaX checkpoint (.pth)",
            "the Video-kMaX authors' repository", "none stated: all rights reserved", {"VIPSeg val STQ / VPQ": f"{stq} / {vpq}"},
            "frame by frame" if mode else "clips of two frames", VIPSEG,
        )  # fmt: skip


def _kitti_step() -> Iterator[Variant]:
    for backbone, sizes in _BACKBONES.items():
        settings = VideoKMaXSettings(classes=19, things=KITTI_STEP_THINGS, backbone=sizes, image_size=(385, 1249), **_NEAR)
        yield Variant(
            f"video_kmax_{backbone}_kitti_step", VIDEO_PANOPTIC, "video_kmax", settings, "your own checkpoint", "training", "-", {},
            "its authors published KITTI-STEP weights for TensorFlow only", CITYSCAPES,
        )  # fmt: skip


_KNET = {"r50": backbones.RESNET50, "swin_b": replace(backbones.SWIN_B, window=7), "swin_l": replace(backbones.SWIN_L, window=7)}
_KNET_FILE, _KNET_WHERE = "Video K-Net checkpoint (.pth)", "the Video K-Net authors' repository"


def _video_knet() -> Iterator[Variant]:
    fused = {"link": "update", "fuse": "update"}
    short = {"fuse": "update", "track_layers": 1}
    kitti = {"r50": {}, "swin_b": fused, "swin_l": fused, "swin_l_short": short}
    vipseg = {"r50": {}, "swin_b": {"VIPSeg val VPQ": "39.8"}}
    for name, linked in kitti.items():
        settings = VideoKNetSettings(backbone=_KNET[name.removesuffix("_short")], **linked)
        note = "file with track_head.fcs.0 alone" if name.endswith("short") else ""
        yield Variant(
            f"video_knet_{name}_kitti_step", VIDEO_PANOPTIC, "video_knet", settings, _KNET_FILE, _KNET_WHERE, "MIT", {}, note, CITYSCAPES
        )
    for name, published in vipseg.items():
        settings = VideoKNetSettings(124, 66, _KNET[name], categories=things_first(VIPSEG_THINGS, 124))
        yield Variant(
            f"video_knet_{name}_vipseg", VIDEO_PANOPTIC, "video_knet", settings, _KNET_FILE, _KNET_WHERE, "MIT", published, "", VIPSEG
        )


def _video_knet_instances() -> Iterator[Variant]:
    for name, precision in (("r50", 40.5), ("swin_b", 54.1)):
        yield Variant(
            f"video_knet_{name}_ytvis19", "video instance segmentation", "video_knet_instances", VideoKNetInstancesSettings(backbone=_KNET[name]),
            _KNET_FILE, _KNET_WHERE, "MIT", {"YouTube-VIS 2019 val AP": str(precision)}, "", YOUTUBE_VIS_2019,
        )  # fmt: skip


def _polyphonicformer() -> Variant:
    return Variant(
        "polyphonicformer_r50_cityscapes_dvps", VIDEO_PANOPTIC, "polyphonicformer", PolyphonicFormerSettings(), "polyphonic_r50_video.pth",
        "the PolyphonicFormer authors' repository", "none stated: all rights reserved", {}, "depth of every pixel too", CITYSCAPES,
    )  # fmt: skip
