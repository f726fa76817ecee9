# SPDX-License-Identifier: Apache-2.0
"""The networks of STCN (Cheng et al., 2021): value encoder and mask decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.residual import FusionBlock, ResBlock, conv3x3


class CBAM(nn.Module):
    """Channel gate, then spatial gate (Woo et al., 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width // 16), nn.ReLU(), nn.Linear(width // 16, width))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))
        x = x * gate.sigmoid()[:, :, None, None]
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return x * self.spatial(pooled).sigmoid()


class Fuser(nn.Module):
    """Joins an object's own features with the frame's features into the memory value."""

    def __init__(self, object_width: int, frame_width: int, value_width: int) -> None:
        super().__init__()
        self.block1 = FusionBlock(object_width, frame_width, value_width)
        self.attention = CBAM(value_width)
        self.block2 = ResBlock(value_width, value_width)

    def forward(self, x: Tensor, frame_terms: tuple[Tensor, Tensor]) -> Tensor:
        x = self.block1(x, frame_terms)
        return self.block2(x + self.attention(x))


class ValueEncoder(nn.Module):
    """Image and mask of one object -> the value that memory keeps of it.

    trunk         maps (B, 4 or 5, H, W) to features whose last map has stride 16
    frame_width   channels of the key encoder's stride-16 map
    """

    def __init__(self, trunk: nn.Module, frame_width: int, value_width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.fuser = Fuser(trunk.channels[-1], frame_width, value_width)

    def forward(self, image: Tensor, masks: Tensor, f16: Tensor) -> Tensor:
        """image (3, H, W), soft masks (O, H, W) of all objects, f16 (C, h, w) of one frame -> values (O, V, h, w)."""
        others = masks.sum(0, keepdim=True) - masks
        planes = torch.stack([masks, others], 1).to(image.dtype)
        x = torch.cat([image.expand(len(masks), -1, -1, -1), planes], 1)
        x = self.trunk(x.contiguous(memory_format=torch.channels_last))[-1]
        terms = self.fuser.block1.of_frame(f16[None])
        # A batch of one keeps the frame's terms shared without copying them out per object.
        return torch.cat([self.fuser(one, terms) for one in x.split(1)])

    def batched(self, image: Tensor, mask: Tensor, others: Tensor, f16: Tensor) -> Tensor:
        """The training form: one object per row, image (B, 3, H, W), masks (B, H, W), f16 (B, C, h, w) -> (B, V, h, w)."""
        x = self.trunk(torch.cat([image, mask[:, None], others[:, None]], 1))[-1]
        return self.fuser(x, self.fuser.block1.of_frame(f16))


class UpsampleBlock(nn.Module):
    """Twice the resolution: skip features of the frame + upsampled object features, then a residual block."""

    def __init__(self, skip_width: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip_conv = nn.Conv2d(skip_width, inputs, 3, padding=1)
        self.out_conv = ResBlock(inputs, outputs)

    def of_frame(self, skip: Tensor) -> Tensor:
        return conv3x3(self.skip_conv, skip)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.out_conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False).add_(skip))


class Decoder(nn.Module):
    """Readout of one object + features of the frame -> logits at full resolution.

    What depends on the frame alone (both skip convolutions and half of `compress`) is computed by `of_frame`, once for
    all objects. widths are those of the decoder at strides 16, 8 and 4.
    """

    def __init__(self, value_width: int, thin_width: int, skips: tuple[int, int], widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.compress = FusionBlock(value_width, thin_width, widths[0])
        self.up_16_8 = UpsampleBlock(skips[1], widths[0], widths[1])
        self.up_8_4 = UpsampleBlock(skips[0], widths[1], widths[2])
        self.pred = nn.Conv2d(widths[2], 1, 3, padding=1)

    def of_frame(self, thin: Tensor, f8: Tensor, f4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.compress.of_frame(thin), self.up_16_8.of_frame(f8), self.up_8_4.of_frame(f4)

    def forward(self, readout: Tensor, frame_terms: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """readout (B, V, h, w) with the matching frame terms -> logits (B, 16 h, 16 w)."""
        inner, skip, skip8, skip4 = frame_terms
        x = self.compress(readout, (inner, skip))
        x = self.up_8_4(self.up_16_8(x, skip8), skip4)
        logits = conv3x3(self.pred, x, relu_input=True)
        return F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)[:, 0]
