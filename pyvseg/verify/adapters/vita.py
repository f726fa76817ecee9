# SPDX-License-Identifier: Apache-2.0
"""VITA and GenVIS: on a short video, and one training step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.verify.adapters import vita_inference, vita_training


def run_vita(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    if "train_points" in manifest["config"]:
        return vita_training.run(manifest, weights, inputs, "vita")
    return vita_inference.run_vita(manifest, weights, inputs)


def run_genvis(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    if "train_points" in manifest["config"]:
        return vita_training.run(manifest, weights, inputs, "genvis")
    return vita_inference.run_genvis(manifest, weights, inputs)
