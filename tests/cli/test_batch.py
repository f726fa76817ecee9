# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from pyvseg.cli.main import main
from pyvseg.engine.recipe import Recipe
from pyvseg.video import write_labels
from tests.cli.test_run import fails
from tests.engine.conftest import clip, small  # noqa: F401  (fixtures)
from tests.engine.standin import standin
from tests.video.clips import images, square, write_images, write_video


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """clips/a.mp4, clips/b.mp4, clips/frames/, deep/er/c.mp4 and masks for all; a stand-in for the network."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "masks").mkdir()
    for path in ("clips/a.mp4", "clips/b.mp4", "deep/er/c.mp4"):
        write_video(tmp_path / path, images(6))
    write_images(tmp_path / "clips" / "frames", images(4))
    for name in ("a", "b", "c", "frames"):
        write_labels(tmp_path / "masks" / f"{name}.png", square())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Recipe, "task", lambda self: standin(self.clip_length or 5, results=self.results))
    return tmp_path


def done(out) -> dict[str, str]:
    lines = [json.loads(line) for path in out.glob("manifest*.jsonl") for line in path.read_text().splitlines()]
    return {line["name"]: line["status"] for line in lines if "name" in line}


def test_folders_patterns_and_lists(archive, capsys):
    (archive / "list.txt").write_text("# mine\nclips/a.mp4\n\ndeep/er/c.mp4\tmasks/b.png\nclips/a.mp4\n")
    for inputs, names in (["clips"], "a b frames"), (["[cd]*/**/*.mp4"], "a b c"), (["list.txt", "clips/frames"], "a c frames"), (["clips/b.mp4"], "b"):
        out = archive / f"to_{names.replace(' ', '')}"
        assert main(["batch", *inputs, "--masks", "masks", "--out", str(out)]) == 0
        assert set(done(out)) == set(names.split()) and all((out / name / "masks").is_dir() for name in names.split())
    printed = capsys.readouterr()
    assert "a.mp4: named twice, run once" in printed.err and "frames per second" in printed.out and "busy: " in printed.out
    assert main(["batch", "clips", "--masks", "masks", "--out", "to_abframes"]) == 0
    assert "0 videos done, 3 before" in capsys.readouterr().out


def test_lists_as_people_write_them(archive, capsys):
    """A byte order mark, Windows' line ends, blanks, names of any kind, one video by two paths, and pictures beside the videos."""
    (archive / "link").symlink_to(archive / "clips")
    for name in ("50%d of #1", "\u00fcn\u0085\u2028i"):
        os.link(archive / "clips" / "a.mp4", archive / f"{name}.mp4")
        os.link(archive / "masks" / "a.png", archive / "masks" / f"{name}.png")
    lines = ["# mine", "", " clips/b.mp4 \tmasks/c.png", "50%d of #1.mp4", "\u00fcn\u0085\u2028i.mp4", "clips/a.mp4", "link/a.mp4"]
    (archive / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert main(["batch", "list.txt", "--masks", "masks", "--out", "out"]) == 0
    assert set(done(archive / "out")) == {"a", "b", "50%d of #1", "\u00fcn\u0085\u2028i"}
    assert main(["batch", "link/a.mp4", "--masks", "masks", "--out", "out"]) == 0
    assert "0 videos done, 1 before" in capsys.readouterr().out
    os.link(archive / "masks" / "a.png", archive / "clips" / "poster.png")
    assert main(["batch", "clips", "--masks", "masks", "--out", "posters"]) == 0 and set(done(archive / "posters")) == {"a", "b", "frames"}


def test_failures_set_the_exit_status(archive, capsys):
    (archive / "clips" / "broken.mp4").write_bytes(b"x" * 99)
    (archive / "list.txt").write_text("clips/a.mp4\nclips/gone.mp4\nclips/broken.mp4\nclips/b.mp4\tmasks/none.png\n")
    assert main(["batch", "list.txt", "--masks", "masks", "--out", "out"]) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.err.splitlines() if line.startswith("pyvseg: failed: ")] and "3 failed" in printed.err
    assert all(word in printed.err for word in ("gone.mp4: no such", "broken.mp4: cannot be read", "none.png: no such")) and "Traceback" not in printed.err
    assert done(archive / "out") == {"a": "done", "gone": "failed", "broken": "failed", "b": "failed"}
    assert main(["batch", "list.txt", "--masks", "masks", "--out", "out"]) == 1
    printed = capsys.readouterr().err
    assert "0 failed, 3 before (--retry-failed tries them again)" in printed and "1 x no such video file or folder of images" in printed


