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

DETECTRON2_RESNET = [
    (r"^backbone\.stem\.", "backbone."),
    (r"^backbone\.res2\.", "backbone.layer1."),
    (r"^backbone\.res3\.", "backbone.layer2."),
    (r"^backbone\.res4\.", "backbone.layer3."),
    (r"^backbone\.res5\.", "backbone.layer4."),
    (r"^(backbone\..*)shortcut\.norm\.", r"\1downsample.1."),
    (r"^(backbone\..*)shortcut\.", r"\1downsample.0."),
    (r"^(backbone\.(?:.*\.)?)conv(\d)\.norm\.", r"\1bn\2."),
]

# detectron2's ResNet and Swin, the heads of Mask2Former and of the systems built on it. Old files have the pixel decoder right
# under the head, and a "static query".
MASK2FORMER = [
    (r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)", "sem_seg_head.pixel_decoder."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"^sem_seg_head\.predictor\.", "decoder."),
    (r"^decoder\.static_query\.", "decoder.query_feat."),
    (r"^decoder\.reid_embed\.", "reid_embed."),
    (r"^vita_module\.enc_self_attn\.(\d+)\.self_attn\.", r"video.encoder.\1.attn."),
    (r"^vita_module\.enc_self_attn\.", "video.encoder."),
    (r"^vita_module\.enc_ffn\.(\d+)\.", r"video.encoder.\1.ffn."),
    (r"^vita_module\.", "video."),
    *DETECTRON2_RESNET,
    (r"^pixel_decoder\.transformer\.(?:encoder\.)?", "pixel_decoder."),
    (r"^pixel_decoder\.(adapter_1|layer_1)\.norm\.", r"pixel_decoder.\1.1."),
    (r"^pixel_decoder\.(adapter_1|layer_1)\.weight$", r"pixel_decoder.\1.0.weight"),
    (r"\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r".layers.\1.cross_attn."),
    (r"\.transformer_self_attention_layers\.(\d+)\.self_attn\.", r".layers.\1.self_attn."),
    (r"\.transformer_(cross|self)_attention_layers\.(\d+)\.norm\.", r".layers.\2.\1_norm."),
    (r"\.transformer_ffn_layers\.(\d+)\.", r".layers.\1.ffn."),
]
MASK2FORMER_IGNORED = r"empty_weight$|relative_position_index$|num_batches_tracked$"

# kMaX-DeepLab and Video-kMaX. The auxiliary semantic head serves training only.
KMAX = [
    *DETECTRON2_RESNET,
    (r"^sem_seg_head\.predictor\.", "decoder."),
    (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
    (r"\._blocks\.", "."),
    (r"\.qkv_transform\.", ".qkv."),
    (r"\._batch_norm_qkv\.", ".qkv.bn."),
    (r"\._(query|key|value)_rpe\._embeddings\.weight$", r".\1_rpe"),
    (r"\._attention\._(height|width)_axis\._batch_norm_similarity\.", r".attention.\1_axis.similarity_norm."),
    (r"\._batch_norm_retrieved_output\.", ".output_norm."),
    (r"\._cluster_centers\.weight$", ".cluster_centers"),
    (r"\._kmax_transformer_layers\.", ".layers."),
    (r"\._kmeans_query_batch_norm_retrieved_value\.", ".update_norm."),
    (r"\._kmeans_query_conv3_bn\.", ".update_out."),
    (r"\._query_self_attention\._batch_norm_similarity\.", ".similarity_norm."),
    (r"\._query_self_attention\._batch_norm_retrieved_value\.", ".retrieved_norm."),
    (r"\._query_conv3_bn\.", ".attention_out."),
    (r"\._query_qkv_conv_bn\.", ".qkv."),
    (r"\._query_ffn_conv(\d)_bn(_act)?\.", r".ffn\1."),
    (r"\._(pixel|query)_conv1_bn_act\.", r".\1_in."),
    (r"\._pixel_v_conv_bn\.", ".value."),
    (r"\._predcitor\.", ".predictor."),
    (r"\._pixel_space_head_conv0bnact\.", ".depthwise."),
    (r"\._pixel_space_head_conv1bnact\.", ".pointwise."),
    (r"\._pixel_space_head_last_convbn\.", ".feature."),
    (r"\._pixel_space_mask_batch_norm\.", ".mask_norm."),
    (r"\._transformer_mask_head\.", ".kernel."),
    (r"\._transformer_class_head\.conv\.", ".classes."),
    (r"\._conv(\d)_bn(_act)?\.", r".conv\1."),
    (r"^(pixel_decoder|decoder)\.(.*)\.norm\.", r"\1.\2.bn."),
    (r"\._", "."),
]
KMAX_IGNORED = r"auxiliary_semantic_predictor\.|num_batches_tracked$"
