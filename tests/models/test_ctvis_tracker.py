# SPDX-License-Identifier: Apache-2.0
"""What the stored cases of CTVIS do not reach."""

import pickle

import pytest
import torch

from pyvseg.models.ctvis_tracker import TrackerSettings, TrackerState, suppress, track

RULES = TrackerSettings()
EYE = 30 * torch.eye(6)


def step(state, *queries, rules=RULES):
    """Queries (score, identity) whose masks do not overlap: the identity's own unit vector is its embedding."""
    scores = torch.tensor([score for score, _ in queries])
    logits = torch.stack([scores.log(), (1 - scores).log()], 1)
    masks = torch.full((len(queries), 1, 8), -1.0)
    for i in range(len(queries)):
        masks[i, 0, i] = 1.0
    return track(state, logits, masks, EYE[[i for _, i in queries]], rules)


def overlapping(intersection, union):
    """Two masks whose IoU is intersection / union."""
    masks = torch.full((2, 1, union), -1.0)
    masks[0] = 1.0
    masks[1, 0, :intersection] = 1.0
    return masks


@pytest.mark.parametrize("intersection, union, both", [(3, 5, False), (21, 35, False), (6, 10, True), (12, 20, True), (30, 50, True), (59, 100, True), (61, 100, False)])
def test_ties_of_the_overlap_are_decided_in_float32(intersection, union, both):
    assert suppress(overlapping(intersection, union), 0.6).tolist() == [True, both]


def test_empty_masks_overlap_each_other_and_the_suppressed_suppress_nothing():
    assert suppress(torch.full((3, 2, 2), -1.0), 0.6).tolist() == [True, False, False]
    chain = torch.full((3, 1, 12), -1.0)
    chain[0, 0, :10], chain[1, 0, 2:12], chain[2, 0, 4:12] = 1.0, 1.0, 1.0
    assert suppress(chain, 0.6).tolist() == [True, False, True]


def test_a_video_without_detections_has_no_tracks():
    state = TrackerState()
    for _ in range(3):
        tracked = step(state, (0.005, 0), (0.001, 1))
        assert len(tracked.detections) == 1 and tracked.ids == []
    assert state.ids == 0 and not state.records and not state.bank


def test_an_empty_bank_starts_anew_with_new_ids():
    state = TrackerState()
    assert step(state, (0.9, 0)).ids == [0]
    state.bank.clear()
    tracked = step(state, (0.8, 0), (0.9, 1))
    assert tracked.ids == [1, 2] and tracked.queries == [1, 0] and tracked.similarity is None
    assert list(state.records) == [0, 1, 2]


def test_nan_embeddings_lose_nothing():
    state = TrackerState()
    step(state, (0.9, 0))
    logits = torch.tensor([[2.0, 0.0]])
    tracked = track(state, logits, torch.ones(1, 1, 8), torch.full((1, 6), torch.nan), RULES)
    assert tracked.ids == [1]


def test_the_dead_leave_and_keep_their_record():
    rules = TrackerSettings(dead_frames=2, noise_after=100)
    state = TrackerState()
    step(state, (0.9, 0), (0.8, 1))
    for _ in range(2):
        step(state, (0.9, 0), rules=rules)
    assert list(state.bank) == [0, 1]
    step(state, (0.9, 0), rules=rules)
    assert list(state.bank) == [0] and list(state.records) == [0, 1]
    assert step(state, (0.9, 0), (0.8, 1), rules=rules).ids == [0, 2]


def test_the_noise_filter_starts_after_its_frame_and_a_record_restarts_at_the_end():
    rules = TrackerSettings(noise_after=3)
    state = TrackerState()
    step(state, (0.9, 0), (0.8, 1), rules=rules)
    for _ in range(3):
        step(state, (0.9, 0), rules=rules)
        assert list(state.records) == [0, 1]
    step(state, (0.9, 0), rules=rules)
    assert list(state.records) == [0] and list(state.bank) == [0, 1]
    step(state, (0.95, 2), (0.9, 0), (0.8, 1), rules=rules)
    assert list(state.records) == [0, 2, 1] and (state.records[1].last, state.records[1].frames) == (5, 1)


def test_a_tracklet_keeps_ten_embeddings():
    state = TrackerState()
    for _ in range(30):
        step(state, (0.9, 0), (0.5, 1))
    assert [(len(t.cache), t.frames) for t in state.bank.values()] == [(10, 30), (10, 30)]


def test_a_pickled_state_goes_on():
    state = TrackerState()
    step(state, (0.9, 0), (0.8, 1))
    other = pickle.loads(pickle.dumps(state))
    assert step(state, (0.9, 1), (0.8, 0)).ids == step(other, (0.9, 1), (0.8, 0)).ids == [1, 0]
