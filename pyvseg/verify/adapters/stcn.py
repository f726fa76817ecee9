# SPDX-License-Identifier: Apache-2.0
"""STCN and PCVOS: propagation through a short video, and one training step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.engine.propagate import Propagation
from pyvseg.engine.types import Frame, FrameResult
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN, STCNSettings
from pyvseg.training.losses import BootstrappedCrossEntropy
from pyvseg.training.vos import training_pass
from pyvseg.verify.adapters.taps import Taps
from pyvseg.verify.compare import Rule

STEP_GRADIENTS = (
    "decoder.pred.weight",
    "key_encoder.conv1.weight",
    "key_proj.key_proj.weight",
    "value_encoder.conv1.weight",
    "value_encoder.fuser.attention.ChannelGate.mlp.1.weight",
)


def run(manifest: dict, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    """STCN cases; a case of the training loss has a warm-up in its config."""
    settings = STCNSettings(refine_width=None, progressive=False, short_side=None, top_k=manifest["config"].get("top_k", 20))
    model = zoo.build(settings, {k: torch.from_numpy(v) for k, v in weights.items()}, name="the case")
    if "start_warm" in manifest["config"]:
        yield from _criterion(manifest, inputs)
        yield from _training_step(manifest, model, weights, inputs)
        return
    for_inference(model, torch.float32)
    taps = Taps(model)
    for tag, options in manifest["runs"].items():
        davis = tag.startswith("davis")
        folder = "in/davis" if davis else "in/yv"
        model.settings = replace(settings, memory_every=options["mem_every"], schedule="modulo" if davis else "distance")
        masks = {0: inputs["in/davis/mask"]} if davis else given_masks(inputs, folder)
        required = options.get("req_frames")
        volume = Volume(model, clip_length=1, max_memory_frames=None, include_last=options.get("include_last", False),
                        required=None if required is None else set(required))  # fmt: skip
        labels = volume.run(inputs[f"{folder}/frames"], masks)
        yield f"out/{tag}/labels", labels
        yield f"out/{tag}/prob_sub", volume.probabilities()[:, :, ::2, ::2]
        yield f"out/{tag}/prob_last", volume.probabilities()[:, -1]
        if tag == "davis":
            yield from _frame_taps(taps)
        taps.close()


def _frame_taps(taps: Taps) -> Iterator[tuple]:
    yield from first_frame(taps)
    yield "tap/first/value_masks", taps.inputs("value_encoder", 0)[1][:, None]
    objects = range(len(taps.inputs("value_encoder", 0)[1]))
    yield "tap/frame1/readout", np.concatenate([taps.inputs("decoder", i)[0][:, ::16] for i in objects])
    yield "tap/frame1/logit", np.concatenate([taps.outputs("decoder", i) for i in objects])


def first_frame(taps: Taps) -> Iterator[tuple]:
    """What both systems show of frame 0: key encoder outputs and the first values, with the published thinning of channels."""
    f4, f8, f16 = taps.outputs("key_encoder", 0)
    for name, tensor, step in (("f4", f4, 32), ("f8", f8, 32), ("f16", f16, 16)):
        yield f"tap/first/{name}", tensor[0, ::step]
    yield "tap/first/k16", taps.outputs("key_proj", 0)[0]
    yield "tap/first/f16_thin", taps.outputs("key_comp", 0)[0, ::16]
    yield "tap/first/value", taps.outputs("value_encoder", 0)[:, ::16]


class Volume(Propagation):
    """A propagation that keeps the probabilities of every frame, as the published programs do."""

    def run(self, frames: np.ndarray, masks: dict[int, np.ndarray]) -> np.ndarray:
        """uint8 frames (T, H, W, 3) and label images by frame -> label images (T, H, W); frames left out stay 0."""
        self.volume: dict[int, dict[int, np.ndarray]] = {}
        labels = np.zeros(frames.shape[:3], np.uint8)
        results = [r for i, image in enumerate(frames) for r in self.step(Frame(i, image, str(i), masks.get(i)))]
        for result in results + self.finish():
            labels[result.index] = result.labels
        self.length = len(frames)
        return labels

    def _results(self, frames: list[Frame], probabilities: Tensor) -> list[FrameResult]:
        for t, frame in enumerate(frames):
            self.volume[frame.index] = dict(zip([0, *self.state.object_ids], probabilities[:, t].numpy()))
        return super()._results(frames, probabilities)

    def probabilities(self) -> np.ndarray:
        """(K + 1, T, H, W): background, then objects in ascending id; what was never computed is background."""
        ids = [0, *sorted(self.state.object_ids)]
        some = next(iter(self.volume.values()))[0]
        volume = np.zeros((len(ids), self.length, *some.shape), np.float32)
        volume[0] = 1e-7
        for t, planes in self.volume.items():
            for i, plane in planes.items():
                volume[ids.index(i), t] = plane
        return volume


def given_masks(inputs: dict[str, np.ndarray], folder: str) -> dict[int, np.ndarray]:
    start = f"{folder}/mask_"
    return {int(name[len(start) :]): mask for name, mask in inputs.items() if name.startswith(start)}


def _criterion(manifest: dict, inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    config = manifest["config"]
    criterion = BootstrappedCrossEntropy(config["start_warm"], config["end_warm"], config["top_p"])
    truth = torch.from_numpy(inputs["in/crit/cls_gt"]).long()
    objects = torch.from_numpy(inputs["in/crit/selector"]).sum(1).long()
    for iteration in (0, 19999, 20000, 30000, 45000, 70000, 70001, 100000):
        logits = [torch.from_numpy(inputs[f"in/crit/logits_{t}"]).requires_grad_() for t in (1, 2)]
        losses = [criterion(x, truth[:, t], objects, iteration) for t, x in enumerate(logits, 1)]
        total = sum(losses)
        total.backward()
        row = [x.item() for x in (*losses, total)] + [criterion.share(iteration), *_overlaps(logits, truth)]
        yield f"out/crit/it{iteration}", np.array(row)
        if iteration in (0, 45000, 100000):
            for t, x in enumerate(logits, 1):
                yield f"out/crit/it{iteration}_grad_logits_{t}", x.grad.numpy(), _rule(manifest, "tolerance_crit_grad")


def _overlaps(logits: list[Tensor], truth: Tensor) -> list[float]:
    """Intersection and union over frames 1 and 2 of the first object, then of the second, whether or not it exists."""
    overlaps = []
    for k in (1, 2):
        said = torch.stack([x.softmax(1)[:, k] > 0.5 for x in logits], 1)
        true = truth[:, 1:] == k
        overlaps += [float((said & true).sum()), float((said | true).sum())]
    return overlaps


def _training_step(manifest: dict, model: STCN, weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> Iterator[tuple]:
    images = torch.from_numpy(inputs["in/step/frames"]).permute(0, 1, 4, 2, 3) / 255
    mean, std = (images.new_tensor(x).view(3, 1, 1) for x in (model.settings.mean, model.settings.std))
    truth = torch.from_numpy(inputs["in/step/cls_gt"]).long()
    selector = torch.from_numpy(inputs["in/step/selector"])
    masks = torch.stack([truth[:, 0] == k for k in (1, 2)], 1).float()
    model.train(False).requires_grad_(True)
    logits = training_pass(model, (images - mean) / std, masks, selector, [[1], [2]])
    criterion = BootstrappedCrossEntropy()
    losses = [criterion(logits[t], truth[:, t], selector.sum(1).long(), 0) for t in (1, 2)]
    sum(losses).backward()
    yield "out/step/losses", np.array([x.item() for x in (*losses, sum(losses))])
    for t in (1, 2):
        yield f"out/step/logits_{t}", logits[t].detach()[..., ::2, ::2].numpy()
    yield "out/step/mask_2", logits[2].detach().softmax(1)[:, 1:, ::2, ::2].numpy()
    published = map_keys({k: k for k in weights}, key_maps.STCN)
    gradients = {published[name]: p.grad for name, p in model.named_parameters()}
    norms = np.array([gradients[k].double().norm().item() for k in manifest["grad_norm_names"]])
    yield "out/step/grad_norms", norms, _rule(manifest, "tolerance_step_grad")
    for name in STEP_GRADIENTS:
        gradient = gradients[name][::8] if name.startswith("key_proj.key_proj.weight") else gradients[name]
        yield f"out/step/grad/{name}", gradient.numpy(), _rule(manifest, "tolerance_step_grad")


def _rule(manifest: dict, key: str) -> Rule:
    return Rule(manifest[key]["rtol"], manifest[key]["atol"])
