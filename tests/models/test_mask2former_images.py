# SPDX-License-Identifier: Apache-2.0
"""The image model on images, against the published steps at full size; and its checkpoints on videos."""

import numpy as np
import pytest
import torch

import pyvseg
from pyvseg.cli.main import main
from pyvseg.models import image_results, mask2former_images
from pyvseg.models.frame_size import FrameSize
from pyvseg.video.panoptic import read_ids
from tests.engine.conftest import small  # noqa: F401
from tests.video.clips import images, write_images


@pytest.fixture
def model(small):  # noqa: F811
    network = pyvseg.load("mask2former_r50_coco_panoptic", weights=small("mask2former_r50_coco_panoptic")).network
    network.decoder.class_embed.weight.mul_(20)  # sure of its classes
    return network


def test_results_are_those_of_the_whole_logits(model, monkeypatch):
    monkeypatch.setattr(mask2former_images, "CHUNK_BYTES", 1)
    image = images(1, 53, 97)[0]
    size = FrameSize.of(53, 97, 48)
    with torch.inference_mode():
        last = model(size.input(image[None], model.settings.mean, model.settings.std))[-1]
        logits, masks = last.logits[0], size.to_source(size.upsample(last.masks))[0]
        things = frozenset(range(80))
        expected = image_results.instances(logits, masks, 30, things)
        labels, segments = image_results.panoptic(logits, masks, things)
        scores = image_results.semantic(logits, masks)
    found = model.instances(image, top=30)
    assert len(found.scores) and torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores)
    assert (found.masks != expected.masks).float().mean() < 1e-3
    ours = model.panoptic(image)
    assert len(segments) and ours[1] == segments and np.mean(ours[0] != labels.numpy()) < 1e-3
    classes = torch.from_numpy(model.semantic(image))
    assert classes.shape == (53, 97)
    best, second = scores.topk(2, 0).values
    clear = best - second > 1e-4 * best
    assert clear.float().mean() > 0.5 and torch.equal(classes[clear], scores.argmax(0)[clear])


def test_nothing_found_and_odd_sizes(model):
    model.decoder.class_embed.weight.zero_()
    for height, width in ((1, 1), (3, 400)):
        image = images(1, height, width)[0]
        labels, segments = model.panoptic(image)
        assert labels.shape == (height, width) and not labels.any() and segments == []
        assert model.semantic(image).shape == (height, width) and model.instances(image).masks.shape[1:] == (height, width)


def test_frames_of_a_video(model):
    for result, image in zip(pyvseg.api.PanopticModel(model).segment(images(3)), images(3)):
        labels, segments = model.panoptic(image)
        assert [value // 10000 for value in result.segments] == sorted(s.category for s in segments)
        assert np.array_equal(result.values > 0, labels > 0)


def test_runs_with_image_models(small, tmp_path, capsys):  # noqa: F811
    write_images(tmp_path / "clip", images(3))
    for name, result in (("mask2former_r50_coco_panoptic", "pred.json"), ("mask2former_r50_coco_instance", "results.json")):
        out = tmp_path / name
        assert main(["run", str(tmp_path / "clip"), "--model", name, "--weights", str(small(name)), "--out", str(out)]) == 0
        assert (out / result).exists() and (out / "overlay.mp4").exists()
    again = ["run", str(tmp_path / "clip"), "--model", "mask2former_r50_coco_panoptic", "--weights", str(small("mask2former_r50_coco_panoptic"))]
    assert main([*again, "--clip-length", "2"]) == 2 and "by itself" in capsys.readouterr().err
    assert read_ids(tmp_path / "mask2former_r50_coco_panoptic" / "pan_pred" / "clip" / "00000.png").dtype == np.int32
