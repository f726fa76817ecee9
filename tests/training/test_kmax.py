# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX trains: model and criterion together."""

import torch

from pyvseg.layers.kmax_backbones import ResNetSizes
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings
from pyvseg.training.kmax import KMaXCriterion, clip_target, predictions_of

SIZE = (65, 97)


def clip() -> tuple[torch.Tensor, torch.Tensor]:
    """Two squares that move, on a ground: images (2, 3, H, W) and masks (3, 2, H, W)."""
    masks = torch.zeros(3, 2, *SIZE, dtype=torch.bool)
    for t in range(2):
        masks[0, t, 8:32, 8 + 12 * t : 36 + 12 * t] = True
        masks[1, t, 36:60, 60 - 12 * t : 88 - 12 * t] = True
    masks[2] = ~masks[:2].any(0)
    masks[:, 1, :4] = False  # nothing is annotated there
    colours = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, -0.5]])
    return torch.einsum("mthw,mc->tchw", masks.float(), colours) + 0.05 * torch.randn(2, 3, *SIZE), masks


def test_a_clip_can_be_learnt():
    torch.manual_seed(0)
    settings = VideoKMaXSettings(
        classes=3, things=(0, 1), backbone=ResNetSizes(50, 8, 32, 8, unactivated=True), queries=8, image_size=SIZE,
        widths=(16, 16, 16, 16), blocks=(1, 1, 1, 1), layers=(1, 1, 1), ffn=64, drop=0.0,
    )  # fmt: skip
    model, criterion = VideoKMaX(settings).train(), KMaXCriterion(3, pixels=128)
    images, masks = clip()
    semantic = torch.where(masks.any(0), masks.int().argmax(0), -1)
    target = clip_target(torch.tensor([0, 1, 2]), masks, semantic)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-2, weight_decay=0.05)
    errors, overlaps = [], []
    for _ in range(25):
        losses, matched = criterion(predictions_of(model, model.encode(images).split()), [target])
        optimiser.zero_grad()
        criterion.total(losses).backward()
        optimiser.step()
        errors.append(losses["loss_mask"].item())
        overlaps.append(matched[0].dice.mean().item())
    assert len(losses) == 4 * 4  # three layers and the final prediction
    assert all(p.grad is not None for p in model.parameters())
    assert errors[-1] < 0.5 * errors[0] and overlaps[0] < 0.25 and overlaps[-1] > 0.45
