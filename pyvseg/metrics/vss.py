# SPDX-License-Identifier: Apache-2.0
"""Video semantic segmentation: mIoU and its relatives, and video consistency mVC, as the VSPW evaluation (Miao et al., CVPR 2021) computes them.

Maps are uint8 (H, W) in VSPW's form: class + 1; 0, 253 and 255 in labels are void.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyvseg.errors import PyvsegError
from pyvseg.metrics.panoptic import same_size

CLASSES = 124
VOID = (0, 253, 255)
LENGTHS = (8, 16)  # frames of mVC's windows
COLUMNS = ("mIoU", "pixel accuracy", "mean class accuracy", "frequency weighted IoU")


def histogram(label: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Pixels by value of label and result, (256, 256) int64; those of several frames add up. Raises PyvsegError where the sizes differ."""
    same_size(label, result)
    return np.bincount((label.astype(np.uint16) << 8 | result).ravel(), minlength=1 << 16).reshape(256, 256)


def accuracy(counts: np.ndarray, classes: int = CLASSES) -> dict[str, float]:
    """The four numbers of `COLUMNS` as fractions: void labels left out, means over the classes that are labelled.

    counts (256, 256) of all frames. Raises PyvsegError where a result has a value that is no class.
    """
    used = counts[np.setdiff1d(np.arange(256), VOID)]
    if (values := np.setdiff1d(np.flatnonzero(used.sum(0)), np.arange(1, classes + 1))).size:
        raise PyvsegError(f"the result holds the value {values[0]}; every pixel needs its class + 1, from 1 to {classes}")
    if used[classes:].any():
        raise PyvsegError(f"the label holds a class beyond {classes}; labels hold class + 1, and {', '.join(map(str, VOID))} for void")
    return _accuracy(counts[1 : classes + 1, 1 : classes + 1])


def accuracy_of_raw_values(counts: np.ndarray, classes: int = CLASSES) -> dict[str, float]:
    """The same as a script in circulation has it, a little lower: it takes the values of the PNGs themselves for classes 0 to 123.

    So void (0) is a class that is never found, the last class is never looked at, and what is taken for it falls to class 0 of the next row.
    """
    rows, columns = np.divmod(np.arange(classes * 256), 256)
    cells = np.bincount(rows * classes + columns, counts[:classes].ravel(), classes * classes)
    return _accuracy(cells[: classes * classes].reshape(classes, classes))


def _accuracy(confusion: np.ndarray) -> dict[str, float]:
    labelled, found, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    there = labelled > 0
    if not there.any():
        return dict.fromkeys(COLUMNS, float("nan"))
    iou = right[there] / (labelled + found - right)[there]
    of_class, share = right[there] / labelled[there], labelled[there] / labelled.sum()
    return dict(zip(COLUMNS, map(float, (iou.mean(), right.sum() / labelled.sum(), of_class.mean(), (share * iou).sum()))))


class Consistency:
    """mVC of one video, frame by frame: of the pixels whose label stays the same for n frames, the share whose result does too.

    As in the published program the result is compared with itself and not with the label, a void label is one like any other,
    and a video's last window is left out. Memory is two counters per pixel, whatever n.
    """

    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        self.lengths = tuple(lengths)
        self._values: dict[int, list[float]] = {n: [] for n in self.lengths}
        self._before: tuple[np.ndarray, np.ndarray] | None = None
        self._same: list[np.ndarray] = []  # frames that a pixel has kept its value, before this one: of label and result

    def update(self, label: np.ndarray, result: np.ndarray) -> None:
        """Raises PyvsegError where the size changes within the video."""
        now, limit = (label, result), max(self.lengths)
        if self._before is None:
            self._same = [np.zeros(label.shape, np.int32) for _ in now]
        elif self._before[0].shape != label.shape:
            raise PyvsegError("the size changes from {1}x{0} to {3}x{2}".format(*self._before[0].shape, *label.shape))
        else:
            for same, one, other in zip(self._same, self._before, now):
                np.minimum(same + 1, limit, out=same)
                same *= one == other
        self._before = now
        for n, values in self._values.items():
            steady = self._same[0] >= n - 1
            both = int((steady & (self._same[1] >= n - 1)).sum())
            values.append(both / count if (count := int(steady.sum())) else float("nan"))

    def values(self) -> dict[int, np.ndarray]:
        """One per window, by window length; NaN where no label stays the same."""
        return {n: np.array(values[n - 1 : -1]) for n, values in self._values.items()}


def mean_consistency(videos: Sequence[dict[int, np.ndarray]]) -> dict[int, float]:
    """mVC by window length: the mean over all windows of all videos, so that long videos weigh more. NaN where there are none."""
    result = {}
    for n in videos[0]:
        values = np.concatenate([video[n] for video in videos])
        values = values[~np.isnan(values)]
        result[n] = float(values.mean()) if values.size else float("nan")
    return result
