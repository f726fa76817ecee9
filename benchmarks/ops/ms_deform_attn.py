# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention of a pixel decoder: every pixel of three levels (strides 32, 16, 8) is a query, 8 heads
of 32 channels, 4 points, offsets of some pixels around the query's own place; and what strays from that."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, on_gpu
from pyvseg.ops import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused
from pyvseg.ops.ms_deform_attn import reference

try:
    from torch_ms_deform_attn import ms_deform_attn as peer
except ImportError:  # not installed, or built for another PyTorch
    peer = None

try:  # the CUDA extension of Deformable-DETR (2020), built from its repository
    from MultiScaleDeformableAttention import ms_deform_attn_forward as original
except ImportError:
    original = None

H, D, P = 8, 32, 4
PEER, ORIGINAL = "torch-ms-deform-attn", "Deformable-DETR's CUDA kernel"
Shapes = list[tuple[int, int]]
GPU_BARS = (5.0, 1.0)  # times eager PyTorch, and a peer


def published(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As Deformable-DETR and Mask2Former compute it without their extension."""
    B, _, H, D = value.shape
    _, Q, _, L, P, _ = locations.shape
    grids = 2 * locations - 1
    sampled = []
    for level, maps in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        image = maps.flatten(2).transpose(1, 2).reshape(B * H, D, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(B * H, 1, Q, L * P)
    out = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1).view(B, H * D, Q)
    return out.transpose(1, 2).contiguous()


def places(shapes: Shapes, points: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Locations and weights, as published modules compute them."""
    sizes = torch.tensor([(width, height) for height, width in shapes])
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return points[:, :, None, :, None] + offsets / sizes[None, None, None, :, None], weights


def pyramid(height: int, width: int) -> Shapes:
    return [(height // stride, width // stride) for stride in (32, 16, 8)]


def inputs(shapes: Shapes, B: int, queries: int | None = None, D: int = D) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """value, reference points, offsets, logits; `queries` at random places, or one at every pixel."""
    L, S = len(shapes), sum(height * width for height, width in shapes)
    if queries is None:
        centres = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1) for h, w in shapes]
        points = torch.cat(centres)[None, :, None].expand(B, S, L, 2).contiguous()
    else:
        points = torch.rand(B, queries, 1, 2).expand(B, queries, L, 2).contiguous()
    Q = points.shape[1]
    return torch.randn(B, S, H, D), points, 3 * torch.randn(B, Q, H, L, P, 2), torch.randn(B, Q, H, L, P)


def sizes_of(shapes: Shapes) -> tuple[Tensor, Tensor]:
    """Height and width of each level and where it starts, as published kernels take them."""
    sizes = torch.tensor(shapes)
    return sizes, torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))


def by_peer(shapes: Shapes) -> Callable:
    sizes, starts = sizes_of(shapes)
    return lambda value, _, locations, weights: peer(value, sizes, starts, locations, weights)


def case(name: str, shapes: Shapes, args: tuple[Tensor, ...], dtype: torch.dtype, quick: bool, bars: tuple[float, float] | None) -> Case:
    value, *raw = args
    narrow = value.to(dtype)
    locations, weights = places(shapes, *raw)
    ways = {
        "published": lambda: published(value, shapes, locations, weights),
        "published, from offsets": lambda: published(value, shapes, *places(shapes, *raw)),
        "pyvseg": lambda: ms_deform_attn(narrow, shapes, locations, weights),
        "pyvseg, fused": lambda: ms_deform_attn_fused(narrow, shapes, *raw),
    }
    if peer:
        run = by_peer(shapes)
        ways[PEER] = lambda: run(value, shapes, locations, weights)
    if original and on_gpu():
        step = min(value.shape[0], 64)
        ways[ORIGINAL] = lambda sizes=sizes_of(shapes): original(value, *sizes, locations, weights, step)
    if not quick:
        ways["pyvseg reference"] = lambda: reference(narrow, shapes, locations, weights)
        compiled = torch.compile(published, dynamic=False)
        ways["published, torch.compile"] = lambda: compiled(value, shapes, locations, weights)
    result = narrow.element_size() * value.shape[0] * locations.shape[1] * value.shape[2] * value.shape[3]
    traffic = narrow.nbytes + locations.nbytes + weights.nbytes + result
    wanted = {("pyvseg", "published"): bars[0], ("pyvseg, fused", "published, from offsets"): bars[0]} if bars else {}
    if bars and peer:
        wanted[("pyvseg", PEER)] = bars[1]
    if ORIGINAL in ways and dtype == torch.bfloat16:
        wanted[("pyvseg", ORIGINAL)] = 2
    fused = {way: traffic + raw[0].nbytes for way in ("pyvseg, fused", "published, from offsets")}
    name += f", {str(dtype).removeprefix('torch.')}"
    return Case("ms_deform_attn", name, ways, traffic, 8.0 * weights.numel() * value.shape[3], torch.float32, wanted, fused)


