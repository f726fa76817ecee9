# SPDX-License-Identifier: Apache-2.0
"""The association of Video-kMaX alone: clips' segments and features in, identities and the memory after every clip out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pyvseg.models.kmax_panoptic import ClipPanoptic, ClipSegment, boxes_of
from pyvseg.models.panoptic_linking import Linked, LinkSettings, LinkState, link

SHIFT = 4999  # the published code tells values of the current clip by it


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for config in manifest["config"]["runs"]:
        tag, length = config["tag"], config["T"]
        rules = LinkSettings(confidence=config["LAMB_CONF_THRES"], buffer=config["LAMB_BUFFER_SIZE"], temperature=config["LAMB_TEMPERATURE"])
        state = LinkState()
        for start in range(0, config["frames"], max(length - 1, 1)):
            name = f"{tag}/clip{start}."
            clip = _clip({key: inputs[f"in/{name}{key}"] for key in ("panoptic", "segments", "features")}, length, rules.divisor)
            own = np.array([0] + [s.category * rules.divisor + i for i, s in enumerate(clip.segments, 1)], np.int32)
            linked = link(clip, start, length > 1, state, rules)
            yield from ((kind + name + part, result) for kind, part, result in _results(clip, own, linked, state, start))


def _clip(given: dict[str, np.ndarray], length: int, divisor: int) -> ClipPanoptic:
    labels = (given["panoptic"] % divisor).reshape(length, -1, given["panoptic"].shape[-1])
    boxes = boxes_of(labels, len(given["segments"]))
    rows = zip(given["segments"].tolist(), given["features"], boxes)
    return ClipPanoptic(labels, [ClipSegment(category, bool(thing), 1.0, feature, box) for (_, category, thing), feature, box in rows])


def _results(clip: ClipPanoptic, own: np.ndarray, linked: Linked, state: LinkState, start: int) -> Iterator[tuple]:
    flat = clip.labels.reshape(-1, clip.labels.shape[-1])
    things = [(s, segment) for s, segment in enumerate(clip.segments, 1) if segment.is_thing and segment.box is not None]
    yield "tap/", "box_id", own[[s for s, _ in things]]
    yield "tap/", "box", np.array([segment.box for _, segment in things])
    stitched = own.copy() if not start else np.zeros_like(own)
    for s, value in (*linked.matched, *linked.unmatched):
        stitched[s] = value
    yield "tap/", "stitched", stitched[flat]
    for part, pairs in (("matched", linked.matched), ("unmatched", linked.unmatched)):
        yield "tap/", part, np.array([(own[s] + SHIFT, value) for s, value in pairs], np.int32).reshape(-1, 2)
    if linked.decoded is not None:
        yield "tap/", "score", linked.decoded[0]
    yield "out/", "tracked", linked.tracked[flat]
    yield "out/", "final", linked.values[flat]
    yield from (("out/", f"memory_{part}", result) for part, result in memory(state))


def memory(state: LinkState) -> Iterator[tuple]:
    """(part, result) of what the memory holds, in its order."""
    held = state.memory.values()
    yield "id", np.array(list(state.memory), np.int32)
    yield "last", np.array([m.last for m in held], np.int32)
    yield "app", np.array([m.appearance for m in held])
    yield "box", np.array([list(m.boxes) for m in held])
