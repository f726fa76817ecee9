# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from pyvseg.cli.main import main
from pyvseg.errors import VideoError
from pyvseg.engine.types import FrameResult
from pyvseg.video.palette import PALETTE
from pyvseg.video.panoptic_writer import PanopticClasses, PanopticJsonWriter, PanopticOverlayWriter, PanopticResult, join_panoptic
from pyvseg.video.writer import OverlayWriter, PngWriter, RleWriter
from pyvseg.view import write_page
from tests.video.clips import images, square

HOSTILE = "<img src=x onerror=document.title=1> #1? 50%.\"'&"


def results(folder, count=12, overlay=True, tracks="masks.json"):
    """A finished video: object 3 in every frame, object 7 in the first third."""
    frames = [FrameResult(t, f"{t:05d}", image, square(3) if t >= count // 3 else square(3) + np.flipud(square(7)), (3, 7)) for t, image in enumerate(images(count))]
    writers = [PngWriter(folder / "masks"), RleWriter(folder / "masks.json", folder.name)]
    for writer in writers + ([OverlayWriter(folder / "overlay.mp4", (48, 64), None)] if overlay else []):
        for frame in frames:
            writer.write(frame)
        writer.close()
    if tracks == "results.json":
        three, seven = json.loads((folder / "masks.json").read_text())
        found = [seven | {"score": 0.9, "category": "cat & dog"}, three | {"score": 0.25, "category_id": 4}]
        (folder / "results.json").write_text(json.dumps(found))
        (folder / "masks.json").unlink()
    return folder


def data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S).group(1))


def test_one_video(tmp_path):
    page, count = write_page(results(tmp_path / "out"))
    (video,) = data(page)["videos"]
    assert count == 1 and (video["name"], video["frames"], video["size"], video["fps"]) == ("out", 12, [48, 64], 24.0)
    assert (video["overlay"], video["strip"]) == ("overlay.mp4", "masks.jpg")
    assert [(o["object_id"], o["frames"], o["present"]) for o in video["objects"]] == [(3, 12, "1" * 12), (7, 4, "1" * 4 + "0" * 8)]
    assert cv2.imread(str(tmp_path / "out" / "masks.jpg")).shape == (96, 5 * 128, 3)


def test_boxes(tmp_path):
    results(tmp_path / "out", tracks="results.json")
    boxes = [("dog", 9, 0, 0.4), ("zebra", 30, 0, 0.1), ("dog", 9, 1, 0.9), ("dog", 9, 2, 0.2), ("fox", 12, 3, 0.5)]
    entries = [{"image_id": t, "category_id": i, "bbox": [1, 2, 3, 4], "score": score, "category": name} for name, i, t, score in boxes]
    (tmp_path / "out" / "results.json").write_text(json.dumps(entries))
    page, _ = write_page(tmp_path / "out")
    (video,) = data(page)["videos"]
    assert [(o["category"], o["score"], o["frames"], o["present"]) for o in video["objects"]] == [("dog", 0.9, 2, "1100"), ("fox", 0.5, 1, "0001")]
    assert video["frames"] == 12  # from the overlay
    (tmp_path / "out" / "results.json").write_text(json.dumps([entries[0], {"bbox": 3}]))
    assert data(write_page(tmp_path / "out")[0])["videos"][0]["objects"] == []


def test_a_batch_with_hostile_names_and_failures(tmp_path):
    results(tmp_path / HOSTILE, tracks="results.json")
    results(tmp_path / "without overlay", overlay=False)
    notes = [{"name": "broken", "status": "failed", "reason": "</script><b>damaged"}, {"name": HOSTILE, "status": "failed", "reason": "an earlier try"}, {"name": "x"}, 3]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes) + '{"cut')
    page, count = write_page(tmp_path)
    text, videos = page.read_text(encoding="utf-8"), {video["name"]: video for video in data(page)["videos"]}
    assert count == 3 and set(videos) == {HOSTILE, "without overlay", "broken"}
    assert "<img src=x" not in text and "<b>" not in text
    assert videos["broken"]["error"] == "</script><b>damaged" and videos[HOSTILE]["error"] is None
    assert videos["without overlay"]["strip"] == "without%20overlay/masks.jpg" and videos["without overlay"]["overlay"] is None
    found = videos[HOSTILE]["objects"]
    assert [(o["category"], o["score"]) for o in found] == [("cat & dog", 0.9), ("class 4", 0.25)]
    assert "/" in videos[HOSTILE]["overlay"] and not set(' #?"<%') & set(videos[HOSTILE]["overlay"].replace("%", ""))


