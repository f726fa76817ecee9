# SPDX-License-Identifier: Apache-2.0
"""PolyphonicFormer: a stored case, depth and boxes against their plain formulations, files, saved states, published names."""

import json
import signal
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyvseg
from benchmarks.models.polyphonicformer import Published
from benchmarks.models.video_knet import drawn
from pyvseg import checkpoints
from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.cli.main import main
from pyvseg.engine.output import Interrupted
from pyvseg.engine.panoptic import PanopticSegmentation
from pyvseg.engine.recipe import Recipe
from pyvseg.engine.run import run
from pyvseg.errors import CheckpointError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.depth_kernels import DepthKernelHead
from pyvseg.layers.inference import for_inference
from pyvseg.layers.roi_embedding import pyramid_roi_align
from pyvseg.models import zoo
from pyvseg.models.fitting import fitting
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.knet_panoptic import MergeSettings
from pyvseg.models.polyphonicformer import PolyphonicFormer, PolyphonicFormerSettings, chosen_depth, extents
from pyvseg.models.state import load_state, save_state
from pyvseg.verify import verify_case
from pyvseg.video.depth import read_depth, write_depth
from pyvseg.video.panoptic import read_ids, write_ids
from pyvseg.video.png import read_numbers, write_numbers
from tests.conftest import shared
from tests.models.test_video_knet import small, video
from tests.video.clips import write_images

