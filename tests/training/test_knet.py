# SPDX-License-Identifier: Apache-2.0
"""The criterion of Video K-Net: the stored step, and frames where something is missing."""

import pytest
import torch

from pyvseg.models.video_knet import VideoKNet
from pyvseg.training.knet import KNetCriterion, predictions_of, truth_of
from pyvseg.verify import verify_case
from tests.conftest import shared
from tests.models.test_video_knet import PANOPTIC, small


def test_the_stored_step_agrees():
    report = verify_case(shared("parity", "video_knet-loss"))
    assert report.passed, report
    assert len(report.lines) == 72


def truth(things, classes):
    semantic = torch.full((40, 60), -1)
    for i, each in enumerate(classes):
        semantic[10 * i : 10 * i + 10] = each
    masks = torch.zeros(things, 40, 60)
    masks[:, 5:20, 5:20] = 1
    return truth_of(torch.zeros(things, dtype=torch.int64), masks, torch.arange(things), semantic, 2, (64, 64))


@pytest.mark.parametrize("things, classes", [(0, ()), (2, (3,))])
def test_frames_where_something_is_missing(things, classes):
    model, criterion = small(VideoKNet, PANOPTIC).train(), KNetCriterion(5, 3)
    reference = predictions_of(model, torch.randn(2, 3, 64, 64))
    key = predictions_of(model, torch.randn(2, 3, 64, 64), reference.stages[-1].kernels)
    truths = [truth(things, classes), truth(1, (2,))]
    losses = criterion(key, truths) | criterion.track_losses(model, key, reference, truths, truths)
    assert all(torch.isfinite(loss) for loss in losses.values())
    criterion.total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.stages[-1].fc_cls.bias.grad.abs().max() > 0 and model.embed.fc.weight.grad.abs().max() > 0


def test_soft_edges_and_padding_of_targets():
    found = truth(1, (2, 0, 3))
    assert found.stuff.tolist() == [2, 3] and found.masks.shape == (1, 32, 32)
    assert 0 < found.masks.max() <= 1 and set(found.masks.unique().tolist()) == {0.0, 0.25, 0.5, 1.0}
    assert not found.masks[0, 20:].any() and not found.stuff_masks[:, :, 30:].any()