@pytest.mark.parametrize("masks, tracks", [("Annotations", "rle"), ("masks", "tracks")])
def test_a_dataset(tmp_path, masks, tracks):
    results(tmp_path / "one")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "results.json").write_text("[]")
    for source, target in (("masks", f"{masks}/seq"), ("masks.json", f"{tracks}/seq.json"), ("overlay.mp4", "overlays/seq.mp4")):
        (tmp_path / "set" / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "one" / source, tmp_path / "set" / target)
    page, _ = write_page(tmp_path / "set")
    (video,) = data(page)["videos"]
    assert (video["name"], video["overlay"], video["strip"]) == ("seq", "overlays/seq.mp4", f"{tracks}/seq.jpg")


@pytest.mark.parametrize("layout", ["batch", "one video"])
def test_panoptic_results(tmp_path, layout):
    """The sky in all frames, a cat in the second half; as a batch writes them and as a run does."""
    out = tmp_path / "out"
    folder, overlay, segments = (out / "clip",) * 3 if layout == "batch" else (out, out, out / "segments")
    classes = PanopticClasses(("cat", "sky"), frozenset({0}), 10000)
    segments_json = segments / ("segments.json" if layout == "batch" else "clip.json")
    writers = [PanopticJsonWriter(segments_json, "clip", classes), PanopticOverlayWriter(overlay / "overlay.mp4", (48, 64), None, classes)]
    for t, image in enumerate(images(8)):
        values = np.full((48, 64), 10000, np.int32)
        values[:20, :20] = 3 if t >= 4 else 10000
        for writer in writers:
            writer.write(PanopticResult(t, f"{t:05d}", image, values, (3, 10000) if t >= 4 else (10000,)))
    for writer in writers:
        writer.close()
    join_panoptic([segments_json], folder / "pred.json", classes)
    (video,) = data(write_page(out)[0])["videos"]
    assert (video["name"], video["frames"], video["size"]) == ("clip", 8, [48, 64])
    assert [(o["object_id"], o["category"], o["present"]) for o in video["objects"]] == [(3, "cat", "00001111"), (10000, "sky", "1" * 8)]
    assert video["strip"] and [o["colour"] for o in video["objects"]] == ["#" + bytes(PALETTE[i]).hex() for i in (1 + 93, 1 + 97)]
    segments_json.write_text('{"annotations": [{"segments_info": 3}]}')
    assert data(write_page(out)[0])["videos"][0]["objects"] == []


def test_damaged_results_say_nothing_and_stop_nothing(tmp_path):
    for name in "ab":
        results(tmp_path / name)
    for path in ("masks.json", "overlay.mp4"):
        (tmp_path / "a" / path).write_bytes((tmp_path / "a" / path).read_bytes()[:100])
    a, b = data(write_page(tmp_path)[0])["videos"]
    assert (a["objects"], a["strip"]) == ([], None) and len(b["objects"]) == 2


def test_a_batch_under_way(tmp_path):
    results(tmp_path / "unfinished")
    with pytest.raises(VideoError, match="no video is finished yet"):
        write_page(tmp_path)
    results(tmp_path / "a")
    assert [video["name"] for video in data(write_page(tmp_path)[0])["videos"]] == ["a"]


@pytest.mark.parametrize("made", [False, True])
def test_nothing_to_show(tmp_path, made, capsys):
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
    with pytest.raises(VideoError, match="none: no "):
        write_page(folder)
    assert main(["view", str(folder)]) == 2 and "--out folder of a run" in capsys.readouterr().err


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return name
    pytest.skip("no Chromium on this machine to open the page in")


def _open(page, tmp_path, fragment="") -> str:
    """The document after its script has run, as the browser writes it out."""
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [_browser(), *quiet.split(), f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


def test_in_a_browser(tmp_path):
    _browser()
    results(tmp_path / "out" / HOSTILE, tracks="results.json")
    for i in range(70):
        folder = tmp_path / "out" / f"plain{i:02d}"
        shutil.copytree(tmp_path / "out" / HOSTILE, folder) if i == 0 else (folder.mkdir(), (folder / "results.json").write_text("[]"))
    page, _ = write_page(tmp_path / "out")
    whole = _open(page, tmp_path)
    assert "71 of 71 videos" in whole and "&lt;img src=x onerror" in whole and "<title>out</title>" in whole
    assert whole.count("<article>") == 60  # the others when the reader comes near them
    chosen = _open(page, tmp_path, "#class=class 4&score=0.2&play=plain00")
    assert "2 of 71 videos" in chosen and chosen.count("<article>") == 2
    assert re.search(r'<dialog id="player" open="">.*<h2>plain00</h2>\s*<video[^>]* src="plain00/overlay.mp4"', chosen, re.S)
    assert "0 of 71 videos" in _open(page, tmp_path, "#class=class 4&score=0.3")
