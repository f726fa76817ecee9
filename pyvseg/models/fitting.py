# SPDX-License-Identifier: Apache-2.0
"""Which variants a file's weights fit, told by the shapes of a few tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.layers.backbones import ResNetSizes, SwinSizes
from pyvseg.layers.kmax_backbones import ConvNeXtSizes
from pyvseg.layers.kmax_backbones import ResNetSizes as TrainedResNetSizes
from pyvseg.models.ctvis import CTVISSettings
from pyvseg.models.genvis import GenVISSettings
from pyvseg.models.kmax import KMaXSettings
from pyvseg.models.knet import KNetSettings
from pyvseg.models.mask2former import Mask2FormerSettings
from pyvseg.models.polyphonicformer import PolyphonicFormerSettings
from pyvseg.models.tube_link import TubeLinkSettings
from pyvseg.models.tube_link_panoptic import TubeLinkPanopticSettings
from pyvseg.models.variant import Variant
from pyvseg.models.video_detector import DetectorSettings
from pyvseg.models.video_knet import VideoKNetSettings
from pyvseg.models.video_knet_instances import VideoKNetInstancesSettings
from pyvseg.models.vita import VITASettings

_TELL_TALES = (("video.pre_memory_embed_k.weight", GenVISSettings), ("video.class_embed.weight", VITASettings), ("reid_embed.layers.0.weight", CTVISSettings))


def fitting(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    """Names of the variants whose system, backbone, queries and classes are those of `weights`: of the families of Mask2Former, of
    kMaX-DeepLab (where image and video models have the same weights), of Tube-Link, K-Net and TransVOD."""
    found = (fit(weights, variants) for fit in (_fitting_mask2former, _fitting_kmax, _fitting_tube_link, _fitting_knet, _fitting_transvod))
    return next(filter(None, found), [])


def _fitting_knet(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    state = map_keys(weights, key_maps.VIDEO_KNET)
    kernels, classes = state.get("initial.kernels.weight"), state.get("initial.classes.bias")
    if kernels is None or classes is None or kernels.ndim != 4 or classes.ndim != 1:
        return []
    ways = [way(state, f"stages.0.{part}.") for part in ("link", "fuse")]
    special = ("clip_stages.0.norm.bias", VideoKNetInstancesSettings), ("initial.direct.bias", PolyphonicFormerSettings)
    kind = next((kind for key, kind in special if key in state), VideoKNetSettings)
    found = kind, len(classes), len(kernels), _backbone(state), *ways, "embed.layers.1.bias" in state
    knet = [v for v in variants if isinstance(v.settings, KNetSettings)]
    own = lambda s: (type(s), s.classes, s.kernels, _sizes(s), s.link, s.fuse, getattr(s, "track_layers", 0) > 1)  # noqa: E731
    return [v.name for v in knet if found == own(v.settings)]


def way(state: Mapping[str, Tensor], part: str) -> str | None:
    """How a stage of K-Net links or fuses."""
    return "update" if f"{part}update.fc_norm.bias" in state else "attention" if f"{part}norm.bias" in state else None


def _fitting_transvod(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    state = map_keys(weights, key_maps.TRANSVOD)
    queries, logits = state.get("detector.query_embed.weight"), state.get("detector.class_embed.0.bias")
    if queries is None or logits is None:
        return []
    tells = {"fusion.norm1.weight": "transvodpp", "temporal_decoders.1.norm1.weight": "transvod_lite", "query_layers.0.norm1.weight": "transvod"}
    system = next((system for key, system in tells.items() if key in state), "transvod_single")
    found = system, len(queries), len(logits), _backbone(state)
    detectors = [v for v in variants if isinstance(v.settings, DetectorSettings)]
    return [v.name for v in detectors if found == (v.system, v.settings.queries, v.settings.classes, _sizes(v.settings))]


def _fitting_kmax(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    state = map_keys(weights, key_maps.KMAX)
    classes, centres = state.get("decoder.predictor.classes.bias"), state.get("decoder.cluster_centers")
    if classes is None or centres is None or centres.ndim != 2:
        return []
    found = len(classes) - 1, centres.shape[1], _backbone(state)
    kmax = [v for v in variants if isinstance(v.settings, KMaXSettings)]
    return [v.name for v in kmax if found == (v.settings.classes, v.settings.queries, _sizes(v.settings))]


def _fitting_mask2former(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    state = map_keys(weights, key_maps.MASK2FORMER)
    classes, queries = state.get("decoder.class_embed.bias"), state.get("decoder.query_feat.weight")
    if classes is None or queries is None:
        return []
    kind = next((kind for key, kind in _TELL_TALES if key in state), Mask2FormerSettings)
    found = (kind, len(classes) - 1, len(queries), _backbone(state))
    return [v.name for v in variants if (s := v.settings) and found == (type(s), getattr(s, "classes", 0), getattr(s, "queries", 0), _sizes(s))]


def _fitting_tube_link(weights: Mapping[str, Tensor], variants: Iterable[Variant]) -> list[str]:
    state = map_keys(weights, key_maps.TUBE_LINK)
    classes, queries = state.get("decoder.class_embed.bias"), state.get("decoder.query_feat.weight")
    if classes is None or queries is None:
        return []
    found = ("linker.norm.weight" in state, len(classes) - 1, len(queries), _backbone(state))
    tubes = [v for v in variants if isinstance(v.settings, TubeLinkSettings)]
    return [v.name for v in tubes if found == (isinstance(v.settings, TubeLinkPanopticSettings), v.settings.classes, v.settings.queries, _sizes(v.settings))]


def _sizes(settings) -> tuple | None:
    """What `_backbone` says of the variant's weights."""
    backbone = getattr(settings, "backbone", None)
    if isinstance(backbone, ConvNeXtSizes):
        return backbone.widths, backbone.depths
    if isinstance(backbone, SwinSizes):
        return backbone.width, backbone.depths, backbone.window
    return (backbone.outputs, backbone.depth) if isinstance(backbone, ResNetSizes | TrainedResNetSizes) else None


def _backbone(state: Mapping[str, Tensor]) -> tuple | None:
    def count(beginning: str) -> int:
        return len({key[len(beginning) :].split(".")[0] for key in state if key.startswith(beginning)})

    if "backbone.downsample_layers.0.0.weight" in state:
        weights = (state.get(f"backbone.downsample_layers.{i}.{i > 0:d}.weight", ()) for i in range(4))
        return tuple(map(len, weights)), tuple(count(f"backbone.stages.{i}.") for i in range(4))
    if "backbone.patch_embed.proj.weight" in state:
        width, depths = len(state["backbone.patch_embed.proj.weight"]), tuple(count(f"backbone.layers.{i}.blocks.") for i in range(4))
        table = state.get("backbone.layers.0.blocks.0.attn.relative_position_bias_table")
        return width, depths, 0 if table is None else (round(len(table) ** 0.5) + 1) // 2
    last = state.get("backbone.layer1.0.conv3.weight", state.get("backbone.layer1.0.conv2.weight"))
    depth = {(2, 2): 18, (6, 2): 34, (6, 3): 50, (23, 3): 101, (36, 3): 152}
    blocks = count("backbone.layer3."), 3 if "backbone.layer1.0.conv3.weight" in state else 2
    return None if last is None else (len(last), depth.get(blocks))
