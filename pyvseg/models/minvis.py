# SPDX-License-Identifier: Apache-2.0
"""MinVIS (Huang et al., NeurIPS 2022): every frame is segmented on its own, queries are followed from frame to frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyvseg.layers.mask_decoder import Prediction
from pyvseg.layers.pixel_decoder import PixelFeatures
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.mask2former import Mask2Former
from pyvseg.models.spool import MaskStore
from pyvseg.models.video_instances import Selection, VideoInstances, render

TOP = 10  # tracks in a result


@dataclass
class MinVISState:
    """What a video's later frames and its result depend on; slot s continues query s of the first frame.

    embeddings   (Q, C) of the last frame, in the order of the slots
    logits       (Q, K + 1) sum over the frames
    masks        of every slot in every frame
    """

    size: FrameSize
    frames: int = 0
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    masks: MaskStore = field(default_factory=MaskStore)


class MinVIS(Mask2Former):
    def new_state(self, size: FrameSize) -> MinVISState:
        return MinVISState(size)

    framewise = True

    def per_frame(self, images: Tensor) -> Prediction:
        return self.segment_clip(self.encode(images))

    def segment_clip(self, features: PixelFeatures, state: MinVISState | None = None) -> Prediction:
        """Every frame of the clip on its own."""
        return self.decoder(features)[-1]

    def link(self, clip: Prediction, state: MinVISState) -> list[Tensor]:
        """Puts the queries of every frame in the order of the slots; returns the orders, each (Q,)."""
        return [self._link_frame(*frame, state) for frame in zip(*clip)]

    def _link_frame(self, queries: Tensor, logits: Tensor, masks: Tensor, state: MinVISState) -> Tensor:
        order = torch.arange(len(queries), device=queries.device) if state.embeddings is None else match(state.embeddings, queries)
        logits = logits[order].float()
        state.embeddings = queries[order]
        state.logits = logits if state.logits is None else state.logits + logits
        state.masks.append(masks, order.argsort().tolist())
        state.frames += 1
        return order

    def probabilities(self, state: MinVISState) -> tuple[Tensor, list[int]]:
        """Of the classes for every slot (Q, K), and the slots. A slot's class is that of its mean logits."""
        return (state.logits / state.frames).softmax(-1)[:, :-1], list(range(len(state.logits)))

    def forget(self, state: MinVISState) -> None:
        """Drops what only the result of the whole video needs, for streams without end."""
        state.masks = MaskStore()

    def finish(self, state: MinVISState, top: int | None = None, compat: bool = True) -> VideoInstances:
        """The tracks of the video so far."""
        probabilities, names = self.probabilities(state)
        return render(Selection.best(probabilities, top or TOP, names, compat=compat), state.frames, state.size, state.masks.get, device=self.device)


def match(before: Tensor, after: Tensor) -> Tensor:
    """Which query of `after` (Q, C) continues each of `before` (Q, C): the permutation with the largest sum of cosines."""
    before, after = (F.normalize(x.float(), dim=-1, eps=0) for x in (before, after))
    cost = 1 - after @ before.T
    rows, columns = linear_sum_assignment(cost.T.cpu().nan_to_num(nan=2.0).numpy())
    return torch.from_numpy(columns).to(after.device)