NAME = "polyphonicformer_r50_cityscapes_dvps"
SIZES = {
    "backbone": ResNetSizes(18, 32, 32, 32), "channels": 32, "kernels": 6, "stages": 2, "heads": 4, "ffn": 32, "merge": MergeSettings(12, 0.2, 0.0),
    "track_convs": 1, "track_width": 32, "track_hidden": 32, "embedding": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    return PolyphonicFormerSettings(**SIZES)


@pytest.fixture(scope="module")
def network(settings):
    return for_inference(small(PolyphonicFormer, settings), torch.float32)


@pytest.fixture
def weights(monkeypatch, settings, tmp_path):
    """Of a small variant, in a file."""
    monkeypatch.setitem(zoo.ZOO, NAME, replace(zoo.variant(NAME), settings=settings))
    path = tmp_path / "polyphonic.safetensors"
    checkpoints.write(path, small(PolyphonicFormer, settings).state_dict())
    return path


@pytest.mark.parametrize("name, tensors", [("polyphonic-small", 145)])
def test_stored_cases_agree(name, tensors):
    report = verify_case(shared("parity", name))
    assert report.passed, report
    assert len(report.lines) == tensors


def test_depth_is_pooled_and_drawn_as_if_features_were_transformed():
    torch.manual_seed(0)
    head = DepthKernelHead(32, 4, 32, 5).double()
    masks, features, kernels = torch.randn(2, 7, 6, 9).double(), torch.randn(2, 32, 6, 9).double(), torch.randn(2, 7, 32).double()
    transformed = head.feat_depth_transform(features)
    pooled = torch.einsum("bnhw,bchw->bnc", (masks.sigmoid() > 0.5).double(), transformed)
    logits = torch.einsum("bnc,bchw->bnhw", head.fc_depth(head.depth_regs(kernels)), transformed)
    assert torch.allclose(head.pool_depth(masks, features), pooled, atol=1e-12)
    assert torch.allclose(head.depth(kernels, features), logits, atol=1e-12)


@pytest.mark.parametrize("source", [(64, 96), (61, 70)])
def test_every_pixel_has_the_depth_of_its_segment(source):
    generator = torch.Generator().manual_seed(0)
    size = FrameSize.of(*source, None)
    maps = 80 * torch.rand(5, size.padded[0] // 4, size.padded[1] // 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, source, generator=generator)
    full = F.interpolate(maps[None], size.padded, mode="bilinear")[0, :, : source[0], : source[1]]
    expected = full.gather(0, labels[None])[0]
    assert np.allclose(chosen_depth(maps.float(), labels.short().numpy(), size), expected, rtol=1e-6, atol=1e-4)


def published_roi(features, box):
    """Of a map (C, h, w) in its own pixels: RoIAlign with half a pixel of shift, two samples along each side of a cell."""
    (height, width), (x1, y1, x2, y2) = features.shape[1:], box
    result = torch.zeros(len(features), 7, 7, dtype=features.dtype)
    for i in range(14):
        for j in range(14):
            y, x = y1 - 0.5 + (y2 - y1) * (i + 0.5) / 14, x1 - 0.5 + (x2 - x1) * (j + 0.5) / 14
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = features[:, top, left] * (1 - x + left) + features[:, top, right] * (x - left)
            lower = features[:, bottom, left] * (1 - x + left) + features[:, bottom, right] * (x - left)
            result[:, i // 2, j // 2] += (upper * (1 - y + top) + lower * (y - top)) / 4
    return result


def test_boxes_are_looked_up_in_the_map_of_their_size():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 32, 128 >> i, 160 >> i, generator=generator, dtype=torch.float64) for i in range(4)]
    boxes = [(3.25, 0, 20.5, 31), (100, 50, 240, 190.5), (0, 100, 300, 400), (20, 30, 700, 620), (0, 0, 0, 0), (630, 500, 650, 520), (0, 0, 112, 112)]
    found = pyramid_roi_align([m.float() for m in maps], torch.tensor(boxes))
    for box, level, cells in zip(boxes, (0, 1, 2, 3, 0, 0, 1), found):
        expected = published_roi(maps[level][0], [side / (4 << level) for side in box])
        assert torch.allclose(cells.double(), expected, atol=1e-4)
    assert not found[5][:, -1].any() and found[5][:, 0].any()


def test_extents_are_twice_the_mean_distance():
    labels = np.zeros((40, 60), np.int16)
    labels[5:9, 10:40], labels[30, 3] = 2, 1
    labels[20:36, 0:3] = 3
    boxes = extents(labels, [1, 2, 3])
    for number, box in enumerate(boxes, 1):
        y, x = (torch.from_numpy(at).double() for at in np.nonzero(labels == number))
        half = [max(2 * (at - at.mean()).abs().mean().item(), 2) for at in (x, y)]
        expected = [x.mean() - half[0], y.mean() - half[1], x.mean() + half[0], y.mean() + half[1]]
        assert np.allclose(box, np.maximum(expected, 0), atol=1e-5)
    assert boxes[2][0] == 0


def test_a_frame_without_things_ages_no_track(network):
    state = network.new_state(70, 90)
    with torch.inference_mode():
        frame = network.encode_frames(video(1)[0][None], state)[0]
        silent = frame._replace(classes=torch.full_like(frame.classes, -30.0), masks=torch.full_like(frame.masks, -9.0))
        nothing = network.step([silent], state)[0]
        silent.classes[0, 2, 3] = silent.masks[0, 2, 4, 5] = 30.0
        thing = network.step([silent], state)[0]
    assert (state.written, state.seen) == (2, 1) and thing.segments == [(14_0001, 14, True)]
    assert not nothing.segments and not nothing.values.any()
    dense = 0.01 + (80 - 0.01) * F.interpolate(frame.dense.double(), scale_factor=2, mode="bilinear").sigmoid()
    assert np.allclose(nothing.depth, F.interpolate(dense, state.size.padded, mode="bilinear")[0, 0, :70, :90], atol=1e-4)


def test_run_writes_what_segment_gives(weights, tmp_path):
    write_images(tmp_path / "street", video(4))
    assert main(["run", str(tmp_path / "street"), "--model", NAME, "--weights", str(weights), "--out", str(tmp_path / "out")]) == 0
    model = pyvseg.load(NAME, weights=weights, device="cpu")
    results = list(model.segment(tmp_path / "street"))
    assert [result.index for result in results] == list(range(4))
    for result in results:
        assert np.array_equal(read_ids(tmp_path / "out" / "pan_pred" / "street" / f"{result.name}.png"), result.values)
        depth = read_depth(tmp_path / "out" / "depth" / "street" / f"{result.name}.png")
        assert result.depth.dtype == np.float32 and np.abs(depth - result.depth).max() <= 0.5 / 256 + 1e-6
        assert result.depth.min() >= 0.009 and result.depth.std() > 0
        assert set(np.unique(result.values)) - {0} == set(result.segments)
    assert {value // 10000 >= 11 for result in results for value in result.segments} == {True, False}
    with pytest.raises(CheckpointError, match="missing"):
        image_model = {name: value for name, value in checkpoints.read(weights).items() if not name.startswith("embed.")}
        zoo.build_variant(zoo.variant(NAME), image_model, name="polyphonic_r50_image.pth")


def test_interrupted_and_resumed_equals_undisturbed(weights, tmp_path, monkeypatch):
    write_images(tmp_path / "street", video(6))
    task = Recipe(NAME, weights, "cpu").task()
    run(task, tmp_path / "street", out=tmp_path / "whole", progress=False)
    real, calls = PanopticSegmentation.step, []

    def step(self, frames, **last):
        calls.append(frames)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, frames, **last)

    monkeypatch.setattr(PanopticSegmentation, "step", step)
    with pytest.raises(Interrupted):
        run(task, tmp_path / "street", out=tmp_path / "parts", progress=False)
    monkeypatch.setattr(PanopticSegmentation, "step", real)
    assert run(task, tmp_path / "street", out=tmp_path / "parts", resume=True, progress=False).frames == 2
    whole, parts = ({p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")} for out in (tmp_path / "whole", tmp_path / "parts"))
    assert len(whole) == 12 and whole == parts


def test_a_saved_state_goes_on(network, tmp_path):
    state, saved = (network.new_state(70, 90) for _ in range(2))
    with torch.inference_mode():
        for image in video(4):
            one = network.step(network.encode_frames(image[None], state), state)[0]
            other = network.step(network.encode_frames(image[None], saved), saved)[0]
            assert np.array_equal(one.values, other.values) and np.array_equal(one.depth, other.depth)
            save_state(saved, tmp_path / "state")
            saved = load_state(tmp_path / "state")
    assert saved.seen == state.seen > 0 and saved.tracks.tracks


def test_bfloat16_says_nearly_the_same(network, settings):
    half = for_inference(small(PolyphonicFormer, settings), torch.bfloat16)
    state, image = network.new_state(70, 90), video(1)
    with torch.inference_mode():
        a, b = (model.encode_frames(image[0][None], state)[0] for model in (network, half))
    assert b.classes.dtype == torch.bfloat16 and (a.dense.sigmoid() - b.dense.float().sigmoid()).abs().max() < 0.02
    with torch.inference_mode():
        assert half.step([b], state)[0].depth.dtype == np.float32


def test_depth_files(tmp_path):
    metres = np.array([[0.01, 79.99, 300.0], [1 / 256, 0.0, 12.5]], np.float32)
    write_depth(tmp_path / "depth.png", metres)
    assert np.array_equal(read_depth(tmp_path / "depth.png"), np.array([[3, 20477, 65535], [1, 0, 3200]], np.float32) / 256)
    with pytest.raises(ValueError, match="finite"):
        write_depth(tmp_path / "nan.png", np.full((2, 2), np.nan))


@pytest.mark.parametrize(
    "published, ours",
    [
        ("rpn_head.localization_fpn.aux_convs.1.gn.bias", "initial.fpn.depth.gn.bias"),
        ("rpn_head.depth_convs.0.conv.weight", "initial.depth.conv.weight"),
        ("rpn_head.conv_direct_depth.bias", "initial.direct.bias"),
        ("roi_head.mask_head.1.attention_depth.attn.in_proj_weight", "stages.1.attention_depth.in_proj_weight"),
        ("roi_head.mask_head.1.attention_norm_depth.weight", "stages.1.norm_depth.weight"),
        ("roi_head.mask_head.2.kernel_update_conv_depth.norm_in.bias", "stages.2.update_depth.norm_in.bias"),
        ("roi_head.mask_head.0.feat_depth_transform.conv.bias", "stages.0.feat_depth_transform.bias"),
        ("roi_head.mask_head.0.ffn_depth.layers.0.0.weight", "stages.0.ffn_depth.linear1.weight"),
        ("roi_head.mask_head.0.ffn_norm_depth.bias", "stages.0.ffn_depth.norm.bias"),
        ("roi_head.mask_head.0.depth_regs.1.bias", "stages.0.depth_regs.1.bias"),
        ("track_head.convs.3.gn.bias", "embed.convs.3.gn.bias"),
        ("track_head.fcs.0.weight", "embed.layers.0.weight"),
    ],
)
def test_published_names(published, ours):
    assert list(map_keys({published: torch.zeros(())}, key_maps.VIDEO_KNET)) == [ours]
    assert list(map_keys({ours: torch.zeros(())}, key_maps.VIDEO_KNET)) == [ours]  # files that pyvseg wrote
    with torch.device("meta"):
        model = PolyphonicFormer(zoo.variant(NAME).settings)
    assert ours in model.state_dict() and fitting(model.state_dict(), zoo.ZOO.values()) == [NAME]


def test_the_benchmark_is_timed_against_the_same_results(settings):
    torch.manual_seed(0)
    settings = replace(settings, kernels=30)
    plain = small(PolyphonicFormer, settings)
    classes, masks = drawn(settings, (96, 160))
    published = Published(plain, plain.new_state(90, 150), lambda name, work: work(), (classes, masks))
    with torch.inference_mode():
        frame = published.network(torch.randn(1, 3, 96, 160))
        panoptic = published.merge(None)
        found = plain.segment_clip(frame._replace(classes=classes[None], masks=masks[None]), published.state)
        assert np.mean(panoptic.labels != found.panoptic.labels) < 1e-3 and len(panoptic.segments) > 4
        assert np.abs(published.depth(frame, found.panoptic) - found.depth).max() < 1e-2
    assert np.array_equal(panoptic.boxes, found.panoptic.boxes)


def test_a_run_on_cityscapes_dvps_is_what_eval_scores(weights, tmp_path, capsys):
    split, out, rng = tmp_path / "data" / "video_sequence" / "val", tmp_path / "out", np.random.default_rng(0)
    split.mkdir(parents=True)
    maps = rng.choice([0, 11_002, 13_001, 10_000, 32_000], (4, 7, 9)).astype(np.uint16).repeat(10, 1).repeat(10, 2)
    for t, image in enumerate(video(8)):
        name = split / f"{t // 4:06d}_{t % 4:06d}_munster_000105_000004"
        cv2.imwrite(f"{name}_leftImg8bit.png", image[..., ::-1])
        write_numbers(f"{name}_gtFine_instanceTrainIds.png", maps[t % 4])
        write_depth(f"{name}_depth.png", np.where(rng.random(image.shape[:2]) < 0.5, 40.0, 0.0))
    assert main(["run", str(split), "--model", NAME, "--weights", str(weights), "--out", str(out), "--no-overlay"]) == 0
    assert sorted(path.name for path in (out / "depth").iterdir()) == ["000000", "000001"]
    score = ["eval", str(out), "--gt", str(tmp_path / "data"), "--protocol", "cityscapes-dvps", "--json", str(tmp_path / "scores.json")]
    assert main(score) == 0
    for path in split.glob("*_leftImg8bit.png"):  # results that are the annotations
        truth = [read(f"{path}".replace("leftImg8bit", end)) for read, end in ((read_numbers, "gtFine_instanceTrainIds"), (read_depth, "depth"))]
        sequence = path.name.split("_")[0]
        values = np.where(truth[0] < 19_000, truth[0].astype(np.int32) // 1000 * 10_000 + np.maximum(truth[0] % 1000, 1), 0)
        write_ids(out / "pan_pred" / sequence / path.name, values)
        write_depth(out / "depth" / sequence / path.name, np.where(truth[1] > 0, truth[1], 5.0))
    assert main(score) == 0
    totals = json.loads((tmp_path / "scores.json").read_text())["totals"]
    assert totals["DSTQ"] == totals["DQ"] == totals["a1"] == 1 and totals["abs_rel"] == 0
    assert totals["DVPQ"] == pytest.approx(100 * 4 / 19) and totals["DVPQ-Things"] == pytest.approx(100 * 2 / 8)
    next((out / "depth" / "000000").iterdir()).unlink()
    assert main(score) != 0 and "000000" in capsys.readouterr().err
