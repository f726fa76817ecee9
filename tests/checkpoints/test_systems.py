# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from pyvseg.checkpoints import guess_system
from tests.conftest import shared


@pytest.mark.parametrize(
    "case, system",
    [
        ("pcvos-full", "PCVOS"),
        ("stcn-small", "STCN"),
        ("genvis-full", "GenVIS"),
        ("vita-full", "VITA"),
        ("ctvis-full", "CTVIS"),
        ("video_kmax-full", "kMaX-DeepLab / Video-kMaX"),
        ("kmax-small", "kMaX-DeepLab / Video-kMaX"),
        ("mask2former-full", "Mask2Former / MinVIS"),
        ("mask2former-swin", "Mask2Former / MinVIS"),
        ("minvis-small", "Mask2Former / MinVIS"),
        ("polyphonic-full", "PolyphonicFormer"),
        ("video_knet-full", "Video K-Net"),
        ("video_knet-vis-small", "Video K-Net"),
        ("tube_link-full", "Tube-Link"),
        ("transvod-full", "TransVOD"),
        ("transvodlite-full", "TransVOD Lite"),
        ("transvodpp-full", "TransVOD++"),
    ],
)
def test_published_names(case, system):
    keys = json.loads((shared("parity", case) / "manifest.json").read_text())["weights"]
    assert guess_system(keys) == system


def test_other_names():
    assert guess_system(["conv1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight", "fc.bias"]) == "torchvision ResNet"
    assert guess_system(["weight", "bias"]) is None
    assert guess_system([]) is None
