# SPDX-License-Identifier: Apache-2.0
"""A recipe whose model is there already, for benchmarks that do not count its loading."""

from dataclasses import dataclass

from pyvseg.engine.recipe import Recipe
from pyvseg.engine.task import Task


@dataclass(frozen=True)
class Loaded:
    recipe: Recipe
    ready: Task

    def settings(self) -> dict:
        return self.recipe.settings()

    def task(self) -> Task:
        return self.ready
