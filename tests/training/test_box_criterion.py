# SPDX-License-Identifier: Apache-2.0
"""The criterion of the TransVOD systems beyond its stored case."""

import pytest
import torch

from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models.transvod import TransVOD, TransVODSettings
from pyvseg.models.video_detector import Prediction
from pyvseg.training.box_criterion import BoxCriterion, Target, frame_predictions, generalised_iou, temporal_parameters

CRITERION = BoxCriterion()


def target(count):
    steps = torch.arange(count) / max(count, 1)
    return Target(torch.arange(count) % 3 + 1, torch.stack([0.2 + 0.6 * steps, 0.5 + 0 * steps, 0.1 + 0.1 * steps, 0.2 + 0 * steps], 1))


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (3, 7)])
def test_any_number_of_objects(counts):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 6, 4), (2, 6, 4)
    given = [Prediction(*(torch.rand(shape, generator=generator).requires_grad_() for shape in shapes)) for _ in range(2)]
    losses, matches = CRITERION(given, [target(n) for n in counts])
    assert set(losses) == {f"loss_{what}{suffix}" for what in ("ce", "bbox", "giou") for suffix in ("", "_0")}
    total = CRITERION.total(losses)
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(x.grad).all() for p in given for x in p)
    assert [len(queries) for queries, _ in matches[-1]] == [min(n, 6) for n in counts]


def test_the_right_answer_is_found():
    wanted = target(3)
    logits, boxes = torch.full((1, 6, 4), -20.0), torch.full((1, 6, 4), 0.9)
    boxes[0, [4, 0, 5]] = wanted.boxes
    logits[0, [4, 0, 5], wanted.labels] = 20
    losses, matches = CRITERION([Prediction(logits, boxes)], [wanted])
    queries, found = matches[0][0]
    assert dict(zip(found.tolist(), queries.tolist())) == {0: 4, 1: 0, 2: 5}
    assert CRITERION.total(losses) < 1e-6


def test_generalised_iou():
    a = torch.tensor([[0.0, 0, 2, 2]])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [3, 0, 4, 2]])
    torch.testing.assert_close(generalised_iou(a, b), torch.tensor([1.0, 1 / 3, -1 / 4]))


def test_both_steps_reach_their_parameters():
    torch.manual_seed(0)
    settings = TransVODSettings(
        queries=20, backbone=ResNetSizes(50, 8, 16, 8, dilated=True), hidden=32, ffn=32, heads=4, encoder_layers=1, decoder_layers=2, references=2
    )
    model, images = TransVOD(settings).train(), torch.randn(3, 3, 48, 64)
    for head in (*model.detector.bbox_embed, *model.box_heads):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)  # they begin as zero, and pass nothing back
    torch.nn.init.normal_(model.detector.encoder[0].self_attn.attention_weights.weight)  # likewise
    losses, _ = CRITERION(frame_predictions(model, images), [target(2)] * 3)
    CRITERION.total(losses).backward()
    temporal = set(map(id, temporal_parameters(model)))
    single = {n for n, p in model.named_parameters() if p.requires_grad and id(p) not in temporal}
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == single
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(id(p) in temporal)
    losses, _ = CRITERION(model(images), [target(2)])
    CRITERION.total(losses).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, p in model.named_parameters() if id(p) in temporal}
