# SPDX-License-Identifier: Apache-2.0
"""Small networks of random weights behind the names of published ones."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from pyvseg import checkpoints
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models import zoo

SIZES = dict(
    queries=8, backbone=ResNetSizes(18, 16, 16, 16), width=32, mask_width=32, hidden=32, heads=4, encoder_layers=1, encoder_ffn=32,
    decoder_layers=3, ffn=32, short_side=48,
)  # fmt: skip
VIDEO = dict(video_queries=8, video_heads=4, video_ffn=32, video_encoder_layers=2, video_layers=1)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes a variant small; returns its weights file."""

    def make(name):
        chosen = zoo.variant(name)
        more = VIDEO if name.startswith(("vita", "genvis")) else {"embed_hidden": 32} if name.startswith("ctvis") else {}
        chosen = replace(chosen, settings=replace(chosen.settings, **SIZES, **more))
        monkeypatch.setitem(zoo.ZOO, name, chosen)
        torch.manual_seed(0)
        path = tmp_path / f"{name}.safetensors"
        checkpoints.write(path, zoo.SYSTEMS[chosen.system].network(chosen.settings).state_dict())
        return path

    return make


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "street"
    folder.mkdir()
    for t in range(5):
        image = np.full((54, 71, 3), 90, np.uint8)
        cv2.circle(image, (20 + 6 * t, 27), 12, (30, 200, 240), -1)
        cv2.imwrite(str(folder / f"{t:05d}.png"), image)
    return folder
