# SPDX-License-Identifier: Apache-2.0
"""The metrics beside a plain formulation of the same definition: `python -m benchmarks.metrics`.

The plain form follows the way of the published evaluation programs, in our own words: every window of every length reads its
PNGs again and goes through its segments one by one, and STQ reads them once more; tracks are compared pair by pair, frame by frame.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco

from benchmarks.timing import measure
from pyvseg.datasets.vis_tracks import Video, tubes_of
from pyvseg.metrics import stq, vis, vpq
from pyvseg.metrics.panoptic import Pairs, Segments, count_frame
from pyvseg.ops import mask_overlap, pack_masks
from pyvseg.video.panoptic import read_ids, write_ids
from pyvseg.video.rle import encode_masks

Lists = list[Segments]


def plain_vpq(read_truth, read_result, truth: Lists, result: Lists, num_classes: int, n: int) -> np.ndarray:
    """Sum of IoU, TP, FP, FN per class, (num_classes, 4), of one video; `read_*(frame)` returns an id map."""
    counts = np.zeros((num_classes, 4))
    for start in range(len(truth) - n + 1):
        frames = range(start, start + n)
        tubes = (_plain_tubes(lists, frames) for lists in (truth, result))
        _plain_window([read_truth(t) for t in frames], [read_result(t) for t in frames], *tubes, counts)
    return counts


def _plain_tubes(lists: Lists, frames: range) -> dict[int, list]:
    """id -> [class, crowd, area]"""
    tubes: dict[int, list] = {}
    for t in frames:
        for name, of_class, crowd, area in zip(*(column.tolist() for column in lists[t])):
            tubes.setdefault(name, [of_class, crowd, 0])[2] += area
    return tubes


def _plain_window(truth_maps, result_maps, truth: dict[int, list], result: dict[int, list], counts: np.ndarray) -> None:
    truth_map, result_map = np.stack(truth_maps).astype(np.uint64), np.stack(result_maps).astype(np.uint64)
    for name, area in zip(*np.unique(result_map, return_counts=True)):
        if name:
            result[int(name)][2] = int(area)
    inside = {}
    for key, pixels in zip(*np.unique(truth_map * (1 << 24) + result_map, return_counts=True)):
        inside[int(key) >> 24, int(key) & 0xFFFFFF] = int(pixels)
    matched_truth, matched_result = set(), set()
    for (t, r), pixels in inside.items():
        if t not in truth or r not in result or truth[t][1] or truth[t][0] != result[r][0]:
            continue
        iou = pixels / (truth[t][2] + result[r][2] - pixels - inside.get((0, r), 0))
        if iou > 0.5:
            counts[truth[t][0]] += (iou, 1, 0, 0)
            matched_truth.add(t)
            matched_result.add(r)
    crowds = {}
    for t, (of_class, crowd, _) in truth.items():
        if crowd:
            crowds[of_class] = t
        elif t not in matched_truth:
            counts[of_class, vpq.FN] += 1
    for r, (of_class, _, area) in result.items():
        excused = inside.get((0, r), 0) + (inside.get((crowds[of_class], r), 0) if of_class in crowds else 0)
        if r not in matched_result and not excused / area > 0.5:
            counts[of_class, vpq.FP] += 1


def plain_stq(labels, num_classes: int, things: list[int], ignore: int = 255) -> tuple[float, float, float]:
    """STQ, AQ and SQ of one sequence; `labels` yields (annotation, result) label maps."""
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    sizes = [defaultdict(int) for _ in range(3)]  # annotated tubes, the result's, both
    for truth, result in labels:
        classes = [np.where(each >> 16 == ignore, num_classes, each >> 16) for each in (truth, result)]
        np.add.at(confusion, (classes[0].ravel(), classes[1].ravel()), 1)
        in_truth, in_result = (np.isin(each, things) for each in classes)
        crowd = in_truth & (truth & 0xFFFF == 0)
        in_truth, in_result = in_truth & ~crowd, in_result & ~crowd
        both = in_truth & in_result
        for table, values in zip(sizes, (truth[in_truth], result[in_result], truth[both] * (1 << 24) + result[both])):
            for key, pixels in zip(*np.unique(values, return_counts=True)):
                table[int(key)] += int(pixels)
    association = 0.0
    for t, size in sizes[0].items():
        for r, other in sizes[1].items():
            inside = sizes[2].get(t * (1 << 24) + r, 0)
            association += inside / size * (inside / (size + other - inside))
    aq = association / max(len(sizes[0]), 1e-15)
    confusion[num_classes] = 0
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    sq = (confusion.diagonal()[union > 0] / union[union > 0]).mean()
    return float(np.sqrt(aq * sq)), aq, float(sq)


def plain_labels(ids: np.ndarray, segments: Segments, numbers: dict[int, int]) -> np.ndarray:
    """Labels of a map as VIPSeg's evaluation makes them; `numbers` grows with the ids that appear."""
    labels = np.full(ids.shape, 255 << 16 | 255, np.int64)
    for name, of_class in zip(segments.ids.tolist(), segments.classes.tolist()):
        labels[ids == name] = (of_class << 16) + numbers.setdefault(name, len(numbers))
    return labels


