# SPDX-License-Identifier: Apache-2.0
"""One training pass of VITA (Heo et al., NeurIPS 2022): losses of the detector on every frame, of the video queries on the clip,
and of the similarity between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyvseg.layers.mask_decoder import Prediction
from pyvseg.models.vita import VITA
from pyvseg.training.set_criterion import Match, RandomPoints, SetCriterion, Target, instance_count, matched_masks, uniform

SIMILARITY_WEIGHT = 0.5
USED_LAYERS = 3  # of the detector: each of the last three gives the video module queries of its own
Random = Callable[[str], RandomPoints]  # by the name of what is matched: "frame/final", "clip/0", ...


class VideoTarget(NamedTuple):
    """The N instances of a video: labels (N,), ids (N, T) with -1 where absent, masks (N, T, H, W)."""

    labels: Tensor
    ids: Tensor
    masks: Tensor

    def frames(self) -> list[Target]:
        """What every frame shows."""
        there = self.ids >= 0
        return [Target(self.labels[there[:, t]], self.masks[there[:, t], t]) for t in range(self.ids.shape[1])]

    def part(self, frames: slice) -> VideoTarget:
        return VideoTarget(self.labels, self.ids[:, frames], self.masks[:, frames])


@dataclass
class ClipOutput:
    """The video module's part, problem = used detector layer * videos + video.

    predictions   of every decoder layer, over the problems
    frames        (L * B, T, fQ, C) similarity embeddings of the frame queries
    queries       (L * B, cQ, C) of the video queries
    carried       (L * B, cQ, C) video queries before the last norm
    """

    predictions: list[Prediction]
    frames: Tensor
    queries: Tensor
    carried: Tensor


def prefixed(losses: dict[str, Tensor], prefix: str, suffix: str = "") -> dict[str, Tensor]:
    """loss_ce -> loss_PREFIX_ceSUFFIX"""
    return {f"loss_{prefix}{name.removeprefix('loss_')}{suffix}": loss for name, loss in losses.items()}


def by_layer(count: int) -> list[tuple[int, str, str]]:
    """(index, name, suffix of its losses) in the published order: the final one, then the earlier ones."""
    return [(count - 1, "final", ""), *((i, str(i), f"_{i}") for i in range(count - 1))]


class VITACriterion:
    """Weighted losses of one batch, ready to be summed.

    frame, video   criteria of the detector and of the video queries
    """

    def __init__(self, frame: SetCriterion, video: SetCriterion) -> None:
        self.frame, self.video = frame, video

    def __call__(
        self, model: VITA, images: Tensor, targets: Sequence[VideoTarget], random: Random | None = None
    ) -> tuple[dict[str, Tensor], dict]:
        """images (B * T, 3, H, W) of B videos, frame by frame -> losses by name, and what was predicted and matched on the way."""
        random = random or (lambda name: uniform(images.device))
        features, predictions = detect(model, images)
        losses, frame_matches = self.frame_losses(predictions, [f for t in targets for f in t.frames()], random)
        masks = model.video.vita_mask_features(features.finest).unflatten(0, (len(targets), -1))
        output = clip_pass(model, frame_tokens(predictions, len(targets)), masks)
        clip_losses, clip_matches = self.clip_losses(output, targets, random)
        weights = similarity_loss(output, targets, frame_matches[-USED_LAYERS:], clip_matches[-1])
        losses |= clip_losses | {"loss_vita_sim": SIMILARITY_WEIGHT * weights}
        seen = {"frame": predictions, "frame_matches": frame_matches, "clip": output, "clip_matches": clip_matches}
        return losses, seen

    def frame_losses(self, predictions: list[Prediction], targets: list[Target], random: Random) -> tuple[dict[str, Tensor], list]:
        """Mask2Former's, with deep supervision."""
        count = instance_count(sum(len(t.labels) for t in targets), predictions[0].masks)
        losses, matches = {}, [None] * len(predictions)
        for i, name, suffix in by_layer(len(predictions)):
            numbers = random(f"frame/{name}")
            matches[i] = self.frame.match(predictions[i], targets, numbers)
            losses |= prefixed(weighted(self.frame, self.frame.losses(predictions[i], targets, matches[i], count, numbers)), "", suffix)
        return losses, matches

    def clip_losses(self, output: ClipOutput, targets: Sequence[VideoTarget], random: Random) -> tuple[dict[str, Tensor], list]:
        problems = [Target(t.labels, t.masks) for t in targets] * USED_LAYERS
        count = instance_count(sum(len(t.labels) for t in problems), output.queries)
        losses, matches = {}, [None] * len(output.predictions)
        for i, name, suffix in by_layer(len(output.predictions)):
            numbers = random(f"clip/{name}")
            matches[i] = self.video.match(output.predictions[i], problems, numbers)
            losses |= prefixed(video_losses(self.video, output.predictions[i], problems, matches[i], count, numbers), "vita_", suffix)
        return losses, matches


