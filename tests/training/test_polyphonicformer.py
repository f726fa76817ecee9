# SPDX-License-Identifier: Apache-2.0
"""The criterion of PolyphonicFormer: the stored step, frames where something is missing, the depth of queries."""

import numpy as np
import pytest
import torch

from pyvseg.models.polyphonicformer import PolyphonicFormer, PolyphonicFormerSettings, extents
from pyvseg.training.knet import truth_of
from pyvseg.training.polyphonicformer import PolyphonicCriterion, depth_truth_of, predictions_of
from pyvseg.verify import verify_case
from tests.conftest import shared
from tests.models.test_polyphonicformer import SIZES
from tests.models.test_video_knet import small


def test_the_stored_step_agrees():
    report = verify_case(shared("parity", "polyphonic-loss"))
    assert report.passed, report
    assert len(report.lines) == 67


def truth(things, stuff, measured):
    semantic = torch.full((40, 60), -1)
    for i, each in enumerate(stuff):
        semantic[10 * i : 10 * i + 10] = each
    masks = torch.zeros(things, 40, 60)
    masks[:, 5:20, 5:20] = 1
    seen = truth_of(torch.zeros(things, dtype=torch.int64), masks, torch.arange(things), semantic, 8, (64, 64), 4)
    return depth_truth_of(seen, torch.full((40, 60), 20.0 * measured), (64, 64))


@pytest.mark.parametrize("things, stuff, measured", [(0, (), False), (0, (9,), True), (2, (8, 18), True), (1, (), False)])
def test_frames_where_something_is_missing(things, stuff, measured):
    model, criterion = small(PolyphonicFormer, PolyphonicFormerSettings(**SIZES)).train(), PolyphonicCriterion()
    key = predictions_of(model, torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        reference = predictions_of(model, torch.randn(2, 3, 64, 64))
    truths = [truth(things, stuff, measured), truth(1, (10,), True)]
    losses = criterion(key, truths) | criterion.track_losses(model, key, reference, truths, truths)
    assert all(torch.isfinite(loss) for loss in losses.values())
    criterion.total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.stages[-1].fc_depth.bias.grad.abs().max() > 0 and model.embed.out.weight.grad.abs().max() > 0
    assert torch.equal(criterion.total({"depth_dense": losses["depth_dense"], "loss_rpn_seg": losses["loss_rpn_seg"]}), losses["loss_rpn_seg"])


def test_boxes_of_annotations_reach_over_their_soft_edges():
    found = truth(1, (), True)
    assert found.depth.shape == (16, 16) and found.depth.unique().tolist() == [0.0, 20.0]
    mask = np.zeros((64, 64), np.int16)
    mask[5:20, 5:20] = 1
    wider = np.sign(found.boxes[0].numpy() - extents(mask, [1])[0])
    assert wider.tolist() == [-1, -1, 1, 1]


def test_depth_of_known_error():
    criterion = PolyphonicCriterion()
    logits = torch.logit((torch.tensor([[[8.0, 22.0, 40.0, 70.0]]]).double() - 0.01) / 79.99)
    wanted, weights = torch.tensor([[[10.0, 20.0, 0.0, 80.0]]]).double(), torch.tensor([[[1.0, 0.5, 1.0, 1.0]]]).double()
    logs = torch.tensor([torch.log(torch.tensor(0.8)), 0.5 * torch.log(torch.tensor(1.1))])
    relative = torch.tensor([-0.2, 0.05])
    expected = (logs.square().sum() / 2 - logs.sum() / 4 + (relative.square().sum() / 2).sqrt() + relative.abs().sum() / 2) / 3
    assert torch.allclose(criterion.depth_loss(logits, wanted, weights).float(), expected, atol=1e-5)
