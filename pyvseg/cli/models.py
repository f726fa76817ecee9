# SPDX-License-Identifier: Apache-2.0
"""`pyvseg models`"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvseg.models.variant import Variant


@dataclass
class Models:
    """List the models: what each is for, where its weights come from, under which licence, and what its authors report."""


def models(options: Models) -> None:
    from pyvseg.models.zoo import ZOO

    rows = [("name", "task", "system", "weights", "licence"), *map(_row, ZOO.values())]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
    print()
    for variant in ZOO.values():
        for what, value in {**variant.published, **({"note": variant.note} if variant.note else {})}.items():
            print(f"{variant.name}: {what}: {value}")
    print("\nWeights that are not bundled: download the file and pass it, `pyvseg run VIDEO --model NAME --weights FILE`.")


def _row(variant: Variant) -> tuple[str, ...]:
    weights = "bundled" if variant.where == "bundled" else f"{variant.file}, from {variant.where}"
    return variant.name, variant.task, variant.system, weights, variant.licence
