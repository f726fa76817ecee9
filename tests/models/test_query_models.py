# SPDX-License-Identifier: Apache-2.0
"""The network of Mask2Former and what stands behind it: results of an image, kept masks, tracks of a video."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvseg import models
from pyvseg.checkpoints import key_maps, load_into
from pyvseg.layers.backbones import ResNetSizes, SwinSizes
from pyvseg.layers.mask_decoder import DecoderLayer
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.image_results import instances, panoptic
from pyvseg.models.mask2former import Mask2Former, Mask2FormerSettings
from pyvseg.models.mask2former_video import Mask2FormerVideo
from pyvseg.models.minvis import MinVIS, match
from pyvseg.models.spool import MaskStore, Spool
from pyvseg.models.video_instances import Selection, render
from pyvseg.verify import load_case, verify_case
from pyvseg.video.resize import resize_bilinear
from tests.conftest import shared

SMALL = Mask2FormerSettings(
    classes=5, queries=12, backbone=ResNetSizes(50, 16, 64, 16), width=32, mask_width=32, hidden=64, heads=4, encoder_layers=1,
    encoder_ffn=64, decoder_layers=3, ffn=64, short_side=None,
)  # fmt: skip


@pytest.fixture
def small():
    torch.manual_seed(0)
    return lambda cls, **changes: cls(Mask2FormerSettings(**{**vars(SMALL), **changes})).eval()


@pytest.mark.parametrize(
    "name",
    [
        *("mask2former-small", "mask2former-swin", "mask2former-video", "mask2former-loss", "mask2former-video-loss"),
        *("minvis-small", "ops-track_ctvis", "ctvis-small", "ctvis-loss"),
    ],
)
def test_stored_cases_agree(name):
    report = verify_case(shared("parity", name))
    assert report.passed, report.summary() + "\n" + "\n".join(str(line) for line in report.lines if line.failed)


def test_names_of_old_files_load():
    weights = {k: torch.from_numpy(v) for k, v in load_case(shared("parity", "mask2former-small")).weights.items()}
    rename = {k: k.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query") for k in weights}
    settings = Mask2FormerSettings(**{**vars(SMALL), "queries": 16, "width": 64, "mask_width": 64, "encoder_layers": 2, "encoder_ffn": 1024, "decoder_layers": 4, "ffn": 128})
    models = []
    for state in (weights, {rename[k]: v for k, v in weights.items()}):
        models.append(Mask2Former(settings))
        load_into(models[-1], state, key_maps.MASK2FORMER, name="file", ignore=key_maps.MASK2FORMER_IGNORED)
    load_into(models[0], models[1].state_dict(), key_maps.MASK2FORMER, name="our own names", ignore=key_maps.MASK2FORMER_IGNORED)
    for a, b in zip(*(m.state_dict().values() for m in models)):
        assert torch.equal(a, b)


def test_one_frame_clips_and_batches_of_clips(small):
    model = small(Mask2Former, joint=True)
    x = torch.randn(4, 3, 64, 96)
    with torch.inference_mode():
        both = model(x, clips=2)[-1]
        apart = [model(part)[-1] for part in x.split(2)]
        assert both.masks.shape == (2, 12, 2, 16, 24)
        torch.testing.assert_close(both.masks, torch.cat([p.masks for p in apart]), rtol=1e-4, atol=1e-3)
        assert model(x[:1])[-1].masks.shape == (1, 12, 1, 16, 24)


def test_a_query_whose_mask_is_empty_looks_everywhere():
    torch.manual_seed(0)
    layer = DecoderLayer(32, 4, 64).eval()
    x, embed, memory = torch.randn(1, 3, 32), torch.randn(3, 32), torch.randn(1, 7, 32)
    masks = torch.zeros(1, 3, 7)
    masks[0, 1] = -1.0
    torch.testing.assert_close(layer(x, embed, memory, memory, masks), layer(x, embed, memory, memory))
    masks[0, 1, :3] = 1.0
    assert not torch.allclose(layer(x, embed, memory, memory, masks), layer(x, embed, memory, memory))


def test_training_freezes_batch_norms_and_reaches_every_other_parameter(small):
    model = small(Mask2Former).train()
    before = model.backbone.bn1.running_mean.clone()
    predictions = model(torch.randn(1, 3, 64, 64), auxiliary=True)
    sum(p.logits.square().sum() + p.masks.square().sum() for p in predictions).backward()
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".bn" in n)


def test_swin_takes_any_size():
    swin = SwinSizes(16, (2, 2, 2, 2), (1, 2, 4, 8), 3).build().eval()
    for height, width in ((1, 1), (37, 70), (64, 33)):
        maps = swin(torch.randn(1, 3, height, width))
        assert maps[0].shape == (1, 16, -(-height // 4), -(-width // 4))
        assert [m.shape[1] for m in maps] == [16, 32, 64, 128]


@pytest.mark.parametrize(
    "source, short, resized, padded",
    [
        ((720, 1280), 360, (360, 640), (384, 640)),
        ((480, 854), 480, (480, 854), (480, 864)),
        ((100, 1000), 360, (133, 1333), (160, 1344)),
        ((1, 5000), 360, (1, 1333), (32, 1344)),
        ((33, 65), None, (33, 65), (64, 96)),
    ],
)
def test_frame_sizes(source, short, resized, padded):
    assert FrameSize.of(*source, short) == FrameSize(source, resized, padded)


def test_resizing_is_pillows():
    case = np.load(shared("parity", "vita-small", "tensors.npz"))
    assert np.array_equal(resize_bilinear(torch.from_numpy(case["in/frames"]), case["tap/resized"].shape[1:3]), case["tap/resized"])
    image = np.random.default_rng(0).integers(0, 256, (1, 37, 53, 3), np.uint8)
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for size in ((61, 20), (7, 31), (37, 5), (1, 1), (74, 106)):
        theirs = np.asarray(pillow.fromarray(image[0]).resize(size[::-1], pillow.BILINEAR))
        assert np.array_equal(resize_bilinear(torch.from_numpy(image), size)[0].numpy(), theirs)


def panoptic_input(*queries):
    """Queries (class, score, rows, logit) on a 6 x 4 image with classes 0, 1 (things), 2 (stuff)."""
    logits, masks = torch.full((len(queries), 4), -20.0), torch.full((len(queries), 6, 4), -8.0)
    for i, (label, score, rows, value) in enumerate(queries):
        logits[i, label] = np.log(score)
        logits[i, 3 if label != 3 else 0] = np.log(1 - score)
        masks[i, rows] = value
    return logits, masks, frozenset({0, 1})


def test_panoptic_merges_stuff_and_counts_things():
    top, middle, bottom = slice(0, 2), slice(2, 4), slice(4, 6)
    labels, segments = panoptic(*panoptic_input((2, 0.9, top, 8.0), (0, 0.9, middle, 8.0), (2, 0.95, bottom, 8.0)))
    assert labels[:, 0].tolist() == [1, 1, 2, 2, 1, 1]
    assert segments == [(1, False, 2), (2, True, 0)]


def test_panoptic_drops_what_is_mostly_covered_and_what_scores_low():
    whole, top, rest = slice(0, 6), slice(0, 1), slice(1, 6)
    labels, segments = panoptic(*panoptic_input((0, 0.85, whole, 2.0), (1, 0.99, rest, 8.0), (1, 0.5, top, 8.0)))
    assert segments == [(1, True, 1)]
    assert labels[:, 0].tolist() == [0, 1, 1, 1, 1, 1]  # the covered query won a row, and loses it too


def test_panoptic_without_queries():
    labels, segments = panoptic(*panoptic_input((3, 0.9, slice(0, 6), 8.0), (0, 0.7, slice(0, 6), 8.0)))
    assert labels.dtype == torch.int32 and not labels.any() and segments == []


def test_panoptic_area_counts_pixels_below_one_half():
    logits, masks, things = panoptic_input((0, 0.9, slice(0, 2), 8.0), (1, 0.9, slice(5, 6), -1.0))
    masks[0, 2:] = -9.0
    labels, segments = panoptic(logits, masks, things)
    assert segments == [(1, True, 0)]  # the second wins pixels, but none is in its own mask
    assert labels[:, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_instances_with_fewer_pairs_than_asked_for():
    found = instances(torch.randn(2, 4), torch.randn(2, 6, 5), top=100)
    assert len(found.scores) == 6 and (found.scores.diff() <= 0).all()


def test_matching_follows_a_permutation():
    x = torch.randn(20, 16)
    order = torch.randperm(20)
    assert torch.equal(match(x, (3 * x)[order]), order.argsort())
    assert sorted(match(torch.full((3, 2), torch.nan), torch.ones(3, 2)).tolist()) == [0, 1, 2]


def frames(t=5, height=50, width=70):
    return np.random.default_rng(1).integers(0, 256, (t, height, width, 3), np.uint8)


def drive(model, images, size, together):
    state = model.new_state(size)
    with torch.inference_mode():
        for start in range(0, len(images), together):
            x = size.input(images[start : start + together], model.settings.mean, model.settings.std)
            model.link(model.segment_clip(model.encode(x), state), state)
        return model.finish(state), state


@pytest.mark.parametrize("cls, joint", [(MinVIS, False), (Mask2FormerVideo, True)])
def test_windows_do_not_change_the_result(small, cls, joint):
    model, size = small(cls, joint=joint), FrameSize.of(50, 70, 40)
    (a, _), (b, _) = (drive(model, frames(), size, together) for together in (1, 3))
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    assert len(a) == 10 and a[0].masks.shape == (5, 50, 70)
    if np.array_equal(a.objects, b.objects):
        assert np.mean([a[i].masks != b[i].masks for i in range(10)]) < 1e-2


def test_a_pickled_state_goes_on(small):
    model, size = small(MinVIS), FrameSize.of(50, 70, None)
    whole, _ = drive(model, frames(), size, 1)
    _, state = drive(model, frames()[:3], size, 1)
    state = pickle.loads(pickle.dumps(state))
    with torch.inference_mode():
        for image in frames()[3:]:
            x = size.input(image[None], model.settings.mean, model.settings.std)
            model.link(model.segment_clip(model.encode(x), state), state)
        rest = model.finish(state)
    assert np.array_equal(whole.scores, rest.scores) and np.array_equal(whole[3].masks, rest[3].masks)


@pytest.mark.parametrize("source, short", [((96, 128), None), ((45, 61), 96), ((300, 200), 64)])
def test_kept_masks_give_the_masks_of_the_whole_logits(source, short):
    size = FrameSize.of(*source, short)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(40, 1, 6, 6, generator=generator) - 1.2
    logits = F.interpolate(coarse, tuple(s // 4 for s in size.padded), mode="bicubic")[:, 0]
    store = MaskStore()
    store.append(logits, list(range(40)))
    present, kept = store.get(0, list(range(40)))
    assert 0 < len(present) < 40
    whole = size.to_source(size.upsample(logits[None]))[0] > 0
    assert not whole[[i for i in range(40) if i not in present]].any()
    assert torch.equal(size.to_source(size.upsample(kept[None]))[0] > 0, whole[present])


def test_spool_beyond_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(models.spool, "MEMORY_BYTES", 100)
    spool = Spool()
    tensors = [torch.randn(i % 3, 5).to((torch.float32, torch.bfloat16)[i % 2]) for i in range(20)]
    assert [spool.append(t) for t in tensors] == list(range(20))
    spool.save(tmp_path / "spool")
    for copy in (spool, pickle.loads(pickle.dumps(spool)), Spool.load(tmp_path / "spool")):
        assert all(torch.equal(copy[i], tensors[i]) for i in (19, 0, 7, 3)) and torch.equal(copy.part(11, 3, 4), tensors[11].flatten()[3:7])
    (tmp_path / "spool").write_bytes((tmp_path / "spool").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        Spool.load(tmp_path / "spool")


def test_quality_and_sharing_of_masks():
    size = FrameSize((8, 8), (8, 8), (8, 8))
    logits = torch.full((2, 2, 2), -5.0)
    logits[0] = 3.0
    chosen = Selection(torch.tensor([0.5, 0.4, 0.9]), torch.tensor([7, 7, 9]), torch.tensor([0, 1, 0]))
    at = {7: logits[0], 9: logits[1]}
    found = render(chosen, 3, size, lambda t, names: (list(range(len(names))), torch.stack([at[n] for n in names])), quality="resized")
    assert found.objects.tolist() == [7, 7, 9] and found.labels.tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.scores, [0.5 * 0.95257413, 0.4 * 0.95257413, 0], rtol=1e-5)
    assert found[0].masks.all() and not found[2].masks.any() and found.segments[9] == [None] * 3
