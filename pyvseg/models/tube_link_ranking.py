# SPDX-License-Identifier: Apache-2.0
"""The tracks of Tube-Link (Li et al., ICCV 2023): of all objects of a video every frame shows its best ones only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyvseg.models.frame_size import FrameSize
from pyvseg.models.image_results import inside_and_quality
from pyvseg.models.spool import MaskStore, Segments
from pyvseg.models.video_instances import CHUNK_BYTES, Selection, VideoInstances
from pyvseg.video.rle import encode_masks

_STEP = 10  # objects whose masks are made at a time


class Ranking(NamedTuple):
    """What one frame shows of N (object, class) pairs.

    rows     of the pairs, best first
    scores   (N,) class probability times mean mask probability inside the mask; right for `rows`
    masks    object -> bool (H, W), where it has one; all of `rows`, and maybe others
    """

    rows: Tensor
    scores: Tensor
    masks: dict[int, np.ndarray]


def rank_frame(
    pairs: Selection, frame: int, masks: MaskStore, size: FrameSize, shown: int, device: torch.device | str = "cpu"
) -> Ranking:
    """The `shown` best of pairs that come by falling class probability. No more masks are made, on `device`, than can be among them."""
    objects = list(dict.fromkeys(pairs.objects.tolist()))
    place = {name: i for i, name in enumerate(objects)}
    column = [place[name] for name in pairs.objects.tolist()]
    probabilities = pairs.scores.float().cpu()
    best = [probabilities[column.index(i)].item() for i in range(len(objects))]
    present, logits = masks.get(frame, objects)
    quality, made = torch.zeros(len(objects)), {}
    step = max(1, min(_STEP, CHUNK_BYTES // (4 * max(size.padded[0] * size.padded[1], size.source[0] * size.source[1]))))
    for start in range(0, len(present), step):
        some = present[start : start + step]
        if (probabilities * quality[column] >= best[some[0]]).sum() >= shown:
            break  # a score is at most the probability
        inside, likely = inside_and_quality(size.to_source(size.upsample(logits[None, start : start + step].to(device)))[0])
        quality[some] = likely.cpu()
        made |= {objects[i]: mask for i, mask in zip(some, inside.cpu().numpy()) if mask.any()}
    scores = probabilities * quality[column]
    return Ranking(scores.sort(descending=True, stable=True).indices[:shown], scores, made)


def ranked_by_frames(
    pairs: Selection, masks: MaskStore, size: FrameSize, shown: int, top: int | None = None, device: torch.device | str = "cpu"
) -> VideoInstances:
    """The tracks, best first, at most `top`. A track's score is its mean over the frames that show it; in others it has no mask."""
    frames, objects = len(masks), pairs.objects.tolist()
    segments = Segments(size.source, list(dict.fromkeys(objects)), frames)
    total, visible = torch.zeros(len(objects)), torch.zeros(len(objects), frames, dtype=torch.bool)
    for t in range(frames):
        ranking = rank_frame(pairs, t, masks, size, shown, device)
        total[ranking.rows] += ranking.scores[ranking.rows]
        visible[ranking.rows, t] = True
        names = [name for name in dict.fromkeys(objects[row] for row in ranking.rows.tolist()) if name in ranking.masks]
        if names:
            for name, rle in zip(names, encode_masks(np.stack([ranking.masks[name] for name in names]))):
                segments.put(name, t, rle)
    count = visible.sum(1)
    scores = total / count.clamp(min=1)
    order = scores.argsort(descending=True, stable=True)
    kept = order[count[order] > 0][:top]
    labels, names = pairs.labels.cpu()[kept], pairs.objects.cpu()[kept]
    return VideoInstances(size.source, scores[kept].numpy(), labels.numpy(), names.numpy(), segments, visible=visible[kept].numpy())
