# SPDX-License-Identifier: Apache-2.0
"""Video K-Net: stored cases, the panoptic merge against its plain formulation, tracking, saved states, published names."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.models.panoptic import Stopwatch
from benchmarks.models.video_knet import Published, drawn
from pyvseg.api import InstanceModel, PanopticModel
from pyvseg.checkpoints import key_maps, map_keys
from pyvseg.engine.types import Frame
from pyvseg.errors import PyvsegError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.layers.inference import for_inference
from pyvseg.models import zoo
from pyvseg.models.fitting import fitting
from pyvseg.models.frame_size import FloatFrameSize, FrameSize
from pyvseg.models.knet_panoptic import NOWHERE, MergeSettings, merge
from pyvseg.models.quasi_dense import Detections, QuasiDenseSettings, QuasiDenseState, track
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_knet import VideoKNet, VideoKNetSettings, VideoKNetState
from pyvseg.models.video_knet_instances import VideoKNetInstances, VideoKNetInstancesSettings
from pyvseg.verify import verify_case
from tests.conftest import shared

SMALL = {"backbone": ResNetSizes(18, 32, 32, 32), "channels": 32, "kernels": 6, "stages": 2, "heads": 4, "ffn": 32}
PANOPTIC = VideoKNetSettings(5, 3, categories=(1, 4, 0, 2, 3), merge=MergeSettings(12, 0.2, 0.0), **SMALL)
INSTANCES = VideoKNetInstancesSettings(classes=4, clip_stages=1, top=5, short_side=64, long_side=96, **SMALL)


@torch.no_grad()
def small(network, settings):
    """Random weights, of which scores spread and masks differ."""
    torch.manual_seed(3)
    model = network(settings)
    for name, parameter in model.named_parameters():
        if "fc_mask" in name or "fc_cls" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def panoptic():
    return for_inference(small(VideoKNet, PANOPTIC), torch.float32)


@pytest.fixture(scope="module")
def instances():
    return for_inference(small(VideoKNetInstances, INSTANCES), torch.float32)


def video(count, size=(70, 90)):
    base = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    return [np.ascontiguousarray(base[3 * i : 3 * i + size[0], 2 * i : 2 * i + size[1]]) for i in range(count)]


@pytest.mark.parametrize("name, tensors", [("video_knet-small", 116), ("video_knet-vis-small", 29), ("ops-track_quasi_dense", 34)])
def test_stored_cases_agree(name, tensors):
    report = verify_case(shared("parity", name))
    assert report.passed, report
    assert len(report.lines) == tensors


@pytest.mark.parametrize("ways", [("attention", None), ("update", "update"), (None, "attention")])
def test_a_saved_state_goes_on(tmp_path, ways):
    model = for_inference(small(VideoKNet, replace(PANOPTIC, link=ways[0], fuse=ways[1])), torch.float32)
    with torch.inference_mode():
        one, other = (_play(model, video(4), path) for path in (None, tmp_path / "state"))
    assert [frame.index for frame in one] == [0, 1, 2, 3]
    assert all(np.array_equal(a.values, b.values) and a.segments == b.segments for a, b in zip(one, other))
    assert {thing for frame in one for _, _, thing in frame.segments} == {True, False}
    for frame in one:
        assert set(np.unique(frame.values)) - {0} == {value for value, _, _ in frame.segments}
        assert all(value // 10000 == category and thing == (category in (1, 4)) for value, category, thing in frame.segments)


def _play(model, images, saved):
    state, shown = model.new_state(*images[0].shape[:2]), []
    for image in images:
        shown += model.step(model.encode_frames(image[None], state), state)
        if saved:
            save_state(state, saved)
            state = load_state(saved)
    return shown


def test_the_frame_before_matters_only_where_it_is_asked(panoptic):
    first, second = video(2)
    state = panoptic.new_state(70, 90)
    with torch.inference_mode():
        _, frame = panoptic.encode_frames(np.stack([first, second]), state)
        alone = panoptic.segment_clip(frame, panoptic.new_state(70, 90)).refined
        panoptic.segment_clip(panoptic.encode_frames(first[None], state)[0], state)
        after = panoptic.segment_clip(frame, state).refined
    assert torch.equal(alone.masks, after.masks) and torch.equal(alone.linked, alone.kernels)
    assert not torch.allclose(after.linked, after.kernels)


def test_segment_and_stream_agree(panoptic):
    model = PanopticModel(panoptic, ("a", "b", "c", "d", "e"))
    stream = model.stream()
    live = [result for i, image in enumerate(video(3)) for result in stream.step([Frame(i, image, str(i))])]
    whole = list(model.segment(video(3)))
    assert len(live) == len(whole) == 3
    assert all(np.mean(a.values != b.values) < 1e-3 for a, b in zip(live, whole))  # batches of two round differently


def published_merge(scores, masks, size, stuff, upsample, rules):
    """All masks at full size, in float64."""
    things, kernels = scores.shape[1] - stuff, len(scores) - stuff
    best, pairs = scores[:kernels, :things].flatten().topk(min(rules.top, kernels * things))
    own, order = scores[kernels:, things:].diagonal().sort(descending=True)
    total, labels = torch.cat([best, own]), torch.cat([pairs % things, order + things])
    full = F.interpolate(masks[None], scale_factor=upsample, mode="bilinear").sigmoid()
    full = F.interpolate(full, size.padded, mode="bilinear")[0, :, : size.source[0], : size.source[1]]
    full = full[torch.cat([pairs // things, order + kernels])]
    winner, result, segments = (total[:, None, None] * full).argmax(0), torch.zeros(size.source, dtype=torch.int64), []
    for k in total.argsort(descending=True).tolist():
        won, inside = winner == k, (full[k] >= 0.5).sum()
        low = labels[k] < things and total[k] < rules.score
        if not low and won.any() and inside and won.sum() / inside >= rules.overlap:
            segments.append((int(labels[k]), float(total[k]), int(won.sum())))
            result[won] = len(segments)
    return result, segments


@pytest.mark.parametrize("source", [(64, 96), (61, 70)])
def test_merge_is_the_published_one(source):
    torch.manual_seed(0)
    size = FrameSize.of(*source, None)
    scores, masks = torch.rand(13, 7).double() ** 2, 6 * torch.randn(13, size.padded[0] // 8, size.padded[1] // 8).double()
    rules = MergeSettings(14, 0.3, 0.1)
    semantic = torch.randn(7, *masks.shape[1:])
    found = merge(scores.float(), masks.float(), semantic, size, 4, 4, rules)
    labels, segments = published_merge(scores, masks, size, 4, 4, rules)
    assert len(segments) > 4 and (found.labels == 0).any()
    assert np.array_equal(found.labels, labels.numpy())
    assert [(s.category, s.area) for s in found.segments] == [(category, area) for category, _, area in segments]
    assert np.allclose([s.score for s in found.segments], [score for _, score, _ in segments])
    thing = F.interpolate(semantic[None], source, mode="bilinear")[0].argmax(0).numpy() < 3
    inside = [np.nonzero((found.labels == i) & thing) for i, s in enumerate(found.segments, 1) if s.is_thing]
    assert found.boxes.tolist() == [[x.min(), y.min(), x.max(), y.max()] for y, x in inside]


def test_merge_is_that_of_the_benchmark():
    settings, state = VideoKNetSettings(), VideoKNetState(FrameSize.of(187, 620, None))
    classes, masks = given = drawn(settings, state.size.padded)
    semantic = torch.randn(1, 19, *masks.shape[1:], generator=torch.Generator().manual_seed(0))
    published = Published(SimpleNamespace(settings=settings), state, Stopwatch(False), given).merge(semantic)
    found = merge(classes.sigmoid(), masks, semantic[0], state.size, settings.stuff, settings.upsample, settings.merge)
    assert sum(s.is_thing for s in found.segments) > 2 and sum(not s.is_thing for s in found.segments) > 2
    assert np.mean(found.labels != published.labels) < 1e-3 and np.array_equal(found.boxes, published.boxes)
    assert [(s.category, s.rank) for s in found.segments if s.is_thing] == [(s.category, s.rank) for s in published.segments if s.is_thing]


def test_a_frame_of_nothing(panoptic):
    size = FrameSize.of(64, 96, None)
    found = merge(torch.zeros(9, 5), torch.full((9, 8, 12), -9.0), torch.zeros(5, 8, 12), size, 3, 4, MergeSettings())
    assert not found.segments and not found.labels.any() and found.boxes.shape == (0, 4)
    broken = merge(torch.full((9, 5), torch.nan), torch.full((9, 8, 12), torch.nan), torch.zeros(5, 8, 12), size, 3, 4, MergeSettings())
    assert broken.labels.shape == (64, 96)


def test_a_thing_that_no_pixel_of_the_semantic_map_supports_has_the_published_box():
    semantic, masks = torch.zeros(5, 8, 12), torch.full((9, 8, 12), -9.0)
    semantic[4], masks[0] = 1.0, 9.0
    found = merge(torch.full((9, 5), 0.5), masks, semantic, FrameSize.of(64, 96, None), 3, 4, MergeSettings())
    assert found.boxes.tolist() == [list(NOWHERE)]


def detections(*rows):
    """(score, label, left) of unit squares, with an embedding of their own."""
    boxes = [(10.0 * left, 0, 10.0 * left + 8, 8, score) for score, _, left in rows]
    embeddings = torch.stack([40 * F.one_hot(torch.tensor(left), 8).float() for _, _, left in rows])
    return Detections(np.array(boxes, np.float32), np.array([label for _, label, _ in rows]), embeddings.numpy())


def test_ids_return_in_endless_video():
    state, rules = QuasiDenseState(), QuasiDenseSettings(most=8)
    seen = [track(state, detections((0.9, 0, 0), (0.8, 0, 1 + t % 7)), t, rules).ids.tolist() for t in range(20)]
    assert [ids[0] for ids in seen] == [0] * 20 and all(0 < ids[1] < 8 for ids in seen)
    assert len({ids[1] for ids in seen}) == 7 and len(state.tracks) <= 6
    with pytest.raises(PyvsegError, match="room for"):
        track(QuasiDenseState(), detections((0.9, 0, 0), (0.8, 0, 1)), 0, replace(rules, most=1))


def test_ids_shift_where_a_duplicate_was_left_out(panoptic):
    """As published: ids and things are paired by position."""

    class Given(VideoKNet):
        def detections(self, clip):
            return detections((0.9, 0, 0), (0.8, 0, 0), (0.7, 0, 3))

    panoptic.__class__ = Given
    try:
        clip = type("Clip", (), {"panoptic": type("Panoptic", (), {"boxes": np.zeros((3, 4))})})
        assert panoptic.link(clip, panoptic.new_state(70, 90)) == [1, 2, 0]
        panoptic.settings = replace(PANOPTIC, compat=False)
        assert panoptic.link(clip, panoptic.new_state(70, 90)) == [1, 0, 2]
    finally:
        panoptic.__class__, panoptic.settings = VideoKNet, PANOPTIC


def test_instances_do_not_depend_on_how_frames_come(tmp_path, instances):
    model = InstanceModel(instances, ("a", "b", "c", "d"))
    whole = model.segment(video(5, (120, 160)))
    state = instances.new_state(FrameSize.of(120, 160, 64, 96))
    assert isinstance(state.size, FloatFrameSize) and state.size.resized == (64, 85)
    with torch.inference_mode():
        for image in video(5, (120, 160)):
            x = state.size.input(image[None], INSTANCES.mean, INSTANCES.std)
            instances.link(instances.segment_clip(instances.per_frame(x), state), state)
            save_state(state, tmp_path / "state")
            state = load_state(tmp_path / "state")
        one_by_one = instances.finish(state)
    assert len(whole) == len(one_by_one) == 5 and len({track.label for track in whole}) > 1
    assert np.allclose(whole.scores, one_by_one.scores, atol=1e-4) and np.array_equal(whole.labels, one_by_one.labels)
    assert all(np.mean(a.masks != b.masks) < 1e-3 for a, b in zip(whole, one_by_one))
    assert any(track.masks.any() for track in whole)


def test_bfloat16_says_nearly_the_same(instances):
    half = for_inference(small(VideoKNetInstances, INSTANCES), torch.bfloat16)
    a, b = (InstanceModel(model).segment(video(2), compat=False) for model in (instances, half))
    assert np.allclose(np.sort(a.scores), np.sort(b.scores), atol=0.1)


@pytest.mark.parametrize(
    "published, ours",
    [
        ("neck.fpn_convs.3.conv.bias", "fpn.output.3.bias"),
        ("neck.lateral_convs.0.conv.weight", "fpn.lateral.0.weight"),
        ("rpn_head.localization_fpn.convs_all_levels.2.conv1.gn.bias", "initial.fpn.levels.2.1.gn.bias"),
        ("roi_head.mask_head.2.attention.attn.in_proj_weight", "stages.2.attention.in_proj_weight"),
        ("roi_head.mask_head.2.attention_previous.attn.out_proj.bias", "stages.2.link.attention.out_proj.bias"),
        ("roi_head.mask_head.2.attention_previous_norm.bias", "stages.2.link.norm.bias"),
        ("roi_head.mask_head.2.link_ffn.layers.0.0.weight", "stages.2.link.ffn.linear1.weight"),
        ("roi_head.mask_head.0.link_ffn_norm.weight", "stages.0.link.ffn.norm.weight"),
        ("roi_head.mask_head.1.attention_previous_update_track.fc_norm.bias", "stages.1.link.update.fc_norm.bias"),
        ("roi_head.mask_head.1.attention_previous_track.attn.in_proj_bias", "stages.1.link.attention.in_proj_bias"),
        ("roi_head.mask_head.1.link_ffn_norm_track.bias", "stages.1.link.ffn.norm.bias"),
        ("roi_head.mask_head.1.attention_previous_update_link.norm_in.bias", "stages.1.fuse.update.norm_in.bias"),
        ("roi_head.mask_head.1.attention_previous_norm_link.bias", "stages.1.fuse.norm.bias"),
        ("roi_head.mask_head.1.link_ffn_link.layers.1.bias", "stages.1.fuse.ffn.linear2.bias"),
        ("tracker.mask_head.1.kernel_update_conv.input_gate.bias", "clip_stages.1.update.input_gate.bias"),
        ("track_head.fcs.1.bias", "embed.layers.1.bias"),
    ],
)
def test_published_names(published, ours):
    assert list(map_keys({published: torch.zeros(())}, key_maps.VIDEO_KNET)) == [ours]
    assert list(map_keys({ours: torch.zeros(())}, key_maps.VIDEO_KNET)) == [ours]  # files that pyvseg wrote
    fused, plain = (zoo.variant(f"video_knet_{name}") for name in ("swin_b_kitti_step", "r50_ytvis19"))
    with torch.device("meta"):
        names = {name for v in (fused, plain) for name in zoo.SYSTEMS[v.system].network(v.settings).state_dict()}
    with torch.device("meta"):
        names |= set(VideoKNet(VideoKNetSettings()).state_dict())
    assert ours in names


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name.startswith("video_knet")])
def test_weights_tell_their_variant(name):
    chosen = zoo.variant(name)
    with torch.device("meta"):
        weights = zoo.SYSTEMS[chosen.system].network(chosen.settings).state_dict()
    assert fitting(weights, zoo.ZOO.values()) == [name]
