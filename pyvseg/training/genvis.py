# SPDX-License-Identifier: Apache-2.0
"""One training pass of GenVIS (Heo et al., CVPR 2023): clip after clip with the memory in between, an object keeps the query
that it was given when it was first seen. The detector is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvseg.models.genvis import GenVIS
from pyvseg.training.set_criterion import Match, SetCriterion, Target, instance_count, solve, uniform
from pyvseg.training.vita import (
    SIMILARITY_WEIGHT,
    USED_LAYERS,
    Random,
    VideoTarget,
    by_layer,
    clip_pass,
    detect,
    frame_tokens,
    prefixed,
    similarity_loss,
    video_losses,
)

_NEVER = 1e6  # cost of what must not be matched


class GenVISCriterion:
    """Weighted losses of one batch, ready to be summed.

    frame, video   criteria of the detector, whose matches alone are used, and of the video queries
    """

    def __init__(self, frame: SetCriterion, video: SetCriterion) -> None:
        self.frame, self.video = frame, video

    def __call__(
        self, model: GenVIS, images: Tensor, targets: Sequence[VideoTarget], random: Random | None = None
    ) -> tuple[dict[str, Tensor], dict]:
        """images (B * T, 3, H, W), T a multiple of the clip length -> losses by name, and what was predicted and matched on the way.

        Gradients flow through the memory of all clips.
        """
        random = random or (lambda name: uniform(images.device))
        videos, length = len(targets), model.settings.clip_length
        with torch.no_grad():
            features, predictions = detect(model, images)
        shown = [frame for target in targets for frame in target.frames()]
        used = range(len(predictions) - USED_LAYERS, len(predictions))
        names = {i: name for i, name, _ in by_layer(len(predictions))}
        frame_matches = [self.frame.match(predictions[i], shown, random(f"frame/{names[i]}")) for i in used]
        tokens = frame_tokens(predictions, videos)
        masks = model.video.vita_mask_features(features.finest).unflatten(0, (videos, -1))
        walk = _Walk(self.video, targets, len(model.video.layers))
        carried = model.video.query_feat.weight.expand(len(tokens), -1, -1)
        keys, values, losses, outputs = [], [], {}, []
        for clip in range(tokens.shape[1] // length):
            frames = slice(clip * length, (clip + 1) * length)
            past = (torch.stack(keys), torch.stack(values)) if keys else (None, None)
            output = clip_pass(model, tokens[:, frames], masks[:, frames], model.video.read(carried, *past))
            carried = output.carried
            key, value = model.video.entry(output.predictions[-1].queries)
            keys.append(key)
            values.append(value)
            losses |= walk.losses(clip, frames, output, frame_matches, random)
            outputs.append(output)
        return losses, {"frame": predictions, "frame_matches": frame_matches, "clips": outputs, "walk": walk}


class _Walk:
    """Unified label assignment along a sequence.

    slots    for every decoder layer and problem the query (N,) of each instance
    history  of `slots` clip by clip, and which instances were valid and new
    """

    def __init__(self, criterion: SetCriterion, targets: Sequence[VideoTarget], layers: int) -> None:
        self.criterion, self.targets = criterion, targets
        self.slots: list[list[Tensor]] = [[] for _ in range(layers)]
        self.seen = [torch.zeros(len(t.labels), dtype=torch.bool, device=t.labels.device) for t in targets]
        self.history: list[dict] = []

    def losses(self, clip: int, frames: slice, output, frame_matches: list[list[Match]], random: Random) -> dict[str, Tensor]:
        parts = [target.part(frames) for target in self.targets]
        valid = [(part.ids >= 0).any(1) for part in parts]
        new = [v & ~seen for v, seen in zip(valid, self.seen)]
        self.seen = [v | seen for v, seen in zip(valid, self.seen)]
        whole = [Target(part.labels, part.masks) for part in parts] * USED_LAYERS
        problems = [Target(part.labels[v], part.masks[v]) for part, v in zip(parts, valid)] * USED_LAYERS
        count = instance_count(sum(len(p.labels) for p in problems), output.queries)
        losses = {}
        for i, name, suffix in by_layer(len(output.predictions)):
            numbers = random(f"clip{clip}/{name}")
            self._assign(i, output.predictions[i], whole, valid, new, numbers)
            matches = [_of_valid(slots, valid[p % len(valid)]) for p, slots in enumerate(self.slots[i])]
            found = video_losses(self.criterion, output.predictions[i], problems, matches, count, numbers)
            losses |= prefixed(found, "genvis_", f"{suffix}_clip{clip}")
        shown = [VideoTarget(part.labels[v], part.ids[v], part.masks[v]) for part, v in zip(parts, valid)]
        here = [_frames_of(layer, frames, len(self.targets)) for layer in frame_matches]
        final = [_of_valid(slots, valid[p % len(valid)]) for p, slots in enumerate(self.slots[-1])]
        losses[f"loss_genvis_sim_clip{clip}"] = SIMILARITY_WEIGHT * similarity_loss(output, shown, here, final)
        self.history.append({"slots": [[s.clone() for s in layer] for layer in self.slots], "valid": valid, "new": new, "parts": parts})
        return losses

    @torch.no_grad()
    def _assign(self, layer: int, prediction, whole: list[Target], valid: list[Tensor], new: list[Tensor], random) -> None:
        """New instances get free queries; a query is free unless an instance that is old and visible holds it."""
        slots = self.slots[layer]
        first = not slots
        for p, (logits, masks, target) in enumerate(zip(prediction.logits, prediction.masks, whole)):
            fresh, visible = new[p % len(new)], valid[p % len(valid)]
            costs = self.criterion.costs(logits, masks, target, random)
            costs[:, ~fresh] = _NEVER
            if not first:
                costs[slots[p][visible & ~fresh]] = _NEVER
            queries, instances = solve(costs)
            found = queries[instances.argsort()]
            if first:
                slots.append(found)
            else:
                slots[p][fresh] = found[fresh]


def _of_valid(slots: Tensor, valid: Tensor) -> Match:
    queries = slots[valid]
    return queries, torch.arange(len(queries), device=queries.device)


def _frames_of(matches: list[Match], frames: slice, videos: int) -> list[Match]:
    """Of matches over all frames of all videos those of a clip's frames."""
    length = len(matches) // videos
    return [matches[b * length + t] for b in range(videos) for t in range(frames.start, frames.stop)]
