# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError, PyvsegError
from pyvseg.models.stcn import STCN, STCNSettings
from pyvseg.training.data import Mixture
from pyvseg.training.loop import Schedule, train
from pyvseg.training.losses import BootstrappedCrossEntropy, aggregated_logits
from pyvseg.training.sequences import LabelledImage
from pyvseg.training.vos import training_pass

SMALL = STCNSettings(
    encoders="efficientnet_lite0", key_width=16, value_width=32, thin_width=24, decoder_widths=(32, 24, 16),
    refine_width=16, refine_window=(2, 3, 3),
)  # fmt: skip


def discs(count: int = 6) -> list[LabelledImage]:
    rng = np.random.default_rng(1)
    sources = []
    for _ in range(count):
        y, x = np.mgrid[:96, :128]
        labels = ((y - rng.integers(30, 66)) ** 2 + (x - rng.integers(40, 88)) ** 2 < 22**2).astype(np.uint8)
        image = rng.integers(0, 100, (96, 128, 3)).astype(np.uint8)
        image[labels > 0] += 120
        sources.append(LabelledImage(image, labels))
    return sources


def mixture(length: int = 3, size: int = 64) -> Mixture:
    return Mixture([discs()], [], length, size, seed=3)


def test_samples_are_as_documented_and_repeat_with_the_seed():
    first, again = iter(mixture(5)), iter(mixture(5))
    for _ in range(10):
        (frames, labels), (frames2, labels2) = next(first), next(again)
        assert frames.shape == (5, 64, 64, 3) and labels.shape == (5, 64, 64) and frames.dtype == labels.dtype == torch.uint8
        assert 1 in labels[0].unique() and labels.max() <= 2
        assert torch.equal(frames, frames2) and torch.equal(labels, labels2)


def test_share_of_hard_pixels_follows_the_published_schedule():
    criterion = BootstrappedCrossEntropy()
    assert [criterion.share(i) for i in (0, 19_999, 20_000, 45_000, 70_000, 10**6)] == pytest.approx([1, 1, 1, 0.575, 0.15, 0.15])


def test_a_second_object_that_does_not_exist_has_no_say():
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    target = torch.randint(0, 2, (1, 8, 8))
    BootstrappedCrossEntropy()(logits, target, torch.tensor([1]), 0).backward()
    assert logits.grad[:, 2].abs().max() == 0 and logits.grad[:, 1].abs().max() > 0


def test_aggregated_logits_match_the_inference_form():
    from pyvseg.models.memory import aggregate

    p = torch.rand(2, 3, 5, 5)
    expected = torch.stack([aggregate(one) for one in p])
    torch.testing.assert_close(aggregated_logits(p).softmax(1), expected, rtol=1e-5, atol=1e-6)


def test_a_pass_reaches_every_parameter():
    torch.manual_seed(0)
    model = STCN(SMALL).eval()
    frames, masks = torch.randn(1, 5, 3, 64, 64), (torch.rand(1, 2, 64, 64) > 0.5).float()
    logits = training_pass(model, frames, masks, torch.ones(1, 2), [[1, 2], [3, 4]])
    assert sorted(logits) == [1, 2, 3, 4] and all(x.shape == (1, 3, 64, 64) for x in logits.values())
    sum(x.square().mean() for x in logits.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_sample_can_be_learnt():
    torch.manual_seed(0)
    model = STCN(SMALL).eval()
    images, labels = next(iter(mixture(4)))
    frames = (images.permute(0, 3, 1, 2)[None] / 255 - 0.5) / 0.25
    masks = torch.stack([labels[0] == i for i in (1, 2)])[None].float()
    selector = masks.flatten(2).any(2).float()
    optimizer, criterion, losses = torch.optim.Adam(model.parameters(), 2e-3), BootstrappedCrossEntropy(), []
    for _ in range(40):
        logits = training_pass(model, frames, masks, selector, [[1, 2], [3]])
        loss = sum(criterion(x, labels[None, t].long(), selector.sum(1).long(), 0) for t, x in logits.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_a_run_saves_logs_and_resumes(tmp_path):
    model = STCN(replace(SMALL, refine_width=None))
    before = model.decoder.pred.weight.detach().clone()
    train(model, mixture(), Schedule(iterations=3, batch=2, save_every=2), tmp_path, workers=0)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["iteration"] == 0 and np.isfinite(rows[0]["loss"])
    assert not torch.equal(model.decoder.pred.weight, before)
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["iteration"] == 3
    fresh = STCN(replace(SMALL, refine_width=None))
    train(fresh, mixture(), Schedule(iterations=3, batch=2), tmp_path, workers=0)  # nothing left to do
    assert torch.equal(fresh.decoder.pred.weight, model.decoder.pred.weight)
    train(fresh, mixture(), Schedule(iterations=4, batch=2), tmp_path, workers=0)
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["iteration"] == 4
    assert all(v.dtype == torch.float16 for v in checkpoints.read(tmp_path / "model.safetensors").values() if v.is_floating_point())


def test_a_damaged_resume_file_is_named(tmp_path):
    (tmp_path / "resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="resume.pt: cannot be resumed"):
        train(STCN(SMALL), mixture(), Schedule(iterations=1), tmp_path, workers=0)


@pytest.mark.parametrize("options, message", [({}, "no training images"), ({"images": ["nowhere:nothing"]}, "nowhere: no such file"), ({"images": ["a"]}, "joined by a colon"), ({"size": 100}, "multiple of 16")])
def test_bad_options_are_named(tmp_path, options, message):
    from pyvseg.cli.train import Train
    from pyvseg.cli.train import train as command

    with pytest.raises(PyvsegError, match=message):
        command(Train(tmp_path, **options))
