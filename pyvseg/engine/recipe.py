# SPDX-License-Identifier: Apache-2.0
"""How videos are segmented, as data: what `pyvseg run` and `pyvseg batch` make their models and lanes from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Literal

from pyvseg import __version__
from pyvseg.engine.memory import fitting_clip
from pyvseg.engine.propagate import Propagation, look_ahead
from pyvseg.engine.run import Following, Tracker
from pyvseg.engine.run_instances import Finding, InstanceNetwork, InstanceOptions
from pyvseg.engine.run_panoptic import PanopticFinding, PanopticNetwork, PanopticOptions
from pyvseg.errors import PyvsegError
from pyvseg.models import zoo
from pyvseg.models.vos import DEFAULT_MEMORY_FRAMES, VOSState


@dataclass(frozen=True)
class Recipe:
    """All that results depend on besides videos and masks; small enough to send to other processes and machines.

    model, weights, device, precision       see `zoo.load`
    clip_length, max_memory_frames          of models that follow given masks (the first also of panoptic ones);
                                            None: the model's own number, no bound
    score_threshold, top, compat            of models that find their objects, see `InstanceOptions`
    pngs, overlay                           whether to write palette PNGs and overlay videos
    step_pngs                               of panoptic models, see `PanopticOptions`
    at_once                                 videos that pass through the network together; None: 4 on a GPU, else 1

    Raises PyvsegError for numbers that cannot be and for files that are not there.
    """

    model: str = "pcvos_tiny"
    weights: str | None = None
    device: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    clip_length: int | None = None
    max_memory_frames: int | None = DEFAULT_MEMORY_FRAMES
    score_threshold: float = 0.3
    top: int | None = None
    compat: bool = True
    pngs: bool = True
    overlay: bool = True
    step_pngs: bool = False
    at_once: int | None = None

    def __post_init__(self) -> None:
        if zoo.variant(self.model).task == "image segmentation":
            raise PyvsegError(f"{self.model} segments single images; for videos there are the video models of `pyvseg models`")
        named = {"clip-length": self.clip_length, "max-memory-frames": self.max_memory_frames, "top-k": self.top, "at-once": self.at_once}
        for name, value in named.items():
            if value is not None and value < 1:
                raise PyvsegError(f"--{name} {value}: must be at least 1{', or none' if name.startswith('max') else ''}")
        if self.weights is not None and not Path(self.weights).is_file():
            raise PyvsegError(f"weights {self.weights}: no such file")

    @property
    def needs_masks(self) -> bool:
        return zoo.variant(self.model).task == "semi-supervised"

    @property
    def is_panoptic(self) -> bool:
        return zoo.variant(self.model).task == "video panoptic segmentation"

    def settings(self) -> dict:
        """What must be equal for results to belong together, by the names of the options."""
        chosen = zoo.variant(self.model)
        same = {"model": self.model, "weights": str(self.weights), "precision": self.precision, "pngs": self.pngs, "overlay": self.overlay, "pyvseg": __version__}
        if self.needs_masks:
            return same | {"clip_length": self.clip_length or chosen.settings.clip_length, "max_memory_frames": self.max_memory_frames}
        if self.is_panoptic:
            return same | {"clip_length": self.clip_length or chosen.settings.clip_length, "step_pngs": self.step_pngs}
        return same | {"score_threshold": self.score_threshold, "top_k": self.top, "compat": self.compat}

    def tracker(self) -> Tracker:
        """The model of a run that follows given masks."""
        model = zoo.load(self.model, weights=self.weights, device=self.device, precision=self.precision)
        length = self.clip_length or model.settings.clip_length

        def propagation(saved: Path | None) -> Propagation:
            state = VOSState.load(saved, model.device) if saved else None
            return Propagation(model, clip_length=length, max_memory_frames=self.max_memory_frames, state=state)

        settings = {
            "model": self.model, "weights": str(self.weights), "clip_length": length, "max_memory_frames": self.max_memory_frames,
            "precision": self.precision, "device": str(model.device), "pyvseg": __version__,
        }  # fmt: skip
        fit = lambda video, objects: fitting_clip(model, video, length, objects, self.max_memory_frames or 0)  # noqa: E731
        return Tracker(propagation, settings, length, fit, look_ahead)

    def instances(self) -> tuple[InstanceNetwork, InstanceOptions]:
        """The model of a run that finds its objects."""
        network = zoo.load(self.model, weights=self.weights, device=self.device, precision=self.precision)
        settings = {"weights": str(self.weights), "precision": self.precision, "device": str(network.device), "pyvseg": __version__}
        options = InstanceOptions(self.score_threshold, self.top, self.compat, self.pngs, self.overlay, self._at_once(network.device.type))
        return InstanceNetwork(network, self.model, zoo.variant(self.model).classes, settings), options

    def panoptic(self) -> tuple[PanopticNetwork, PanopticOptions]:
        """The model of a run that segments all there is."""
        network = zoo.load(self.model, weights=self.weights, device=self.device, precision=self.precision)
        network.settings = replace(network.settings, clip_length=self.clip_length or network.settings.clip_length)
        settings = {
            "weights": str(self.weights), "clip_length": network.settings.clip_length, "precision": self.precision,
            "device": str(network.device), "pyvseg": __version__,
        }  # fmt: skip
        return PanopticNetwork(network, self.model, zoo.variant(self.model).classes, settings), PanopticOptions(self.overlay, self.step_pngs)

    def _at_once(self, device: str) -> int:
        return self.at_once or (4 if device == "cuda" else 1)

    def lanes(self, stop: Event) -> Following | Finding | PanopticFinding:
        """For a batch: loads the model; makes lanes that go on with what Ctrl-C suspended."""
        if self.needs_masks:
            tracker = self.tracker()
            return Following(tracker, stop, True, self.overlay, self.pngs, at_once=self._at_once(tracker.settings.get("device", "cpu").partition(":")[0]))
        if self.is_panoptic:
            return PanopticFinding(*self.panoptic(), stop, True)
        return Finding(*self.instances(), stop, True)
