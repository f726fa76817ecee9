# SPDX-License-Identifier: Apache-2.0
"""CTVIS: the tracker alone on stored detections, and the whole system on a short video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pyvseg.models.ctvis import CTVIS, CTVISSettings, Detections
from pyvseg.models.ctvis_tracker import Record, Tracked, TrackerSettings, TrackerState, track
from pyvseg.verify.adapters import set_criterion
from pyvseg.verify.adapters.mask2former import build, every, network_taps, settings
from pyvseg.verify.adapters.video_masks import network_input, tracks, video_taps


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    if weights:
        yield from _system(manifest, weights, inputs)
    elif "kind" in manifest["config"]:
        yield from set_criterion.run(manifest, weights, inputs)
    else:
        yield from _tracker(manifest, inputs)


def tracker_settings(config: dict) -> TrackerSettings:
    return TrackerSettings(
        select=config["inference_select_thr"], init=config["init_score_thr"], overlap=config["mask_nms_thr"],
        match=config["match_score_thr"], dead_frames=config["num_dead_frames"], cache=config["maximum_cache"],
        noise_after=config["noise_frame_num"], noise_frames=config["suppress_frame_num"], noise_absent=config["none_frame_num"],
    )  # fmt: skip


def _tracker(manifest: dict, inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    rules, state = tracker_settings(manifest["config"]["tracker"]), TrackerState()
    logits, masks, embeddings = (torch.from_numpy(inputs[f"in/{name}"]) for name in ("logits", "masks", "embeds"))
    frames = []
    for t in range(len(logits)):
        known = state.ids > 0
        tracked = track(state, logits[t], masks[t], embeddings[t], rules)
        frames.append(dict(zip(tracked.keys, tracked.queries)))
        tap = f"tap/frame{t}"
        yield f"{tap}.kept", tracked.detections.numpy()
        yield f"{tap}.query", np.array(tracked.queries, np.int64)
        yield f"{tap}.bank_last", np.array([t.last for t in state.bank.values()], np.int64)
        yield f"{tap}.record_ids", np.array(list(state.records), np.int64)
        yield from _frame_taps(tap, tracked, state, known, embeddings.shape[-1])
    records = list(state.records.values())
    queries = _queries(records, frames)
    yield "out/record_ids", np.array(list(state.records), np.int64)
    yield "out/record_query", queries
    yield "out/track_logits", torch.stack([r.mean_logits for r in records]).numpy()
    present = _followed(queries, masks.numpy()) > 0
    yield "out/track_masks", np.packbits(present.reshape(*present.shape[:2], -1), axis=-1)


def _frame_taps(tap: str, tracked: Tracked, state: TrackerState, known: bool, width: int, channel: int = 1) -> Iterator[tuple]:
    yield f"{tap}.scores_sorted", tracked.scores.numpy()
    if known:
        yield f"{tap}.similarity", tracked.similarity.numpy()
    yield f"{tap}.ids", np.array(tracked.ids, np.int64)
    bank = state.bank.values()
    yield f"{tap}.bank_ids", np.array(list(state.bank), np.int64)
    yield f"{tap}.bank_frames", np.array([t.frames for t in bank], np.int64)
    embeddings = np.array([t.embedding.numpy() for t in bank], np.float32).reshape(len(bank), width)
    yield f"{tap}.bank_embeds", embeddings[:, ::channel]


def _queries(records: list[Record], frames: list[dict[int, int]]) -> np.ndarray:
    """The query that each record had in each frame (n, T), -1 where it was absent; `frames` say it by the records' keys."""
    return np.array([[frame.get(record.key, -1) for frame in frames] for record in records])


def _followed(queries: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Mask logits (n, T, h, w) of the records out of (T, Q, h, w), zero where they are absent."""
    followed = masks[np.arange(len(masks)), queries]
    followed[queries < 0] = 0
    return followed


@torch.inference_mode()
def _system(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    base = vars(settings(config))
    rules = tracker_settings(config["tracker"])
    model = CTVIS(CTVISSettings(**base, embed_hidden=config["reid_hidden"], embed_layers=config["reid_layers"], tracker=rules))
    build(model, weights)
    taps = network_taps(model)
    size, x = network_input(model, inputs)
    predictions = model(x, auxiliary=True)
    yield from video_taps(manifest, taps)
    taps.close()
    clip = Detections(predictions[-1].logits, predictions[-1].masks, model.reid_embed(predictions[-1].queries))
    step = every(manifest, "pred_masks")
    yield "tap/bare_logits", predictions[0].logits.numpy()
    yield "tap/pred_logits", clip.logits.numpy()
    yield "tap/pred_masks", clip.masks[..., ::step, ::step].numpy()
    yield "tap/pred_embeds", clip.embeddings.numpy()
    state = model.new_state(size)
    channel = every(manifest, "bank_embeds")
    frames = []
    for t in range(len(x)):
        known = state.tracker.ids > 0
        (tracked,) = model.link(Detections(*(part[t : t + 1] for part in clip)), state)
        frames.append(dict(zip(tracked.keys, tracked.queries)))
        yield f"tap/frame{t}.nms_keep", tracked.kept.numpy().astype(np.uint8)
        yield from _frame_taps(f"tap/frame{t}", tracked, state.tracker, known, clip.embeddings.shape[-1], channel)
    records = list(state.tracker.records.values())
    step = every(manifest, "out/track_masks")
    yield "out/track_logits", torch.stack([r.mean_logits for r in records]).numpy()
    yield "out/track_masks", _followed(_queries(records, frames), clip.masks.numpy())[..., ::step, ::step]
    yield from tracks(model.finish(state, config["topk"]))
