# SPDX-License-Identifier: Apache-2.0
"""The DAVIS metrics on synthetic label volumes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.metrics import vos
from pyvseg.video.palette import davis_palette


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    sequences = list(dict.fromkeys(name.rsplit("_", 1)[0] for name in manifest["config"]["objects"]))
    yield from _semi_supervised(sequences, inputs)
    yield from _unsupervised(sequences, inputs)
    for name, bound_th in manifest["config"]["bound_th"].items():
        yield from _single_masks(name, bound_th, inputs)
    yield from _corners()
    for name, curve in inputs.items():
        if name.startswith("in/curve"):
            yield name.replace("in/", "out/"), np.array(vos.statistics(curve, strict=True))
    yield "out/palette", davis_palette()


def _semi_supervised(sequences: list[str], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    scores = {}
    for name in sequences:
        annotations, results = inputs[f"in/{name}/gt"], inputs[f"in/{name}/result"]
        num_objects = int(np.where(annotations[0] == vos.VOID, 0, annotations[0]).max())
        scores[name] = vos.sequence_scores(zip(annotations[1:-1], results[1:-1]), num_objects)
        for i, (j, f) in enumerate(zip(*scores[name]), start=1):
            yield f"out/{name}_{i}/J", j
            yield f"out/{name}_{i}/F", f
    for letter, index in (("J", 0), ("F", 1)):
        columns = np.array([vos.statistics(curve) for each in scores.values() for curve in each[index]]).T
        for column, values in zip("MRD", columns):
            yield f"out/{letter}_{column}", values
    yield "out/global", np.array(list(vos.totals(scores).values()))


def _unsupervised(sequences: list[str], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    scores = [vos.unsupervised_scores(inputs[f"in/{name}/gt"], inputs[f"in/{name}/result"]) for name in sequences]
    yield "out/unsup_J_M", np.concatenate([each.j.mean(1) for each in scores])
    yield "out/unsup_F_M", np.concatenate([each.f.mean(1) for each in scores])


def _single_masks(name: str, bound_th: float, inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    a, b, void = (inputs[f"in/{name}/{part}"].astype(bool) for part in ("a", "b", "void"))
    yield f"out/{name}/J", np.array([_j(a, b, void)])
    yield f"out/{name}/F", np.array([_f(a & ~void, b & ~void, bound_th)])
    yield f"out/{name}/boundary_a", vos.boundary_map(a)
    yield f"out/{name}/boundary_b", vos.boundary_map(b)


def _corners() -> Iterator[tuple[str, np.ndarray]]:
    """[J, F] of empty, full and cut-out masks with each other."""
    masks = {"e": np.zeros((20, 30), bool), "f": np.ones((20, 30), bool), "c": np.zeros((20, 30), bool)}
    masks["c"][5:9, 6:20] = True
    for pair in ("ee", "ef", "ec", "fe", "ff", "fc", "ce", "cc"):
        a, b = masks[pair[0]], masks[pair[1]]
        yield f"out/corner_{pair}", np.array([_j(a, b), _f(a, b)])


def _j(a: np.ndarray, b: np.ndarray, void: np.ndarray | None = None) -> float:
    return vos.jaccard(a.astype(np.uint8), b.astype(np.uint8), 1, 1, void)[0, 0]


def _f(a: np.ndarray, b: np.ndarray, bound_th: float = vos.BOUND_TH) -> float:
    radius = vos.boundary_radius(*a.shape, bound_th)
    return vos.boundary_f(vos.boundary(a, radius), vos.boundary(b, radius))
