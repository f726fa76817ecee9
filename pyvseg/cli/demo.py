# SPDX-License-Identifier: Apache-2.0
"""`pyvseg demo`"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pyvseg import demo as material
from pyvseg.cli.run import Run, run
from pyvseg.engine.recipe import Recipe


@dataclass
class Demo:
    """Follow a pedestrian, a bicycle bag and a bollard through a real clip with the bundled model.

    The three outlines at the first frame were drawn by hand; everything after it is the model's. Needs no network.
    """

    out: Path = Path("demo_output")
    """Folder for the results; results of an earlier demo in it are replaced."""
    recipe: Recipe = field(default_factory=Recipe)


def demo(options: Demo) -> None:
    video = material.clip()
    print(f"following 3 objects through frames {material.FRAMES} of {video.name}")
    run(Run(video, options.recipe, mask=(material.MASKS,), frames=material.FRAMES, out=options.out, overwrite=True))
