# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import numpy as np
import pytest

from pyvseg.cli.verify import Verify, verify
from pyvseg.errors import PyvsegError
from pyvseg.verify import load_case, verify_case
from pyvseg.verify.adapters import metrics_vos
from tests.conftest import shared


@pytest.fixture
def case(tmp_path):
    """A small case that agrees, for a test to spoil: what the adapter computes on one moving object."""
    labels = np.zeros((2, 6, 24, 40), np.uint8)
    for t in range(6):
        labels[0, t, 5:15, 5 + 2 * t : 20 + 2 * t] = 1
        labels[1, t, 6:16, 5 + t : 20 + 2 * t] = 1
    inputs = {"in/alpha/gt": labels[0], "in/alpha/result": labels[1]}
    manifest = {
        "system": "metrics-vos",
        "config": {"objects": ["alpha_1"], "bound_th": {}},
        "weights": {},
        "tolerance": {"rtol": 1e-12, "atol": 1e-12},
    }
    folder = tmp_path / "case"
    folder.mkdir()
    np.savez_compressed(folder / "tensors.npz", **inputs, **dict(metrics_vos.run(manifest, {}, inputs)))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit_tensors(case, edit):
    with np.load(case / "tensors.npz") as stored:
        tensors = dict(stored)
    edit(tensors)
    np.savez(case / "tensors.npz", **tensors)


def edit_manifest(case, **changes):
    path = case / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


STORED = [("metrics-vos", 70, 0), ("metrics-vps", 19, 0), ("metrics-ytvis", 3, 0), ("metrics-vspw", 6, 0), ("metrics-dvps", 87, 0), ("ops-kernel_update", 186, 0), ("ops-memory_read", 75, 0), ("ops-ms_deform_attn", 35, 0)]


@pytest.mark.parametrize("name, tensors, left_out", STORED)
def test_stored_cases_agree(name, tensors, left_out):
    report = verify_case(shared("parity", name))
    assert report.passed, report
    assert sum(line.verdict == "ok" for line in report.lines) == tensors
    assert len(report.lines) == tensors + left_out


def test_a_tampered_result_fails(case, capsys):
    edit_tensors(case, lambda tensors: tensors.update({"out/alpha_1/J": tensors["out/alpha_1/J"] + 1e-9}))
    assert verify(Verify((case,), quiet=True)) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2
    assert "out/alpha_1/J" in out[0] and "1.00e-09" in out[0] and "FAIL" in out[0]
    assert out[1] == "case: FAIL, 19 tensors agree, 1 FAIL"


def test_a_tensor_that_nothing_produces_fails(case):
    edit_tensors(case, lambda tensors: tensors.update({"out/more": np.zeros(3)}))
    report = verify_case(case)
    assert [line.name for line in report.lines if line.failed] == ["out/more"]


def test_a_result_that_the_case_lacks_fails(case):
    edit_tensors(case, lambda tensors: tensors.pop("out/global"))
    assert [line.name for line in verify_case(case).lines if line.failed] == ["out/global"]


def test_verify_prints_a_line_per_tensor_and_goes_on_after_a_bad_case(case, tmp_path, capsys):
    assert verify(Verify((tmp_path / "absent", case))) == 1
    streams = capsys.readouterr()
    assert len(streams.out.splitlines()) == 21
    assert streams.out.splitlines()[-1] == "case: ok, 20 tensors agree"
    assert streams.err.startswith("pyvseg: error: ") and "absent" in streams.err
    assert verify(Verify((case,), quiet=True)) == 0


def test_no_adapter(case):
    edit_manifest(case, system="unheard-of")
    with pytest.raises(PyvsegError, match="no adapter for the system 'unheard-of'"):
        verify_case(case)


def spoil(case, kind):
    if kind == "no folder":
        shutil.rmtree(case)
    elif kind == "no tensors":
        (case / "tensors.npz").unlink()
    elif kind == "cut tensors":
        data = (case / "tensors.npz").read_bytes()
        (case / "tensors.npz").write_bytes(data[: len(data) // 2])
    elif kind == "flipped bytes":
        data = bytearray((case / "tensors.npz").read_bytes())
        data[len(data) // 3 : len(data) // 3 + 50] = bytes(50)
        (case / "tensors.npz").write_bytes(data)
    elif kind == "pickled tensors":
        np.savez(case / "tensors.npz", **{"in/x": np.array([{}], dtype=object)})
    elif kind == "cut manifest":
        (case / "manifest.json").write_text('{"system": "metr')
    elif kind == "list manifest":
        (case / "manifest.json").write_text("[]")
    elif kind == "no tolerance":
        manifest = json.loads((case / "manifest.json").read_text())
        del manifest["tolerance"]
        (case / "manifest.json").write_text(json.dumps(manifest))
    elif kind == "bad weights":
        edit_manifest(case, weights={"conv.weight": [["x"], 0, 1]})
    elif kind == "no input":
        edit_tensors(case, lambda tensors: tensors.pop("in/alpha/gt"))


@pytest.mark.parametrize(
    "kind",
    ["no folder", "no tensors", "cut tensors", "flipped bytes", "pickled tensors", "cut manifest", "list manifest", "no tolerance", "bad weights", "no input"],
)
def test_damaged_cases_give_one_clear_line(case, kind):
    spoil(case, kind)
    with pytest.raises(PyvsegError) as caught:
        verify_case(case)
    assert "\n" not in str(caught.value)
    assert "case" in str(caught.value)


def test_weights_follow_the_rule():
    case = load_case(shared("parity", "stcn-small"))
    assert len(case.weights) == len(case.manifest["weights"]) == 405
    weight = case.weights["decoder.pred.weight"]
    assert weight.dtype == np.float32 and weight.shape == (1, 256, 3, 3)
    assert weight.std() == pytest.approx(case.manifest["weights"]["decoder.pred.weight"][2], rel=0.05)
    assert all(name.startswith("in/") for name in case.inputs)
