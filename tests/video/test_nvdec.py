# SPDX-License-Identifier: Apache-2.0
"""NVDEC by torchcodec: a stand-in for the module on machines that have neither."""

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from pyvseg.cli.main import main
from pyvseg.errors import PyvsegError, VideoError
from pyvseg.video import nvdec, open_video, write_labels
from tests.video.clips import images, square, write_video


class VideoDecoder:
    """Decodes on the CPU what is asked of the GPU; as torchcodec does, it raises RuntimeError for frames that are not there."""

    def __init__(self, path, *, device, dimension_order):
        assert (device, dimension_order) == ("cuda", "NHWC")
        with av.open(path) as container:
            self.frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            self.count = container.streams.video[0].frames

    def __len__(self):
        return self.count

    def get_frames_in_range(self, start, stop):
        if stop > len(self.frames):
            raise RuntimeError("Requested next frame while there are no more frames left to decode.\nmore")
        return SimpleNamespace(data=torch.from_numpy(np.stack(self.frames[start:stop])))


@pytest.fixture
def torchcodec(monkeypatch):
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvdec, "_stream", nullcontext)


def test_the_same_frames(tmp_path, torchcodec):
    path = write_video(tmp_path / "clip.mp4", images(19))
    frames, found = list(open_video(path)), list(open_video(path, "nvdec"))
    assert [frame.name for frame in found] == [frame.name for frame in frames]
    assert all(np.array_equal(a.image, b.image) and b.image.dtype == np.uint8 for a, b in zip(frames, found))
    assert len(list(open_video(path, "nvdec").part(9, 12))) == 3


def test_files_that_it_cannot_decode(tmp_path, torchcodec, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", images(12))
    monkeypatch.setattr(VideoDecoder, "__len__", lambda decoder: 16)
    with pytest.raises(VideoError, match=r"clip.mp4: NVDEC cannot decode it \(Requested next frame .* decode.\); try --decoder cpu"):
        list(open_video(path, "nvdec"))


def test_without_torchcodec_or_a_gpu(tmp_path, monkeypatch, capsys, torchcodec):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PyvsegError, match="--decoder nvdec needs a CUDA GPU"):
        nvdec.check()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4", images(2))
    write_labels(tmp_path / "first.png", square())
    for command in (["run", "clip.mp4", "--mask", "first.png"], ["batch", "clip.mp4", "--masks", "."]):
        write_labels(tmp_path / "clip.png", square())
        assert main([*command, "--decoder", "nvdec", "--out", command[0]]) == 2
        assert "--decoder nvdec needs torchcodec: pip install 'pyvseg[nvdec]'" in capsys.readouterr().err
