# SPDX-License-Identifier: Apache-2.0
"""Classes and masks of kMaX-DeepLab's queries."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.normed import ConvBN, LinearBN, batch_norm, initialise
from pyvseg.layers.packed import products

WIDTH, DEPTH = 256, 128  # of the queries; of pixel features and mask kernels


@dataclass(frozen=True)
class Prediction:
    """Of B clips of T frames.

    logits      (B, N, K + 1) classes, "no object" last
    embeddings  (B, N, 256) that the masks come from, and that identify an object
    kernels     (B, N, 128)
    pixels      T tensors (B, 128, h, w), not normalised
    scale, shift   of the mask logits, scalars: a batch norm
    """

    logits: Tensor
    embeddings: Tensor
    kernels: Tensor
    pixels: list[Tensor]
    scale: Tensor
    shift: Tensor

    def features(self, frame: int) -> Tensor:
        """(B, 128, h, w) of length 1."""
        return F.normalize(self.pixels[frame], dim=1, eps=1e-12)

    def masks(self, frame: int, queries: Tensor | None = None) -> Tensor:
        """float32 mask logits (B, N, h, w), or of some queries only, (B, n, h, w)."""
        kernels = self.kernels if queries is None else self.kernels[:, queries]
        pixels = self.pixels[frame].float()
        masks = products(self.scale.float() * kernels.float(), pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        length = torch.linalg.vector_norm(pixels, dim=1, keepdim=True).clamp_(min=1e-12)
        return masks.div_(length).add_(self.shift.float())


class Predictor(nn.Module):
    """inputs: channels of the map that masks are made for."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.depthwise = ConvBN(inputs, inputs, 5, act=True, groups=inputs)
        self.pointwise = ConvBN(inputs, WIDTH, act=True)
        self.feature = ConvBN(WIDTH, DEPTH, bias=True)
        self.kernel = LinearBN(WIDTH, DEPTH)
        self.classes = nn.Linear(WIDTH, classes + 1)
        self.mask_norm = batch_norm(1)
        nn.init.constant_(self.mask_norm.weight, 0.1)
        initialise(self.classes, WIDTH)
        # Published as a constant of the forward pass: no weights file has it.
        self.void = math.log(classes * 0.9 / 0.1)

    def hidden(self, x: Tensor) -> Tensor:
        """What depends on the frame alone: (B, inputs, h, w) -> (B, 256, h, w)."""
        return self.pointwise(self.depthwise(x))

    def forward(self, pixels: list[Tensor], class_embeddings: Tensor, mask_embeddings: Tensor) -> Prediction:
        """pixels: `feature` of every frame's `hidden`; embeddings (B, N, 256)."""
        logits = self.classes(class_embeddings)
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self.void], -1)
        return Prediction(logits, mask_embeddings, self.kernel(mask_embeddings), pixels, *self.affine())

    def clusters(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Kernels (B, N, 256) and biases (B, N) whose products with `hidden` are largest where the mask logits are.

        In evaluation mode. The length of a pixel's features does not change which product is the largest, so it is left out,
        and `feature`, now linear, goes into the kernels.
        """
        weight, bias = self.feature.affine()
        kernels = self.affine()[0] * self.kernel(queries)
        return kernels @ weight, kernels @ bias

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of the mask logits in evaluation mode."""
        norm = self.mask_norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return scale, norm.bias - norm.running_mean * scale

    def dense_masks(self, prediction: Prediction) -> list[Tensor]:
        """The mask logits of every frame by the batch norm itself, whose statistics, in training, are those of all frames."""
        features = [F.normalize(p, dim=1, eps=1e-12) for p in prediction.pixels]
        together = torch.cat([prediction.kernels @ f.flatten(2) for f in features], -1)
        logits = self.mask_norm(together[:, None])[:, 0]
        parts = logits.split([f.shape[2] * f.shape[3] for f in features], -1)
        return [part.unflatten(-1, f.shape[2:]) for part, f in zip(parts, features)]
