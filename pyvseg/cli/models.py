# SPDX-License-Identifier: Apache-2.0
"""`pyvseg models`"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import tyro

from pyvseg.errors import PyvsegError

if TYPE_CHECKING:
    from pyvseg.models.variant import Variant


@dataclass
class Models:
    """List the models: what each is for, where its weights come from, under which licence, and what its authors report.

    For example

        pyvseg models
        pyvseg models ctvis
        pyvseg models panoptic r50
    """

    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only models with all of these words in their name, system or task."""


def models(options: Models) -> None:
    from pyvseg.models.zoo import ZOO

    words = [word.lower() for word in options.words]
    chosen = [v for v in ZOO.values() if all(word in f"{v.name} {v.system} {v.task}" for word in words)]
    if not chosen:
        raise PyvsegError(f"no model has {' and '.join(words)} in its name, system or task; `pyvseg models` lists them all")
    for (system, task, licence), variants in groupby(chosen, lambda v: (v.system, v.task, v.licence)):
        print(f"{system}: {task}; licence of the weights: {licence}")
        _print_aligned([_row(variant) for variant in variants])
        print()
    print("Weights that are not bundled: download the file and pass it, `pyvseg run VIDEO --model NAME --weights FILE`.")


def _row(variant: Variant) -> tuple[str, ...]:
    weights = "bundled" if variant.where == "bundled" else f"{variant.file}, from {variant.where}"
    notes = [f"{what}: {value}" for what, value in variant.published.items()] + [variant.note] * bool(variant.note)
    return variant.name, weights, "; ".join(notes)


def _print_aligned(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
