# SPDX-License-Identifier: Apache-2.0
"""The modules in place of an attention written in plain PyTorch, inside a small encoder."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.ops import MSDeformAttn, MultiScaleDeformableAttention

SHAPES = [(3, 4), (6, 7)]
C, HEADS, LEVELS, POINTS = 32, 4, 2, 3
S = sum(h * w for h, w in SHAPES)


class PlainAttention(nn.Module):
    """As published, with `grid_sample`; positional arguments as Deformable-DETR passes them."""

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        self.heads, self.levels, self.points = n_heads, n_levels, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None):
        B, Q, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.view(B, -1, self.heads, value.shape[-1] // self.heads)
        offsets = self.sampling_offsets(query).view(B, Q, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(B, Q, self.heads, -1).softmax(-1).view(B, Q, self.heads, self.levels, self.points)
        reference = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            sizes = input_spatial_shapes.flip(-1)[None, None, None, :, None]
            locations = reference + offsets / sizes
        else:
            locations = reference[..., :2] + offsets / self.points * reference[..., 2:] * 0.5
        out = 0
        for level, start in enumerate(input_level_start_index.tolist()):
            height, width = input_spatial_shapes[level].tolist()
            image = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(B * self.heads, -1, height, width)
            grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            samples = F.grid_sample(image, grid, align_corners=False).view(B, self.heads, -1, Q, self.points)
            out = out + (samples * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(-1)
        return self.output_proj(out.flatten(1, 2).transpose(1, 2))


class EncoderLayer(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.self_attn = attention(C, LEVELS, HEADS, POINTS)
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.linear1, self.linear2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x: Tensor, position: Tensor, *geometry) -> Tensor:
        points, shapes, starts, padding = geometry
        x = self.norm1(x + self.self_attn(x + position, points, x, shapes, starts, padding))
        return self.norm2(x + self.linear2(self.linear1(x).relu()))


class Encoder(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(attention) for _ in range(3))

    def forward(self, x: Tensor, *others) -> Tensor:
        for layer in self.layers:
            x = layer(x, *others)
        return x


def grid_points() -> Tensor:
    """(1, S, L, 2): every pixel refers to its own place on all levels."""
    rows = [((x + 0.5) / width, (y + 0.5) / height) for height, width in SHAPES for y in range(height) for x in range(width)]
    return torch.tensor(rows)[None, :, None].expand(1, S, LEVELS, 2)


def arguments(reference_width: int = 2) -> tuple:
    points = grid_points().expand(2, -1, -1, -1)
    if reference_width == 4:
        points = torch.cat((points, torch.rand(2, S, LEVELS, 2) * 0.5 + 0.1), -1)
    padding = torch.zeros(2, S, dtype=torch.bool)
    padding[1, -9:] = True
    shapes = torch.tensor(SHAPES)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    return torch.randn(2, S, C), torch.randn(2, S, C), points, shapes, starts, padding


def encoders() -> tuple[Encoder, Encoder]:
    plain, ours = Encoder(PlainAttention), Encoder(MSDeformAttn)
    with torch.no_grad():
        for layer in plain.layers:  # trained offsets and weights depend on the query
            layer.self_attn.sampling_offsets.bias.mul_(20)
            layer.self_attn.sampling_offsets.weight.mul_(3)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("reference_width", [2, 4])
def test_encoder_with_the_attention_swapped(reference_width):
    plain, ours = encoders()
    x, *others = arguments(reference_width)
    outs, grads, out_grad = [], [], torch.randn(2, S, C)
    for encoder in (plain, ours):
        leaf = x.clone().requires_grad_()
        out = encoder(leaf, *others)
        outs.append(out)
        grads.append(torch.autograd.grad(out, [leaf, *encoder.parameters()], out_grad))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_bfloat16_under_autocast():
    plain, ours = encoders()
    args = arguments()
    exact = plain.double()(*(a.double() if a.is_floating_point() else a for a in args))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ours(*args)
        assert ours.layers[0].self_attn(args[0] + args[1], args[2], args[0], *args[3:]).dtype == torch.bfloat16
    assert (narrow - exact).abs().max() < 0.05 * exact.abs().max()


def test_parameters_as_published():
    module = MSDeformAttn()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256), "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256), "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256), "value_proj.bias": (256,),
        "output_proj.weight": (256, 256), "output_proj.bias": (256,),
    }  # fmt: skip
    assert shapes == {name: tuple(parameter.shape) for name, parameter in MultiScaleDeformableAttention().named_parameters()}
    offsets = module.sampling_offsets.bias.view(8, 4, 4, 2)
    for head in range(8):
        x, y = math.cos(head * math.pi / 4), math.sin(head * math.pi / 4)
        step = torch.tensor([x, y]) / max(abs(x), abs(y))
        for point in range(4):
            torch.testing.assert_close(offsets[head, :, point], (step * (point + 1)).expand(4, 2), rtol=1e-5, atol=1e-5)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias, module.value_proj.bias, module.output_proj.bias):
        assert not zero.any()
    bound = math.sqrt(6 / (256 + 256))
    assert 0.95 * bound < module.value_proj.weight.abs().max() <= bound


@pytest.mark.parametrize("batch_first", [False, True])
def test_mmcv_signature(batch_first):
    plain = PlainAttention(C, LEVELS, HEADS, POINTS)
    ours = MultiScaleDeformableAttention(C, HEADS, LEVELS, POINTS, dropout=0.5, batch_first=batch_first).eval()
    ours.load_state_dict(plain.state_dict())
    x, position, points, shapes, starts, padding = arguments()
    identity = torch.randn(2, S, C)
    turn = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    out = ours(
        turn(x), None, None, turn(identity), query_pos=turn(position), key_padding_mask=padding, reference_points=points,
        spatial_shapes=shapes, level_start_index=starts, attn_masks=None,
    )  # fmt: skip
    torch.testing.assert_close(turn(out), plain(x + position, points, x, shapes, starts, padding) + identity, rtol=1e-4, atol=1e-4)
    residual = ours(turn(x), reference_points=points, spatial_shapes=SHAPES)
    torch.testing.assert_close(turn(residual), plain(x, points, x, shapes, starts) + x, rtol=1e-4, atol=1e-4)
    ours.train()
    dropped = ours(turn(x), identity=torch.zeros_like(turn(x)), reference_points=points, spatial_shapes=SHAPES)
    assert 0.4 < (dropped == 0).double().mean() < 0.6


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiple of 3 heads, got 32"):
        MSDeformAttn(32, 2, 3)
    with pytest.raises(ValueError, match="reference_points and spatial_shapes are needed"):
        MultiScaleDeformableAttention(C, HEADS, LEVELS, POINTS)(torch.zeros(S, 1, C))
