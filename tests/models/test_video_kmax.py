# SPDX-License-Identifier: Apache-2.0
"""Video-kMaX around its network: clips of any length, linking, panoptic results."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyvseg.errors import PyvsegError
from pyvseg.layers.kmax_predictor import Prediction
from pyvseg.models.kmax_panoptic import ClipPanoptic, ClipSegment, PanopticSettings, boxes_of, panoptic_clip
from pyvseg.models.kmax_size import KMaXSize
from pyvseg.models.panoptic_linking import LinkSettings, LinkState, join_within, link
from pyvseg.models.state import load_state, save_state
from pyvseg.models.video_kmax import VideoKMaX, VideoKMaXSettings
from pyvseg.models.zoo import variant
from tests.models.test_kmax import SMALL, small

ONLINE = LinkSettings(confidence=0.5)


def video_model(length):
    model = VideoKMaX(VideoKMaXSettings(**vars(SMALL), clip_length=length, panoptic=PanopticSettings(0.1, 0.11), linking=ONLINE))
    model.load_state_dict(small().state_dict())
    with torch.no_grad():
        model.decoder.predictor.mask_norm.weight.fill_(8)
    return model.eval()


def frames(count):
    ramp = np.arange(60 * 80 * 3).reshape(60, 80, 3)
    return [((ramp * (7 + i % 3)) // 50 % 256).astype(np.uint8) for i in range(count)]


@torch.inference_mode()
def play(model, images, together, saved=None):
    state = model.new_state(60, 80)
    shown = []
    for start in range(0, len(images), together):
        x = model.input(np.stack(images[start : start + together]), state)
        shown += model.step(model.encode(x).split(), state)
        if saved:
            save_state(state, saved)
            state = load_state(saved)
    return shown + model.step([], state, last=True), state


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_every_frame_comes_once_whatever_the_clip_length(length, count):
    model = video_model(length)
    shown, state = play(model, frames(count), 2)
    assert [frame.index for frame in shown] == list(range(count))
    assert all(frame.values.shape == (60, 80) and frame.values.dtype == np.int32 for frame in shown)
    assert any(frame.segments for frame in shown)
    for frame in shown:
        assert set(np.unique(frame.values)) - {0} == {value for value, _, _ in frame.segments}
        assert all(value // 10000 == category and thing == (category in SMALL.things) for value, category, thing in frame.segments)
    assert len(state.pixels) < max(length, 2)


def test_a_saved_state_goes_on(tmp_path):
    model = video_model(2)
    (one, _), (other, _) = (play(model, frames(5), 1, saved) for saved in (tmp_path / "state.safetensors", None))
    assert all(np.array_equal(a.values, b.values) for a, b in zip(one, other))


def clip(*segments, frames=1, size=(6, 20)):
    """Segments (category, is_thing, columns by frame, feature); None: not in that frame."""
    labels = np.zeros((frames, *size), np.uint8)
    for i, (_, _, columns, _) in enumerate(segments, 1):
        for t, part in enumerate(columns):
            if part is not None:
                labels[t, :, part] = i
    boxes = boxes_of(labels, len(segments))
    rows = [ClipSegment(c, thing, 1.0, np.array(feature, np.float32), box) for (c, thing, _, feature), box in zip(segments, boxes)]
    return ClipPanoptic(labels, rows)


LEFT, MIDDLE, RIGHT = slice(0, 5), slice(8, 12), slice(15, 20)
RED, BLUE = (1.0, 0.0), (0.0, 1.0)


def test_the_shared_frame_links_and_a_category_that_changed_does_not():
    state = LinkState()
    first = link(clip((3, True, [LEFT, MIDDLE], RED), (4, True, [RIGHT, RIGHT], BLUE), frames=2), 0, True, state, LinkSettings())
    second = link(clip((5, True, [RIGHT, RIGHT], BLUE), (3, True, [MIDDLE, LEFT], RED), frames=2), 1, True, state, LinkSettings())
    assert first.values.tolist() == [0, 30001, 40002]
    assert second.values[2] == 30001 and second.values[1] == 50003
    assert second.matched == [(2, 30001)] and second.unmatched == [(1, 50003)]


def test_the_memory_brings_back_what_was_gone():
    state = LinkState()
    for start in range(3):
        link(clip((1, True, [LEFT], RED)) if start == 0 else clip((7, False, [RIGHT], BLUE)), start, False, state, ONLINE)
    back = link(clip((1, True, [LEFT], RED), (2, True, [RIGHT], RED)), 3, False, state, ONLINE)
    assert back.values.tolist() == [0, 10001, back.values[2]] and back.values[2] // 10000 == 2
    without = LinkState()
    link(clip((1, True, [LEFT], RED)), 0, False, without, LinkSettings(memory=False))
    assert link(clip((1, True, [LEFT], RED)), 1, False, without, LinkSettings(memory=False)).values[1] == 10002 and not without.memory


def test_the_memory_forgets():
    state = LinkState()
    link(clip((1, True, [LEFT], RED)), 0, False, state, ONLINE)
    for start in range(1, 12):
        assert (10001 in state.memory) == (start <= 11)
        link(clip((7, False, [RIGHT], BLUE)), start, False, state, ONLINE)
    assert not state.memory


def test_stuff_keeps_its_value_of_the_video():
    state = LinkState()
    first = link(clip((7, False, [LEFT], RED)), 0, False, state, ONLINE)
    later = link(clip((1, True, [LEFT], RED), (7, False, [RIGHT], RED)), 1, False, state, ONLINE)
    assert later.values[2] == first.values[1] == 70001 != later.tracked[2]


def test_ids_return_in_endless_video():
    state, rules = LinkState(), LinkSettings(confidence=0.5, buffer=0, divisor=8)
    seen = []
    for start in range(30):
        colour = torch.randn(2, generator=torch.Generator().manual_seed(start)).tolist()
        seen.append(link(clip((1, True, [LEFT], colour), (2, False, [RIGHT], RED)), start, False, state, rules).tracked.tolist())
    assert all(v // 8 == 1 and 1 <= v % 8 <= 7 for _, v, _ in seen) and all(v // 8 == 2 for _, _, v in seen)
    assert all(a % 8 != b % 8 for _, a, b in seen)
    many = clip(*((1, True, [slice(i, i + 1)], RED) for i in range(9)))
    with pytest.raises(PyvsegError, match="room for 7 ids"):
        link(many, 30, False, state, rules)


def test_an_object_that_changes_its_query_within_a_clip_is_joined():
    two = clip(
        (1, True, [LEFT, None, None], RED), (1, True, [None, LEFT, LEFT], (0.9, 0.1)), (2, True, [None, MIDDLE, None], RED),
        (1, True, [RIGHT, RIGHT, RIGHT], RED), frames=3,
    )  # fmt: skip
    joined = join_within(two, LinkSettings())
    assert [np.unique(frame).tolist() for frame in joined.labels] == [[0, 1, 4], [0, 1, 3, 4], [0, 1, 4]]
    np.testing.assert_allclose(joined.segments[0].feature, [0.95, 0.05], rtol=1e-6)
    assert joined.segments[1].box is None and joined.segments[0].box.tolist() == two.segments[0].box.tolist()
    assert join_within(clip((1, True, [LEFT, None], RED), (1, True, [None, LEFT], BLUE), frames=2), LinkSettings()).labels[1].max() == 2


def published_merge(logits, masks, things, size, rules):
    """All queries at full size in float64, segment by segment; also how far every pixel is from another decision."""
    full = F.interpolate(masks.double(), size.padded, mode="bilinear", align_corners=True)[..., : size.resized[0], : size.resized[1]]
    full = F.interpolate(full, size.source, mode="bilinear", align_corners=True)
    scores, categories = logits.double().softmax(-1)[:, :-1].max(-1)
    full = torch.where((scores > rules.object_threshold)[:, None, None], full, -9999.0)
    sure, best = full.softmax(1).max(1).values, full.topk(2, 1).values
    labels, winner, stuff, segments = torch.zeros_like(sure, dtype=torch.int64), full.argmax(1), {}, []
    for q in winner.unique().tolist():
        category = int(categories[q])
        number = stuff.get(category)
        if number is None:
            segments.append((category, category in things))
            number = len(segments)
            if category not in things:
                stuff[category] = number
        labels[(winner == q) & (sure > rules.pixel_threshold)] = number
    clear = (best[:, 0] - best[:, 1] > 1e-3) & ((sure - rules.pixel_threshold).abs() > 1e-4)
    return labels.numpy(), segments, clear.numpy()


def test_the_merge_is_the_published_one():
    """Queries that lead but are nowhere sure still take a number; stuff of one class is one segment."""
    torch.manual_seed(3)
    queries, classes, things, cells = 14, 5, frozenset({0, 1}), (17, 25)
    logits, kernels = 3 * torch.randn(1, queries, classes + 1), 12 * torch.randn(1, queries, 128)
    logits[0, [1, 4], 2], logits[0, [3, 6], 0] = 9.0, 9.0
    kernels[0, 3] = kernels[0, 6] * 1.001  # two things at the same places: one leads, but never surely
    pixels = [F.interpolate(torch.randn(1, 128, 4, 5), cells, mode="bicubic") for _ in range(2)]
    prediction = Prediction(logits, torch.randn(1, queries, 256), kernels, pixels, torch.tensor(1.0), torch.tensor(-0.5))
    size, rules = KMaXSize((60, 80), (65, 87), (65, 97)), PanopticSettings(0.3, 0.55)
    masks = torch.cat([prediction.masks(t) for t in range(2)])
    labels, segments, clear = published_merge(logits[0], masks, things, size, rules)
    clip = panoptic_clip(prediction, 0, things, size, rules)
    assert [(s.category, s.is_thing) for s in clip.segments] == segments
    assert clear.mean() > 0.98 and (clip.labels == labels)[clear].all()
    unseen = [s for s in range(1, len(segments) + 1) if s not in labels]
    assert unseen and all(clip.segments[s - 1].box is None for s in unseen)
    assert len({c for c, thing in segments if not thing}) == sum(not thing for _, thing in segments)


@pytest.mark.parametrize("backbone", ["r50", "convnext_l"])
def test_published_settings(backbone):
    near, online = (variant(f"video_kmax_{backbone}_vipseg{mode}").settings for mode in ("", "_online"))
    for s in (near, online):
        assert (s.image_size, s.classes, len(s.things), s.queries, s.linking.buffer) == ((897, 1601), 124, 58, 128, 10)
    assert (near.clip_length, near.panoptic, near.linking.confidence) == (2, PanopticSettings(0.3, 0.5), 0.7)
    assert (online.clip_length, online.panoptic, online.linking.confidence) == (1, PanopticSettings(0.4, 0.5), 0.5)
