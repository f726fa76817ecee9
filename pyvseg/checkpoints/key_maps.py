# SPDX-License-Identifier: Apache-2.0
"""Published parameter names -> ours: one small table per system, for `load_into`."""

STCN = [
    (r"^key_encoder\.res2\.", "key_encoder.layer1."),
    (r"^value_encoder\.(?!fuser|trunk)", "value_encoder.trunk."),
    (r"^key_proj\.key_proj\.", "key_proj."),
    (r"^input_proj\.key_proj\.", "icr_proj."),
    (r"^refine_transformer\.layers\.0\.", "icr."),
    (r"^refine_transformer\.", "icr."),
    (r"\.ChannelGate\.mlp\.1\.", ".mlp.0."),
    (r"\.ChannelGate\.mlp\.3\.", ".mlp.2."),
    (r"\.SpatialGate\.spatial\.conv\.", ".spatial."),
]
STCN_IGNORED = r"relative_position_index$|num_batches_tracked$"

EFFICIENTNET_LITE = [
    (r"^_conv_stem\.", "conv."),
    (r"^_bn0\.", "bn."),
    (r"^_blocks\.", "blocks."),
    (r"\._expand_conv\.", ".conv0."),
    (r"\._depthwise_conv\.", ".conv1."),
    (r"\._project_conv\.", ".conv2."),
    (r"\._bn(\d)\.", r".bn\1."),
]
EFFICIENTNET_LITE_IGNORED = r"^(blocks\.1[1-5]\.|_conv_head|_bn1|_fc)|num_batches_tracked$"
