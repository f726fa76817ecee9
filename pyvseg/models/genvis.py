# SPDX-License-Identifier: Apache-2.0
"""GenVIS (Heo et al., CVPR 2023): VITA clip by clip. A query keeps its object from clip to clip, helped by a memory of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyvseg.layers.packed import products
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.spool import MaskStore
from pyvseg.models.video_instances import Selection, VideoInstances, render
from pyvseg.models.vita import VITA, FrameTokens, VITASettings
from pyvseg.models.vita_module import VideoModule


@dataclass(frozen=True)
class GenVISSettings(VITASettings):
    """
    clip_length    1 for the online checkpoints, 3 for the semi-online ones; a file does not say which it is
    memory_clips   that the memory holds, more than any video of the data sets has; None: all, as published
    """

    window: int = 0
    clip_length: int = 1
    memory_clips: int | None = 512


@dataclass
class Prototypes:
    """The memory: keys and values (M, B, cQ, C) of the clips so far, of the last `limit` if that is given; room grows by doubling."""

    limit: int | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    clips: int = 0  # entered so far

    def __len__(self) -> int:
        return self.clips if self.limit is None else min(self.clips, self.limit)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Of one clip, each (B, cQ, C); a full memory loses its oldest clip."""
        have = 0 if self.keys is None else len(self.keys)
        if len(self) == have and have != self.limit:
            room = max(8, 2 * have) if self.limit is None else min(max(8, 2 * have), self.limit)
            grown = [key.new_zeros(room, *key.shape) for _ in range(2)]
            for new, old in zip(grown, (self.keys, self.values)):
                if old is not None:
                    new[:have] = old
            self.keys, self.values = grown
        place = self.clips % len(self.keys)
        self.keys[place], self.values[place] = key, value
        self.clips += 1


class SequentialVideoModule(VideoModule):
    """VITA's module with a query that reads its own past."""

    def __init__(self, width: int, **sizes) -> None:
        super().__init__(width, **sizes)
        self.pre_memory_embed_k = nn.Linear(width, width)
        self.pre_memory_embed_v = nn.Linear(width, width)
        self.pre_query_embed_k = nn.Linear(width, width)
        self.pre_query_embed_v = nn.Linear(width, width)

    def read(self, queries: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
        """Carried queries (B, cQ, C), memory (M, B, cQ, C) or None -> the next clip's queries.

        A query looks at its own entries only, and the products are not scaled.
        """
        x = queries + self.pre_query_embed_v(queries)
        if keys is None or not len(keys):
            return x
        weights = torch.einsum("bqc,mbqc->mbq", self.pre_query_embed_k(queries), keys).softmax(0)
        return x + torch.einsum("mbq,mbqc->bqc", weights, values)

    def entry(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries of a clip (B, cQ, C) -> its key and value in memory."""
        return self.pre_memory_embed_k(queries), self.pre_memory_embed_v(queries)


class ClipQueries(NamedTuple):
    """What the queries say of a clip: carried on (cQ, C), logits (cQ, K + 1), masks (T, cQ, h, w) logits."""

    carried: Tensor
    logits: Tensor
    masks: Tensor


@dataclass
class GenVISState:
    """What later clips and the result depend on: two entries of (cQ, C) per remembered clip, and the masks found so far."""

    size: FrameSize
    frames: int = 0
    queries: Tensor | None = None  # (1, cQ, C) carried from the last clip
    memory: Prototypes = field(default_factory=Prototypes)
    probabilities: Tensor | None = None  # (cQ, K), the best of all clips
    masks: MaskStore = field(default_factory=MaskStore)


class GenVIS(VITA):
    module = SequentialVideoModule

    def new_state(self, size: FrameSize) -> GenVISState:
        return GenVISState(size, memory=Prototypes(self.settings.memory_clips))

    def segment_clip(self, features: FrameTokens, state: GenVISState) -> ClipQueries:
        """One clip of `clip_length` frames, fewer at the end of the video."""
        tokens = self.video.encode(features.queries[None])
        carried = self.video.query_feat.weight[None] if state.queries is None else state.queries
        memory = state.memory
        past = (None, None) if memory.keys is None else (memory.keys[: len(memory)], memory.values[: len(memory)])
        carried = self.video.decode(tokens, self.video.read(carried, *past))[-1]
        queries = self.video.decoder_norm(carried)
        masks = products(self.video.mask_embed(queries).expand(len(features.masks), -1, -1), features.masks.flatten(2))
        return ClipQueries(carried, self.video.class_embed(queries)[0], masks.unflatten(2, features.masks.shape[2:]))

    def link(self, clip: ClipQueries, state: GenVISState) -> None:
        """Query q stays object q; what it was enters its memory."""
        state.memory.append(*self.video.entry(self.video.decoder_norm(clip.carried)))
        state.queries = clip.carried
        probabilities = clip.logits.float().softmax(-1)[:, :-1]
        best = state.probabilities
        state.probabilities = probabilities if best is None else torch.maximum(best, probabilities)
        for masks in clip.masks:
            state.masks.append(masks, list(range(len(masks))))
            state.frames += 1

    def probabilities(self, state: GenVISState) -> tuple[Tensor, list[int]]:
        """Of the classes for every query (cQ, K), the best of all clips, and the queries."""
        return state.probabilities, list(range(len(state.probabilities)))

    def forget(self, state: GenVISState) -> None:
        """Drops what only the result of the whole video needs, for streams without end."""
        state.masks = MaskStore()

    def finish(self, state: GenVISState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """The tracks of the video so far."""
        probabilities, names = self.probabilities(state)
        chosen = Selection.best(probabilities, top or self.settings.top, names, compat=compat)
        return render(chosen, state.frames, state.size, state.masks.get, quality="resized", device=self.device)
