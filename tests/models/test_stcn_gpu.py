# SPDX-License-Identifier: Apache-2.0
"""The host never waits inside a clip: neither for a value that decides something, nor for a transfer."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyvseg.engine.propagate import Propagation, ready
from pyvseg.engine.types import Frame
from pyvseg.layers.inference import for_inference
from pyvseg.layers.transfer import arrived, constant, from_device, to_device
from pyvseg.models.stcn import STCN
from tests.models.test_stcn import SMALL, square, video

WAITS = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal.default")  # values read, or tensors made of Python's numbers


class Watch(TorchDispatchMode):
    """Notes the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += [str(func)] if any(name in str(func) for name in WAITS) else []
        return func(*args, **kwargs or {})


def test_the_watch_sees_what_waits():
    with Watch() as watch:
        x = torch.tensor([1.0, 2.0])
        x[x > 1].sum().item()
    assert {name.split(".")[1] for name in watch.found} >= {"_local_scalar_dense", "lift_fresh"}


@torch.inference_mode()
def test_no_value_decides_what_the_host_does():
    """The network as it is defined, whose operations are those of the GPU; the first clip of each kind makes constants."""
    torch.manual_seed(0)
    model = STCN(SMALL).eval()
    propagation = Propagation(model, clip_length=3, max_memory_frames=3)
    masks = {0: square(4, 8, 8), 2: square(1, 30, 40)}
    for t, image in enumerate(video(12)):
        if t == 9:
            clip = propagation.input([Frame(i, image, str(i)) for i in (9, 10, 11)])
            with Watch() as watch:
                features = model.encode(clip)
                probabilities = model.segment_clip(features, propagation.state)
                model.link(features, [9, 10, 11], probabilities, propagation.state, clip_length=3, closed=False)
            break
        propagation.step(Frame(t, image, str(t), masks.get(t)))
    assert propagation.state.last_memory > 8 and watch.found == []


def test_transfers_on_a_cpu_are_the_arrays_themselves():
    cpu, images = torch.device("cpu"), video(2)
    assert np.shares_memory(to_device(images, cpu).numpy(), images)
    assert np.shares_memory(arrived(from_device(torch.from_numpy(images))).numpy(), images)
    assert torch.equal(to_device(list(images), cpu), torch.from_numpy(images))
    assert constant((1.0, 2.0), cpu) is constant((1.0, 2.0), cpu) and constant((1,), cpu, torch.uint8).dtype == torch.uint8


def test_constants_made_in_inference_serve_training():
    with torch.inference_mode():
        rows = constant((1, 0), torch.device("cpu"), torch.int64)
    x = torch.ones(2, 3, requires_grad=True)
    x[rows].square().sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_nothing_in_a_clip_waits(precision):
    torch.manual_seed(0)
    model = for_inference(STCN(SMALL).to("cuda"), getattr(torch, precision))
    propagation, results, frames = Propagation(model, clip_length=3, max_memory_frames=3), [], video(24)
    masks = {0: square(4, 8, 8), 2: square(1, 30, 40)}
    try:
        for t, image in enumerate(frames):
            if t == 12:  # shapes have come before: kernels are built, graphs captured, constants made
                torch.cuda.set_sync_debug_mode("error")
            results += propagation.step(Frame(t, image, str(t), masks.get(t)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results += propagation.finish()
    again = Propagation(model, clip_length=3, max_memory_frames=3)
    waited = [ready(r) for t, image in enumerate(frames) for r in again.step(Frame(t, image, str(t), masks.get(t)))] + again.finish()
    assert len(results) == 24 and all(np.array_equal(ready(a).labels, ready(b).labels) for a, b in zip(results, waited, strict=True))
