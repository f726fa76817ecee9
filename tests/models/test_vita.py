# SPDX-License-Identifier: Apache-2.0
"""VITA and GenVIS beyond their stored cases."""

import pickle

import numpy as np
import pytest
import torch

from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.genvis import GenVIS, GenVISSettings, Prototypes, SequentialVideoModule
from pyvseg.models.vita import VITA, VITASettings
from pyvseg.models.vita_module import VideoModule
from pyvseg.verify import verify_case
from tests.conftest import shared

SMALL = dict(
    classes=5, queries=6, backbone=ResNetSizes(18, 16, 16, 16), width=32, mask_width=32, hidden=32, heads=4, encoder_layers=1, encoder_ffn=64,
    decoder_layers=3, ffn=64, short_side=None, video_queries=7, video_heads=4, video_ffn=64, video_encoder_layers=2, video_layers=2, top=6,
)  # fmt: skip


@pytest.mark.parametrize("name", ["vita-small", "genvis-online-small", "genvis-semionline-small", "vita-loss", "genvis-loss"])
def test_stored_cases_agree(name):
    report = verify_case(shared("parity", name))
    assert report.passed, report.summary() + "\n" + "\n".join(str(line) for line in report.lines if line.failed)


def published_mask(frames, count, window, shift):
    """The rules of the published shifted windows, cell by cell."""
    h, total = shift, count * window
    padding = [(p - h) % total >= frames for p in range(total)]
    mask = torch.zeros(count, window, window)
    for n in range(count):
        for i in range(window):
            for j in range(window):
                i_pads, j_pads = padding[n * window + i], padding[n * window + j]
                ends = n in (0, count - 1)
                if i_pads or (ends and j_pads) or (n == 0 and (i < h) != (j < h)):
                    mask[n, i, j] = -1000.0
    return mask


def module(**changes):
    torch.manual_seed(0)
    sizes = dict(classes=3, frame_queries=4, queries=5, heads=2, hidden=16, encoder_layers=2, layers=1, inputs=32, mask_width=8, window=3)
    return VideoModule(8, **{**sizes, **changes}).eval()


@pytest.mark.parametrize("frames, window", [(1, 3), (3, 3), (4, 3), (7, 3), (9, 3), (11, 4), (5, 6)])
@pytest.mark.parametrize("layer", [0, 1])
def test_windows_follow_the_published_masks(frames, window, layer):
    video = module(window=window, encoder_layers=2)
    tokens = torch.randn(2, frames, 4, 8)
    count = -(-frames // window)
    shift = (window + 1) // 2 if layer else 0
    x = torch.nn.functional.pad(video.input_proj_dec(tokens), (0, 0, 0, 0, 0, count * window - frames))
    if not layer:
        mask = torch.zeros(count, window, window)
        mask[-1, :, window - (count * window - frames) :] = -torch.inf
    else:
        mask = published_mask(frames, count, window, shift)
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).repeat(2, 1, 1)
    windows = x.roll(shift, 1).reshape(2 * count, window * 4, 8)
    expected = video.encoder[layer](windows, mask).reshape(2, -1, 4, 8).roll(-shift, 1)[:, :frames].flatten(1, 2)
    if layer:
        video.encoder[0] = torch.nn.Identity()
        video.encoder[0].forward = lambda x, mask=None: x
    else:
        video.encoder = video.encoder[:1]
    torch.testing.assert_close(video.encode(tokens), expected, rtol=1e-4, atol=1e-5)


def test_training_does_not_shift():
    video, tokens = module(), torch.randn(1, 6, 4, 8)
    plain = video.train().encode(tokens)
    assert not torch.allclose(plain, video.eval().encode(tokens))
    first = video.train().encode(tokens[:, :3])
    torch.testing.assert_close(plain[:, :12], first)


def test_the_memory_read_is_per_query_and_not_scaled():
    torch.manual_seed(0)
    sizes = dict(classes=3, frame_queries=4, queries=5, heads=2, hidden=16, encoder_layers=0, layers=0, inputs=32, mask_width=8, window=0)
    video = SequentialVideoModule(8, **sizes)
    x, keys, values = torch.randn(2, 5, 8), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    query = video.pre_query_embed_k(x)
    read = torch.empty_like(x)
    for b in range(2):
        for q in range(5):
            weights = (keys[:, b, q] @ query[b, q]).softmax(0)
            read[b, q] = weights @ values[:, b, q]
    empty = x + video.pre_query_embed_v(x)
    torch.testing.assert_close(video.read(x, keys, values), empty + read)
    torch.testing.assert_close(video.read(x, None, None), empty)


def test_memory_grows_by_doubling():
    memory = Prototypes()
    entries = [torch.randn(1, 2, 3) for _ in range(20)]
    for entry in entries:
        memory.append(entry, -entry)
    assert len(memory.keys) == 32 and torch.equal(memory.keys[:20], torch.stack(entries)) and torch.equal(memory.values[:20], -memory.keys[:20])


def test_a_bounded_memory_loses_its_oldest_clips():
    memory = Prototypes(limit=10)
    entries = [torch.randn(1, 2, 3) for _ in range(25)]
    for entry in entries:
        memory.append(entry, -entry)
    assert len(memory) == len(memory.keys) == 10 and {tuple(k.flatten().tolist()) for k in memory.keys} == {tuple(e.flatten().tolist()) for e in entries[15:]}


def drive(model, frames, together, state=None, finish=True):
    s, size = model.settings, FrameSize.of(*frames.shape[1:3], None)
    state = model.new_state(size) if state is None else state
    with torch.inference_mode():
        for start in range(0, len(frames), together):
            x = size.input(frames[start : start + together], s.mean, s.std)
            model.link(model.segment_clip(model.encode(x), state), state)
        return model.finish(state) if finish else state


FRAMES = np.random.default_rng(0).integers(0, 256, (7, 40, 60, 3), np.uint8)


def test_vita_does_not_care_how_frames_are_batched():
    torch.manual_seed(0)
    model = VITA(VITASettings(**SMALL, window=3)).eval()
    a, b = drive(model, FRAMES, 7), drive(model, FRAMES, 2)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)
    assert a[0].masks.shape == (7, 40, 60)


@pytest.mark.parametrize("length", [1, 3])
def test_a_pickled_genvis_state_goes_on(length):
    torch.manual_seed(0)
    model = GenVIS(GenVISSettings(**SMALL, clip_length=length)).eval()
    whole = drive(model, FRAMES, length)
    state = pickle.loads(pickle.dumps(drive(model, FRAMES[:3], length, finish=False)))
    rest = drive(model, FRAMES[3:], length, state)
    assert np.array_equal(whole.scores, rest.scores) and np.array_equal(whole[0].masks, rest[0].masks) and len(whole) == 6
