# SPDX-License-Identifier: Apache-2.0
"""A resumed run of the real network continues bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pyvseg.engine.output import Interrupted
from pyvseg.engine.propagate import Propagation
from pyvseg.engine.run import run
from pyvseg.engine.tasks.following import Following
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN
from pyvseg.models.vos import VOSState
from tests.engine.test_run import interrupt_at, labels
from tests.video.clips import images, square, write_video


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return STCN(replace(zoo.variant("pcvos_tiny").settings, short_side=None)).eval()


@pytest.mark.parametrize("at", [(1,), (12,), (7, 15)])
def test_resumed_equals_undisturbed(tmp_path, network, at):
    video = write_video(tmp_path / "clip.mp4", images(18))
    masks = {0: square(1), 9: np.flipud(square(3))}

    def propagation(saved):
        state = VOSState.load(saved) if saved else None
        return Propagation(network, clip_length=3, max_memory_frames=3, state=state)

    task = Following(propagation, {"clip_length": 3}, 3)
    run(task, video, masks, out=tmp_path / "whole", progress=False)
    for n, index in enumerate(at):
        with pytest.raises(Interrupted):
            run(interrupt_at(index, task), video, masks, out=tmp_path / "out", resume=n > 0, progress=False)
        assert list((tmp_path / "out" / "unfinished").glob("state-*.safetensors"))
    summary = run(task, video, masks, out=tmp_path / "out", resume=True, progress=False)
    assert 0 < summary.frames < 18
    whole, resumed = labels(tmp_path / "whole" / "masks"), labels(tmp_path / "out" / "masks")
    assert any(m.any() for m in list(whole.values())[10:])  # the network says something
    assert list(whole) == list(resumed) and all(np.array_equal(whole[k], resumed[k]) for k in whole)
