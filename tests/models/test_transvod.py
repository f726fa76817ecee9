# SPDX-License-Identifier: Apache-2.0
"""TransVOD, TransVOD++ and TransVOD Lite: networks, choice of frames, published files."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pyvseg import checkpoints
from pyvseg.errors import CheckpointError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.deformable_detr import DecoderLayer
from pyvseg.layers.pyramid import SWIN_B_PYRAMID
from pyvseg.layers.roi import roi_align
from pyvseg.models import zoo
from pyvseg.models.frame_choice import groups, references
from pyvseg.models.video_detector import best_pairs, frame_size
from pyvseg.verify import load_case, verify_case
from tests.conftest import shared


@pytest.mark.parametrize("name", ["transvod-small", "transvodpp-small", "transvodlite-small", "transvod-loss"])
def test_stored_cases_agree(name):
    report = verify_case(shared("parity", name))
    assert report.passed, report.summary() + "\n" + "\n".join(str(line) for line in report.lines if line.failed)


def published(frame, first, last, count):
    """The choice of `count` >= 8 references in the words of the published evaluation: ids from `first` to `last`."""
    step, found = max((last - first + 1) // 16, 1), []
    for i in range(int((first - frame) // step), int((last - frame) // step)):
        if i < 0:
            found.append(max(frame + i * step, first))
        elif i > 0:
            found.append(min(frame + i * step, last))
    if frame in found:
        found.remove(frame)
    while len(found) < count:
        found.extend(found)
    return found[:count]


def test_references():
    for frames in (3, 15, 16, 31, 32, 33, 100, 531):
        for frame in {0, 1, frames // 2, frames - 2, frames - 1}:
            assert references(frame, frames, 14) == published(frame, 0, frames - 1, 14)
    assert references(0, 1, 14) == [0] * 14 and references(0, 2, 14) == [0] * 14 and references(1, 2, 14) == [0] * 14
    assert references(1, 40, 4) == [3, 5, 7, 9] and references(20, 40, 4) == [18, 16, 14, 12] and references(3, 5, 4) == [4, 4, 4, 4]


@pytest.mark.parametrize("frames", [1, 5, 11, 12, 13, 30])
def test_groups(frames):
    found = groups(frames, 12)
    assert all(len(group) == 12 for group in found) and set(sum(found, [])) == set(range(frames))
    assert found == groups(frames, 12)
    assert len(found) == math.ceil((frames if frames >= 12 else 12) / 12) or frames < 12
    if frames == 13:
        assert sum(groups(frames, 12, shuffle=False), []) == [*range(13), *range(2, 13)]


def naive_roi(features, grid, box):
    """RoIAlign of one box, sample by sample, in float64."""
    (height, width), plane = grid, features.double().view(*grid, -1)
    x1, y1, x2, y2 = (v - 0.5 for v in box.double().tolist())
    cells = []
    for row in range(7):
        for column in range(7):
            total = torch.zeros(plane.shape[-1], dtype=torch.float64)
            for i in (0.25, 0.75):
                for j in (0.25, 0.75):
                    y, x = y1 + (row + i) * (y2 - y1) / 7, x1 + (column + j) * (x2 - x1) / 7
                    if -1 <= y <= height and -1 <= x <= width:
                        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                        t, s = int(y), int(x)
                        b, r, dy, dx = min(t + 1, height - 1), min(s + 1, width - 1), y - t, x - s
                        total += (1 - dy) * ((1 - dx) * plane[t, s] + dx * plane[t, r]) + dy * ((1 - dx) * plane[b, s] + dx * plane[b, r])
            cells.append(total / 4)
    return torch.stack(cells)


def test_roi_align():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6 * 9, 5, generator=generator)
    corner = torch.rand(2, 8, 2, generator=generator) * 14 - 4
    boxes = torch.cat([corner, corner + torch.rand(2, 8, 2, generator=generator) * 9], -1)
    found = roi_align(features, (6, 9), boxes)
    expected = torch.stack([torch.stack([naive_roi(f, (6, 9), box) for box in each]) for f, each in zip(features, boxes)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (expected == 0).any()  # some samples lie outside


@pytest.mark.parametrize("spread", [2, 3, 14])
def test_spread_sampling(spread):
    """(query, head) i looks where i // spread was to look, with its own weights; against `grid_sample` in float64."""
    torch.manual_seed(0)
    layer, grid = DecoderLayer(32, 4, 2, 32).eval(), (5, 7)
    layer.cross_attn.sampling_offsets.weight.data.normal_(std=0.3)
    layer.cross_attn.attention_weights.weight.data.normal_(std=0.3)
    x, memory = torch.randn(1, 6, 32), torch.randn(1, 35, 32)
    boxes = torch.rand(1, 6, 4) * 0.5 + 0.2
    with torch.inference_mode():
        found = layer(x, None, boxes, memory, grid, spread=spread)
        layer, x, memory, boxes = layer.double(), x.double(), memory.double(), boxes.double()
        y = layer.norm2(layer.self_attn(x, x, x, residual=x))
        a = layer.cross_attn
        value = a.value_proj(memory)[0].view(5, 7, 4, 8)
        offsets, weights = a.sampling_offsets(y)[0].view(24, 2, 2), a.attention_weights(y)[0].view(24, 2).softmax(-1)
        sums = torch.zeros(24, 8, dtype=torch.float64)
        for i in range(24):
            box = boxes[0, (i // spread) // 4]
            places = box[:2] + offsets[i // spread] / 2 * box[2:] * 0.5
            image = value[:, :, i % 4].permute(2, 0, 1)[None]
            samples = F.grid_sample(image, (2 * places - 1)[None, None], align_corners=False)[0, :, 0]
            sums[i] = samples @ weights[i]
        expected = layer.ffn(layer.norm1(y + a.output_proj(sums.view(1, 6, 32))))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_dilated_resnet_keeps_stride_16():
    network = ResNetSizes(50, 8, 16, 8, dilated=True).build().eval()
    maps = network(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[-2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (4, 6)]
    assert [block.conv2.dilation for block in network.layer4] == [(1, 1), (2, 2), (2, 2)]


@pytest.mark.parametrize(
    "source, resized", [((720, 1280), (562, 999)), ((360, 640), (562, 999)), ((600, 800), (600, 800)), ((480, 600), (600, 750)), ((640, 480), (800, 600)), ((50, 2000), (25, 1000))]
)  # fmt: skip
def test_frame_sizes(source, resized):
    size = frame_size(*source, 600, 1000)
    assert (size.source, size.resized, size.padded) == (source, resized, resized)


def test_best_pairs():
    logits = torch.tensor([[0.0, 3.0, -1.0], [2.0, -4.0, 1.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]])
    found = best_pairs(logits, boxes, (100, 200), 3)
    assert found.labels.tolist() == [1, 0, 2]
    torch.testing.assert_close(found.boxes[:2], torch.tensor([[80.0, 30, 120, 70], [140, -10, 220, 30]]))
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2, 1]).sigmoid())


def test_published_files_load_and_others_are_refused(tmp_path, monkeypatch):
    state = {key: torch.from_numpy(value) for key, value in load_case(shared("parity", "transvodlite-small")).weights.items()}
    aliases = {f"transformer.decoder.{key}": value for key, value in state.items() if key.startswith("bbox_embed.")}
    torch.save({"model": state | aliases, "optimizer": {}, "lr_scheduler": {"last_epoch": 7}, "epoch": 6}, tmp_path / "lite.pth")
    weights = checkpoints.read(tmp_path / "lite.pth")
    (tmp_path / "lite.pth").unlink()  # hundreds of megabytes
    small = {"backbone": replace(SWIN_B_PYRAMID, depths=(1, 1, 2, 1)), "encoder_layers": 2, "decoder_layers": 2, "ffn": 256}
    for name in ("transvod_lite_swin_b_vid", "transvodpp_swin_b_vid"):
        monkeypatch.setitem(zoo.ZOO, name, replace(zoo.ZOO[name], settings=replace(zoo.ZOO[name].settings, **small)))
    chosen = zoo.variant("transvod_lite_swin_b_vid")
    network = zoo.build_variant(chosen, weights, name="lite.pth")
    assert torch.equal(network.box_heads[2].layers[1].weight, state["temp_bbox_embed_list.2.layers.1.weight"])
    assert torch.equal(network.backbone.outer[1].bias, state["backbone.0.body.fpn.layer_blocks.1.0.bias"])
    with pytest.raises(CheckpointError, match="looks like TransVOD Lite.*they fit transvod_lite_swin_b_vid"):
        zoo.build_variant(zoo.variant("transvodpp_swin_b_vid"), weights, name="lite.pth")
    lost = {key: value for key, value in weights.items() if key != "temp_class_embed_list.2.bias"}
    with pytest.raises(CheckpointError, match="1 missing: class_heads.2.bias"):
        zoo.build_variant(chosen, lost, name="lite.pth")
