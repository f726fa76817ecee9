# SPDX-License-Identifier: Apache-2.0
"""STCN (Cheng et al., NeurIPS 2021), and PCVOS (Park et al., CVPR 2022) which adds clip-wise reading and refinement to it.

A frame becomes keys; a past frame and an object's mask in it become values. The keys of a new frame find their nearest
keys in memory, the values found there and the frame's own features are decoded to one mask per object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyvseg.layers.efficientnet_lite import EfficientNetLite0
from pyvseg.layers.graphs import graphed
from pyvseg.layers.resnet import BasicBlock, Bottleneck, ResNet
from pyvseg.layers.window_attention import IntraClipRefinement
from pyvseg.models.memory import MemoryBank, aggregate
from pyvseg.models.stcn_layers import Decoder, ValueEncoder
from pyvseg.models.vos import VOSState

# Within a clip every fifth frame becomes temporary memory for the later ones (progressive matching); fixed in the published model.
PROGRESSIVE_STEP = 5
# Frames pass through the convolutions a few at a time: on a CPU so many that their largest maps stay in the last-level cache.
_CPU_MAP_BYTES, _GPU_FRAMES = 6 << 20, 8


@dataclass(frozen=True)
class STCNSettings:
    """Sizes and rules of one variant.

    encoders        "resnet" (ResNet-50 keys, ResNet-18 values) or "efficientnet_lite0" (keys; values by a narrow ResNet)
    decoder_widths  channels at strides 16, 8, 4
    refine_width    channels of the refinement's queries and keys; None leaves the refinement out, which makes it STCN
    refine_window   (frames, rows, columns)
    refine_shared   one projection for queries and keys
    value_inputs    5, or 4 for a single-object network that knows no other objects
    progressive     every fifth frame's readout is memory for the rest of its clip
    memory_every    distance between memory frames; None: the clip length
    schedule        "clip": a full clip's last frame is memory even before an annotated frame; "distance": not there;
                    "modulo": frames whose index is a multiple of `memory_every`
    clip_length     frames segmented together unless the user asks for another number
    short_side      frames are resized to this shorter side; None leaves them as they are
    """

    encoders: str = "resnet"
    key_width: int = 64
    value_width: int = 512
    thin_width: int = 512
    decoder_widths: tuple[int, int, int] = (512, 256, 256)
    refine_width: int | None = 256
    refine_window: tuple[int, int, int] = (2, 7, 7)
    refine_shared: bool = True
    value_inputs: int = 5
    top_k: int = 20
    progressive: bool = True
    memory_every: int | None = None
    schedule: str = "clip"
    clip_length: int = 5
    short_side: int | None = 480
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass
class ClipFeatures:
    """What a clip's frames look like, before any object is asked for; frames are the first axis of every tensor.

    images   (L, 3, H, W) network input
    keys     (L, h * w, CK) at stride 16
    f16      (L, C, h, w)
    thin, f8, f4   decoder inputs at strides 16, 8, 4
    refine   (L, R, h, w), or None without refinement
    """

    images: Tensor
    keys: Tensor
    f16: Tensor
    thin: Tensor
    f8: Tensor
    f4: Tensor
    refine: Tensor | None

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.f16.shape[-2:])


class STCN(nn.Module):
    """The network of one variant; see `STCNSettings`.

    `encode`, `segment_clip` and `link` drive a video through a `VOSState`, `annotate` enters the user's masks.
    """

    def __init__(self, settings: STCNSettings) -> None:
        super().__init__()
        self.settings = s = settings
        if s.encoders == "resnet":
            self.key_encoder = ResNet((3, 4, 6), Bottleneck)
            value_trunk = ResNet((2, 2, 2), BasicBlock, inputs=s.value_inputs, bias=True)
        else:
            self.key_encoder = EfficientNetLite0()
            value_trunk = ResNet((1, 1, 2), BasicBlock, inputs=s.value_inputs, bias=True, width=32)
        c4, c8, c16 = self.key_encoder.channels
        self.value_encoder = ValueEncoder(value_trunk, c16, s.value_width)
        self.key_proj = nn.Conv2d(c16, s.key_width, 3, padding=1)
        self.key_comp = nn.Conv2d(c16, s.thin_width, 3, padding=1)
        self.decoder = Decoder(s.value_width, s.thin_width, (c4, c8), s.decoder_widths)
        if s.refine_width is not None:
            self.icr_proj = nn.Conv2d(c16, s.refine_width, 3, padding=1)
            self.icr = IntraClipRefinement(s.refine_width, s.value_width, s.refine_window, shared=s.refine_shared)
        for module in value_trunk.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.orthogonal_(self.key_proj.weight)
        nn.init.zeros_(self.key_proj.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.value_encoder.fuser.attention.mlp[0].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.value_encoder.fuser.attention.mlp[0].weight.device

    def new_state(self, max_memory_frames: int | None) -> VOSState:
        return VOSState(max_memory_frames)

    # The three verbs, and `annotate` before them.

    def encode(self, images: Tensor) -> ClipFeatures:
        """Normalised frames (L, 3, H, W), sides multiples of 16 -> features; a few frames at a time."""
        parts = [graphed(self.parts, some) for some in images.split(self._together(images, getattr(self.key_encoder, "widest", 0)))]
        if len(parts) == 1:
            return ClipFeatures(**parts[0])
        joined = {name: None if x is None else torch.cat([part[name] for part in parts]) for name, x in parts[0].items()}
        return ClipFeatures(**joined)

    def parts(self, images: Tensor) -> dict[str, Tensor | None]:
        return vars(self.features(images))

    def features(self, images: Tensor) -> ClipFeatures:
        """`encode` in one batch, which is what training wants."""
        images = images.to(self.dtype)
        f4, f8, f16 = self.key_encoder(images)
        keys = self.key_proj(f16).flatten(2).transpose(1, 2).contiguous()
        refine = None if self.settings.refine_width is None else self.icr_proj(f16)
        return ClipFeatures(images, keys, f16, self.key_comp(f16), f8, f4, refine)

    def annotate(
        self, features: ClipFeatures, index: int, masks: dict[int, Tensor], before: Tensor | None, state: VOSState
    ) -> Tensor:
        """Enter the user's masks of frame `index`.

        features   of this frame alone (L = 1)
        masks      id -> (H, W) float, 1 inside
        before     (K + 1, H, W) what `segment_clip` said of this frame for the objects known so far, None if it was not asked

        Returns the frame's probabilities (K + 1, H, W) for all objects known now, in the order of `state.object_ids`.
        """
        given = torch.stack(list(masks.values()))
        old = list(state.object_ids)
        shape = (len(old), *given.shape[1:])
        objects = given.new_zeros(shape) if before is None else before[1:].clone()
        objects[:, given.sum(0) > 0.5] = 0
        new = [i for i in masks if i not in old]
        for i, mask in masks.items():
            if i in old:
                objects[old.index(i)] = mask
        objects = torch.cat([objects, given.new_zeros(len(new), *shape[1:])])
        state.object_ids += new
        for i in new:
            objects[state.object_ids.index(i)] = masks[i]
        if new:
            state.banks.append(MemoryBank(tuple(new), features.keys.shape[1]))
        probabilities = aggregate(objects)
        values = self.encode_values(features, 0, probabilities[1:])
        state.remember(index, features.keys[0], values, annotated=True)
        return probabilities

    def segment_clip(self, features: ClipFeatures, state: VOSState) -> Tensor:
        """Probabilities (K + 1, L, H, W), float32, background first, then `state.object_ids`."""
        maps = None if features.refine is None else self.icr.attention(features.refine.permute(0, 2, 3, 1)[None])
        readouts = {}
        for bank in state.banks:
            for i, readout in zip(bank.object_ids, self._read(features, bank)):
                readouts[i] = readout if maps is None else self.icr(readout[None, None], maps)[0, 0]
        ordered = [readouts[i].permute(0, 3, 1, 2) for i in state.object_ids]  # channels last in memory
        step = self._together(features.images, self.settings.decoder_widths[1])
        frame_parts = features.thin, features.f8, features.f4, *ordered
        return torch.cat([graphed(self.decode, *chunk) for chunk in zip(*(part.split(step) for part in frame_parts))], 1)

    def link(
        self,
        features: ClipFeatures,
        indices: list[int],
        probabilities: Tensor,
        state: VOSState,
        *,
        clip_length: int,
        closed: bool,
        include_last: bool = False,
    ) -> None:
        """Let the segmented clip enter memory, as the schedule of the settings says.

        indices        of the clip's frames in the video
        probabilities  (K + 1, L, H, W) of `segment_clip`
        closed         the clip's last frame ends a pass (it is annotated, or the video ends)
        include_last   a clip's last frame that is not a memory frame becomes temporary memory
        """
        every = self.settings.memory_every or clip_length
        for t, index in enumerate(indices):
            last = t == len(indices) - 1
            due = index % every == 0 if self.settings.schedule == "modulo" else index - state.last_memory >= every
            permanent = due and not (last and closed and self.settings.schedule != "clip")
            if permanent or (include_last and last and not closed):
                values = self.encode_values(features, t, probabilities[1:, t])
                if permanent:
                    state.remember(index, features.keys[t], values, annotated=False)
                else:
                    state.remember_temporarily(features.keys[t], values)

    def encode_values(self, features: ClipFeatures, t: int, masks: Tensor) -> Tensor:
        """Soft masks (K, H, W) of frame t of the clip -> values (K, h * w, CV)."""
        values = self.value_encoder(features.images[t], masks, features.f16[t])
        return values.flatten(2).transpose(1, 2)

    # Parts of `segment_clip`.

    def _read(self, features: ClipFeatures, bank: MemoryBank) -> Tensor:
        """Readouts (O, L, h, w, CV) of a clip; progressive matching makes every fifth one memory for those after it."""
        length, cells, _ = features.keys.shape
        step = PROGRESSIVE_STEP if self.settings.progressive else length
        before, readouts = bank.temporary, []
        for start in range(0, length, step):
            keys = features.keys[start : start + step]
            readout = bank.read(keys.flatten(0, 1), self.settings.top_k).unflatten(1, (len(keys), cells))
            readouts.append(readout)
            if start + step < length:
                bank.append_temporary(keys[-1], readout[:, -1])
        bank.temporary = before
        return torch.cat(readouts, 1).unflatten(2, features.grid)

    def decode(self, thin: Tensor, f8: Tensor, f4: Tensor, *readouts: Tensor) -> Tensor:
        """`ClipFeatures` of some frames, and of each object its readouts (L, CV, h, w) there -> probabilities (K + 1, L, H, W)."""
        terms = self.decoder.of_frame(thin, f8, f4)
        return aggregate(torch.stack([self.decoder(readout, terms) for readout in readouts]).sigmoid_())

    def _together(self, images: Tensor, channels: int) -> int:
        """Frames whose map of so many channels at stride 4 is small enough."""
        if images.device.type != "cpu":
            return _GPU_FRAMES
        size = max(self.key_encoder.channels[0], channels) * (images.shape[-2] // 4) * (images.shape[-1] // 4) * self.dtype.itemsize
        return max(1, _CPU_MAP_BYTES // size)