def backward(name: str, shapes: Shapes, args: tuple[Tensor, ...], bars: tuple[float, float] | None) -> Case:
    value, points, offsets, logits = args
    locations, weights = places(shapes, points, offsets, logits)
    grad = torch.randn(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])

    def step(function, *tensors: Tensor, fixed: tuple[Tensor, ...] = ()):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        return lambda: torch.autograd.grad(function(leaves[0], shapes, *fixed, *leaves[1:]), leaves, grad)

    ways = {
        "published": step(published, value, locations, weights),
        "pyvseg": step(ms_deform_attn, value, locations, weights),
        "pyvseg, fused": step(ms_deform_attn_fused, value, offsets, logits, fixed=(points,)),
    }
    if peer:
        ways[PEER] = step(by_peer(shapes), value, locations, weights)
    traffic = 3.0 * (value.nbytes + locations.nbytes + weights.nbytes) + 2 * grad.nbytes
    wanted = {("pyvseg", "published"): bars[0]} if bars else {}
    if bars and peer:
        wanted[("pyvseg", PEER)] = bars[1]
    flops = 4 * 8.0 * weights.numel() * value.shape[3]
    return Case("ms_deform_attn", f"{name}, forward and backward", ways, traffic, flops, torch.float32, wanted)


def module(name: str, shapes: Shapes, quick: bool) -> Case:
    """The attention with its four linear layers, in inference."""
    attention = MSDeformAttn(H * D, len(shapes), H, P).requires_grad_(False)
    attention.sampling_offsets.weight.normal_(std=3 / (H * D) ** 0.5)
    _, points, _, _ = inputs(shapes, 1)
    query = torch.randn(1, points.shape[1], H * D)

    def by_publication() -> Tensor:
        heads = attention.value_proj(query).unflatten(-1, (H, D))
        offsets = attention.sampling_offsets(query).view(1, -1, H, len(shapes), P, 2)
        logits = attention.attention_weights(query).view(1, -1, H, len(shapes), P)
        return attention.output_proj(published(heads, shapes, *places(shapes, points, offsets, logits)))

    def by_autocast() -> Tensor:
        with torch.autocast(query.device.type, torch.bfloat16):
            return attention(query, points, query, shapes)

    linears = (attention.value_proj, attention.sampling_offsets, attention.attention_weights, attention.output_proj)
    ways = {
        "published": by_publication,
        "pyvseg": lambda: attention(query, points, query, shapes),
        "pyvseg, bfloat16": by_autocast,
        "the linear layers alone": lambda: [linear(query) for linear in linears],
    }
    weights = sum(parameter.numel() for parameter in attention.parameters())
    flops = 2.0 * query.shape[1] * weights + 8.0 * query.shape[1] * H * len(shapes) * P * D
    traffic = 2.0 * query.nbytes + points.nbytes + 4.0 * weights
    return Case("ms_deform_attn", f"{name}, whole module", ways, traffic, flops, torch.float32)


def cases(quick: bool) -> Iterator[Case]:
    for height, width in ((480, 864), (384, 640)):
        name, shapes = f"{height}x{width}", pyramid(height, width)
        bars, both = (GPU_BARS, GPU_BARS) if on_gpu() else ((25, 4), (15, 3.5))
        yield case(name, shapes, inputs(shapes, 1), torch.float32, quick, bars)
        yield backward(name, shapes, inputs(shapes, 1), both)
        yield module(name, shapes, quick)
    shapes = pyramid(480, 864)
    yield case("480x864", shapes, inputs(shapes, 1), torch.bfloat16, True, None)
    if quick:
        return
    value, points, _, logits = inputs(shapes, 1)
    anywhere = torch.rand(1, points.shape[1], H, 3, P, 2) * torch.tensor([[w, h] for h, w in shapes])[:, None]
    yield case("480x864, samples anywhere", shapes, (value, 0 * points, anywhere, logits), torch.float32, True, None)
    shapes = pyramid(736, 1280)
    yield case("736x1280", shapes, inputs(shapes, 1), torch.float32, True, None)
    yield backward("736x1280", shapes, inputs(shapes, 1), None)
    shapes = pyramid(384, 640)
    yield case("384x640, 5 frames", shapes, inputs(shapes, 5), torch.float32, True, None)
    shapes = [(100, 134), (50, 67), (25, 34), (13, 17)]
    yield case("300 queries on 4 levels, 800x1072", shapes, inputs(shapes, 1, 300), torch.float32, True, None)
    if on_gpu():
        for height, width, B in ((384, 640, 1), (736, 1280, 1), (1088, 1920, 1), (480, 864, 4), (480, 864, 16)):
            shapes = pyramid(height, width)
            yield case(f"{height}x{width}, {B} frames", shapes, inputs(shapes, B), torch.bfloat16, True, GPU_BARS)
