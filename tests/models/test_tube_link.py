# SPDX-License-Identifier: Apache-2.0
"""Tube-Link: parity, tubes of a video that comes piece by piece, identities, results, published files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvseg.checkpoints import key_maps, load_into
from pyvseg.errors import CheckpointError
from pyvseg.layers.backbones import ResNetSizes, SwinSizes
from pyvseg.layers.swin import PatchMerging
from pyvseg.models import zoo
from pyvseg.models.frame_size import FloatFrameSize, FrameSize
from pyvseg.models.image_results import panoptic
from pyvseg.models.spool import MaskStore
from pyvseg.models.state import load_state, save_state
from pyvseg.models.tube_link import TubeLink, TubeLinkSettings, mmdet_swin
from pyvseg.models.tube_link_instances import TubeLinkInstances, TubeLinkInstancesSettings, sure_ends, tube_ends
from pyvseg.models.tube_link_maps import TubeMapSettings
from pyvseg.models.tube_link_panoptic import TubeLinkPanoptic, TubeLinkPanopticSettings, TubePanoptic, won_segments
from pyvseg.models.tube_link_ranking import rank_frame, ranked_by_frames
from pyvseg.models.tube_link_semantic import TubeLinkSemantic
from pyvseg.models.tube_link_tracker import BACKDROP, DROPPED, IDS, TubeTracks, TubeTrackerSettings, track
from pyvseg.models.video_instances import Selection
from pyvseg.verify import load_case, verify_case
from tests.conftest import shared

SIZES = dict(
    classes=6, queries=12, backbone=ResNetSizes(18, 16, 16, 16), width=32, mask_width=32, hidden=32, heads=4, encoder_layers=1, encoder_ffn=32,
    decoder_layers=3, ffn=32, short_side=None,
)  # fmt: skip
CHECKED = TubeTrackerSettings()


@pytest.mark.parametrize("name", ["tube_link-small", "tube_link_vis-small", "tube_link-loss"])
def test_stored_cases_agree(name):
    report = verify_case(shared("parity", name))
    assert report.passed, report.summary() + "\n" + "\n".join(str(line) for line in report.lines if line.failed)


def model(kind, settings):
    torch.manual_seed(3)
    network = kind(settings).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("mask_features.weight"):
            parameter -= parameter.mean(1, keepdim=True)  # masks of both signs
        if name.endswith(("class_embed.weight", "query_embed.weight", "out_proj.weight")):
            parameter *= {"class_embed": 8, "query_embed": 3, "out_proj": 0.2}[name.split(".")[-2]]  # sure classes, queries that differ
    return network


def maps_model(length, semantic=False, **more):
    if semantic:
        return model(TubeLinkSemantic, TubeMapSettings(**SIZES, clip_length=length))
    rules = {"things": (1, 4), "object_threshold": 0.3, "overlap_threshold": 0.2}
    return model(TubeLinkPanoptic, TubeLinkPanopticSettings(**SIZES, clip_length=length, **rules, **more))


def frames(count):
    ramp = np.arange(40 * 56 * 3).reshape(40, 56, 3)
    return np.stack([((ramp * (7 + t % 5) + 900 * t) // 50 % 256).astype(np.uint8) for t in range(count)])


@torch.inference_mode()
def maps_of(network, images, together, saved=None):
    state, shown = network.new_state(40, 56), []
    for start in range(0, len(images), together):
        shown += network.step(network.encode_frames(images[start : start + together], state), state)
        assert len(state.waiting) < network.settings.clip_length
        if saved:
            save_state(state, saved)
            state = load_state(saved)
    return shown + network.step([], state, last=True)


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("length, count", [(1, 3), (2, 5), (4, 2), (4, 9)])
def test_every_frame_comes_once_whatever_the_tube(length, count, semantic, tmp_path):
    network = maps_model(length, semantic)
    shown = maps_of(network, frames(count), 2)
    assert [frame.index for frame in shown] == list(range(count))
    for frame in shown:
        assert frame.values.shape == (40, 56) and frame.values.dtype == np.int32
        assert set(np.unique(frame.values)) - {0} == {value for value, _, _ in frame.segments}
        assert all(value // 10000 == category and thing == (category in network.settings.things) for value, category, thing in frame.segments)
        assert not semantic or (frame.values > 0).all()
    assert semantic or len({value for frame in shown for value, _, _ in frame.segments}) > 1
    again = maps_of(network, frames(count), 2, tmp_path / "state.safetensors")
    assert all(np.array_equal(a.values, b.values) for a, b in zip(shown, again))


@torch.inference_mode()
def test_semantic_labels_are_those_of_the_definition():
    network = maps_model(3, semantic=True)
    state = network.new_state(40, 56)
    tube = network.segment_tube(network.encode_frames(frames(3), state))
    torch.manual_seed(0)
    tube = tube._replace(embeddings=torch.randn_like(tube.embeddings), logits=3 * torch.randn_like(tube.logits))  # a class for every query
    network.segment_tube = lambda given: tube
    labels = network.segment_clip([None] * 3, state)
    for t in range(3):
        full = state.size.upsample(tube.masks(t)[None])[0].double()
        scores = torch.einsum("qk,qhw->khw", tube.logits.double().softmax(-1)[:, :-1], full.sigmoid())
        best = scores.topk(2, 0).values
        assert ((labels[t] == scores.argmax(0)) | (best[0] - best[1] < 1e-5)).all() and len(labels[t].unique()) > 1


def test_categories_are_things_first():
    assert TubeMapSettings(classes=5, things=(3, 1)).categories == (3, 1, 0, 2, 4)
    vipseg = zoo.variant("tube_link_r50_vipseg").settings
    assert len(vipseg.things) == 58 and sorted(vipseg.categories) == list(range(124)) and list(vipseg.things) == sorted(vipseg.things)
    assert zoo.variant("tube_link_r50_kitti_step").settings.categories[:4] == (11, 13, 0, 1)
    assert zoo.variant("tube_link_r50_vspw").settings.categories == tuple(range(124))


def test_ends_of_tubes():
    assert [tube_ends(n, 4) for n in (10, 7, 5, 4, 1)] == [[4, 7, 10], [4, 7], [4, 5], [4], [1]]
    assert tube_ends(13, 4) == [4, 7, 10, 13]
    for tube in (1, 2, 3, 4, 7):
        settings = TubeLinkInstancesSettings(tube=tube)
        for total in range(1, 37):
            seen, held = [], 0
            for n in range(1, total + 1):
                held = max(held, n - (seen[-1] if seen else 0))
                assert sure_ends(n, tube, 36)[: len(seen)] == seen
                seen = sure_ends(n, tube, 36)
            assert tube_ends(total, tube)[: len(seen)] == seen and held <= settings.held_frames
        assert sure_ends(36, tube, 36) == tube_ends(36, tube)


@torch.inference_mode()
def instances_of(network, images, together, saved=None):
    state = network.new_state(FrameSize.of(40, 56, None))
    for start in range(0, len(images), together):
        x = state.size.input(images[start : start + together], network.settings.mean, network.settings.std)
        network.link(network.segment_clip(network.encode(x), state), state)
        assert len(state.waiting) < network.settings.held_frames
        if saved:
            save_state(state, saved)
            state = load_state(saved)
    return network.finish(state), state


@pytest.mark.parametrize("count", [1, 3, 10, 13])
def test_instances_do_not_depend_on_how_the_frames_come(count, tmp_path):
    network = model(TubeLinkInstances, TubeLinkInstancesSettings(**SIZES, tube=3, chunk=8, shown=5))
    (one, state), (other, _) = instances_of(network, frames(count), 1, tmp_path / "state"), instances_of(network, frames(count), 1)
    assert state.tubes == sum(len(tube_ends(n, 3)) for n in [8] * (count // 8) + [count % 8] if n)
    assert len(state.masks) == state.frames == count and not state.waiting
    assert np.array_equal(one.scores, other.scores) and np.array_equal(one.visible, other.visible)
    assert (one.visible.sum(0) == 5).all() and len(one[0].rle) == count
    assert all((a.masks == b.masks).all() for a, b in zip(one, other))


def test_a_frame_is_resized_as_floats():
    image = np.random.default_rng(0).integers(0, 256, (1, 60, 80, 3), np.uint8)
    size = FloatFrameSize.of(60, 80, 48, 854)
    x = size.resize(torch.from_numpy(image))
    exact = F.interpolate(torch.from_numpy(image).permute(0, 3, 1, 2).double(), (48, 64), mode="bilinear", align_corners=False)
    assert size.padded == (64, 64) and (x - exact).abs().max() < 1e-4


def test_ranking_leaves_out_nothing():
    torch.manual_seed(0)
    size = FrameSize.of(40, 56, None)
    masks = MaskStore()
    logits = 3 * F.interpolate(torch.randn(30, 1, 3, 4), (16, 16), mode="bicubic")[:, 0]
    logits[7] = -1.0
    masks.append(logits, list(range(30)))
    pairs = Selection.best((3 * torch.randn(30, 4)).softmax(-1), 60)
    full = size.to_source(size.upsample(logits[None]))[0].double()
    quality = torch.tensor([m.sigmoid()[m > 0].mean() if (m > 0).any() else 0 for m in full])
    exact = pairs.scores.double() * quality[pairs.objects]
    for shown in (1, 9, 30, 60):
        ranking = rank_frame(pairs, 0, masks, size, shown)
        assert torch.equal(ranking.rows, exact.sort(descending=True, stable=True).indices[:shown])
        assert torch.allclose(ranking.scores[ranking.rows].double(), exact[ranking.rows], atol=1e-6)
        for row in ranking.rows.tolist():
            name = int(pairs.objects[row])
            assert np.array_equal(ranking.masks[name], full[name] > 0) if (full[name] > 0).any() else name not in ranking.masks


def test_a_track_has_no_mask_where_it_is_not_shown():
    masks, size = MaskStore(), FrameSize.of(40, 56, None)
    one = torch.full((2, 16, 16), -2.0)
    one[:, 2:6, 2:9] = torch.tensor([4.0, 1.0])[:, None, None]
    masks.append(one, [0, 1])
    masks.append(one.flip(0), [0, 1])
    found = ranked_by_frames(Selection(torch.tensor([0.8, 0.8, 0.2]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2])), masks, size, 1)
    assert found.objects.tolist() == [0, 1] and found.labels.tolist() == [0, 1] and found.scores[0] == found.scores[1] > 0.7
    assert found[0].mask(0).any() and found[0].mask(1) is None and found[0].rle[1] is None and not found[0].masks[1].any()
    assert found[1].mask(0) is None and found[1].mask(1).any()


def boxes(*columns):
    masks = torch.zeros(len(columns), 8, 40, dtype=torch.bool)
    for mask, part in zip(masks, columns):
        mask[:, part] = True
    return masks


def test_identities_over_tubes():
    state, e = TubeTracks(), 6 * torch.eye(4)
    apart = boxes(slice(0, 5), slice(10, 15), slice(20, 25))
    assert track(state, torch.tensor([0.9, 0.3, 0.1]), apart, e[:3], 0, CHECKED).ids == [0, 1, BACKDROP]
    second = track(state, torch.tensor([0.9, 0.9, 0.4]), apart, e[[1, 0, 3]], 4, CHECKED)
    assert second.ids == [1, 0, BACKDROP]
    over = boxes(slice(0, 10), slice(0, 9), slice(0, 6), slice(20, 30))
    third = track(state, torch.tensor([0.9, 0.9, 0.4, 0.9]), over, torch.stack([e[0], e[0], e[3], e[2]]), 8, CHECKED)
    assert third.kept.tolist() == [True, False, True, True] and third.ids == [0, DROPPED, 2]
    assert torch.equal(state.tracks[0].embedding, e[0]) and state.tracks[1].last == 4
    assert track(state, torch.ones(0), boxes(), e[:0], 14, CHECKED).ids == []
    assert list(state.tracks) == [0, 2]  # 10 frames without the other


def test_embeddings_move_half_way():
    state = TubeTracks()
    before, after = torch.tensor([8.0, 0.0]), torch.tensor([8.0, 4.0])
    for frame, x in ((0, before), (4, after)):
        assert track(state, torch.ones(1), boxes(slice(0, 3)), x[None], frame, CHECKED).ids == [0]
    assert torch.equal(state.tracks[0].embedding, (before + after) / 2)


def test_empty_masks_are_each_others_duplicates():
    masks = boxes(slice(0, 0), slice(0, 4), slice(0, 0))
    assert track(TubeTracks(), torch.ones(3), masks, torch.eye(3), 0, CHECKED).kept.tolist() == [True, True, False]


def test_ids_return_only_when_nothing_bears_them():
    state, e = TubeTracks(ids=IDS - 1), 9 * torch.eye(3)
    masks = boxes(slice(0, 5), slice(10, 15), slice(20, 25))
    assert track(state, torch.ones(1), masks[:1], e[:1], 0, CHECKED).ids == [IDS - 1]
    state.ids = IDS - 1
    assert track(state, torch.ones(3), masks, e, 4, CHECKED).ids == [IDS - 1, 0, 1]


def tube(*listed, masks):
    """A tube of things of one class; `masks` of the last frame."""
    count = len(listed[0])
    labels = torch.zeros(len(listed), 8, 40, dtype=torch.uint8)
    for s, mask in enumerate(masks, 1):
        labels[-1][mask] = s
    scores, classes = torch.full((count,), 0.9), torch.zeros(count, dtype=torch.int64)
    states = 3 * torch.randn(12, 32, generator=torch.manual_seed(5))
    return TubePanoptic(labels, torch.arange(count) + 3, classes, scores, torch.tensor(listed), states)


@torch.inference_mode()
def test_published_faults_and_their_remedy():
    duplicates = tube([True] * 4, masks=boxes(slice(0, 0), slice(0, 0), slice(0, 5), slice(10, 15)))
    forgotten = tube([True, False], [False, False], [False, True], masks=boxes(slice(0, 5), slice(10, 15)))
    untracked = tube([True, True], [False, False], masks=boxes(slice(0, 5), slice(10, 15)))
    found = {}
    for compat in (True, False):
        network = maps_model(2, compat=compat)
        found[compat] = [network.link(clip, network.new_state(8, 40)).instances for clip in (duplicates, forgotten, untracked)]
    assert found[True] == [[1, 2, 3, 0], [4, 1], [4, 5]]  # the next ones' ids; the first, then all keep numbers of their queries
    assert found[False] == [[1, 0, 2, 3], [1, 2], [1, 2]]


@torch.inference_mode()
def test_in_inference_a_query_sees_its_own_predecessor():
    network = maps_model(2)
    torch.manual_seed(0)
    queries, before = torch.randn(2, 12, 32)
    alone = network.linker(queries[:, None], before[:, None])[:, 0]
    moved = before.clone()
    moved[5] += 1
    changed = (network.linker(queries[:, None], moved[:, None])[:, 0] != alone).any(1)
    assert changed.nonzero().tolist() == [[5]]
    assert (network.linker(queries[None], moved[None])[0] != network.linker(queries[None], before[None])[0]).any(1).all()  # training


def test_won_segments_are_mask2formers():
    torch.manual_seed(1)
    size = FrameSize.of(52, 64, 40)
    masks, scores = 4 * F.interpolate(torch.randn(7, 1, 4, 5), (16, 16), mode="bicubic")[:, 0], torch.rand(7) / 5 + 0.8
    labels, counts = won_segments(masks, scores, size, 0.5)
    logits = torch.full((7, 8), -30.0)
    logits[range(7), range(7)], logits[:, 7] = scores.log(), (1 - scores).log()
    full = size.to_source(size.upsample(masks[None].double().float()))[0]
    exact, segments = panoptic(logits, full, frozenset(range(7)), overlap_threshold=0.5)
    table = torch.tensor([0, *(s.category + 1 for s in segments)])
    assert (table[exact.long()] != labels.long()).float().mean() < 1e-3 and 1 < len(segments) < 7
    assert counts.nonzero()[:, 0].tolist() == [s.category for s in segments]
    nothing, none = won_segments(masks[:0], scores[:0], size, 0.5)
    assert nothing.shape == (52, 64) and not nothing.any() and none.shape == (0,)


def test_files_of_the_authors_load_and_others_are_refused(tmp_path, monkeypatch):
    weights = {key: torch.from_numpy(value) for key, value in load_case(shared("parity", "tube_link-small")).weights.items()}
    settings = TubeLinkPanopticSettings(
        classes=9, things=tuple(range(5)), queries=14, backbone=ResNetSizes(18, outputs=64), encoder_layers=2, encoder_ffn=128, decoder_layers=3,
        ffn=192,
    )  # fmt: skip
    small = replace(zoo.variant("tube_link_r50_vipseg"), settings=settings)
    monkeypatch.setitem(zoo.ZOO, small.name, small)
    torch.save({"meta": {"epoch": 8, "CLASSES": ("a", "b")}, "state_dict": weights, "optimizer": {"state": {}}}, tmp_path / "latest.pth")
    network = zoo.load(small.name, weights=tmp_path / "latest.pth", device="cpu")
    assert torch.equal(network.decoder.query_feat.weight, weights["panoptic_head.query_feat.weight"])
    ours = zoo.build(settings, weights, name="file", system="tube_link_panoptic").state_dict()
    again = zoo.build(settings, ours, name="our own names", system="tube_link_panoptic").state_dict()
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    with pytest.raises(CheckpointError, match="file looks like Tube-Link.*23 unexpected: linker.*they fit tube_link_r50_vipseg"):
        zoo.build_variant(zoo.variant("tube_link_r50_vspw"), weights, name="file")


def test_patches_merge_as_in_mmdetection():
    torch.manual_seed(0)
    ours, x = PatchMerging(8), torch.randn(2, 6, 4, 8)
    norm, weight = torch.nn.LayerNorm(32), torch.randn(16, 32)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    merged = F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2)
    expected = F.linear(norm(merged), weight).view(2, 3, 2, 16)
    prefix = "backbone.stages.0.downsample."
    named = mmdet_swin({f"{prefix}reduction.weight": weight, f"{prefix}norm.weight": norm.weight, f"{prefix}norm.bias": norm.bias}, ours)
    ours.load_state_dict({key.removeprefix(prefix): value for key, value in named.items()})
    assert torch.allclose(ours(x), expected, atol=1e-5)


def test_names_of_mmdetections_swin():
    network = TubeLink(TubeLinkSettings(**{**SIZES, "backbone": SwinSizes(16, (1, 1, 1, 1), (1, 2, 4, 8), 4)}))
    rename = (("backbone.layers.", "backbone.stages."), ("patch_embed.proj.", "patch_embed.projection."), (".attn.", ".attn.w_msa."))
    rename += ((".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))
    weights = {}
    for key, value in network.state_dict().items():
        for old, new in rename if key.startswith("backbone.") else ():
            key = key.replace(old, new)
        weights[key] = value
    weights["backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
    load_into(network, weights, key_maps.TUBE_LINK, name="file", ignore=key_maps.TUBE_LINK_IGNORED)
