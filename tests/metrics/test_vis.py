# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from pyvseg.datasets.vis_tracks import VISTracks
from pyvseg.errors import PyvsegError
from pyvseg.metrics import vis
from pyvseg.ops import mask_overlap
from pyvseg.video.rle import encode_masks

SIZE, LENGTH = (20, 30), 3


def documents(rng, videos=2):
    """Annotations and results of random boxes, and their masks: uncompressed RLE, absent frames, ties of scores and categories at random."""
    truth = {"videos": [], "categories": [{"id": i, "name": f"c{i}"} for i in (1, 2)], "annotations": []}
    results, masks = [], {}
    for video in range(1, videos + 1):
        names = [f"v{video}/{t:05d}.jpg" for t in range(LENGTH)]
        truth["videos"].append({"id": video, "height": SIZE[0], "width": SIZE[1], "length": LENGTH, "file_names": names})
        for part, entries, count in (("truth", truth["annotations"], 4), ("result", results, 9)):
            volume = np.zeros((count, LENGTH, *SIZE), bool)
            for track in volume:
                y, x, h, w = rng.integers(0, 10), rng.integers(0, 15), rng.integers(3, 10), rng.integers(3, 15)
                for t in range(LENGTH):
                    if t == 0 or rng.random() < 0.7:
                        track[t, y : y + h, x + t : x + t + w] = True
            masks[video, part] = volume
            for i, track in enumerate(volume):
                rles = [rle if mask.any() else None for rle, mask in zip(encode_masks(track), track)]
                if i == 0:
                    rles = [rle and uncompressed(mask) for rle, mask in zip(rles, track)]
                entry = {"video_id": video, "category_id": int(rng.integers(1, 3)), "segmentations": rles}
                extra = {"score": float(rng.integers(0, 5)) / 5} if part == "result" else {"id": len(entries) + 1, "iscrowd": int(i == 3)}
                entries.append(entry | extra)
    return truth, results, masks


def uncompressed(mask):
    flat = np.concatenate(([0], mask.ravel(order="F"), [0]))
    edges = np.flatnonzero(np.diff(flat))
    edges = np.concatenate((edges, [mask.size])) if flat[-2] == 0 else edges
    return {"size": list(SIZE), "counts": np.diff(edges, prepend=0).tolist()}


def write(folder, truth, results):
    paths = [folder / "truth.json", folder / "results.json"]
    for path, document in zip(paths, (truth, results)):
        path.write_text(json.dumps(document))
    return VISTracks(paths[0], paths[1:])


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_those_of_painted_masks(tmp_path, seed):
    truth, results, masks = documents(np.random.default_rng(seed))
    tracks = write(tmp_path, truth, results)
    for video in tracks.videos.values():
        ours = tracks.result(video).tubes, tracks.truth(video).tubes
        painted = [torch.from_numpy(masks[video.id, part]) for part in ("result", "truth")]
        expected = [each.numpy() for each in mask_overlap(*painted)]
        for got, want in zip((vis.tube_overlap(*ours), *map(vis.tube_areas, ours)), expected):
            assert (got == want).all()
        shown = [[frame.sum() for frame in track if frame.any()] or [0] for track in masks[video.id, "result"]]
        assert tracks.result(video).areas == pytest.approx([np.mean(areas) for areas in shown])


def slow_match(iou, ignore, crowd, threshold):
    """The definition: for each track of the result the annotated one and whether that need not be found."""
    taken, found = set(), []
    order = sorted(range(len(ignore)), key=lambda g: ignore[g])
    for row in iou:
        best, match = min(threshold, 1 - 1e-10), None
        for g in order:
            if g in taken and not crowd[g]:
                continue
            if match is not None and not ignore[match] and ignore[g]:
                break
            if row[g] >= best:
                best, match = row[g], g
        taken.add(match)
        found.append((match is not None, match is not None and bool(ignore[match])))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_the_definition(seed):
    rng = np.random.default_rng(seed)
    iou = rng.integers(6, 11, (6, 5)) / 10  # ties abound
    areas, crowd = rng.integers(1, 4, 5) * 10_000.0, rng.random(5) < 0.2
    got = vis._match(np.zeros(6), np.full(6, 5000.0), iou, areas, crowd)
    for a, (low, high) in enumerate(vis.AREAS.values()):
        ignore = crowd | (areas < low) | (areas > high)
        outside = not low <= 5000 <= high
        for t, threshold in enumerate(vis.THRESHOLDS):
            expected = slow_match(iou, ignore, crowd, threshold)
            assert got.hit[a, t].tolist() == [hit for hit, _ in expected]
            assert got.ignored[a, t].tolist() == [ignored if hit else outside for hit, ignored in expected]
        assert got.annotated[a] == (~ignore).sum()


def test_perfect_and_no_results(tmp_path):
    truth, _, _ = documents(np.random.default_rng(0))
    for entry in truth["annotations"]:
        entry["iscrowd"] = 0
    perfect = [{**entry, "score": 1 - i / 100} for i, entry in enumerate(truth["annotations"])]
    for results, expected in ((perfect, 1.0), ([], 0.0)):
        tracks = write(tmp_path, truth, results)
        numbers = vis.summary(vis.average([vis.match_video(tracks.truth(v), tracks.result(v)) for v in tracks.videos.values()], (1, 2)))
        assert numbers["AP"] == numbers["AP75"] == numbers["AR10"] == pytest.approx(expected)
        assert np.isnan(numbers["AP large"])  # nothing is that large


def test_polygons(tmp_path):
    truth, _, _ = documents(np.random.default_rng(0), 1)
    entry = truth["annotations"][0]
    entry["segmentations"] = [[[2, 3, 12, 3, 12, 9, 2, 9]], None, None]
    tracks = write(tmp_path, truth, [])
    assert tracks.truth(tracks.videos["v1"]).areas[0] == pytest.approx(60)
    entry["segmentations"][0] = [[2, 3, 1e9, 3, 12, 9]]
    with pytest.raises(PyvsegError, match="v1: a mask is neither COCO RLE nor polygons within the image"):
        tracks = write(tmp_path, truth, [])
        tracks.truth(tracks.videos["v1"])
