# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from benchmarks import metrics as plain
from pyvseg.errors import PyvsegError
from pyvseg.metrics import stq, vpq
from pyvseg.metrics.panoptic import Pairs, Segments, count_frame, count_pairs
from tests.conftest import shared

CLASSES, THINGS = 9, (2, 4, 7, 8)


def random_video(seed, frames=7, crowds=True):
    """Maps of blocks that change little from frame to frame, the result a disturbed annotation; void in both, crowds, switched classes."""
    rng = np.random.default_rng(seed)
    classes = {i: int(rng.integers(CLASSES)) for i in range(1, 15)}
    truth, result, truth_lists, result_lists = [], [], [], []
    blocks = rng.integers(0, 15, (5, 6))
    for _ in range(frames):
        blocks = np.where(rng.random((5, 6)) < 0.1, rng.integers(0, 15, (5, 6)), blocks)
        image = np.kron(blocks, np.ones((4, 5), int))
        other = np.roll(image, rng.integers(-1, 2), rng.integers(2))
        other = np.where(rng.random(image.shape) < 0.1, rng.integers(0, 15, image.shape), other)
        for image, maps, lists, is_truth in ((image, truth, truth_lists, True), (other * 70001, result, result_lists, False)):
            ids = rng.permutation(np.unique(image[image > 0]))
            of = [classes[int(i) if is_truth else int(i) // 70001] for i in ids]
            if not is_truth:
                of = np.where(rng.random(len(of)) < 0.1, rng.integers(CLASSES), of)
            crowd = np.isin(ids, (3, 5)) & crowds & is_truth
            maps.append(image)
            lists.append(Segments.of(ids, of, crowd, [(image == i).sum() for i in ids]))
    return truth, result, truth_lists, result_lists


@pytest.mark.parametrize("seed", range(8))
def test_vpq_is_the_definition(seed):
    truth, result, *lists = random_video(seed)
    video = vpq.VideoPQ(CLASSES, (1, 3, 7, 8))
    for frame in zip(truth, result, *lists):
        video.update(count_frame(*frame, CLASSES))
    for n, got in zip(video.windows, video.counts):
        np.testing.assert_allclose(got, plain.plain_vpq(truth.__getitem__, result.__getitem__, *lists, CLASSES, n), rtol=1e-12)
    assert video.counts[:3, :, vpq.TP].sum() > 5 and not video.counts[3].any()  # no window of 8 in 7 frames


@pytest.mark.parametrize("seed", range(4))
def test_stq_is_the_definition(seed, monkeypatch):
    monkeypatch.setattr(stq, "_PENDING", 5)  # sums in bulk many times over
    truth, result, *lists = random_video(seed)
    numbers = {}, {}
    labels = [
        [plain.plain_labels(maps[t], of[t], table) for maps, of, table in zip((truth, result), lists, numbers)] for t in range(len(truth))
    ]
    ours = [stq.number_segments(each) for each in lists]
    sequence = stq.SequenceSTQ(CLASSES, THINGS)
    for t in range(len(truth)):
        pairs = count_pairs(truth[t], result[t])
        sequence.update(Pairs(*(stq.relabel(ids, of[t], ls[t]) for ids, of, ls in zip(pairs, lists, ours)), pairs.pixels))
    np.testing.assert_allclose(stq.quality([sequence.counts()]), plain.plain_stq(labels, CLASSES, list(THINGS)), rtol=1e-12)


def test_benchmark_material_agrees_too():
    truth, result, *lists = plain.synthetic(4, 60, 100, 12, CLASSES)
    video = vpq.VideoPQ(CLASSES, (2,))
    for frame in zip(truth, result, *lists):
        video.update(count_frame(*frame, CLASSES))
    np.testing.assert_allclose(video.counts[0], plain.plain_vpq(truth.__getitem__, result.__getitem__, *lists, CLASSES, 2), rtol=1e-12)


def test_perfect_and_empty_results():
    truth, _, lists, _ = random_video(0, crowds=False)
    empty = Segments.of([], [])
    for maps, of, expected in ((truth, lists, 100.0), ([0 * image for image in truth], [empty] * len(truth), 0.0)):
        video = vpq.VideoPQ(CLASSES)
        for frame in zip(truth, maps, lists, of):
            video.update(count_frame(*frame, CLASSES))
        assert vpq.totals(video.counts, THINGS) == {"all": expected, "things": expected, "stuff": expected}
    assert np.isnan(vpq.totals(video.counts, range(CLASSES))["stuff"])  # no stuff among the classes: no number, and no error


def test_memory_of_a_long_video_does_not_grow(monkeypatch):
    monkeypatch.setattr(stq, "_PENDING", 100)
    video, rows = vpq.VideoPQ(3, (1, 2)), stq._Tally()
    image, segments = np.full((4, 4), (1 << 16) + 1), Segments.of([(1 << 16) + 1], [1])
    frame = count_frame(image, image, segments, segments, 3)
    for _ in range(20):
        video.update(frame)
    assert len(video._recent) == 2
    for _ in range(20_000):
        rows.add(frame.pairs.truth, frame.pairs.pixels)
        assert len(rows._rows) <= 103
    assert rows.sums()[1].tolist() == [20_000 * 16]


def frame_of(truth_ids=(1, 2), result_ids=(5, 6), classes=(0, 1), shapes=((2, 4), (2, 4)), listed=None, areas=None):
    maps = [np.repeat(ids, 4).reshape(shape) if np.prod(shape) == 8 else np.ones(shape, int) for ids, shape in zip((truth_ids, result_ids), shapes)]
    truth = Segments.of(truth_ids, (0, 1), areas=areas)
    return count_frame(*maps, truth, Segments.of(result_ids if listed is None else listed, classes), 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shapes": ((2, 4), (2, 3))}, "the result is 3x2, its annotation 4x2"),
        ({"classes": (0, 2)}, "result's segment 6 has class 2, but classes go from 0 to 1"),
        ({"classes": (-1, 1)}, "result's segment 5 has class -1"),
        ({"listed": (5, 7)}, "image holds segment id 6, which its list lacks"),
        ({"listed": (5, 6, 9), "classes": (0, 1, 1)}, "lists segment id 9, which no pixel"),
        ({"listed": (5, 6, 6), "classes": (0, 1, 1)}, "lists segment id 6 twice"),
        ({"listed": (0, 6)}, "lists segment id 0; ids go from 1"),
        ({"listed": (1 << 24, 6)}, "lists segment id 16777216; ids go from 1"),
    ],
)
def test_frames_that_do_not_fit(change, message):
    with pytest.raises(PyvsegError, match=message) as caught:
        frame_of(**change)
    assert "\n" not in str(caught.value)


def test_areas_that_the_annotation_states_wrongly():
    with pytest.raises(PyvsegError, match="segment 2 covers more pixels than its \"area\""):
        vpq.VideoPQ(2).update(frame_of(areas=(4, 3)))


def test_labels_that_do_not_fit():
    one = np.array([1])
    with pytest.raises(PyvsegError, match="the result holds class 9; classes go from 0 to 8, and 255 is void"):
        stq.SequenceSTQ(CLASSES, THINGS).update(Pairs(one, one * 9 << 16, one))
    with pytest.raises(PyvsegError, match="70000 segments; STQ can number 65536"):
        stq.number_segments([Segments.of(np.arange(1, 70001), np.zeros(70000, int))])


def test_stored_maps_against_themselves_and_against_the_next_frame():
    """Real label maps."""
    from pyvseg.video.panoptic import read_step

    maps = [read_step(path) for path in sorted(shared("data", "camvid_step", "panoptic_maps").glob("*.png"))[:12]]
    labels = [(classes.astype(np.int64) << 16) | instances for classes, instances in maps]
    for results, low, high in ((labels, 1, 1), (labels[1:] + labels[-1:], 0.2, 0.8)):
        sequence = stq.SequenceSTQ(11, (8, 9, 10))
        for truth, result in zip(labels, results):
            sequence.update(count_pairs(truth, result))
        got = stq.quality([sequence.counts()])
        np.testing.assert_allclose(got, plain.plain_stq(zip(labels, results), 11, [8, 9, 10]), rtol=1e-12)
        assert low <= got.aq <= high
