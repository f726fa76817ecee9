# SPDX-License-Identifier: Apache-2.0
"""`pyvseg eval`"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pyvseg.errors import OutputError, PyvsegError

if TYPE_CHECKING:
    import numpy as np

    from pyvseg.datasets.davis import Davis
    from pyvseg.metrics.vos import Scores


@dataclass
class Eval:
    """Score label PNGs against DAVIS-style annotations: J, F and J&F as the DAVIS 2017 evaluation defines them.

    The first frame (given) and the last are not scored, an object is scored from the first annotation on, and totals are
    means over all objects. Annotations of 0 and 255 (DAVIS 2016) are one object; so are results of 0 and 255 where one object is annotated.
    """

    results: tyro.conf.Positional[Path]
    """Folder with one folder of label PNGs per sequence, named like the annotations; or the OUT of `pyvseg run`, which keeps them in Annotations."""
    gt: Path
    """Dataset folder, the one that holds Annotations."""
    sequences: tuple[str, ...] = ()
    """Only these; by default every sequence that has results."""
    image_set: str | None = None
    """Only the sequences in this list of the dataset's ImageSets, such as 2017/val."""
    json: Path | None = None
    """Write all numbers there too."""


def eval(options: Eval) -> None:
    from pyvseg.datasets.davis import Davis

    dataset = Davis(options.gt)
    if (options.results / "Annotations").is_dir():
        options = replace(options, results=options.results / "Annotations")
    names = list(options.sequences) or _sequences(dataset, options)
    table = tabulate({name: score_sequence(dataset, name, options.results / name) for name in names})
    left_out = sorted(set(dataset.sequences()) - set(names))
    _print(table)
    if left_out:
        shown = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        print(f"not in the totals: {len(left_out)} annotated sequences, not asked for or without results ({shown})")
    if options.json is not None:
        _write_json(options.json, table | {"left_out": left_out})


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
    from pyvseg.datasets.davis import VOID, is_binary
    from pyvseg.metrics import vos
    from pyvseg.video.png import read_labels

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
    from pyvseg.metrics.vos import Scores, totals

    sequences = {
        name: totals({name: each}) | {"objects": {str(i + 1): totals({name: Scores(each.j[i : i + 1], each.f[i : i + 1])}) for i in range(len(each.j))}}
        for name, each in scores.items()
    }
    return {"totals": totals(scores), "sequences": sequences}


def _print(table: dict) -> None:
    width = max(len("sequence"), *map(len, table["sequences"])) + 2
    columns = list(table["totals"])

    def row(name: str, object_id: str, numbers: dict[str, float]) -> None:
        print(f"{name:<{width}}{object_id:>6}" + "".join(f"{numbers[column]:>10.3f}" for column in columns))

    print(f"{'sequence':<{width}}{'object':>6}" + "".join(f"{column:>10}" for column in columns))
    for name, sequence in table["sequences"].items():
        for object_id, numbers in sequence["objects"].items():
            row(name, object_id, numbers)
        if len(sequence["objects"]) > 1:
            row(name, "all", sequence)
    row("total", "", table["totals"])


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None
