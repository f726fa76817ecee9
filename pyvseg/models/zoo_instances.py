# SPDX-License-Identifier: Apache-2.0
"""The published checkpoints of the Mask2Former family: images, and instances of videos."""

from __future__ import annotations

from collections.abc import Iterator

from pyvseg.layers.backbones import RESNET50, RESNET101, SWIN_B, SWIN_L, SWIN_S, SWIN_T
from pyvseg.models.categories import COCO_PANOPTIC, COCO_THINGS, OVIS, YOUTUBE_VIS_2019, YOUTUBE_VIS_2021
from pyvseg.models.ctvis import CTVISSettings
from pyvseg.models.genvis import GenVISSettings
from pyvseg.models.mask2former import Mask2FormerSettings
from pyvseg.models.variant import Variant
from pyvseg.models.vita import VITASettings

R50, LARGE = {"backbone": RESNET50, "queries": 100}, {"backbone": SWIN_L, "queries": 200}
CLASSES = {"ytvis19": 40, "ytvis21": 40, "ytvis22": 40, "ovis": 25}
DATA = {"ytvis19": "YouTube-VIS 2019", "ytvis21": "YouTube-VIS 2021", "ytvis22": "YouTube-VIS 2022", "ovis": "OVIS"}
NAMES = {"ytvis19": YOUTUBE_VIS_2019, "ytvis21": YOUTUBE_VIS_2021, "ytvis22": YOUTUBE_VIS_2021, "ovis": OVIS}
VIDEO_INSTANCES = "video instance segmentation"
_COCO = {"short_side": 800}
_M2F_WEIGHTS = "CC BY-NC 4.0"


def variants() -> Iterator[Variant]:
    yield from _mask2former_images()
    yield from _mask2former_videos()
    yield from _minvis()
    yield from _ctvis()
    yield from _vita()
    yield from _genvis()


def _mask2former_images() -> Iterator[Variant]:
    where = "Mask2Former's model zoo"
    panoptic = Mask2FormerSettings(classes=133, things=tuple(range(80)), **_COCO, **R50)
    yield Variant(
        "mask2former_r50_coco_panoptic", "video panoptic segmentation", "mask2former_panoptic", panoptic, "model_final_94dc52.pkl", where,
        _M2F_WEIGHTS, {"COCO panoptic val PQ / AP / mIoU": "51.9 / 41.7 / 61.7"}, "an image model: every frame stands alone", COCO_PANOPTIC,
    )  # fmt: skip
    for name, sizes, file, result in (("r50", R50, "model_final_3c8ec9.pkl", "43.7"), ("swin_l", LARGE, "model_final_e5f453.pkl", "50.1")):
        yield Variant(
            f"mask2former_{name}_coco_instance", VIDEO_INSTANCES, "mask2former", Mask2FormerSettings(classes=80, **_COCO, **sizes),
            file, where, _M2F_WEIGHTS, {"COCO instance val AP": result}, "an image model: objects are followed as by MinVIS", COCO_THINGS,
        )  # fmt: skip


def _mask2former_videos() -> Iterator[Variant]:
    files = {("r50", "ytvis19"): "model_final_34112b.pkl", ("r50", "ytvis21"): "model_final_b8aae2.pkl"}
    backbones = {"r50": RESNET50, "r101": RESNET101, "swin_t": SWIN_T, "swin_s": SWIN_S, "swin_b": SWIN_B, "swin_l": SWIN_L}
    results = {"ytvis19": (46.4, 49.2, 51.5, 54.3, 59.5, 60.4), "ytvis21": (40.6, 42.4, 45.9, 48.6, 52.0, 52.6)}
    for data, row in results.items():
        for (name, backbone), result in zip(backbones.items(), row):
            settings = Mask2FormerSettings(
                classes=40, backbone=backbone, queries=200 if name == "swin_l" else 100, joint=True, short_side=480 if "swin" in name else 360
            )
            file = files.get((name, data), "model_final_*.pkl")
            yield _video("mask2former_video", name, data, settings, file, "Mask2Former's video model zoo", _M2F_WEIGHTS, result)


def _minvis() -> Iterator[Variant]:
    results = {"ytvis19": (47.3, 62.0), "ytvis21": (43.9, 55.4), "ovis": (26.7, 41.7)}
    for data, row in results.items():
        for name, sizes, file, result in zip(("r50", "swin_l"), (R50, LARGE), ("R50", "swin_large"), row):
            side = 480 if name == "swin_l" and data != "ytvis21" else 360
            settings = Mask2FormerSettings(classes=CLASSES[data], short_side=side, **sizes)
            note = "also for the files trained with fewer labels, *_r10, *_r5 and *_r1" if name == "swin_l" else ""
            yield _video("minvis", name, data, settings, f"minvis_{data}_{file}.pth", "MinVIS' repository", "CC BY-NC-SA 4.0", result, note)


def _ctvis() -> Iterator[Variant]:
    results = {"ytvis19": (55.2, 65.6), "ytvis21": (50.1, 61.2), "ytvis22": (44.9, 53.8), "ovis": (35.5, 46.9)}
    for data, row in results.items():
        for name, sizes, result in zip(("r50", "swin_l"), (R50, LARGE), row):
            settings = CTVISSettings(classes=CLASSES[data], **sizes)
            yield _video("ctvis", name, data, settings, "CTVIS checkpoint (.pth)", "CTVIS' repository", "MIT", result)


def _vita() -> Iterator[Variant]:
    results = {"ytvis19": (49.8, 63.0), "ytvis21": (45.7, 57.5), "ovis": (19.6, 27.7)}
    for data, row in results.items():
        for name, sizes, side, result in zip(("r50", "swin_l"), (R50, LARGE), (360, 448), row):
            settings = VITASettings(classes=CLASSES[data], short_side=side, top=_top(data), **sizes)
            yield _video("vita", name, data, settings, "VITA checkpoint (.pth)", "VITA's repository", "Apache-2.0", result)


def _genvis() -> Iterator[Variant]:
    results = {
        "online": {"ytvis19": (50.0, 64.0), "ytvis21": (47.1, 59.6), "ovis": (35.8, 45.2)},
        "semionline": {"ytvis19": (51.3, 63.8), "ytvis21": (46.3, 60.1), "ovis": (34.5, 45.4)},
    }
    for (mode, table), length in zip(results.items(), (1, 3)):
        for data, row in table.items():
            for name, sizes, side, result in zip(("r50", "swin_l"), (R50, LARGE), (360, 448), row):
                settings = GenVISSettings(classes=CLASSES[data], short_side=side, top=_top(data), clip_length=length, **sizes)
                found = _video("genvis", name, data, settings, "GenVIS checkpoint (.pth)", "GenVIS' repository", "Apache-2.0", result)
                yield Variant(**{**vars(found), "name": f"{found.name}_{mode}"})


def _video(system: str, backbone: str, data: str, settings, file: str, where: str, licence: str, result: float, note: str = "") -> Variant:
    published = {f"{DATA[data]} val AP": str(result)}
    return Variant(
        f"{system}_{backbone}_{data}", VIDEO_INSTANCES, system, settings, file, where, licence, published, note, NAMES[data]
    )  # fmt: skip


def _top(data: str) -> int:
    return 20 if data == "ovis" else 10
