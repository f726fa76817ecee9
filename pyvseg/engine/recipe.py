# SPDX-License-Identifier: Apache-2.0
"""How videos are segmented, as data: the options that `pyvseg run` and `pyvseg batch` share. Imports no network, and travels to
other processes and machines."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyvseg import __version__
from pyvseg.errors import PyvsegError

if TYPE_CHECKING:
    from torch import nn

    from pyvseg.engine.task import Task


@dataclass(frozen=True)
class Results:
    """Which results are wanted."""

    overlay: bool = True
    """Leave out the overlay videos."""
    pngs: bool = True
    """Leave out the palette PNGs; the JSON has the masks too. Without them, a stopped video starts again where masks are given;
    in instance segmentation, without the overlay too, every video is read only once."""
    step_pngs: bool = False
    """Panoptic segmentation: PNGs in the form of KITTI-STEP too."""
    score_threshold: float = 0.3
    """Instance segmentation and object detection: tracks, or boxes, of a lower score are left out of masks and overlay; results.json has all."""
    top_k: int | None = None
    """Instance segmentation: so many tracks at most; object detection: so many boxes in a frame. Left out: the model's published number."""
    compat: bool = True
    """Instance segmentation: each object only once, with its likeliest class; as published it makes a track for each likely one.
    Tube-Link, Video K-Net and PolyphonicFormer, panoptic: without the published code's faults in the ids of objects."""

    def tracks(self) -> dict:
        """What the results of instance segmentation depend on, by the names of the options."""
        return {"score_threshold": self.score_threshold, "top_k": self.top_k, "compat": self.compat}


@dataclass(frozen=True)
class Recipe:
    """All that results depend on besides videos and masks."""

    model: str = "pcvos_tiny"
    """A name of `pyvseg models`."""
    weights: Path | None = None
    """A published checkpoint or a safetensors file; not needed where weights are bundled."""
    device: str | None = None
    """cpu, cuda, cuda:1; left out: CUDA where there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster where the hardware knows it, and not exact."""
    clip_length: int | None = None
    """Frames segmented together: longer is faster, shorter follows fast change better. Left out: the model's own number."""
    decoder: Literal["cpu", "nvdec"] = "cpu"
    """What decodes video files: FFmpeg, or the GPU's own decoder, which differs in the last bits. Needs pyvseg[nvdec]."""
    max_memory_frames: int | Literal["none"] = 16  # pyvseg.models.vos.DEFAULT_MEMORY_FRAMES
    """Frames that the memory holds of the objects of given masks; none = no bound, as published."""
    at_once: int | None = None
    """So many videos at a time pass through the network together. Left out: 4 on a GPU, else 1."""
    results: Results = Results()

    def __post_init__(self) -> None:
        """Raises PyvsegError for numbers that cannot be and for files that are not there."""
        named = {"clip-length": self.clip_length, "max-memory-frames": self.memory_frames, "top-k": self.results.top_k, "at-once": self.at_once}
        for name, value in named.items():
            if value is not None and value < 1:
                raise PyvsegError(f"--{name} {value}: must be at least 1{', or none' if name.startswith('max') else ''}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise PyvsegError(f"weights {self.weights}: no such file")

    @property
    def task_name(self) -> str:
        from pyvseg.models import zoo

        return zoo.variant(self.model).task

    @property
    def needs_masks(self) -> bool:
        return self.task_name == "semi-supervised"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of what instance segmentation and object detection find; empty for other tasks."""
        from pyvseg.models import zoo

        return zoo.variant(self.model).classes if self.finds_boxes or self.task_name == "video instance segmentation" else ()

    @property
    def finds_boxes(self) -> bool:
        return self.task_name == "video object detection"

    @property
    def memory_frames(self) -> int | None:
        return None if self.max_memory_frames == "none" else self.max_memory_frames

    def settings(self) -> dict:
        """What must be equal for results to belong together, by the names of the options."""
        from pyvseg.models import zoo

        given = asdict(self) | asdict(self.results) | {"weights": str(self.weights), "pyvseg": __version__}
        names = ["model", "weights", "precision", "decoder", "pngs", "overlay", "pyvseg"]
        if self.task_name == "video instance segmentation":
            names += self.results.tracks()
        elif self.finds_boxes:
            names += ["score_threshold", "top_k", "clip_length"]
            given["clip_length"] = self.clip_length or getattr(zoo.variant(self.model).settings, "clip_length", None)
        else:
            names += ["clip_length", "max_memory_frames" if self.needs_masks else "step_pngs"]
            names += ["compat"] if hasattr(zoo.variant(self.model).settings, "compat") else []
            given["clip_length"] = self.clip_length or getattr(zoo.variant(self.model).settings, "clip_length", 1)
        return {name: given[name] for name in names}

    def task(self) -> Task:
        """Loads the model."""
        if self.needs_masks:
            from pyvseg.engine.tasks.following import Following as Chosen
        elif self.task_name == "video instance segmentation":
            from pyvseg.engine.tasks.instances import Instances as Chosen
        elif self.finds_boxes:
            from pyvseg.engine.tasks.detection import Detection as Chosen
        else:
            from pyvseg.engine.tasks.panoptic import Panoptic as Chosen
        return Chosen.of(self)

    def load(self) -> tuple[nn.Module, dict]:
        """The model's network, and what every task made of this has beside it."""
        from pyvseg.models import zoo
        from pyvseg.video import nvdec

        if self.decoder == "nvdec":
            nvdec.check()
        network = zoo.load(self.model, weights=self.weights, device=self.device, precision=self.precision)
        if network.device.type == "cuda":
            sys.setswitchinterval(0.0005)  # seconds; for ten times as long, Python's default, a decoder or writer may keep the thread that launches waiting
        at_once = self.at_once or (4 if network.device.type == "cuda" else 1)
        return network, {"settings": self.settings() | {"device": str(network.device)}, "results": self.results, "at_once": at_once}
