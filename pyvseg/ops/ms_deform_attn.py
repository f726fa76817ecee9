# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021) between value projection and output projection.

Coordinates: x before y. A location is normalised to its level: 0 and 1 are the outer edges of the map, so that the
centre of pixel i of W lies at (i + 0.5) / W. Sampling is bilinear between pixel centres; pixels outside the map are
zero. A location that is NaN or infinite lies outside: it contributes zero and has gradient zero.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.ops import _dispatch

__all__ = ["MSDeformAttn", "MultiScaleDeformableAttention", "ms_deform_attn", "ms_deform_attn_fused"]

Shapes = Sequence[tuple[int, int]] | Tensor
_SLOWER = "25 to 50 times"


def ms_deform_attn(
    value: Tensor,  # (B, S, H, D), the L maps row by row, one after the other
    spatial_shapes: Shapes,  # L pairs (height, width), S = sum of height * width
    sampling_locations: Tensor,  # (B, Q, H, L, P, 2), normalised (x, y)
    attention_weights: Tensor,  # (B, Q, H, L, P)
    *,
    backend: str = "auto",
) -> Tensor:  # (B, Q, H * D)
    """Sums, for every query and head, the L * P samples of the head's maps times their weights.

    Float32, bfloat16 or float16; the sums and all coordinates are float32, the result has value's dtype. Locations and
    weights may be float32 beside a narrower value, which keeps locations exact. Pass `spatial_shapes` as ints: a tensor
    is read by the host, which makes it wait for a GPU. Gradients for all three tensors, deterministic on the CPU, and
    elsewhere under `torch.use_deterministic_algorithms`; the gradient of a location jumps at pixel centres.

    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    shapes = _sizes(spatial_shapes)
    choice = _plan(value, shapes, sampling_locations, attention_weights, backend)
    if choice == "empty":
        return _empty(value, sampling_locations, attention_weights)
    locations, weights = _geometry(value, sampling_locations, attention_weights)
    if choice == "reference":
        return reference(value, shapes, locations, weights)
    return _dispatch.call(choice, "ms_deform_attn", value, _flat(shapes), locations, weights)


def ms_deform_attn_fused(
    value: Tensor,  # (B, S, H, D), the L maps row by row, one after the other
    spatial_shapes: Shapes,  # L pairs (height, width), S = sum of height * width
    reference_points: Tensor,  # (B, Q, L, 2) normalised (x, y), or (B, Q, L, 4) boxes (centre x, centre y, width, height)
    sampling_offsets: Tensor,  # (B, Q, H, L, P, 2), (x, y) in pixels of the level, or in half boxes / P
    attention_logits: Tensor,  # (B, Q, H, L, P)
    *,
    backend: str = "auto",
) -> Tensor:  # (B, Q, H * D)
    """`ms_deform_attn` on what the query's two linear layers give: location arithmetic and softmax happen inside.

    A location is reference + offset / (width, height of the level) for points, and centre + offset / P * box / 2 for
    boxes; the weights are the softmax of a head's L * P logits. All else as in `ms_deform_attn`.
    """
    shapes = _sizes(spatial_shapes)
    choice = _plan_fused(value, shapes, reference_points, sampling_offsets, attention_logits, backend)
    if choice == "empty":
        return _empty(value, reference_points, sampling_offsets, attention_logits)
    (points,) = _geometry(value, reference_points)
    offsets, logits = _geometry(value, sampling_offsets, attention_logits)
    if choice == "reference":
        return reference_fused(value, shapes, points, offsets, logits)
    return _dispatch.call(choice, "ms_deform_attn_fused", value, _flat(shapes), points, offsets, logits)


def reference(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition in PyTorch, as published: each level sampled by `grid_sample`."""
    wide = _wide(value, locations, weights)
    B, _, H, D = value.shape
    grids = (2 * locations.to(wide) - 1).nan_to_num(nan=3.0).clamp(-3, 3)  # 3 is outside whatever the size
    maps = value.to(wide).split([height * width for height, width in shapes], dim=1)
    result = value.new_zeros(B * H, D, locations.shape[1], dtype=wide)
    for level, (height, width) in enumerate(shapes):
        if height * width:
            image = maps[level].permute(0, 2, 3, 1).reshape(B * H, D, height, width)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * H, Q, P, 2)
            samples = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False)  # (B * H, D, Q, P)
            weight = weights[:, :, :, level].to(wide).transpose(1, 2).flatten(0, 1)
            result = result + torch.einsum("ndqp,nqp->ndq", samples, weight)
    return result.view(B, H * D, -1).transpose(1, 2).to(value.dtype).contiguous()


