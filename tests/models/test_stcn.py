# SPDX-License-Identifier: Apache-2.0
"""Rules of propagation that hold for any weights: a small network with random ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import pyvseg
from pyvseg import checkpoints
from pyvseg.engine.propagate import Propagation, propagate
from pyvseg.engine.types import Frame
from pyvseg.errors import CheckpointError, PyvsegError, VideoError
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.memory import MemoryBank, aggregate
from pyvseg.models.stcn import STCN, STCNSettings
from pyvseg.models.vos import Geometry, VOSState

SMALL = STCNSettings(
    encoders="efficientnet_lite0", key_width=16, value_width=32, thin_width=24, decoder_widths=(32, 24, 16),
    refine_width=16, refine_window=(2, 3, 3), short_side=None,
)  # fmt: skip


def network(settings: STCNSettings = SMALL) -> STCN:
    torch.manual_seed(0)
    return for_inference(STCN(settings), torch.float32)


def video(length: int, height: int = 60, width: int = 90) -> np.ndarray:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (height, width + 4 * length, 3), np.uint8)
    return np.stack([base[:, 4 * i : 4 * i + width] for i in range(length)])


def square(value: int, y: int, x: int, size: int = 24, shape=(60, 90)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[y : y + size, x : x + size] = value
    return mask


def labels(model: STCN, frames: np.ndarray, masks: dict[int, np.ndarray], **options) -> np.ndarray:
    given = (Frame(i, image, str(i), masks.get(i)) for i, image in enumerate(frames))
    results = list(propagate(model, given, **options))
    assert [r.index for r in results] == list(range(len(frames)))
    return np.stack([r.labels for r in results])


def test_a_stream_gives_the_masks_of_a_file_run_with_clip_length_one():
    model, frames, masks = network(), video(7), {0: square(3, 10, 10), 4: square(7, 30, 60)}
    offline = labels(model, frames, masks, clip_length=1)
    stream = pyvseg.Model(model).stream()
    live = np.stack([stream.step(image, masks.get(i)).labels for i, image in enumerate(frames)])
    assert np.array_equal(offline, live)
    assert {0, 3, 7} >= set(np.unique(live)) > {0}


@pytest.mark.parametrize("clip_length", [1, 2, 5, 10])
def test_a_saved_state_continues_to_the_same_masks(tmp_path, clip_length):
    model, frames, masks = network(), video(12), {0: square(1, 10, 10), 3: square(2, 30, 60)}
    whole = labels(model, frames, masks, clip_length=clip_length, max_memory_frames=3)
    first = Propagation(model, clip_length=clip_length, max_memory_frames=3)
    done = []
    for i, image in enumerate(frames):
        results = first.step(Frame(i, image, str(i), masks.get(i)))
        done += results
        if results and i >= 6:
            break
    first.state.save(tmp_path / "state.safetensors")
    rest = Propagation(model, clip_length=clip_length, state=VOSState.load(tmp_path / "state.safetensors"))
    for i in range(len(done), len(frames)):
        done += rest.step(Frame(i, frames[i], str(i), masks.get(i)))
    done += rest.finish()
    assert np.array_equal(np.stack([r.labels for r in done]), whole)


def test_memory_is_bounded_and_keeps_annotated_frames():
    bank = MemoryBank((1,), cells=2)
    for i in range(10):
        bank.append(i, torch.full((2, 4), float(i)), torch.zeros(1, 2, 3), annotated=i in (0, 5), max_frames=4)
    assert bank.frames == 4
    assert sorted(bank.keys[0, : bank.frames * 2 : 2, 0].tolist()) == [0, 5, 8, 9]


def test_memory_of_annotated_frames_alone_grows():
    bank = MemoryBank((1,), cells=1)
    for i in range(5):
        bank.append(i, torch.zeros(1, 4), torch.zeros(1, 1, 3), annotated=True, max_frames=2)
    assert bank.frames == 5


@pytest.mark.parametrize("bound, expected", [(3, 3), (None, 5)])
def test_bank_size_over_a_video(bound, expected):
    model, state = network(), None
    propagation = Propagation(model, clip_length=5, max_memory_frames=bound)
    for i, image in enumerate(video(21)):
        propagation.step(Frame(i, image, str(i), square(1, 10, 10) if i == 0 else None))
    assert [b.frames for b in propagation.state.banks] == [expected]


def test_an_object_annotated_again_is_corrected_not_doubled():
    model, frames = network(), video(6)
    propagation = Propagation(model, clip_length=2)
    results = []
    for i, image in enumerate(frames):
        results += propagation.step(Frame(i, image, str(i), {0: square(1, 5, 5), 3: square(1, 30, 50)}.get(i)))
    assert propagation.state.object_ids == [1]
    assert np.array_equal(results[3].labels, square(1, 30, 50))


def test_objects_that_entered_together_share_a_bank():
    model, frames = network(), video(4)
    propagation = Propagation(model, clip_length=2)
    both = square(2, 5, 5) + square(9, 32, 50)
    for i, image in enumerate(frames):
        propagation.step(Frame(i, image, str(i), {0: both, 2: square(4, 5, 60)}.get(i)))
    assert [b.object_ids for b in propagation.state.banks] == [(2, 9), (4,)]


def test_a_mask_without_objects_says_nothing():
    model, frames = network(), video(5)
    masks = {0: square(1, 10, 10)}
    assert np.array_equal(labels(model, frames, masks), labels(model, frames, {**masks, 2: np.zeros((60, 90), np.uint8)}))


def test_frames_before_the_first_mask_are_background():
    result = labels(network(), video(4), {2: square(5, 10, 10)})
    assert not result[:2].any() and np.array_equal(result[2], square(5, 10, 10))


def test_a_frame_of_another_size_is_named():
    propagation = Propagation(network())
    propagation.step(Frame(0, video(1)[0], "00000", square(1, 10, 10)))
    with pytest.raises(VideoError, match="frame 00001: size changes from 90x60 to 64x48"):
        propagation.step(Frame(1, np.zeros((48, 64, 3), np.uint8), "00001"))


def test_a_mask_of_another_size_is_named():
    with pytest.raises(VideoError, match="mask of frame 00000 is 45x30, the video 90x60"):
        Propagation(network()).step(Frame(0, video(1)[0], "00000", np.ones((30, 45), np.uint8)))


def test_many_objects():
    mask = np.zeros((60, 90), np.uint8)
    for n in range(40):
        mask[6 * (n // 8) : 6 * (n // 8) + 5, 11 * (n % 8) : 11 * (n % 8) + 9] = n + 1
    result = labels(network(), video(4), {0: mask}, clip_length=3)
    assert np.array_equal(result[0], mask)


def test_bfloat16_stays_close():
    model = network(replace(SMALL, refine_width=None))
    torch.manual_seed(0)
    low = for_inference(STCN(replace(SMALL, refine_width=None)), torch.bfloat16)
    frames, masks = video(5), {0: square(1, 10, 10, 30)}
    exact, rounded = (labels(m, frames, masks, clip_length=2) for m in (model, low))
    assert (exact != rounded).mean() < 0.05


def test_folding_does_not_change_the_network():
    torch.manual_seed(0)
    plain = STCN(SMALL).eval()
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    folded = STCN(SMALL)
    folded.load_state_dict(plain.state_dict())
    for_inference(folded, torch.float32)
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        expected, got = plain.double().encode(images.double()), folded.encode(images)
    for name in ("keys", "thin", "f4", "refine"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_aggregation_is_the_softmax_of_logits():
    p = torch.rand(3, 4, 5)
    stacked = torch.cat([(1 - p).prod(0, keepdim=True), p]).clamp(1e-7, 1 - 1e-7).double()
    expected = torch.log(stacked / (1 - stacked)).softmax(0)
    torch.testing.assert_close(aggregate(p).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, resized, padding", [((480, 854), (480, 854), (5, 5, 0, 0)), ((720, 1280), (480, 853), (5, 6, 0, 0)), ((100, 75), (640, 480), (0, 0, 0, 0))])
def test_geometry_of_the_published_protocol(size, resized, padding):
    geometry = Geometry.of(*size, 480)
    assert geometry.resized == resized and geometry.padding == padding


def test_a_single_object_file_gets_a_plane_for_the_others_that_it_ignores():
    torch.manual_seed(0)
    settings = zoo.variant("stcn_r50").settings
    state = STCN(settings).state_dict()
    conv = state.pop("value_encoder.trunk.conv1.weight")
    state["value_encoder.conv1.weight"] = conv[:, :4].clone()
    built = zoo.build(settings, state, name="s0.pth")
    assert torch.equal(built.value_encoder.trunk.conv1.weight[:, :4], conv[:, :4])
    assert not built.value_encoder.trunk.conv1.weight[:, 4].any()


def test_an_unknown_model_suggests_the_nearest():
    with pytest.raises(PyvsegError, match="did you mean pcvos_tiny"):
        pyvseg.load("pcvos_tny")


def test_weights_of_another_variant_are_refused(tmp_path):
    path = tmp_path / "small.safetensors"
    checkpoints.write(path, STCN(SMALL).state_dict())
    with pytest.raises(CheckpointError, match="another shape"):
        pyvseg.load("pcvos_tiny", weights=path)


def test_a_model_without_bundled_weights_says_where_they_are_published():
    with pytest.raises(PyvsegError, match="s03_pcvos_ytvos.pth"):
        pyvseg.load("pcvos_r50_ytvos")


@pytest.mark.parametrize("size, short_side", [((60, 107), 48), ((30, 17), 48), ((1, 1), 16), ((48, 70), None)])
def test_network_input(size, short_side):
    """Normalised, resized and padded, against the published order of operations in float64."""
    geometry = Geometry.of(*size, short_side)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    mean, std = SMALL.mean, SMALL.std
    x = torch.from_numpy(images).double().permute(0, 3, 1, 2) / 255
    x = (x - x.new_tensor(mean).view(3, 1, 1)) / x.new_tensor(std).view(3, 1, 1)
    exact = torch.nn.functional.interpolate(x, geometry.resized, mode="bicubic", align_corners=False)
    found = geometry.frames(images, mean, std, torch.device("cpu"))
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), torch.nn.functional.pad(exact, geometry.padding), rtol=0, atol=2e-5)
