# SPDX-License-Identifier: Apache-2.0
"""Batches with the networks of all tasks: killed, and finished by the same call."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from pyvseg.engine.jobs import Job
from pyvseg.engine.propagate import Propagation, look_ahead
from pyvseg.engine.recipe import Results
from pyvseg.engine.tasks.following import Following
from pyvseg.engine.tasks.instances import Instances
from pyvseg.engine.tasks.panoptic import Panoptic
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN
from pyvseg.models.vos import VOSState
from tests.conftest import ROOT
from tests.engine.conftest import SIZES
from tests.engine.test_batch import files, go, notes
from tests.models.test_stcn import SMALL
from tests.models.test_video_kmax import video_model
from tests.video.clips import images, square, write_video

LENGTHS = {"a": 5, "b": 19, "c": 8}


@dataclass(frozen=True)
class SmallRecipe:
    """Behind what `Recipe` offers, small networks of random weights."""

    name: str
    at_once: int = 1

    def settings(self) -> dict:
        return {"model": self.name}

    def task(self):
        torch.manual_seed(0)
        if self.name == "following":
            network = for_inference(STCN(SMALL), torch.float32)
            propagation = lambda saved: Propagation(network, clip_length=3, state=VOSState.load(saved) if saved else None)  # noqa: E731
            return Following(propagation, self.settings(), 3, look_ahead=look_ahead, at_once=self.at_once)
        if self.name == "panoptic":
            return Panoptic(for_inference(video_model(2), torch.float32), self.name, ("cat", "dog", "bird", "sky", "road", "wall"), at_once=self.at_once)
        chosen = zoo.variant(self.name)
        network = zoo.SYSTEMS[chosen.system].network(replace(chosen.settings, **SIZES)).eval()
        wanted = Results(score_threshold=0, top_k=5)
        return Instances(for_inference(network, torch.float32), self.name, chosen.classes, results=wanted, at_once=self.at_once)


def jobs_of(folder, name):
    masks = {0: square(1), 4: np.flipud(square(3))} if name == "following" else None
    return [Job(path.stem, path, masks) for path in sorted(folder.glob("*.mp4"))]


KILLED = """
import sys
from pathlib import Path
from tests.engine.test_batch import go
from tests.engine.test_batch_models import SmallRecipe, jobs_of
go(jobs_of(Path(sys.argv[1]), sys.argv[3]), Path(sys.argv[2]), SmallRecipe(sys.argv[3], int(sys.argv[4])))
"""


@pytest.mark.parametrize("name, at_once", [("following", 2), ("minvis_r50_ytvis21", 2), ("panoptic", 1)])
def test_killed_and_finished(tmp_path, name, at_once):
    (tmp_path / "clips").mkdir()
    for clip, count in LENGTHS.items():
        write_video(tmp_path / "clips" / f"{clip}.mp4", images(count))
    jobs, recipe, out = jobs_of(tmp_path / "clips", name), SmallRecipe(name, at_once), tmp_path / "out"
    assert go(jobs, tmp_path / "whole", recipe).frames == sum(LENGTHS.values())
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "clips"), str(out), name, str(at_once)], cwd=ROOT)
    while process.poll() is None and not (out.exists() and notes(out)):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = len(notes(out))
    report = go(jobs, out, recipe)
    assert (report.before, report.done) == (before, 3 - before) and before >= 1
    assert files(out) == files(tmp_path / "whole")
    kinds = {"panoptic": {"pan_pred", "pred.json", "segments.json"}, "following": {"masks", "masks.json"}}.get(name, {"masks", "results.json"})
    assert {path.name for path in (out / "b").iterdir()} == kinds | {"overlay.mp4"}
    assert len(list((out / "b").rglob("*.png"))) == 19
