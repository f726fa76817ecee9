# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import random
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError, OutputError

STATE = {"conv.weight": torch.randn(4, 3, 3, 3), "steps": torch.arange(5)}


def assert_same(state, expected=STATE):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


def one_line_error(path):
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def rewrite(source, target, edit, compression=zipfile.ZIP_STORED):
    """Copy the archive `source`, its pickle passed through `edit`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, edit(data) if member.filename.endswith("data.pkl") else data)


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: {"it": 1, "network": s}])
def test_reads_what_torch_saves(tmp_path, legacy, wrap):
    torch.save(wrap(STATE), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert_same(checkpoints.read(tmp_path / "w.pth"))


def test_reads_safetensors_under_any_name(tmp_path):
    for name in ("w.safetensors", "w.pth"):
        safetensors.torch.save_file(STATE, tmp_path / name)
        assert_same(checkpoints.read(tmp_path / name))


def test_takes_off_the_prefix_of_parallel_training(tmp_path):
    torch.save({f"module.{key}": value for key, value in STATE.items()}, tmp_path / "w.pth")
    assert_same(checkpoints.read(tmp_path / "w.pth"))


def test_read_tensors_outlive_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(STATE, path)
    state = checkpoints.read(path)
    path.write_bytes(b"")
    assert_same(state)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_malicious_pickle_is_not_executed(tmp_path, kind):
    mark, path = tmp_path / "executed", tmp_path / "w.pth"
    content = {"weight": torch.ones(2), "evil": Malicious(f"touch {mark}")}
    if kind == "plain":
        path.write_bytes(pickle.dumps({"evil": content["evil"]}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    message = one_line_error(path)
    assert not mark.exists()
    if kind != "plain":
        assert "system" in message and "nothing was executed" in message
    torch.load(path, weights_only=False) if kind != "plain" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the file of this test would have done no harm"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated(tmp_path, legacy, share):
    path = tmp_path / "w.pth"
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "truncated or damaged" in one_line_error(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_safetensors(tmp_path, share):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert "truncated or damaged" in one_line_error(path)


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 20, b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK but not an archive", bytes(range(256))])
def test_not_a_checkpoint(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    one_line_error(path)


def test_no_file_and_a_folder(tmp_path):
    assert "cannot be read" in one_line_error(tmp_path / "absent.pth")
    assert "cannot be read" in one_line_error(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, torch.ones(3), {"weight": torch.ones(2), "epoch": 3}, {1: torch.ones(1)}])
def test_holds_other_things_than_tensors(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    one_line_error(path)


def spoilt(data, rng):
    """A few bytes changed, cut out or put in."""
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        data[at : at + rng.choice([0, 1, length])] = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, length])))
    return bytes(data)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_anywhere_is_a_checkpoint_error_or_harmless(tmp_path, kind):
    path, rng = tmp_path / "w.pth", random.Random(0)
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        path.write_bytes(spoilt(bytearray(whole), rng))
        try:
            state = checkpoints.read(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert refused > 100


def test_an_archive_that_grows_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1 << 20)}, tmp_path / "plain.pth")
    rewrite(tmp_path / "plain.pth", tmp_path / "bomb.pth", lambda data: data, zipfile.ZIP_DEFLATED)
    assert "unpack" in one_line_error(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "old, new",
    [
        (b"Kdt", b"J\x00\x00\x00\x40t"),  # the storage claims 2^30 elements instead of 100
        (b"K\nK\n", b"M\xff\xffM\xff\xff"),  # the tensor claims 65535 x 65535
    ],
)
def test_claimed_sizes_are_held_against_the_file(tmp_path, old, new):
    torch.save({"weight": torch.zeros(10, 10)}, tmp_path / "plain.pth")

    def forge(data):
        assert old in data
        return data.replace(old, new, 1)

    rewrite(tmp_path / "plain.pth", tmp_path / "forged.pth", forge)
    one_line_error(tmp_path / "forged.pth")


def test_an_expanded_tensor_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1).expand(1 << 20)}, tmp_path / "w.pth")
    assert "not backed" in one_line_error(tmp_path / "w.pth")


def test_write_then_read(tmp_path):
    path = tmp_path / "deep" / "w.safetensors"
    shared_memory = {"a": STATE["steps"], "b": STATE["steps"][1:], "c": torch.ones(3, 4).t()}
    checkpoints.write(path, shared_memory, {"system": "pcvos", "licence": "Apache-2.0"})
    assert_same(checkpoints.read(path), shared_memory)
    assert checkpoints.read_metadata(path) == {"system": "pcvos", "licence": "Apache-2.0"}
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_write_leaves_nothing_behind_on_failure(tmp_path):
    (tmp_path / "w.safetensors").mkdir()  # a folder stands where the file should go
    with pytest.raises(OutputError, match="cannot be written"):
        checkpoints.write(tmp_path / "w.safetensors", STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_metadata_of_other_files_is_empty(tmp_path):
    torch.save(STATE, tmp_path / "w.pth")
    assert checkpoints.read_metadata(tmp_path / "w.pth") == {}


class TestLoadInto:
    def model(self):
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def state(self):
        return {key.replace("0.", "conv."): torch.randn_like(value.float()) for key, value in self.model().state_dict().items()}

    def test_maps_names_and_converts_dtypes(self):
        model, state = self.model(), {key: value.half() for key, value in self.state().items()}
        checkpoints.load_into(model, state, [(r"^conv\.", "0.")], name="toy")
        assert torch.equal(model[0].weight, state["conv.weight"].float())

    def test_lists_every_kind_of_misfit_and_changes_nothing(self):
        model, state = self.model(), self.state()
        del state["1.weight"]
        state["conv.weight"] = torch.zeros(4, 5, 1, 1)
        state.update({f"extra.{i}": torch.zeros(1) for i in range(7)})
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load_into(model, state, [(r"^conv\.", "0.")], name="toy")
        message = str(caught.value)
        assert "1 missing: 1.weight;" in message
        assert "7 unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more" in message
        assert "1 of another shape: 0.weight: file (4, 5, 1, 1), model (4, 3, 1, 1)" in message
        assert "\n" not in message
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_ignore_forgives_missing_and_left_over_names(self):
        state = self.state()
        del state["1.num_batches_tracked"]
        state["index_table"] = torch.zeros(1)
        checkpoints.load_into(self.model(), state, [(r"^conv\.", "0.")], name="toy", ignore=r"num_batches_tracked$|^index_table$")

    def test_refuses_two_names_that_become_one(self):
        with pytest.raises(CheckpointError, match="both become"):
            checkpoints.load_into(self.model(), {"a": torch.zeros(1), "b": torch.zeros(1)}, [("[ab]", "c")], name="toy")

    def test_names_the_system_of_a_foreign_file(self):
        state = {"key_encoder.x": torch.zeros(1), "value_encoder.x": torch.zeros(1), "refine_transformer.x": torch.zeros(1)}
        with pytest.raises(CheckpointError, match="looks like PCVOS"):
            checkpoints.load_into(self.model(), state, name="toy")
