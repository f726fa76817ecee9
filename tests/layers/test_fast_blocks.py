# SPDX-License-Identifier: Apache-2.0
"""Blocks in their form for inference give what they give in training."""

import copy

import pytest
import torch
from torch import nn

from pyvseg.layers.attention import MLP, Attention, FeedForward
from pyvseg.layers.efficientnet_lite import InvertedResidual
from pyvseg.layers.convnext import ConvNeXt
from pyvseg.layers.inference import for_inference
from pyvseg.layers.kmax_backbones import DeepLab2ResNet, UnactivatedBottleneck
from pyvseg.layers.mask_decoder import DecoderLayer
from pyvseg.layers.packed import packs, products
from pyvseg.layers.pixel_decoder import EncoderLayer
from pyvseg.layers.resnet import Bottleneck


class Maps(nn.Module):
    """All maps of a backbone in one vector."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([features.flatten() for features in self.backbone(x)])


def encoder_input() -> tuple:
    shapes = [(3, 4), (6, 8)]
    tokens = sum(h * w for h, w in shapes)
    return torch.randn(2, tokens, 32), torch.randn(tokens, 32), shapes, torch.rand(2, tokens, 2, 2)


def decoder_input() -> tuple:
    masks = torch.randn(2, 5, 70) - 0.5
    masks[0, 1] = -1.0
    return torch.randn(2, 5, 32), torch.randn(5, 32), torch.randn(2, 70, 32), torch.randn(2, 70, 32), masks


BLOCKS = {
    "bottleneck": (lambda: Bottleneck(32, 16, 48, 2, False, nn.BatchNorm2d), lambda: (torch.randn(2, 32, 9, 12),)),
    "same width": (lambda: Bottleneck(48, 16, 48, 1, False, nn.BatchNorm2d), lambda: (torch.randn(1, 48, 9, 12),)),
    "activated before": (lambda: UnactivatedBottleneck(32, 16, 48, 1, False, nn.BatchNorm2d), lambda: (torch.randn(1, 32, 9, 12),)),
    "inverted residual": (lambda: InvertedResidual(16, 6, 5, 1, 16), lambda: (torch.randn(2, 16, 8, 12),)),
    "inverted residual, stride 2": (lambda: InvertedResidual(16, 6, 3, 2, 24), lambda: (torch.randn(2, 16, 8, 12),)),
    "inverted residual of 5x5, stride 2": (lambda: InvertedResidual(16, 1, 5, 2, 24), lambda: (torch.randn(2, 16, 8, 12),)),
    "stages activated before": (lambda: Maps(DeepLab2ResNet((2, 3), width=8, outputs=16)), lambda: (torch.randn(1, 3, 33, 41),)),
    "ConvNeXt": (lambda: Maps(ConvNeXt((16, 24), (2, 1))), lambda: (torch.randn(2, 3, 33, 41),)),
    "feed-forward": (lambda: FeedForward(32, 64), lambda: (torch.randn(2, 7, 32),)),
    "perceptron": (lambda: MLP(32, 48, 16), lambda: (torch.randn(2, 7, 32),)),
    "attention": (lambda: Attention(32, 4), lambda: (torch.randn(2, 7, 32), *torch.randn(2, 2, 9, 32))),
    "encoder layer": (lambda: EncoderLayer(32, 4, 2, 4, 64), encoder_input),
    "decoder layer": (lambda: DecoderLayer(32, 4, 64), decoder_input),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_fast_blocks_equal_the_blocks(name, dtype, tolerance):
    torch.manual_seed(0)
    make, inputs = BLOCKS[name]
    block = nn.Sequential(make()).eval()
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype).float() if parameter.ndim > 1 else parameter.data + 0.1 * torch.randn(parameter.shape)
    given = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs()]
    exact = copy.deepcopy(block[0]).double()(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given))
    before = copy.deepcopy(given)
    fast = for_inference(block, dtype)[0]
    with torch.inference_mode():
        error = fast(*given).double() - exact
    assert error.abs().max() < tolerance * exact.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(given, before) if isinstance(a, torch.Tensor))


@pytest.mark.parametrize("batch", [1, 3])
def test_products_with_maps(batch):
    torch.manual_seed(0)
    rows, maps = torch.randn(batch, 5, 16), torch.randn(batch, 16, 6, 7).contiguous(memory_format=torch.channels_last).flatten(2)
    assert packs(rows, maps) and not packs(rows.clone().requires_grad_(), maps)
    torch.testing.assert_close(products(rows, maps).double(), rows.double() @ maps.double(), rtol=0, atol=2e-5)
