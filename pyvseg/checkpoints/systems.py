# SPDX-License-Identifier: Apache-2.0
"""Telling whose weights a file holds by names that only one published system uses."""

from __future__ import annotations

from collections.abc import Iterable

# System, and beginnings of parameter names that must all occur. The first row that fits wins: special systems stand above what they build on.
TELL_TALES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("PCVOS", ("key_encoder.", "value_encoder.", "refine_transformer.")),
    ("XMem", ("key_encoder.", "value_encoder.", "key_proj.d_proj.")),
    ("STCN", ("key_encoder.", "value_encoder.", "key_proj.key_proj.")),
    ("Cutie", ("pixel_encoder.", "mask_encoder.", "object_transformer.")),
    ("GenVIS", ("vita_module.", "genvis_criterion.")),
    ("VITA", ("vita_module.",)),
    ("CTVIS", ("sem_seg_head.predictor.reid_embed.",)),
    ("kMaX-DeepLab / Video-kMaX", ("sem_seg_head.predictor._kmax_transformer_layers.",)),
    ("Mask2Former / MinVIS", ("sem_seg_head.predictor.transformer_cross_attention_layers.",)),
    ("PolyphonicFormer", ("rpn_head.depth_convs.", "roi_head.mask_head.")),
    ("Video K-Net", ("rpn_head.init_kernels.",)),
    ("Tube-Link", ("panoptic_head.transformer_decoder.",)),
    ("TransVOD++", ("transformer.dynamic_layer_for_current_query1.",)),
    ("TransVOD Lite", ("transformer.temporal_decoder1.",)),
    ("TransVOD", ("transformer.temporal_query_layer1.",)),
    ("Deformable DETR", ("transformer.encoder.layers.0.self_attn.sampling_offsets.",)),
    ("torchvision ResNet", ("layer1.0.conv1.weight", "layer4.0.conv1.weight", "conv1.weight")),
)


def guess_system(keys: Iterable[str]) -> str | None:
    """The published system whose files have parameter names like `keys`, or None."""
    keys = list(keys)
    for system, beginnings in TELL_TALES:
        if all(any(key.startswith(beginning) for key in keys) for beginning in beginnings):
            return system
    return None
