# SPDX-License-Identifier: Apache-2.0
"""pyvseg: fast video segmentation with the published checkpoints of the field.

    model = pyvseg.load("pcvos_tiny")
    for result in model.track("clip.mp4", "first_mask.png"):
        result.labels  # uint8 (H, W), object id of each pixel

    model = pyvseg.load("ctvis_r50_ytvis19", weights="CTVIS_checkpoint.pth")
    for track in model.segment("clip.mp4"):
        track.score, track.category, track.mask(0)  # bool (H, W), None where the object is not in the frame

    model = pyvseg.load("video_kmax_r50_vipseg", weights="video_kmax.pth")
    for result in model.segment("clip.mp4"):
        result.values  # int32 (H, W), category * 10000 + id of each pixel, 0 = void
"""

__version__ = "0.1.0"
__all__ = ["InstanceModel", "Model", "PanopticModel", "Stream", "__version__", "load"]


def __getattr__(name: str):
    # torch takes seconds to import; `pyvseg --help` and tools that only read the version need not wait for it.
    if name in ("InstanceModel", "Model", "PanopticModel", "Stream", "load"):
        from pyvseg import api

        return getattr(api, name)
    raise AttributeError(f"module 'pyvseg' has no attribute {name!r}")
