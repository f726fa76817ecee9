# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of kMaX-DeepLab and Video-kMaX: every name consumed or ignored for a reason, and what a file of the other model is told."""

import pytest
import torch

from pyvseg import checkpoints
from pyvseg.checkpoints import key_maps
from pyvseg.errors import CheckpointError
from pyvseg.models import zoo
from pyvseg.verify import load_case
from tests.conftest import shared

NEAR = zoo.ZOO["video_kmax_r50_vipseg"]


@pytest.fixture(scope="module")
def published():
    """As the case stores the state dict of the published VIPSeg model."""
    return {key: torch.from_numpy(value) for key, value in load_case(shared("parity", "video_kmax-full")).weights.items()}


def test_the_published_names_are_consumed(published, tmp_path):
    torch.save({"model": published, "iteration": 3}, tmp_path / "model.pth")
    model = zoo.build_variant(NEAR, checkpoints.read(tmp_path / "model.pth"), name="model.pth")
    left = {key for key in published if key.endswith("num_batches_tracked")}
    assert len(published) - len(left) == len([key for key in model.state_dict() if not key.endswith("num_batches_tracked")])
    again = zoo.build_variant(NEAR, model.state_dict(), name="our own names")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_counters_and_the_training_head_may_be_there_or_not(published):
    head = {"sem_seg_head.predictor._auxiliary_semantic_predictor.final_conv.conv.bias": torch.zeros(125)}
    bare = {key: value for key, value in published.items() if not key.endswith("num_batches_tracked")}
    zoo.build_variant(NEAR, bare | head, name="file")


def test_a_file_of_another_variant_is_told_which(published):
    head = "sem_seg_head.predictor."
    coco = {
        key: torch.zeros(134, *value.shape[1:]) if "_transformer_class_head" in key else value for key, value in published.items()
    }
    with pytest.raises(CheckpointError, match="they fit kmax_r50_coco$"):
        zoo.build_variant(NEAR, coco, name="kmax_r50.pth")
    del published[head + "_cluster_centers.weight"]
    with pytest.raises(CheckpointError, match="1 missing: decoder.cluster_centers"):
        zoo.build_variant(NEAR, published, name="file")


def test_convnext_variants_fit_their_own_files():
    for name in ("kmax_convnext_t_coco", "video_kmax_convnext_l_vipseg"):
        with torch.device("meta"):
            state = zoo.SYSTEMS[zoo.ZOO[name].system].network(zoo.ZOO[name].settings).state_dict()
        fits = zoo.fitting.fitting(state, zoo.ZOO.values())
        assert name in fits and all(zoo.ZOO[f].settings.backbone == zoo.ZOO[name].settings.backbone for f in fits)


def test_published_counts_of_entries():
    """As the published models have them, without the buffers that training counts in."""
    for name, entries in (("video_kmax_r50_vipseg", 1331), ("video_kmax_convnext_l_vipseg", 1359)):
        with torch.device("meta"):
            model = zoo.SYSTEMS["video_kmax"].network(zoo.ZOO[name].settings)
        assert len(checkpoints.map_keys(model.state_dict(), key_maps.KMAX)) == entries
