# SPDX-License-Identifier: Apache-2.0
import pickle
from dataclasses import replace

import pytest
import torch

from pyvseg import checkpoints
from pyvseg.cli.main import main
from pyvseg.errors import CheckpointError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models import zoo
from pyvseg.models.fitting import fitting
from pyvseg.verify import load_case
from tests.conftest import shared


@pytest.fixture(scope="module")
def published():
    return load_case(shared("parity", "mask2former-small")).weights


@pytest.fixture
def variant(monkeypatch):
    """A variant as small as the stored case."""
    settings = replace(
        zoo.variant("minvis_r50_ytvis19").settings, classes=5, queries=16, backbone=ResNetSizes(50, 16, 64, 16), width=64, mask_width=64,
        hidden=64, heads=4, encoder_layers=2, decoder_layers=4, ffn=128,
    )  # fmt: skip
    small = replace(zoo.variant("minvis_r50_ytvis19"), name="minvis_small", settings=settings)
    monkeypatch.setitem(zoo.ZOO, "minvis_small", small)
    return small


def test_a_detectron2_pickle_becomes_safetensors(tmp_path, published, variant, capsys):
    source, target = tmp_path / "model_final.pkl", tmp_path / "out.safetensors"
    source.write_bytes(pickle.dumps({"model": published, "__author__": "somebody"}, 4))
    command = ["convert", str(source), str(target), "--model", "minvis_small"]
    assert main(command) == 0
    assert "--model minvis_small" in capsys.readouterr().out
    metadata = checkpoints.read_metadata(target)
    assert metadata["model"] == "minvis_small" and metadata["system"] == "minvis" and metadata["source"] == "model_final.pkl"
    ours = zoo.build_variant(variant, checkpoints.read(target), name="ours").state_dict()
    direct = zoo.build_variant(variant, {k: torch.from_numpy(v) for k, v in published.items()}, name="theirs").state_dict()
    assert all(torch.equal(ours[key], value) for key, value in direct.items())
    assert main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--precision", "bfloat16"]) == 0
    assert checkpoints.read(target)["decoder.query_feat.weight"].dtype == torch.bfloat16


def test_the_target_is_a_safetensors_file(tmp_path, capsys):
    assert main(["convert", "a.pth", str(tmp_path / "b.pth"), "--model", "minvis_r50_ytvis19"]) == 2
    assert ".safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["minvis_r50_ovis", "ctvis_r50_ovis", "vita_r50_ytvis21", "genvis_r50_ovis_online", "mask2former_r50_coco_panoptic"])
def test_weights_name_the_variants_that_they_fit(name):
    settings = zoo.variant(name).settings
    with torch.device("meta"):
        state = zoo.SYSTEMS[zoo.variant(name).system].network(settings).state_dict()
    assert name in fitting(state, zoo.ZOO.values())


def test_swin_weights_name_their_variants():
    settings = zoo.variant("ctvis_swin_l_ovis").settings
    with torch.device("meta"):
        state = zoo.SYSTEMS["ctvis"].network(settings).state_dict()
    assert fitting(state, zoo.ZOO.values()) == ["ctvis_swin_l_ovis"]
    assert fitting({}, zoo.ZOO.values()) == []


def test_another_variants_file_is_named(published, variant):
    weights = {k: torch.from_numpy(v) for k, v in published.items()}
    with pytest.raises(CheckpointError, match="of another shape.*fit minvis_small") as caught:
        zoo.build_variant(replace(variant, name="other", settings=replace(variant.settings, classes=6)), weights, name="file.pth")
    assert "\n" not in str(caught.value)
