# SPDX-License-Identifier: Apache-2.0
"""PCVOS: the published YouTube-VOS program on a short video, at several clip lengths, and the refinement alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN, STCNSettings
from pyvseg.verify.adapters.stcn import Volume, first_frame, given_masks
from pyvseg.verify.adapters.taps import Taps


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    settings = STCNSettings(
        refine_width=config["hidden_dim"],
        refine_window=(*config["T_window"], *config["S_window"] * 2),
        refine_shared=config["shared_proj"],
        short_side=config["short_side"],
        top_k=config["top_k"],
    )
    model = zoo.build(settings, {k: torch.from_numpy(v) for k, v in weights.items()}, name="the case")
    yield from _refinement(model, inputs)
    for_inference(model, torch.float32)
    for tag, options in manifest["runs"].items():
        model.settings = replace(settings, progressive="PMM" in options["options"])
        masks = given_masks(inputs, "in")
        if tag == "c1":
            masks = {0: masks[0]}
        volume = Volume(model, clip_length=options["clip_length"], max_memory_frames=None, required=set(options["saved_frames"]))
        taps = Taps(model) if tag == "c5" else None
        yield f"out/{tag}/labels", volume.run(inputs["in/frames"], masks)
        yield f"out/{tag}/prob_sub", volume.probabilities()[:, :, ::4, ::4]
        yield f"out/{tag}/prob_last", volume.probabilities()[:, -1, ::2, ::2]
        if taps is not None:
            taps.close()
            yield from _clip_taps(taps)


def _refinement(model: STCN, inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    for name in sorted(inputs):
        if name.startswith("in/icr_") and name.endswith("/x"):
            tag = name.split("/")[1]
            x, v = (torch.from_numpy(inputs[f"in/{tag}/{part}"]).float().permute(0, 2, 3, 4, 1) for part in "xv")
            with torch.inference_mode():
                refined = model.icr(v[:, None], model.icr.attention(x))[:, 0]
            yield f"out/{tag}", refined.permute(0, 4, 1, 2, 3).numpy()


def _clip_taps(taps: Taps) -> Iterator[tuple]:
    yield "tap/net_frame0", taps.inputs("key_encoder", 0)[0][0]
    yield from first_frame(taps)
    channels_first = (3, 0, 1, 2)
    yield "tap/clip0/readout", taps.inputs("icr", 0)[0][0, 0].transpose(channels_first)[::16]
    yield "tap/clip0/icr_key", taps.outputs("icr_proj", 1)[:, ::16].swapaxes(0, 1)
    yield "tap/clip0/icr_out", taps.outputs("icr", 0)[0, 0].transpose(channels_first)[::16]
    yield "tap/clip0/logit", taps.outputs("decoder", 0)[:, ::2, ::2]
