# SPDX-License-Identifier: Apache-2.0
"""Named variants: settings, published file, what was published for it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pyvseg import checkpoints
from pyvseg.checkpoints import key_maps
from pyvseg.errors import CheckpointError, PyvsegError
from pyvseg.layers.inference import for_inference
from pyvseg.layers.normed import linear_weights
from pyvseg.models import fitting, zoo_detection, zoo_instances, zoo_panoptic, zoo_tube_link
from pyvseg.models.ctvis import CTVIS
from pyvseg.models.genvis import GenVIS
from pyvseg.models.kmax_images import KMaXImages
from pyvseg.models.mask2former_images import Mask2FormerInstances, Mask2FormerPanoptic
from pyvseg.models.mask2former_video import Mask2FormerVideo
from pyvseg.models.minvis import MinVIS
from pyvseg.models.polyphonicformer import PolyphonicFormer
from pyvseg.models.stcn import STCN, STCNSettings
from pyvseg.models.transvod import TransVOD
from pyvseg.models.transvod_lite import TransVODLite
from pyvseg.models.transvod_single import TransVODSingle
from pyvseg.models.transvodpp import TransVODPlusPlus
from pyvseg.models.tube_link import mmdet_swin
from pyvseg.models.tube_link_instances import TubeLinkInstances
from pyvseg.models.tube_link_panoptic import TubeLinkPanoptic
from pyvseg.models.tube_link_semantic import TubeLinkSemantic
from pyvseg.models.variant import Variant
from pyvseg.models.video_kmax import VideoKMaX
from pyvseg.models.video_knet import VideoKNet
from pyvseg.models.video_knet_instances import VideoKNetInstances
from pyvseg.models.vita import VITA

_STCN = STCNSettings(refine_width=None, progressive=False, memory_every=5, schedule="distance", short_side=480)
_TINY = STCNSettings(
    encoders="efficientnet_lite0",
    value_width=128,
    thin_width=96,
    decoder_widths=(128, 64, 48),
    refine_width=64,
    clip_length=3,  # what it was trained with
    short_side=384,  # measured on DAVIS: the small network sees further at this size than at 480
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
)

ZOO = {
    v.name: v
    for v in (
        Variant(
            "pcvos_tiny", "semi-supervised", "pcvos", _TINY, "pcvos_tiny.safetensors", "bundled", "Apache-2.0",
            note="small encoders, trained by pyvseg; see the model card",
        ),
        Variant(
            "pcvos_r50_ytvos", "semi-supervised", "pcvos", STCNSettings(), "s03_pcvos_ytvos.pth",
            "the PCVOS authors' repository", "GPL-3.0",
            {"YouTube-VOS 2019 val G, clip 5/10/15/25": "84.6 / 84.1 / 83.6 / 83.0", "DAVIS 2017 val J&F": "86.1"},
        ),
        Variant(
            "stcn_r50", "semi-supervised", "stcn", _STCN, "stcn.pth", "the STCN authors' repository", "MIT",
            {"DAVIS 2017 val J&F": "85.3", "YouTube-VOS 2019 val G": "84.2"},
        ),
        *zoo_instances.variants(),
        *zoo_panoptic.variants(),
        *zoo_tube_link.variants(),
        *zoo_detection.variants(),
    )
}  # fmt: skip


def variant(name: str) -> Variant:
    """Raises PyvsegError, with the nearest names, when there is no variant of that name."""
    if name in ZOO:
        return ZOO[name]
    near = difflib.get_close_matches(name, ZOO, n=2, cutoff=0.3) or list(ZOO)
    raise PyvsegError(f"no model is called {name!r}; did you mean {' or '.join(near)}? (`pyvseg models` lists all)")


@dataclass(frozen=True)
class System:
    """A network, and how its published files become its weights: see `checkpoints.load_into`."""

    network: type[nn.Module]
    key_map: checkpoints.KeyMap
    ignored: str
    prepare: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda weights, model: weights


def _widen(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A single-object file's value encoder has no plane for the other objects: give it one that it ignores."""
    key = "value_encoder.conv1.weight"
    old, new = weights.get(key), model.value_encoder.trunk.conv1.weight
    if old is None or old.ndim != 4 or old.shape[1] != 4 or new.shape[1] != 5:
        return weights
    return {**weights, key: torch.cat([old, old.new_zeros(old.shape[0], 1, *old.shape[2:])], 1)}


