# SPDX-License-Identifier: Apache-2.0
"""The criteria of Video K-Net: the stored step, frames where something is missing, clips."""

import pytest
import torch

from pyvseg.models.video_knet import VideoKNet
from pyvseg.models.video_knet_instances import VideoKNetInstances
from pyvseg.training.knet import KNetCriterion, predictions_of, truth_of
from pyvseg.training.knet_clip import clip_losses, clip_predictions, clip_truth
from pyvseg.verify import verify_case
from tests.conftest import shared
from tests.models.test_video_knet import INSTANCES, PANOPTIC, small


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


def test_a_clip_is_one_tall_mask_and_its_last_stage_keeps_the_match():
    model, criterion = small(VideoKNetInstances, INSTANCES).train(), KNetCriterion(4, 0, upsample=2, rank=0.0, focal=True)
    images, masks = torch.randn(3, 3, 64, 64), torch.zeros(2, 3, 16, 16)
    masks[0, :2, 2:9, 2:9], masks[1, 1:, 8:, 8:] = 1, 1
    labels, ids = torch.tensor([1, 3]), torch.arange(2)
    frames = predictions_of(model, images)
    stages = clip_predictions(model, frames)
    losses = clip_losses(criterion, stages, clip_truth(labels, masks, ids))
    turned = clip_losses(criterion, [s._replace(masks=s.masks.flip(0)) for s in stages], clip_truth(labels, masks.flip(1), ids))
    assert list(losses) == ["tracker_s0_loss_cls", "tracker_s0_loss_mask", "tracker_s0_loss_dice", "tracker_s1_loss_mask", "tracker_s1_loss_dice"]
    assert all(torch.allclose(losses[name], turned[name], rtol=1e-5) for name in losses)
    tall = torch.nn.functional.interpolate(stages[1].masks, scale_factor=2, mode="bilinear").transpose(0, 1).flatten(1).double()
    first = torch.nn.functional.interpolate(stages[0].masks, scale_factor=2, mode="bilinear").transpose(0, 1).flatten(1, 2)
    kernels, found = criterion.match(stages[0].classes[0], first, clip_truth(labels, masks, ids))
    p, t = tall[kernels].sigmoid(), masks.flatten(1)[found].double()
    dice = 1 - 2 * (p * t).sum(1) / ((p * p).sum(1) + (t * t).sum(1) + 2e-3)
    assert torch.allclose(losses["tracker_s1_loss_dice"].double(), dice.mean(), rtol=1e-5)
    truths = [truth_of(labels[masks[:, f].any((1, 2))], masks[masks[:, f].any((1, 2)), f], ids, torch.full((16, 16), -1), 4, (16, 16), 1) for f in range(3)]
    losses |= criterion(frames, truths)
    assert "loss_rpn_rank" not in losses
    criterion.total(losses).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not missing, missing


def test_focal_loss_of_pixels():
    criterion = KNetCriterion(3, 0, focal=True)
    logits, wanted = torch.randn(1, 3, 4, 5).double(), torch.randint(-1, 3, (1, 4, 5))
    total = 0.0
    for k in range(3):
        p = logits[:, k].sigmoid()
        on = wanted == k
        total += torch.where(on, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).sum()
    assert torch.allclose(criterion._semantic_loss(logits, wanted), total / (wanted >= 0).sum())
