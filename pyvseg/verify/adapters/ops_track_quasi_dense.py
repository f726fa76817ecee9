# SPDX-License-Identifier: Apache-2.0
"""The quasi-dense tracker on stored detections."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.models.quasi_dense import Detections, QuasiDenseSettings, QuasiDenseState, Track, track


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    rules = settings(manifest["config"]["tracker"])
    ends = np.cumsum(inputs["in/count"])[:-1]
    boxes, labels, embeddings = (np.split(inputs[f"in/{name}"], ends) for name in ("boxes", "labels", "embeds"))
    for name in (key.split("/")[1] for key in inputs if key.endswith("/frame_id")):
        state, columns = QuasiDenseState(), {}
        for frame, *found in zip(inputs[f"in/{name}/frame_id"].tolist(), boxes, labels, embeddings):
            for kind, part, result in _frame(state, frame, Detections(*found), rules):
                columns.setdefault(f"{kind}/{name}/{part}", []).append(result)
        yield from ((key, np.concatenate(parts)) for key, parts in columns.items())


def settings(given: dict) -> QuasiDenseSettings:
    """Raises ValueError for a memory of backdrops or a measure that no published configuration has."""
    if given["memo_backdrop_frames"] != 1 or not given["with_cats"] or given["match_score_thr"] != given["nms_conf_thr"]:
        raise ValueError("only backdrops of one frame, matches within classes, and one threshold of similarity")
    names = {
        "init": "init_score_thr", "hold": "obj_score_thr", "match": "match_score_thr", "overlap": "nms_class_iou_thr",
        "weak_overlap": "nms_backdrop_iou_thr", "frames": "memo_tracklet_frames", "momentum": "memo_momentum",
    }  # fmt: skip
    return QuasiDenseSettings(**{ours: given[theirs] for ours, theirs in names.items()})


def _frame(state: QuasiDenseState, frame: int, found: Detections, rules: QuasiDenseSettings) -> Iterator[tuple]:
    kept, ids = np.empty(0, np.int64), np.empty(0, np.int64)
    if len(found.boxes):
        kept, ids = track(state, found, frame, rules)
    yield from (("out", part, x) for part, x in (("kept_count", np.array([len(kept)])), ("kept_index", kept), ("boxes", found.boxes[kept])))
    yield from (("out", part, x) for part, x in (("labels", found.labels[kept]), ("ids", ids), ("track_ids", np.maximum(ids, -1) + 1)))
    yield "tap", "memory_ids", np.array([*state.tracks], np.int64)
    yield "tap", "memory_last_frame", np.array([each.last for each in state.tracks.values()], np.int64)
    yield "tap", "next_id", np.array([state.next_id])
    for part, held in (("memory", [*state.tracks.values()]), ("backdrop", state.backdrops)):
        yield from (("tap", f"{part}_{name}", x) for name, x in _held(held, found.embeddings.shape[1]))


def _held(held: list[Track], width: int) -> Iterator[tuple[str, np.ndarray]]:
    yield "count", np.array([len(held)])
    yield "labels", np.array([each.label for each in held], np.int64)
    yield "boxes", np.array([each.box for each in held], np.float32).reshape(-1, 5)
    yield "embeds", np.array([each.embedding for each in held], np.float32).reshape(-1, width)
