# SPDX-License-Identifier: Apache-2.0
"""The network of kMaX-DeepLab: parts in which its fast form differs from the published one, and full-size decisions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvseg.layers.convnext import ConvNeXt
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kmax_axial import AxialAttention
from pyvseg.layers.kmax_backbones import ConvNeXtSizes, ResNetSizes
from pyvseg.models.kmax import KMaX, KMaXSettings
from pyvseg.models.kmax_image_results import ImagePanopticSettings, panoptic
from pyvseg.models.kmax_size import KMaXImageSize, KMaXSize
from pyvseg.verify import verify_case
from tests.conftest import shared

SMALL = KMaXSettings(
    classes=6, things=(0, 1, 2), backbone=ResNetSizes(50, 8, 32, 8), queries=10, image_size=(65, 97), widths=(16, 8, 8, 8), blocks=(1, 1, 1, 1),
    layers=(1, 1, 1), ffn=32,
)  # fmt: skip


def small(**changes):
    """With batch norms as a trained network has them, none the identity."""
    torch.manual_seed(0)
    model = KMaX(KMaXSettings(**{**vars(SMALL), **changes}))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1, 0.3)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


@pytest.mark.parametrize("name", ["kmax-small", "video_kmax-small", "video_kmax-full", "video_kmax-loss", "ops-hila_mb"])
def test_stored_cases_agree(name):
    report = verify_case(shared("parity", name))
    assert report.passed, report.summary() + "\n" + "\n".join(str(line) for line in report.lines if line.failed)


@pytest.mark.parametrize("unactivated", [False, True])
def test_two_resnets_share_their_names(unactivated):
    sizes = [ResNetSizes(50, 8, 32, 8, unactivated=u) for u in (unactivated, not unactivated)]
    one, other = (s.build().eval() for s in sizes)
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 3, 65, 97)
    maps = one(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert (min(m.min() for m in maps) < 0) == unactivated
    assert not torch.allclose(maps[0], other(x)[0])


def test_convnext_sees_padded_zeros():
    net = ConvNeXt((8, 16, 24, 32), (1, 1, 1, 1)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.bias)
    x = torch.randn(1, 3, 65, 97)
    maps = net(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 17, 25), (16, 9, 13), (24, 5, 7), (32, 3, 4)]
    norm, conv = net.downsample_layers[1]
    y = conv(norm(maps[0]))  # without zeros: the last row and column of an odd map are lost
    inside = net.stages[1][0].dwconv(F.pad(y, (0, 1, 0, 1)))
    assert inside.shape == maps[1].shape
    bordered = F.pad(norm(maps[0]), (0, 1, 0, 1))
    bordered[..., -1, :] = bordered[..., :, -1] = 0
    bordered[:, :, -1] += norm.bias[:, None]
    bordered[:, :, :-1, -1] += norm.bias[:, None]
    torch.testing.assert_close(net.stages[1](conv(bordered)), maps[1])


def test_axial_attention_for_inference_is_the_same_function():
    torch.manual_seed(1)
    attention = small(widths=(16, 16, 8, 8)).pixel_decoder.stages[0][0].attention
    assert isinstance(attention, AxialAttention)
    x = torch.randn(2, 32, 6, 9, dtype=torch.float64)
    with torch.inference_mode():
        exact = attention.double()(x)
        plain = attention.float()(x.float())
        fast = for_inference(torch.nn.Sequential(attention), torch.float32)(x.float())
    error = (plain - exact).abs().max()
    assert (fast - exact).abs().max() <= 4 * error + 1e-6


@torch.inference_mode()
def test_fast_decoder_is_the_published_one():
    model = small()
    frames = model.encode(torch.randn(3, 3, 65, 97)).split()
    dense, published = model.decoder(frames, auxiliary=True)
    queries = model.decoder.cluster_centers.T[None]
    for i, (layer, slow) in enumerate(zip(model.decoder.layers, published)):
        quick = layer([frame.layers[i] for frame in frames], queries, False)
        assert quick.prediction is None and all(torch.equal(x, y) for x, y in zip(quick.assign, slow.assign))
        torch.testing.assert_close(quick.queries, slow.queries, rtol=1e-3, atol=1e-3)
        queries = slow.queries
    predictor = model.decoder.predictor
    for t, masks in enumerate(predictor.dense_masks(dense)):
        torch.testing.assert_close(dense.masks(t), masks, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(dense.masks(t, torch.tensor([7, 2])), masks[:, [7, 2]], rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_images_of_a_batch_do_not_see_one_another():
    model = small()
    x = torch.randn(2, 3, 65, 97)
    together, apart = model(x)[0], [model(image[None])[0] for image in x]
    torch.testing.assert_close(together.logits, torch.cat([p.logits for p in apart]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.masks(0), torch.cat([p.masks(0) for p in apart]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backbone", [SMALL.backbone, ConvNeXtSizes((8, 16, 24, 32), (1, 1, 1, 1), drop=0.2)])
def test_training_reaches_every_parameter_that_inference_uses(backbone):
    torch.manual_seed(0)
    model = KMaX(KMaXSettings(**{**vars(SMALL), "backbone": backbone})).train()
    for name, parameter in model.named_parameters():
        if name.endswith(".bn.weight") or ".bn" in name:
            torch.nn.init.normal_(parameter)  # at first the last norms of residual branches are 0 and let no gradient through
    final, layers = model(torch.randn(2, 3, 65, 97))
    loss = final.logits.square().sum() + sum(m.square().sum() for m in model.decoder.predictor.dense_masks(final))
    loss = loss + sum(r.prediction.logits.square().sum() + r.masks[0].square().sum() for r in layers)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert final.logits.shape == (2, 10, 7)


@pytest.mark.parametrize("source, padded", [((480, 854), (129, 193)), ((720, 1280), (65, 97)), ((20, 31), (65, 97)), ((50, 40), (64, 96))])
def test_two_resizings_are_one_resampling(source, padded):
    size = KMaXSize.fit(source, padded)
    masks = torch.randn(3, *size.cells, dtype=torch.float64)
    align = bool(padded[1] % 2)
    full = F.interpolate(masks[None], padded, mode="bilinear", align_corners=align)[..., : size.resized[0], : size.resized[1]]
    full = F.interpolate(full, source, mode="bilinear", align_corners=align)[0]
    once = size.columns.apply(size.rows.apply(masks, 1), 2)
    assert once.shape == full.shape
    torch.testing.assert_close(once, full, rtol=0, atol=1e-4 * masks.abs().max().item())


def test_sizes():
    assert KMaXSize.fit((480, 854), (897, 1601)).resized == (897, 1596)
    assert KMaXSize.fit((1080, 1920), (897, 1601)).resized == (897, 1595)
    image = KMaXImageSize.fit((480, 640), (1281, 1281))
    assert image.resized == (961, 1281) and image.shown == (961, 1281)


def stripes(*queries):
    """Queries (class, score, columns, logit) on a map of 2 x 8 cells that is shown as it is; classes 0, 1 are things, 2 is stuff."""
    logits, masks = torch.full((len(queries), 4), -20.0), torch.full((len(queries), 2, 8), -9.0)
    for i, (label, score, columns, value) in enumerate(queries):
        logits[i, label], logits[i, 3] = np.log(score), np.log(1 - score)
        masks[i, :, columns] = value
    return logits, masks, frozenset({0, 1}), KMaXImageSize((5, 29), (5, 29), (5, 29)), ImagePanopticSettings()


def test_a_mask_that_is_mostly_taken_is_dropped_and_its_rest_stays_void():
    labels, segments = panoptic(*stripes((0, 0.99, slice(0, 5), 5.0), (1, 0.9, slice(1, 6), 4.95), (2, 0.8, slice(6, 8), 5.0)))
    assert segments == [(1, False, 2), (2, True, 0)]  # the stuff is surer: nothing competes with it
    assert labels[2, [0, 8, 16, 20, 28]].tolist() == [2, 2, 2, 0, 1]


def test_stuff_of_a_class_is_one_segment_and_low_scores_go():
    labels, segments = panoptic(*stripes((2, 0.9, slice(0, 2), 5.0), (0, 0.6, slice(2, 5), 5.0), (2, 0.8, slice(5, 8), 5.0)))
    assert segments == [(1, False, 2)] and labels[0, [0, 12, 28]].tolist() == [1, 0, 1]
