# SPDX-License-Identifier: Apache-2.0
"""The bundled model on real video that its training never saw."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pyvseg
from pyvseg import checkpoints
from pyvseg.models import zoo
from pyvseg.video import open_video, read_labels
from tests.conftest import shared

FRAMES = 16


@pytest.mark.parametrize("sequence", ["blackswan", "camel"])
def test_objects_are_followed_better_than_by_standing_still(sequence):
    root = shared("data", "davis2016")
    truth = [read_labels(p) > 0 for p in sorted((root / "Annotations" / "480p" / sequence).glob("*.png"))[:FRAMES]]
    frames = [frame.image for frame, _ in zip(open_video(root / "JPEGImages" / "480p" / sequence), range(FRAMES))]
    results = list(pyvseg.load("pcvos_tiny").track(frames, truth[0].astype(np.uint8)))
    followed = [iou(t, r.labels > 0) for t, r in zip(truth, results)][1:]
    standing = [iou(t, truth[0]) for t in truth][1:]
    assert np.mean(followed) > 0.8 and np.mean(followed) > np.mean(standing) + 0.1, (followed, standing)


def test_bfloat16_loses_little():
    root = shared("data", "davis2016", "JPEGImages", "480p", "blackswan")
    mask = read_labels(shared("data", "davis2016", "Annotations", "480p", "blackswan", "00000.png"))
    frames = [frame.image for frame, _ in zip(open_video(root), range(6))]
    exact, rounded = (list(pyvseg.load("pcvos_tiny", precision=p).track(frames, mask))[-1].labels for p in ("float32", "bfloat16"))
    assert iou(exact > 0, rounded > 0) > 0.95


def test_the_bundled_file_keeps_its_promises():
    path = zoo.ZOO["pcvos_tiny"].bundled
    state = checkpoints.read(path)
    assert sum(v.numel() for v in state.values()) <= 4e6 and path.stat().st_size <= 10e6
    assert all(v.dtype == torch.float16 for v in state.values())
    assert Path(path).with_suffix(".md").is_file()


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))
