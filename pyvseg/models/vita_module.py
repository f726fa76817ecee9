# SPDX-License-Identifier: Apache-2.0
"""The video module of VITA (Heo et al., NeurIPS 2022): object tokens of all frames mix in time, video queries read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyvseg.layers.attention import MLP, Attention, FeedForward
from pyvseg.layers.mask_decoder import DecoderLayer


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.ffn = FeedForward(width, hidden)

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """x (B, N, C), masks (B, N, N): a token does not look where they are negative."""
        return self.ffn(self.norm(self.attn(x, x, x, masks, residual=x)))


class VideoModule(nn.Module):
    """Object tokens of T frames -> video queries, each with classes and one mask embedding.

    width           channels of the tokens
    frame_queries   tokens per frame
    queries         video queries
    inputs          channels of the pixel decoder's finest map, `mask_width` of the mask features made of it
    window          frames that the encoder's layers attend to together, 0: all
    """

    def __init__(
        self, width: int, *, classes: int, frame_queries: int, queries: int, heads: int, hidden: int, encoder_layers: int, layers: int,
        inputs: int, mask_width: int, window: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window = window
        self.input_proj_dec = nn.Linear(width, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(encoder_layers))
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.query_feat = nn.Embedding(queries, width)
        self.query_embed = nn.Embedding(queries, width)
        self.fq_pos = nn.Embedding(frame_queries, width)
        self.class_embed = nn.Linear(width, classes + 1)
        self.mask_embed = MLP(width, width, mask_width)
        self.sim_embed_frame = nn.Linear(width, width)  # these two for the similarity loss alone
        self.sim_embed_clip = nn.Linear(width, width)
        self.vita_mask_features = nn.Conv2d(inputs, mask_width, 1)
        nn.init.kaiming_uniform_(self.vita_mask_features.weight, a=1)
        nn.init.zeros_(self.vita_mask_features.bias)

    def encode(self, tokens: Tensor) -> Tensor:
        """Frame queries (B, T, fQ, C) -> mixed tokens (B, T * fQ, C), frame by frame."""
        x = self.input_proj_dec(tokens)
        if not self.window:
            x = x.flatten(1, 2)
            for layer in self.encoder:
                x = layer(x)
            return x
        frames = x.shape[1]
        x = F.pad(x, (0, 0, 0, 0, 0, -frames % self.window))
        for i, layer in enumerate(self.encoder):
            shift = (self.window + 1) // 2 if i % 2 and not self.training else 0  # training has plain windows only, as published
            x = _windows(layer, x.roll(shift, 1), frames, self.window, shift).roll(-shift, 1)
        return x[:, :frames].flatten(1, 2)

    def decode(self, tokens: Tensor, queries: Tensor | None = None) -> list[Tensor]:
        """Tokens (B, T * fQ, C) and queries (B, cQ, C), None: the learned ones -> queries after every layer, before the norm."""
        x = self.query_feat.weight.expand(len(tokens), -1, -1) if queries is None else queries
        key = tokens + self.fq_pos.weight.repeat(tokens.shape[1] // len(self.fq_pos.weight), 1)
        states = []
        for layer in self.layers:
            x = layer(x, self.query_embed.weight, key, tokens)
            states.append(x)
        return states


def _windows(layer: nn.Module, x: Tensor, frames: int, window: int, shift: int) -> Tensor:
    """`layer` inside windows of x (B, T, fQ, C), T padded and rolled by `shift`, of which `frames` are real.

    Padding is shorter than a window and the ends of a video meet in the first one, so only the outer windows need masks.
    """
    b, _, per_frame, c = x.shape
    x = x.unflatten(1, (-1, window)).flatten(2, 3)  # (B, windows, tokens, C)
    count = x.shape[1]
    outer = [0, count - 1] if count > 1 else [0]
    masks = _outer_masks(frames, count, window, shift, x)[outer].repeat_interleave(per_frame, 1).repeat_interleave(per_frame, 2)
    result = torch.empty_like(x)
    result[:, outer] = layer(x[:, outer].flatten(0, 1), masks.repeat(b, 1, 1)).unflatten(0, (b, -1))
    if count > 2:
        result[:, 1:-1] = layer(x[:, 1:-1].flatten(0, 1)).unflatten(0, (b, -1))
    return result.unflatten(2, (window, per_frame)).flatten(1, 2)


def _outer_masks(frames: int, count: int, window: int, shift: int, like: Tensor) -> Tensor:
    """(windows, W, W) between frames, negative where frame i does not look at frame j. Right for outer windows.

    Published are -inf and, in shifted windows, -1000 added to the logits: the same for all rows but those of padding,
    which nobody looks at.
    """
    padding = (torch.arange(count * window, device=like.device) >= frames).roll(shift).view(count, window)
    closed = padding[:, None].expand(-1, window, -1)
    if shift:
        wrapped = torch.arange(window, device=like.device) < shift
        closed = closed.clone()
        closed[0] |= wrapped[:, None] != wrapped
    return -closed.to(like.dtype)