def test_only_the_json(archive):
    assert main(["batch", "clips", "--masks", "masks", "--no-pngs", "--no-overlay", "--out", "out"]) == 0
    assert [path.name for path in (archive / "out" / "a").iterdir()] == ["masks.json"]


def bad_commands():
    yield ["nowhere"], "nowhere: no such file or folder"
    yield ["*.avi"], r"*.avi: matches nothing"
    yield ["none.txt"], "list none.txt: cannot be read"
    yield ["empty.txt"], "list empty.txt: names no video"
    yield ["bytes.txt"], "list bytes.txt: cannot be read (not a text file)"
    yield ["clips/a.mp4", "other/a.mp4"], "clips/a.mp4 and other/a.mp4 would both write a; rename one"
    yield ["clips/a.mp4", "--masks", "nomasks"], "--masks nomasks: no such folder"
    yield [], "no inputs; name videos"
    yield ["two.txt"], "clips/a.mp4: named twice with different masks"
    yield ["dots.txt"], "...mp4: results cannot be called '..'; rename the video"
    yield ["clips", "--profile", "nowhere/trace.json"], "cannot write nowhere/trace.json"
    yield ["clips", "--ray", "auto", "--workers", "2"], "--ray and --workers exclude each other"
    yield ["clips", "--ray", "--workers", "2"], "--ray and --workers exclude each other"
    yield ["clips", "--at-once", "2", "--ray"], "--ray and --at-once exclude each other"
    yield ["clips", "--shard", "3/2"], "--shard 3/2: expected I/N"
    yield ["clips", "--workers", "0"], "--workers 0: must be at least 1"
    yield ["clips", "--clip-length", "0"], "--clip-length 0: must be at least 1"
    yield ["clips", "--model", "nosuch"], "no model is called 'nosuch'"
    yield ["clips", "--model", "minvis_r50_ytvis21"], "leave --masks out"


@pytest.mark.parametrize("arguments, message", [pytest.param(*each, id=" ".join(each[0])) for each in bad_commands()])
def test_bad_commands(archive, capsys, arguments, message):
    (archive / "empty.txt").write_text("# nothing\n")
    (archive / "two.txt").write_text("clips/a.mp4\tmasks/a.png\nclips/a.mp4\tmasks/b.png\n")
    (archive / "dots.txt").write_text("...mp4\n")
    (archive / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (archive / "other").mkdir()
    os.link(archive / "clips" / "b.mp4", archive / "other" / "a.mp4")
    masks = [] if "--masks" in arguments else ["--masks", "masks"]
    assert message in fails(capsys, "batch", *arguments, *masks, "--out", "out")
    assert not (archive / "out").exists()


def test_masks_are_needed(archive, capsys):
    assert "labels are missing" in fails(capsys, "batch", "clips", "--out", "out")


def test_a_model_that_finds_its_objects(small, clip, tmp_path, capsys):  # noqa: F811
    weights = small("minvis_r50_ytvis21")
    for n in (1, 2):
        write_images(tmp_path / "more" / f"street{n}", images(5))
    out = tmp_path / "out"
    arguments = ["batch", str(clip), str(tmp_path / "more"), "--model", "minvis_r50_ytvis21", "--weights", str(weights), "--out", str(out)]
    assert main([*arguments, "--at-once", "2", "--score-threshold", "0"]) == 0
    assert done(out) == {"street": "done", "street1": "done", "street2": "done"}
    assert sorted(p.name for p in (out / "street").iterdir()) == ["masks", "overlay.mp4", "results.json"]
    assert "score_threshold was 0.0 and is now 0.3" in fails(capsys, *arguments)


def test_a_split_of_youtube_vis(small, clip, tmp_path, capsys):  # noqa: F811
    """Its videos by the names and sizes of the JSON, with its ids in the results."""
    weights, names = small("minvis_r50_ytvis21"), sorted(path.name for path in clip.iterdir())
    videos = [{"id": 3 + n, "file_names": [f"{clip.name}/{name}" for name in names[n:]], "height": 54 + n, "width": 71} for n in range(2)]
    (tmp_path / "valid.json").write_text(json.dumps({"videos": videos, "categories": [{"id": 26, "name": "person"}]}))
    assert main(["batch", str(tmp_path / "valid.json"), "--model", "minvis_r50_ytvis21", "--weights", str(weights), "--out", str(tmp_path / "out")]) == 1
    assert done(tmp_path / "out") == {"video_3": "done", "video_4": "failed"} and "annotation file says 71x55" in capsys.readouterr().err
    tracks = json.loads((tmp_path / "out" / "video_3" / "results.json").read_text())
    assert {(track["video_id"], track["category_id"]) for track in tracks} <= {(3, 26)}
