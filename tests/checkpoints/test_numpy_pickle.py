# SPDX-License-Identifier: Apache-2.0
"""Files as detectron2's model zoo has them, and files that want something else."""

import os
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError

ARRAYS = {
    "conv.weight": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32),
    "half": np.arange(6, dtype=np.float16).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">f4"),
    "count": np.array(7),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.int64),
    "flags": np.array([True, False]),
}


def read(tmp_path, data):
    path = tmp_path / "model_final.pkl"
    path.write_bytes(data)
    return checkpoints.read(path)


def error(tmp_path, data):
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_come_back(tmp_path, protocol):
    content = {"model": ARRAYS, "__author__": "Somebody", "matching_heuristics": True}
    if protocol == 5:  # has an instruction of its own for arrays' memory, which no published file uses
        with pytest.raises(CheckpointError):
            read(tmp_path, pickle.dumps(content, 5))
        return
    state = read(tmp_path, pickle.dumps(content, protocol))
    assert state.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert torch.equal(state[key], torch.from_numpy(np.array(array, np.asarray(array).dtype.newbyteorder("="))))


def test_strings_of_python_2(tmp_path):
    data = pickle.dumps({"x": ARRAYS["half"]}, 2)
    assert torch.equal(read(tmp_path, data)["x"], torch.from_numpy(ARRAYS["half"]))


class Calls:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "value, name",
    [
        (Calls(os.system, "touch stolen"), "posix.system|nt.system"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(np.ndarray, (10**9,)), "no function"),
        (Calls(np.zeros, (10**9,)), "numpy"),
        (Calls(bytearray, 10**9), "builtins.bytearray"),
        (np.array([object()]), "dtype 'O8'"),
        (torch.zeros(2), "torch"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    message = error(tmp_path, pickle.dumps({"x": value}, 4))
    assert any(part in message for part in name.split("|")), message
    assert not (tmp_path / "stolen").exists()


def test_a_state_for_a_function_is_refused(tmp_path):
    data = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}X\x01\x00\x00\x00aK\x01sb."
    assert "a state for a function" in error(tmp_path, data)


def test_claims_beyond_the_file_cost_no_memory(tmp_path):
    array = pickle.dumps({"x": np.zeros(5, np.float32)}, 2)
    bombs = [
        b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",  # a memo index that wants 64 GB
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # a byte array of a terabyte
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        array.replace(b"K\x05", b"J\xff\xff\xff\x7f"),
    ]
    tracemalloc.start()
    for bomb in bombs:
        error(tmp_path, bomb)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_damaged_files_give_one_line(tmp_path):
    data = pickle.dumps({"model": ARRAYS}, 2)
    generator = random.Random(0)
    for _ in range(300):
        broken = bytearray(data[: generator.randrange(3, len(data))] if generator.random() < 0.3 else data)
        for _ in range(generator.randrange(1, 4)):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        try:
            state = read(tmp_path, bytes(broken))
        except CheckpointError as caught:
            assert "\n" not in str(caught)
        else:
            assert sum(t.numel() * t.element_size() for t in state.values()) <= 8 * len(data)
