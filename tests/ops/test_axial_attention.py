# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from pyvseg.ops import axial_attention
from pyvseg.ops.axial_attention import reference
from tests.ops.implementations import implementations
from tests.ops.numerics import assert_as_exact

SIZES = [  # B, H, W, heads, K, V, R
    (1, 1, 1, 1, 1, 1, 0),
    (2, 3, 2, 2, 1, 2, 5),
    (1, 5, 4, 3, 7, 6, 8),
    (2, 17, 9, 8, 4, 8, 254),
    (1, 31, 55, 8, 32, 64, 254),
    (3, 6, 19, 2, 20, 37, 18),
]


def arguments(B: int, H: int, W: int, heads: int, K: int, V: int, R: int) -> dict[str, Tensor]:
    """Similarities of a few units, so that some keys weigh far more than others."""
    tables = {f"{name}_table": torch.randn(2 * R + 1, depth) for name, depth in (("query", K), ("key", K), ("value", V))}
    scales = torch.randn(3, heads) / K**0.5
    return {"qkv": torch.randn(B, H, W, heads * (2 * K + V)), **tables, "scales": scales, "value_scale": torch.randn(heads, V)}


def by_definition(qkv: Tensor, query_table: Tensor, key_table: Tensor, value_table: Tensor, scales: Tensor, value_scale: Tensor) -> Tensor:
    """Along rows, one head and pair at a time, but for sums over channels."""
    (_, _, L, _), (_, heads), (rows, depth) = qkv.shape, scales.shape, query_table.shape
    out = []
    for h in range(heads):
        parts = qkv.split((heads * depth, heads * depth, value_scale.numel()), -1)
        q, k, v = (part.unflatten(-1, (heads, -1))[:, :, :, h] for part in parts)
        weight = qkv.new_zeros(*qkv.shape[:2], L, L)
        for query in range(L):
            for key in range(L):
                row = key - query + rows // 2
                products = q[:, :, query] * k[:, :, key], q[:, :, query] * query_table[row], k[:, :, key] * key_table[row]
                weight[:, :, query, key] = sum(s * p.sum(-1) for s, p in zip(scales[:, h], products))
        weight = weight.softmax(-1)
        distance = torch.arange(L) - torch.arange(L)[:, None] + rows // 2
        out.append(weight @ v + value_scale[h] * torch.einsum("bslm,lmd->bsld", weight, value_table[distance]))
    return torch.cat(out, -1)


@pytest.mark.parametrize("implementation", implementations("axial_attention"), indirect=True)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_the_reference(size, dtype, implementation):
    given = {name: t.to(dtype) for name, t in arguments(*size).items()}
    for axis in (1, 2):
        exact = reference(*(t.double() for t in given.values()), axis)
        found = axial_attention(**given, axis=axis, backend=implementation.backend)
        assert_as_exact(found, reference(*given.values(), axis), exact)


def test_the_reference_is_the_definition():
    given = {name: t.double() for name, t in arguments(2, 4, 5, 3, 6, 8, 6).items()}
    torch.testing.assert_close(reference(*given.values(), 2), by_definition(**given))
    columns = {**given, "qkv": given["qkv"].transpose(1, 2)}
    torch.testing.assert_close(reference(*given.values(), 1), by_definition(**columns).transpose(1, 2))


def test_any_strides_and_gradients():
    given = arguments(2, 6, 7, 2, 8, 16, 9)
    want = axial_attention(**given, axis=1)
    wide = {name: torch.stack([t, t], -1)[..., 0] for name, t in given.items()}
    assert torch.equal(axial_attention(**wide, axis=1), want)
    turned = {**given, "qkv": given["qkv"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(axial_attention(**turned, axis=1), want)
    leaves = {name: t.requires_grad_() for name, t in given.items()}
    found = axial_attention(**leaves, axis=1)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert all(g is not None for g in torch.autograd.grad(found.sum(), leaves.values()))


@pytest.mark.parametrize("implementation", implementations("axial_attention"), indirect=True)
def test_not_finite_and_large(implementation):
    given = arguments(1, 5, 20, 2, 4, 8, 20)
    given["qkv"][0, 2, 3] = torch.nan
    given["qkv"][0, 3] *= 1e4
    found = axial_attention(**given, axis=2, backend=implementation.backend)
    assert found[0, 2].isnan().all() and found[0, [0, 1, 3, 4]].isfinite().all()
    torch.testing.assert_close(found[0, 3].double(), reference(*(t.double() for t in given.values()), 2)[0, 3], rtol=1e-2, atol=1)


@pytest.mark.parametrize("change, error, text", [
    ({"qkv": torch.zeros(1, 3, 4, 41)}, ValueError, "2 heads of 4 . 4 . 8 channels"),
    ({"qkv": torch.zeros(1, 9, 4, 32)}, ValueError, "at most 6 positions along axis 1"),
    ({"qkv": torch.zeros(3, 4, 32)}, ValueError, "qkv must have 4 dimensions"),
    ({"qkv": torch.zeros(1, 3, 4, 32, dtype=torch.int64)}, TypeError, "qkv must be floating point"),
    ({"query_table": torch.zeros(10, 4)}, ValueError, "odd number of rows"),
    ({"key_table": torch.zeros(11, 5)}, ValueError, r"key_table must have shape \(11, 4\)"),
    ({"value_table": torch.zeros(11, 8, dtype=torch.float64)}, TypeError, "value_table must be floating point and of qkv's dtype"),
    ({"scales": torch.zeros(2, 2)}, ValueError, r"scales must have shape \(3, 2\)"),
    ({"value_scale": torch.zeros(2, 8, device="meta")}, ValueError, "value_scale is on meta"),
    ({"axis": 3}, ValueError, "axis must be 1 or 2"),
    ({"backend": "tpu"}, ValueError, "backend must be one of"),
])  # fmt: skip
def test_bad_input_is_named(change, error, text):
    given = {**arguments(1, 3, 4, 2, 4, 8, 5), "axis": 1, **change}
    with pytest.raises(error, match=text):
        axial_attention(**given)


def test_opcheck():
    given = arguments(2, 3, 4, 2, 4, 8, 5)
    torch.library.opcheck(torch.ops.pyvseg.axial_attention.default, (*given.values(), 1))
