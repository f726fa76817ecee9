# SPDX-License-Identifier: Apache-2.0
"""Instances and panoptic maps on a GPU: the host does not wait where the next frames could be launched, and graphs change nothing."""

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from pyvseg.engine.batch import batch
from pyvseg.engine.instances import InstanceSegmentation, segment
from pyvseg.engine.jobs import Job
from pyvseg.engine.panoptic import segment_frames
from pyvseg.engine.propagate import propagate
from pyvseg.engine.recipe import Recipe, Results
from pyvseg.engine.types import Frame
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.stcn import STCN
from pyvseg.models.video_knet import VideoKNet
from pyvseg.models.video_knet_instances import VideoKNetInstances
from tests.gpu_standin import like_a_gpu  # noqa: F401  (a fixture)
from tests.models.test_stcn import SMALL, square, video
from tests.models.test_stcn_gpu import Watch
from tests.models.test_video_kmax import video_model
from tests.models.test_video_knet import INSTANCES, PANOPTIC
from tests.models.test_video_knet import small as small_knet


def frames(count: int) -> list[Frame]:
    images = np.random.default_rng(0).integers(0, 256, (count, 54, 70, 3), np.uint8)
    return [Frame(t, image, str(t)) for t, image in enumerate(images)]


@pytest.mark.parametrize("name", ["minvis_r50_ytvis21", "ctvis_r50_ovis", "vita_r50_ytvis19", "genvis_r50_ytvis19_semionline", "tube_link_r50_ytvis19"])
@torch.inference_mode()
def test_no_value_of_a_frame_decides_what_the_host_does(name, small):
    """As a CUDA graph wants it; the first call makes constants."""
    model = zoo.load(name, weights=small(name))
    x = torch.randn(2, 3, 64, 96)
    model.per_frame(x)
    with Watch() as watch:
        found = model.per_frame(x)
    assert watch.found == [] and all(len(part) == 2 for part in found if isinstance(part, torch.Tensor))


@torch.inference_mode()
def test_no_value_of_a_panoptic_clip_does():
    model = video_model(2)
    x = torch.randn(2, 3, *model.settings.image_size)
    model.encode(x)
    with Watch() as watch:
        pixels = model.encode(x).split()
        model.predict(*tree_leaves(pixels))
    assert watch.found == []


@torch.inference_mode()
def test_no_value_of_a_frame_of_kernels_does():
    x = torch.randn(2, 3, 64, 96)
    for method in (for_inference(small_knet(VideoKNet, PANOPTIC), torch.float32).encode, for_inference(small_knet(VideoKNetInstances, INSTANCES), torch.float32).per_frame):
        method(x)
        with Watch() as watch:
            method(x)
        assert watch.found == []


def test_objects_followed_as_on_a_gpu(request):
    torch.manual_seed(0)
    model, masks = for_inference(STCN(SMALL), torch.float32), {0: square(4, 8, 8), 2: square(1, 30, 40)}
    given = [Frame(t, image, str(t), masks.get(t)) for t, image in enumerate(video(16))]
    expected = [result.labels for result in propagate(model, given, clip_length=3)]
    captured = request.getfixturevalue("like_a_gpu")
    found = [result.labels for result in propagate(model, given, clip_length=3)]
    assert all(isinstance(a, np.ndarray) and (a != b).mean() < 1e-3 for a, b in zip(found, expected, strict=True))
    assert {"parts", "decode"} == set(captured)


@pytest.mark.parametrize("name", ["minvis_r50_ytvis21", "ctvis_r50_ovis", "vita_r50_ytvis19", "genvis_r50_ytvis19_semionline", "tube_link_r50_ytvis19"])
def test_a_batch_of_instances_as_on_a_gpu(name, small, clip, tmp_path, request):
    recipe = Recipe(name, small(name), "cpu", results=Results(pngs=False, overlay=False), at_once=2)
    jobs = [Job(n, clip, None) for n in ("a", "b", "c")]
    batch(jobs, recipe, tmp_path / "expected", progress=False)
    captured = request.getfixturevalue("like_a_gpu")
    report = batch(jobs, recipe, tmp_path / "found", progress=False)
    assert report.done == 3 and "per_frame" in captured
    for job in jobs:
        found, expected = ((tmp_path / where / job.name / "results.json").read_text() for where in ("found", "expected"))
        assert found == expected


def test_panoptic_maps_as_on_a_gpu(request):
    model = for_inference(video_model(2), torch.float32)
    expected = [result.values for result in segment_frames(model, frames(7))]
    captured = request.getfixturevalue("like_a_gpu")
    found = [result.values for result in segment_frames(model, frames(7))]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)) and {"encode", "predict"} == set(captured)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["minvis_r50_ytvis21", "ctvis_r50_ovis"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_instances_wait_for_nothing(name, precision, small):
    model = zoo.load(name, weights=small(name), device="cuda", precision=precision)
    segmentation, given = InstanceSegmentation(model), frames(32)
    try:
        for frame in given:
            if frame.index == 12:
                segmentation.settle()  # the thread that links may still have been making constants
                torch.cuda.set_sync_debug_mode("error")
            segmentation.step(frame)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found, again = segmentation.finish(), segment(model, given)
    on_cpu = segment(zoo.load(name, weights=small(name), device="cpu", precision=precision), given)
    assert np.array_equal(found.scores, again.scores) and [each.rle for each in found] == [each.rle for each in again]
    assert abs(float(found.scores.max()) - float(on_cpu.scores.max())) < (1e-3 if precision == "float32" else 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_panoptic_maps_repeat_themselves(dtype):
    model = for_inference(video_model(2).cuda(), dtype)
    first, again = ([result.values for result in segment_frames(model, frames(8))] for _ in range(2))
    assert len(first) == 8 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
