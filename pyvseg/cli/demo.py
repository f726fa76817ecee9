# SPDX-License-Identifier: Apache-2.0
"""`pyvseg demo`"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyvseg import demo as material
from pyvseg.cli.run import Run, run


@dataclass
class Demo:
    """Follow a pedestrian, a bicycle bag and a bollard through a real clip with the bundled model.

    The three outlines at the first frame were drawn by hand; everything after it is the model's. Needs no network.
    """

    out: Path = Path("demo_output")
    """Folder for the results; results of an earlier demo in it are replaced."""
    model: str = "pcvos_tiny"
    """A name of `pyvseg models`."""
    weights: Path | None = None
    """A checkpoint; not needed for the bundled model."""
    clip_length: int | None = None
    """Frames segmented together; left out: the model's own number."""
    device: str | None = None
    """cpu, cuda, cuda:1; left out: CUDA where there is one."""


def demo(options: Demo) -> None:
    video = material.clip()
    print(f"following 3 objects through frames {material.FRAMES} of {video.name}")
    run(Run(
        video, mask=(material.MASKS,), frames=material.FRAMES, out=options.out, overwrite=True,
        model=options.model, weights=options.weights, clip_length=options.clip_length, device=options.device,
    ))  # fmt: skip