def reference_fused(value: Tensor, shapes: Sequence[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    """The fused form in PyTorch."""
    wide = _wide(value, points, offsets, logits)
    points, offsets = points.to(wide)[:, :, None, :, None], offsets.to(wide)  # points (B, Q, 1, L, 1, 2 or 4)
    if points.shape[-1] == 2:
        sizes = torch.tensor([(max(width, 1), max(height, 1)) for height, width in shapes], dtype=wide, device=value.device)
        locations = points + offsets / sizes[:, None]
    else:
        locations = points[..., :2] + offsets / offsets.shape[-2] * points[..., 2:] * 0.5
    weights = logits.to(wide).flatten(3).softmax(-1).view_as(logits)
    return reference(value, shapes, locations, weights)


def _wide(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _sizes(spatial_shapes: Shapes) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.is_floating_point() or spatial_shapes.dtype == torch.bool:
            raise TypeError(f"spatial_shapes must be integers, got {spatial_shapes.dtype}")
        spatial_shapes = spatial_shapes.tolist()
    try:
        shapes = [(height, width) for height, width in spatial_shapes]
    except (TypeError, ValueError):
        raise ValueError(f"spatial_shapes must be L pairs (height, width), got {spatial_shapes!r}") from None
    for size in (size for shape in shapes for size in shape):
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"spatial_shapes must be integers, got {shapes}")
        if not 0 <= size < 1 << 24:  # beyond it float32 cannot tell pixels apart
            raise ValueError(f"spatial_shapes must lie in 0..2^24, got {shapes}")
    return shapes


def _flat(shapes: list[tuple[int, int]]) -> list[int]:
    return [size for shape in shapes for size in shape]


def _geometry(value: Tensor, *tensors: Tensor) -> list[Tensor]:
    """As the kernels take them: together in value's dtype, or else in float32 (float64 beside any float64)."""
    if all(t.dtype == value.dtype for t in tensors):
        return list(tensors)
    wide = _wide(*tensors)
    return [t.to(wide) for t in tensors]


def _empty(value: Tensor, *geometry: Tensor) -> Tensor:
    zero = sum(t.flatten()[:0].sum() for t in (value, *geometry))  # keeps the graph of the inputs
    B, _, H, D = value.shape
    return zero.to(value.dtype).expand(B, geometry[0].shape[1], H * D).clone()


@_dispatch.planned
def _plan(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, backend: str) -> str:
    _check(value, shapes, sampling_locations=locations, attention_weights=weights)
    return _choose(backend, value, *_geometry(value, locations, weights))


@_dispatch.planned
def _plan_fused(value: Tensor, shapes: list[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor, backend: str) -> str:
    _check(value, shapes, reference_points=points, sampling_offsets=offsets, attention_logits=logits)
    return _choose(backend, value, *_geometry(value, points), *_geometry(value, offsets, logits))


def _choose(backend: str, value: Tensor, *geometry: Tensor) -> str:
    return "empty" if 0 in (value.numel(), geometry[-1].numel()) else _dispatch.choose("ms_deform_attn", backend, value, *geometry, slower=_SLOWER)


def _check(value: Tensor, shapes: list[tuple[int, int]], **geometry: Tensor) -> None:
    for name, tensor in {"value": value, **geometry}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device} but value on {value.device}")
    if value.ndim != 4:
        raise ValueError(f"value must be (B, S, H, D), got shape {tuple(value.shape)}")
    B, S, H, _ = value.shape
    L = len(shapes)
    if S != (pixels := sum(height * width for height, width in shapes)):
        raise ValueError(f"spatial_shapes {shapes} have {pixels} pixels but value {tuple(value.shape)} has S={S}")
    *_, (name, weights) = geometry.items()
    if weights.ndim != 5 or (weights.shape[0], *weights.shape[2:4]) != (B, H, L):
        raise ValueError(f"{name} must be (B={B}, Q, H={H}, L={L}, P), got shape {tuple(weights.shape)}")
    Q, P = weights.shape[1], weights.shape[4]
    for name, tensor in geometry.items():
        if name == "reference_points":
            if tensor.shape not in ((B, Q, L, 2), (B, Q, L, 4)):
                raise ValueError(f"{name} must be (B={B}, Q={Q}, L={L}, 2 or 4), got shape {tuple(tensor.shape)}")
        elif tensor is not weights and tensor.shape != (B, Q, H, L, P, 2):
            raise ValueError(f"{name} must be (B={B}, Q={Q}, H={H}, L={L}, P={P}, 2), got shape {tuple(tensor.shape)}")


def _fake(value: Tensor, shapes: list[int], *geometry: Tensor) -> Tensor:
    B, _, H, D = value.shape
    return value.new_empty(B, geometry[0].shape[1], H * D)


def _fake_backward(grad: Tensor, value: Tensor, shapes: list[int], *geometry_and_deterministic) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (value, *geometry_and_deterministic[:-1]))


def _save(ctx, inputs, output) -> None:
    value, ctx.shapes, *geometry = inputs
    ctx.save_for_backward(value, *geometry)


def _register(op: str) -> None:
    def backward(ctx, grad: Tensor):
        value, *geometry = ctx.saved_tensors
        deterministic = torch.are_deterministic_algorithms_enabled()
        grads = getattr(ctx.kernels, f"{op}_backward")(grad, value, ctx.shapes, *geometry, deterministic)
        return grads[0], None, *grads[1:]

    _dispatch.register_fake(op)(_fake)
    _dispatch.register_fake(f"{op}_backward")(_fake_backward)
    _dispatch.register_autograd(op, backward, setup_context=_save)


for _op in ("ms_deform_attn", "ms_deform_attn_fused"):
    _register(_op)

# Last, since the modules are built on the functions above.
from pyvseg.ops._ms_deform_attn_module import MSDeformAttn, MultiScaleDeformableAttention  # noqa: E402