def weighted(criterion: SetCriterion, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: criterion.total({name: loss}) for name, loss in losses.items()}


def detect(model: VITA, images: Tensor) -> tuple:
    """The pixel decoder's features of all frames and the detector's predictions, bare queries first."""
    features = super(VITA, model).encode(images)
    return features, model.decoder(features, auxiliary=True)


def frame_tokens(predictions: list[Prediction], videos: int) -> Tensor:
    """(L * B, T, fQ, C) queries of the detector's last layers."""
    queries = torch.stack([p.queries for p in predictions[-USED_LAYERS:]])
    return queries.unflatten(1, (videos, -1)).flatten(0, 1)


def clip_pass(model: VITA, tokens: Tensor, masks: Tensor, carried: Tensor | None = None) -> ClipOutput:
    """The video module on frame tokens (L * B, T, fQ, C) and mask features (B, T, M, h, w)."""
    video = model.video
    encoded = video.encode(tokens)
    masks = masks.repeat(len(tokens) // len(masks), 1, 1, 1, 1)
    predictions = []
    for state in video.decode(encoded, carried):
        queries = video.decoder_norm(state)
        logits = torch.einsum("bqc,btchw->bqthw", video.mask_embed(queries), masks)
        predictions.append(Prediction(queries, video.class_embed(queries), logits))
    frames = video.sim_embed_frame(encoded).unflatten(1, tokens.shape[1:3])
    return ClipOutput(predictions, frames, video.sim_embed_clip(queries), state)


def video_losses(
    criterion: SetCriterion, prediction: Prediction, problems: Sequence[Target], matches: Sequence[Match], count: float, random: RandomPoints
) -> dict[str, Tensor]:
    """As of an image, but the points of all frames of an instance are judged together."""
    logits, truth = matched_masks(prediction.masks, problems, matches)
    losses = {"loss_ce": criterion.class_loss(prediction.logits, problems, matches)}
    losses |= criterion.mask_losses(logits, truth, count, random, together=prediction.masks.shape[2])
    return weighted(criterion, losses)


def similarity_loss(
    output: ClipOutput, targets: Sequence[VideoTarget], frame_matches: list[list[Match]], clip_matches: list[Match]
) -> Tensor:
    """Binary cross entropy of the dot products of all pairs of matched queries of a problem: same instance or not.

    frame_matches   of the used detector layers, over all frames of all videos
    clip_matches    over the problems
    """
    frames = targets[0].ids.shape[1]
    total, pairs = output.queries.new_zeros(()), 0
    for problem, (found, (queries, instances)) in enumerate(zip(output.frames, clip_matches)):
        layer, b = divmod(problem, len(targets))
        ids = targets[b].ids
        embeddings, names = [output.queries[problem, queries]], [ids.amax(1)[instances]]
        for t in range(frames):
            chosen, present = frame_matches[layer][b * frames + t]
            embeddings.append(found[t, chosen])
            names.append(ids[ids[:, t] >= 0, t][present])
        embedding, name = torch.cat(embeddings), torch.cat(names)
        embedding, name = embedding[name >= 0], name[name >= 0]
        same = (name[:, None] == name).to(embedding.dtype)
        total = total + F.binary_cross_entropy_with_logits(embedding @ embedding.T, same, reduction="sum")
        pairs += same.numel()
    return total / (pairs + 1e-6)


