# SPDX-License-Identifier: Apache-2.0
"""Memory of instance segmentation does not grow with the length of the video."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

CODE = """
import sys
from dataclasses import replace
import numpy as np, torch
from pyvseg.engine.recipe import Results
from pyvseg.engine.run import run
from pyvseg.engine.tasks.instances import Instances
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from tests.engine.conftest import SIZES, VIDEO

NOISE = np.random.default_rng(0).integers(0, 256, (120, 320, 3), np.uint8)
torch.manual_seed(0)
for name in ("minvis_r50_ytvis21", "ctvis_r50_ovis", "genvis_r50_ytvis19_online", "vita_r50_ytvis19"):
    chosen = zoo.variant(name)
    more = VIDEO if name.startswith(("vita", "genvis")) else {}
    settings = replace(chosen.settings, **SIZES | {"short_side": 32, "decoder_layers": 1, "queries": 4}, **more)
    network = for_inference(zoo.SYSTEMS[chosen.system].network(settings).eval(), torch.float32)
    for count in (100, 1000):
        frames = (NOISE[:, t % 160 : t % 160 + 160] for t in range(count))
        task = Instances(network, name, results=Results(top_k=4, pngs=False, overlay=False))
        run(task, frames, out=f"{sys.argv[1]}/{name}-{count}", progress=False)
        print(name, count, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # peak so far, KiB
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self/status, which only Linux has")
def test_resident_memory_for_100_and_1000_frames(tmp_path):
    """Kept frames would take 52 MB more in each line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    peaks = {(name, int(count)): int(kib) for name, count, kib in map(str.split, done.stdout.splitlines())}
    for name in {name for name, _ in peaks}:
        assert peaks[name, 1000] - peaks[name, 100] < 20 * 1024