_VOS = System(STCN, key_maps.STCN, key_maps.STCN_IGNORED, _widen)
SYSTEMS = {"stcn": _VOS, "pcvos": _VOS} | {
    name: System(network, key_maps.MASK2FORMER, key_maps.MASK2FORMER_IGNORED)
    for name, network in {
        "mask2former": Mask2FormerInstances, "mask2former_panoptic": Mask2FormerPanoptic, "mask2former_video": Mask2FormerVideo, "minvis": MinVIS, "ctvis": CTVIS, "vita": VITA, "genvis": GenVIS,
    }.items()
} | {name: System(network, key_maps.KMAX, key_maps.KMAX_IGNORED, linear_weights) for name, network in {"kmax": KMaXImages, "video_kmax": VideoKMaX}.items()} | {
    name: System(network, key_maps.TUBE_LINK, key_maps.TUBE_LINK_IGNORED, mmdet_swin)
    for name, network in {"tube_link": TubeLinkInstances, "tube_link_panoptic": TubeLinkPanoptic, "tube_link_semantic": TubeLinkSemantic}.items()
} | {
    name: System(network, key_maps.VIDEO_KNET, key_maps.VIDEO_KNET_IGNORED)
    for name, network in {"video_knet": VideoKNet, "video_knet_instances": VideoKNetInstances, "polyphonicformer": PolyphonicFormer}.items()
} | {
    "transvod": System(TransVOD, key_maps.TRANSVOD_V1, key_maps.TRANSVOD_IGNORED),
    "transvodpp": System(TransVODPlusPlus, key_maps.TRANSVOD, key_maps.TRANSVOD_IGNORED),
    "transvod_single": System(TransVODSingle, key_maps.TRANSVOD, key_maps.TRANSVOD_IGNORED),
    "transvod_lite": System(TransVODLite, key_maps.TRANSVOD, key_maps.TRANSVOD_IGNORED),
}  # fmt: skip


def build(settings, weights: dict[str, Tensor], *, name: str, system: str = "stcn") -> nn.Module:
    """A network with `weights` under their published names or ours, in evaluation mode, float32, not yet folded."""
    kind = SYSTEMS[system]
    model = kind.network(settings)
    checkpoints.load_into(model, kind.prepare(weights, model), kind.key_map, name=name, ignore=kind.ignored)
    return model.eval()


def build_variant(chosen: Variant, weights: dict[str, Tensor], *, name: str) -> nn.Module:
    """`build`, whose error says which variants the weights would fit."""
    try:
        return build(chosen.settings, weights, name=name, system=chosen.system)
    except CheckpointError as error:
        found = fitting.fitting(weights, ZOO.values())
        if not found or chosen.name in found:
            raise
        raise CheckpointError(f"{error}; they fit {' or '.join(found[:4])}") from None


def load(
    name: str = "pcvos_tiny", *, weights: str | Path | None = None, device: str | None = None, precision: str = "float32"
) -> nn.Module:
    """The network of a variant, ready to run.

    weights    a published checkpoint or a pyvseg safetensors file; may be left out where weights are bundled
    device     "cpu", "cuda", ...; default: CUDA where there is one
    precision  "float32" gives the published numbers, "bfloat16" is faster

    Raises PyvsegError for unknown names and precisions, CheckpointError for weights that do not fit.
    """
    chosen = variant(name)
    path = chosen.bundled if weights is None else Path(weights)
    if path is None:
        source = f"{chosen.file} from {chosen.where} ({chosen.licence})"
        raise PyvsegError(f"{name} has no bundled weights: download {source} and pass it as weights")
    if precision not in ("float32", "bfloat16"):
        raise PyvsegError(f"precision {precision!r} is not supported; use float32 or bfloat16")
    model = build_variant(chosen, checkpoints.read(path), name=str(path))
    model.to(_device(device))
    if model.device.type == "cuda" and precision == "float32":
        torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions: 10 bits of mantissa
    return for_inference(model, getattr(torch, precision))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise PyvsegError(f"{name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PyvsegError(f"{name}: this machine has no usable CUDA device; use cpu")
    return device
