# SPDX-License-Identifier: Apache-2.0
"""A state that was saved in the middle of a video and read back goes on to the very same tracks."""

import numpy as np
import pytest
import torch

from pyvseg.errors import CheckpointError
from pyvseg.layers.backbones import ResNetSizes
from pyvseg.models.ctvis import CTVIS, CTVISSettings
from pyvseg.models.frame_size import FrameSize
from pyvseg.models.genvis import GenVIS, GenVISSettings
from pyvseg.models.mask2former import Mask2FormerSettings
from pyvseg.models.mask2former_video import Mask2FormerVideo
from pyvseg.models.minvis import MinVIS
from pyvseg.models.state import load_state, save_state
from pyvseg.models.vita import VITA, VITASettings

SMALL = dict(
    classes=5, queries=8, backbone=ResNetSizes(18, 16, 16, 16), width=32, mask_width=32, hidden=32, heads=4, encoder_layers=1,
    encoder_ffn=32, decoder_layers=3, ffn=32, short_side=None,
)  # fmt: skip
VIDEO = dict(video_queries=8, video_heads=4, video_ffn=32, video_encoder_layers=2, video_layers=1)
MODELS = {
    "mask2former_video": (Mask2FormerVideo, Mask2FormerSettings(**SMALL, joint=True)),
    "minvis": (MinVIS, Mask2FormerSettings(**SMALL)),
    "ctvis": (CTVIS, CTVISSettings(**SMALL, embed_hidden=32)),
    "vita": (VITA, VITASettings(**SMALL, **VIDEO, window=3)),
    "genvis": (GenVIS, GenVISSettings(**SMALL, **VIDEO, memory_clips=4)),
}
FRAMES = np.random.default_rng(0).integers(0, 256, (14, 40, 60, 3), np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_state_goes_on(name, tmp_path):
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model, size = kind(settings).eval(), FrameSize.of(40, 60, None)
    path = tmp_path / "state.safetensors"
    found = []
    with torch.inference_mode():
        for broken in (False, True):
            state = model.new_state(size)
            for t, image in enumerate(FRAMES):
                x = size.input(image[None], settings.mean, settings.std)
                model.link(model.segment_clip(model.encode(x), state), state)
                if broken and t == 10:
                    save_state(state, path)
                    state = load_state(path)
            found.append(model.finish(state))
    whole, rest = found
    assert np.array_equal(whole.scores, rest.scores) and np.array_equal(whole.labels, rest.labels)
    assert all(whole.segments[i] == rest.segments[i] for i in whole.objects) and any(t.masks.any() for t in whole)


def test_damaged_states(tmp_path):
    model = MinVIS(Mask2FormerSettings(**SMALL)).eval()
    path = tmp_path / "state.safetensors"
    save_state(model.new_state(FrameSize.of(40, 60, None)), path)
    (tmp_path / "state.safetensors.0").write_bytes(b"cut")
    for damage in (lambda: None, (tmp_path / "state.safetensors.0").unlink, lambda: path.write_bytes(path.read_bytes()[:50])):
        damage()
        with pytest.raises(CheckpointError, match="state.safetensors"):
            load_state(path)
