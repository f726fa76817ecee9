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

# Tube-Link in the names of mmdetection: its ResNet, Swin and Mask2Former, and the parts that link tubes.
TUBE_LINK = [
    (r"^backbone\.patch_embed\.projection\.", "backbone.patch_embed.proj."),
    (r"^backbone\.stages\.", "backbone.layers."),
    (r"^(backbone\..*\.attn\.)w_msa\.", r"\1"),
    (r"^(backbone\..*)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
    (r"^(backbone\..*)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
    (r"^panoptic_head\.pixel_decoder\.(?:encoder\.)?", "pixel_decoder."),
    (r"^panoptic_head\.(?:transformer_decoder\.)?", "decoder."),
    (r"^pixel_decoder\.input_convs\.(\d)\.", r"pixel_decoder.input_proj.\1."),
    (r"^pixel_decoder\.lateral_convs\.0\.", "pixel_decoder.adapter_1."),
    (r"^pixel_decoder\.output_convs\.0\.", "pixel_decoder.layer_1."),
    (r"^(pixel_decoder\..*)\.conv\.", r"\1.0."),
    (r"^(pixel_decoder\..*)\.gn\.", r"\1.1."),
    (r"^pixel_decoder\.mask_feature\.", "pixel_decoder.mask_features."),
    (r"^pixel_decoder\.level_encoding\.weight$", "pixel_decoder.level_embed"),
    (r"^(pixel_decoder\..*)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(pixel_decoder\..*)\.ffns\.0\.layers\.0\.0\.", r"\1.linear1."),
    (r"^(pixel_decoder\..*)\.ffns\.0\.layers\.1\.", r"\1.linear2."),
    (r"^(pixel_decoder\..*)\.norms\.0\.", r"\1.norm1."),
    (r"^(pixel_decoder\..*)\.norms\.1\.", r"\1.norm2."),
    (r"^decoder\.post_norm\.", "decoder.decoder_norm."),
    (r"^decoder\.cls_embed\.", "decoder.class_embed."),
    (r"^decoder\.mask_embed\.0\.", "decoder.mask_embed.layers.0."),
    (r"^decoder\.mask_embed\.2\.", "decoder.mask_embed.layers.1."),
    (r"^decoder\.mask_embed\.4\.", "decoder.mask_embed.layers.2."),
    (r"^(decoder\..*)\.attentions\.0\.attn\.", r"\1.cross_attn."),
    (r"^(decoder\..*)\.attentions\.1\.attn\.", r"\1.self_attn."),
    (r"^(decoder\..*)\.ffns\.0\.layers\.0\.0\.", r"\1.ffn.linear1."),
    (r"^(decoder\..*)\.ffns\.0\.layers\.1\.", r"\1.ffn.linear2."),
    (r"^(decoder\..*)\.norms\.0\.", r"\1.cross_norm."),
    (r"^(decoder\..*)\.norms\.1\.", r"\1.self_norm."),
    (r"^(decoder\..*)\.norms\.2\.", r"\1.ffn.norm."),
    (r"^attention_previous_track\.attn\.", "linker.attention."),
    (r"^attention_previous_norm_track\.", "linker.norm."),
    (r"^link_ffn_track\.layers\.0\.0\.", "linker.ffn.linear1."),
    (r"^link_ffn_track\.layers\.1\.", "linker.ffn.linear2."),
    (r"^link_ffn_norm_track\.", "linker.ffn.norm."),
    (r"^embed_fcs\.", "linker.embed."),
    (r"^fc_embed\.", "linker.embed.3."),
    (r"^track_head\.fcs\.", "linker.head.layers."),
    (r"^track_head\.fc_embed\.", "linker.head.layers.2."),
]
TUBE_LINK_IGNORED = r"relative_position_index$|num_batches_tracked$"

# A stage of K-Net's kernel update, as Video K-Net and PolyphonicFormer have it: linking says "track" for what one of its
# two ways calls nothing at all.
KERNEL_HEAD = [
    (r"attention_previous(_norm)?\.", r"attention_previous\1_track."),
    (r"link_ffn(_norm)?\.", r"link_ffn\1_track."),
    (r"attention_previous_update_track\.", "link.update."),
    (r"attention_previous_norm_track\.", "link.norm."),
    (r"attention_previous_track\.", "link.attention."),
    (r"attention_previous_update_link\.", "fuse.update."),
    (r"attention_previous_norm_link\.", "fuse.norm."),
    (r"attention_previous_link\.", "fuse.attention."),
    (r"link_ffn(_norm)?_track\.", r"link.ffn\1."),
    (r"link_ffn(_norm)?_link\.", r"fuse.ffn\1."),
    (r"kernel_update_conv\.", "update."),
    (r"kernel_update_conv_depth\.", "update_depth."),
    (r"attention_depth\.attn\.", "attention_depth."),
    (r"attention_norm_depth\.", "norm_depth."),
    (r"feat_depth_transform\.conv\.", "feat_depth_transform."),
    (r"ffn_depth\.layers\.0\.0\.", "ffn_depth.linear1."),
    (r"ffn_depth\.layers\.1\.", "ffn_depth.linear2."),
    (r"ffn_norm_depth\.", "ffn_depth.norm."),
    (r"attention\.attn\.", "attention."),
    (r"attention_norm\.", "norm."),
    (r"feat_transform\.conv\.", "feat_transform."),
    (r"ffn\.layers\.0\.0\.", "ffn.linear1."),
    (r"ffn\.layers\.1\.", "ffn.linear2."),
    (r"ffn_norm\.", "ffn.norm."),
]
VIDEO_KNET = [
    (r"^neck\.(lateral|fpn)_convs\.(\d)\.conv\.", r"fpn.\1.\2."),
    (r"^fpn\.fpn\.", "fpn.output."),
    (r"^rpn_head\.localization_fpn\.convs_all_levels\.(\d)\.conv(\d)\.", r"initial.fpn.levels.\1.\2."),
    (r"^rpn_head\.localization_fpn\.conv_pred\.", "initial.fpn.localization."),
    (r"^rpn_head\.localization_fpn\.aux_convs\.0\.", "initial.fpn.semantic."),
    (r"^rpn_head\.localization_fpn\.aux_convs\.1\.", "initial.fpn.depth."),
    (r"^rpn_head\.(loc|seg|depth)_convs\.0\.", r"initial.\1."),
    (r"^rpn_head\.conv_direct_depth\.", "initial.direct."),
    (r"^rpn_head\.init_kernels\.", "initial.kernels."),
    (r"^rpn_head\.conv_seg\.", "initial.classes."),
    (r"^roi_head\.mask_head\.", "stages."),
    (r"^tracker\.mask_head\.", "clip_stages."),
    (r"^embed_fcs\.", "embed.fcs."),
    (r"^fc_embed\.", "embed.fc."),
    (r"^track_head\.fcs\.(\d)\.", r"embed.layers.\1."),
    (r"^track_head\.convs\.", "embed.convs."),
    (r"^track_head\.fc_embed\.", "embed.out."),
    *KERNEL_HEAD,
]
VIDEO_KNET_IGNORED = r"relative_position_index$|num_batches_tracked$"

# TransVOD, TransVOD++ and TransVOD Lite. The decoder's box heads stand in the files twice; the temporal encoder is never run, of
# TransVOD++ the second and third fusion neither. TransVOD++ and Lite have single heads too, which they do not use.
_ROUNDS = (1, 2, 3)
TRANSVOD = [
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"backbone.inner.\1."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"backbone.outer.\1."),
    (r"^input_proj\.0\.", "detector.input_proj."),
    (r"^(query_embed|class_embed|bbox_embed)\.", r"detector.\1."),
    (r"^transformer\.(encoder|decoder)\.(?:layers\.)?", r"detector.\1."),
    (r"^transformer\.(level_embed|reference_points)", r"detector.\1"),
    (r"^temp_class_embed\.", "single_heads.classes."),
    (r"^temp_bbox_embed\.", "single_heads.boxes."),
    (r"^temp_class_embed_list\.", "class_heads."),
    (r"^temp_bbox_embed_list\.", "box_heads."),
    (r"^transformer\.temporal_decoder\.layers\.", "temporal_decoders."),
    *((rf"^transformer\.temporal_decoder{n}\.layers\.0\.", f"temporal_decoders.{n - 1}.") for n in _ROUNDS),
    *((rf"^transformer\.temporal_query_layer{n}\.", f"query_layers.{n - 1}.") for n in _ROUNDS),
    (r"^transformer\.dynamic_layer_for_current_query1\.", "fusion."),
    (r"^(detector\.decoder|temporal_decoders|query_layers|fusion)\.((?:\d\.)?)(linear\d)\.", r"\1.\2ffn.\3."),
    (r"^(detector\.decoder|temporal_decoders|query_layers|fusion)\.((?:\d\.)?)norm3\.", r"\1.\2ffn.norm."),
]
TRANSVOD_V1 = [*TRANSVOD, (r"^single_heads\.classes\.", "class_heads.0."), (r"^single_heads\.boxes\.", "box_heads.0.")]
TRANSVOD_IGNORED = r"^detector\.decoder\.bbox_embed\.|^transformer\.temporal_encoder_layer\.|^transformer\.dynamic_layer|^single_heads\.|relative_position_index$|num_batches_tracked$"