def synthetic(frames: int, height: int, width: int, tubes: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, Lists, Lists]:
    """Id maps (T, H, W) of annotation and result, and their lists: ellipses that drift over bands, the result's a little off."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, num_classes, tubes)
    place, speed = rng.uniform(0, 1, (tubes, 2)) * (height, width), rng.normal(0, 4, (tubes, 2))
    size = rng.uniform(0.03, 0.2, (tubes, 2)) * (height, width)
    volumes = []
    for error in (0.0, 0.05):
        volume = np.zeros((frames, height, width), np.int32)
        for t, image in enumerate(volume):
            for band in range(6):
                image[band * height // 6 + int(error * 60) : (band + 1) * height // 6] = 1 + band
            for i in range(6, tubes):
                (y, x), (b, a) = place[i] + t * speed[i] + rng.normal(0, 30 * error, 2), size[i] * (1 + rng.normal(0, error))
                cv2.ellipse(image, (int(x), int(y)), (int(a), int(b)), 10 * i, 0, 360, 1 + i, -1)
        volumes.append(volume)
    volumes[1][volumes[1] > 0] += 1000
    lists = [[_listed(image, classes, first) for image in volume] for volume, first in zip(volumes, (1, 1001))]
    return *volumes, *lists


def _listed(image: np.ndarray, classes: np.ndarray, first: int) -> Segments:
    ids, areas = np.unique(image[image > 0], return_counts=True)
    return Segments.of(ids, classes[ids - first], areas=areas)


def panoptic() -> None:
    num_classes, things, frames = 124, list(range(58)), 24
    *volumes, truth, result = synthetic(frames, 720, 1280, 40, num_classes)
    with tempfile.TemporaryDirectory() as folder:
        paths = [[Path(folder) / f"{name}{t}.png" for t in range(frames)] for name in "ab"]
        for maps, of_map in zip(volumes, paths):
            for path, image in zip(of_map, maps):
                write_ids(path, image)

        def plain_read(part: int):
            def read(t: int) -> np.ndarray:
                blue, green, red = cv2.split(cv2.imread(str(paths[part][t])).astype(np.uint32))
                return red + green * 256 + blue * 65536

            return read

        def plain() -> tuple:
            numbers = {}, {}
            labels = [
                [plain_labels(plain_read(part)(t), lists[t], numbers[part]) for part, lists in enumerate((truth, result))] for t in range(frames)
            ]
            return (
                np.stack([plain_vpq(plain_read(0), plain_read(1), truth, result, num_classes, n) for n in vpq.WINDOWS]),
                plain_stq(labels, num_classes, things),
            )

        def ours(read=lambda part, t: read_ids(paths[part][t])) -> tuple:
            video, sequence = vpq.VideoPQ(num_classes), stq.SequenceSTQ(num_classes, things)
            numbers = stq.number_segments(truth), stq.number_segments(result)
            for t in range(frames):
                frame = count_frame(read(0, t), read(1, t), truth[t], result[t], num_classes)
                video.update(frame)
                labels = [stq.relabel(ids, *lists) for ids, *lists in zip(frame.pairs, (truth[t], result[t]), (numbers[0][t], numbers[1][t]))]
                sequence.update(Pairs(*labels, frame.pairs.pixels))
            return video.counts, stq.quality([sequence.counts()])

        expected, got = plain(), ours()
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-12)
        in_memory = lambda: ours(lambda part, t: volumes[part][t])  # noqa: E731
        times = measure({"plain": plain, "pyvseg": ours, "pyvseg, maps in memory": in_memory}, budget=40, rounds=5)
    report(f"VPQ at windows {vpq.WINDOWS} and STQ of {frames} frames of 1280x720, about 40 tubes", times, frames)


def plain_track_iou(results: list[list[dict]], truth: list[list[dict]]) -> np.ndarray:
    """Pair by pair and frame by frame, in COCO's compressed form."""
    iou = np.zeros((len(results), len(truth)))
    for d, result in enumerate(results):
        for g, annotated in enumerate(truth):
            shared = union = 0.0
            for one, other in zip(result, annotated):
                shared += coco.area(coco.merge([one, other], intersect=True))
                union += coco.area(coco.merge([one, other]))
            iou[d, g] = shared / union if union else 0.0
    return iou


def painted_track_iou(results: list[list[dict]], truth: list[list[dict]]) -> np.ndarray:
    """Every frame's masks as pixels, packed for `mask_overlap`."""
    shared = areas = others = 0
    for frame in zip(zip(*results), zip(*truth)):
        packed = [pack_masks(torch.from_numpy(np.ascontiguousarray(coco.decode(list(rles)).transpose(2, 1, 0)))) for rles in frame]
        counted = mask_overlap(*packed)
        shared, areas, others = shared + counted[0], areas + counted[1], others + counted[2]
    return (shared / (areas[:, None] + others - shared).clamp(min=1)).numpy()


def instances() -> None:
    frames, size = 36, (720, 1280)
    volume, other, *_ = synthetic(frames, *size, 36, 40)
    results = [encode_masks(other == 1001 + i) for i in range(6, 36)]
    truth = [encode_masks(volume == 1 + i) for i in range(6, 11)]
    video = Video(1, "video", size, frames)

    def ours() -> np.ndarray:
        tubes = [tubes_of("", video, len(rles), [(i, t, rle) for i, row in enumerate(rles) for t, rle in enumerate(row)])[0] for rles in (results, truth)]
        shared = vis.tube_overlap(*tubes)
        areas = [vis.tube_areas(each) for each in tubes]
        return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1)

    ways = {"plain": lambda: plain_track_iou(results, truth), "painted, mask_overlap": lambda: painted_track_iou(results, truth), "pyvseg": ours}
    for run in ways.values():
        np.testing.assert_allclose(run(), ours(), rtol=1e-6)
    report(f"IoU of 30 x 5 tracks in {frames} frames of 1280x720, from COCO RLE", measure(ways, budget=20, rounds=7), frames)


def report(title: str, times: dict, frames: int) -> None:
    seconds = {way: statistics.median(wall for wall, _ in rows) for way, rows in times.items()}
    print(title)
    for way, wall in seconds.items():
        print(f"  {way:<24} {1e3 * wall / frames:8.2f} ms per frame  {seconds['plain'] / wall:6.1f}x")


if __name__ == "__main__":
    panoptic()
    instances()
