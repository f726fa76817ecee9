# SPDX-License-Identifier: Apache-2.0
"""Files as the STCN and PCVOS authors publish them: their names, their shapes, torch.save of the bare state dict."""

import pytest
import torch

from pyvseg import checkpoints
from pyvseg.checkpoints import key_maps
from pyvseg.errors import CheckpointError
from pyvseg.models import zoo
from pyvseg.verify import load_case
from tests.conftest import shared


def state_of(case):
    return {key: torch.from_numpy(value).reshape(()) if key.endswith("num_batches_tracked") else torch.from_numpy(value) for key, value in load_case(case).weights.items()}


@pytest.fixture(scope="module")
def stcn():
    return state_of(shared("parity", "stcn-small"))


def build(state, name="stcn_r50"):
    return zoo.build(zoo.ZOO[name].settings, state, name="file.pth")


def test_published_files_load(tmp_path, stcn):
    torch.save({"it": 3, "network": stcn}, tmp_path / "stcn.pth")
    ours = build(checkpoints.read(tmp_path / "stcn.pth")).state_dict()
    (tmp_path / "stcn.pth").unlink()  # a quarter of a gigabyte
    theirs = checkpoints.map_keys(stcn, key_maps.STCN)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items() if key in ours)
    assert {key for key in theirs.keys() ^ ours.keys() if not key.endswith("num_batches_tracked")} == set()


def test_a_single_object_file_loads(stcn):
    conv = "value_encoder.conv1.weight"
    build(stcn | {conv: stcn[conv][:, :4].clone()})
    with pytest.raises(CheckpointError, match=r"1 of another shape: .*file \(64, 3, 7, 7\), model \(64, 5, 7, 7\)"):
        build(stcn | {conv: stcn[conv][:, :3].clone()})


def test_missing_and_extra_names_are_listed(stcn):
    state = dict(stcn)
    del state["decoder.pred.bias"]
    with pytest.raises(CheckpointError, match="1 missing: decoder.pred.bias"):
        build(state)
    with pytest.raises(CheckpointError, match="1 unexpected: decoder.more"):
        build(stcn | {"decoder.more": torch.zeros(1)})


@pytest.mark.parametrize("case, system", [("mask2former-small", "Mask2Former"), ("ctvis-small", "CTVIS"), ("video_knet-small", "Video K-Net")])
def test_a_file_of_another_system_is_named(case, system):
    with pytest.raises(CheckpointError, match=f"looks like {system}") as caught:
        build(state_of(shared("parity", case)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000


def test_stcn_and_pcvos_files_are_not_mixed_up(stcn):
    with pytest.raises(CheckpointError, match="looks like STCN.*missing"):
        build(stcn, "pcvos_r50_ytvos")
