# SPDX-License-Identifier: Apache-2.0
"""DAVIS 2017, semi-supervised: J, F and J&F of label PNGs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyvseg.datasets.davis import VOID, Davis, is_binary
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vos
from pyvseg.metrics.vos import Scores
from pyvseg.video.png import read_labels

if TYPE_CHECKING:
    from pyvseg.cli.eval import Eval


def evaluate(options: Eval) -> tuple[dict, Iterator[str]]:
    dataset = Davis(options.gt)
    if (options.results / "Annotations").is_dir():
        options = replace(options, results=options.results / "Annotations")
    names = list(options.sequences) or _sequences(dataset, options)
    table = tabulate({name: score_sequence(dataset, name, options.results / name) for name in names})
    return table | {"left_out": sorted(set(dataset.sequences()) - set(names))}, _lines(table)


def _sequences(dataset: Davis, options: Eval) -> list[str]:
    if options.image_set is not None:
        return dataset.sequences(options.image_set)
    if not options.results.is_dir():
        raise PyvsegError(f"{options.results}: no such folder of results")
    names = [name for name in dataset.sequences() if (options.results / name).is_dir()]
    if not names:
        raise PyvsegError(f"{options.results}: no folder in there is named like a sequence of {dataset.root}")
    return names


def score_sequence(dataset: Davis, name: str, results: Path) -> Scores:
    """J and F of the label PNGs in `results` for the sequence `name`. Raises PyvsegError that names the sequence and what is wrong."""
    scored = list(dataset.annotations(name))[1:-1]
    annotations = dataset.labels(name)
    num_objects = int(next(annotations)[1].max(initial=0))
    if num_objects == 0:
        raise PyvsegError(f"{name}: the first annotation shows no object, so there is nothing to score")
    missing = [stem for stem in scored if not (results / f"{stem}.png").is_file()]
    if missing:
        raise PyvsegError(f"{results}: {len(missing)} of {len(scored)} result PNGs are missing, the first is {missing[0]}.png")
    stem = ""

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal stem
        for stem, annotation in islice(annotations, len(scored)):
            result = read_labels(results / f"{stem}.png")
            if num_objects == 1 and is_binary(result):
                result = result // VOID
            yield annotation, result

    try:
        return vos.sequence_scores(pairs(), num_objects)
    except PyvsegError as error:
        raise PyvsegError(f"{' '.join(filter(None, (name, stem)))}: {error}") from None


def tabulate(scores: dict[str, Scores]) -> dict:
    """{"totals": {column: value}, "sequences": {name: {column: value, "objects": {id: {column: value}}}}}; totals are over objects."""
    sequences = {
        name: vos.totals({name: each}) | {"objects": {str(i + 1): vos.totals({name: Scores(each.j[i : i + 1], each.f[i : i + 1])}) for i in range(len(each.j))}}
        for name, each in scores.items()
    }
    return {"totals": vos.totals(scores), "sequences": sequences}


def _lines(table: dict) -> Iterator[str]:
    width = max(len("sequence"), *map(len, table["sequences"])) + 2
    columns = list(table["totals"])

    def row(name: str, object_id: str, numbers: dict[str, float]) -> str:
        return f"{name:<{width}}{object_id:>6}" + "".join(f"{numbers[column]:>10.3f}" for column in columns)

    yield f"{'sequence':<{width}}{'object':>6}" + "".join(f"{column:>10}" for column in columns)
    for name, sequence in table["sequences"].items():
        for object_id, numbers in sequence["objects"].items():
            yield row(name, object_id, numbers)
        if len(sequence["objects"]) > 1:
            yield row(name, "all", sequence)
    yield row("total", "", table["totals"])
