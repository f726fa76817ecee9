# SPDX-License-Identifier: Apache-2.0
"""VPQ and STQ of the VIPSeg evaluation, and STQ with KITTI-STEP's settings, on synthetic panoptic videos."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.metrics import stq, vpq
from pyvseg.metrics.panoptic import Frame, Pairs, Segments, count_frame, count_pairs


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    vipseg, step = manifest["config"]["vipseg"], manifest["config"]["kitti_step"]
    videos = [_frames(video, vipseg["num_classes"], inputs) for video in vipseg["videos"]]
    yield from _vpq(vipseg, videos)
    yield from _stq("stq", vipseg, [_labels(frames) for frames in videos])
    sequences = [(inputs[f"in/step{i}.gt"], inputs[f"in/step{i}.pred"]) for i in range(step["sequences"])]
    yield from _stq("step", step, [[count_pairs(*maps) for maps in zip(*pair)] for pair in sequences])


def _frames(video: dict, num_classes: int, inputs: dict[str, np.ndarray]) -> list[Frame]:
    truth = [Segments.of(*np.array(rows, np.int64).reshape(-1, 3).T) for rows in video["gt_segments"]]
    result = [Segments.of(*np.array(rows, np.int64).reshape(-1, 2).T) for rows in video["pred_segments"]]
    name = video["video_id"]
    return [count_frame(*frame, num_classes) for frame in zip(inputs[f"in/{name}.gt"], inputs[f"in/{name}.pred"], truth, result)]


def _labels(frames: list[Frame]) -> list[Pairs]:
    pairs, truth, result = zip(*frames)
    labels = zip(pairs, truth, stq.number_segments(truth), result, stq.number_segments(result))
    return [Pairs(stq.relabel(p.truth, t, tl), stq.relabel(p.result, r, rl), p.pixels) for p, t, tl, r, rl in labels]


def _vpq(config: dict, videos: list[list[Frame]]) -> Iterator[tuple[str, np.ndarray]]:
    counts = 0
    for frames in videos:
        video = vpq.VideoPQ(config["num_classes"], config["windows"])
        for frame in frames:
            video.update(frame)
        counts = counts + video.counts
    for n, of_window in zip(config["windows"], counts):
        yield f"out/vpq.n{n}.pq_sq_rq_n", np.array([list(row.values()) for row in vpq.means(of_window, config["things"]).values()])
        occurs = of_window[:, vpq.TP :].any(1)
        yield f"tap/vpq.n{n}.category_iou_tp_fp_fn", np.concatenate((np.flatnonzero(occurs)[:, None], of_window[occurs]), 1)
    yield "out/vpq.mean_all_thing_stuff", np.array(list(vpq.totals(counts, config["things"]).values()))


def _stq(prefix: str, config: dict, sequences: list[list[Pairs]]) -> Iterator[tuple[str, np.ndarray]]:
    counts = []
    for frames in sequences:
        sequence = stq.SequenceSTQ(config["num_classes"], config["things"], config["ignore_label"])
        for pairs in frames:
            sequence.update(pairs)
        counts.append(sequence.counts())
    yield f"tap/{prefix}.confusion", sum(each.confusion for each in counts)
    total, per_sequence = stq.quality(counts), [stq.quality([each]) for each in counts]
    yield f"out/{prefix}.STQ_AQ_SQ", np.array(total)
    for name, column in zip(("STQ", "AQ", "IoU"), np.array(per_sequence).T):
        yield f"out/{prefix}.{name}_per_seq", column
