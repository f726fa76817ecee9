# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation: region similarity J, boundary measure F and their statistics, as the DAVIS 2017 evaluation defines them.

Every number is a ratio of pixel counts in float64, equal to the official tool's, not merely close to it. Label images are
(H, W) uint8, 0 = background, 1..K = objects, 255 in an annotation = void. Source: Perazzi et al. 2016, Pont-Tuset et al. 2017.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment

from pyvseg.errors import PyvsegError

VOID = 255
BOUND_TH = 0.008  # boundary tolerance as a share of the image diagonal
MAX_PROPOSALS = 20  # of the unsupervised protocol
COLUMNS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


class Scores(NamedTuple):
    """J and F of the objects of one sequence, (K, T) float64 each."""

    j: np.ndarray
    f: np.ndarray


class Statistics(NamedTuple):
    """Mean, recall (share of frames above 0.5) and decay (first quarter's mean less the last's) of one object's curve."""

    mean: float
    recall: float
    decay: float


class Boundary(NamedTuple):
    """A mask's boundary pixels and the region within a radius of them."""

    points: np.ndarray  # (n, 2) int, row and column
    near: np.ndarray  # (h, w) bool, a window of the image
    origin: np.ndarray  # (2,) int, where the window begins; may be negative


def boundary_radius(height: int, width: int, bound_th: float = BOUND_TH) -> int:
    """Boundary tolerance in pixels: `bound_th` itself from 1 on, below that a share of the diagonal."""
    return int(bound_th) if bound_th >= 1 else math.ceil(bound_th * math.hypot(height, width))


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Boundary pixels (H, W) bool of a mask (H, W) bool: those that differ from the neighbour right, below or right below.

    The image's edge is no boundary: an object that touches it has none there.
    """
    right, below = mask[:, :-1] ^ mask[:, 1:], mask[:-1] ^ mask[1:]
    result = np.zeros(mask.shape, bool)
    result[:, :-1] |= right
    result[:-1] |= below
    result[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return result


def boundary(mask: np.ndarray, radius: int) -> Boundary:
    """The boundary of a mask (H, W) bool, and every pixel within `radius` (Euclidean, inclusive) of it."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    top, left = max(y - 1, 0), max(x - 1, 0)
    # The margin of one pixel keeps every boundary pixel; where it is missing, the image ends too.
    edges = boundary_map(mask[top : y + height + 1, left : x + width + 1])
    padded = np.pad(edges, radius)
    if edges.any():
        distance = cv2.distanceTransform((~padded).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        padded = distance < math.sqrt(radius**2 + 0.5)  # squared distances are integers: the half keeps rounding out
    origin = np.array((top, left))
    return Boundary(np.argwhere(edges) + origin, padded, origin - radius)


def boundary_f(annotation: Boundary, result: Boundary) -> float:
    """F: harmonic mean of the shares of each boundary that lies near the other."""
    n_result, n_annotation = len(result.points), len(annotation.points)
    if n_result == 0 or n_annotation == 0:
        return float(n_result == n_annotation)
    precision = _count_near(result.points, annotation) / n_result
    recall = _count_near(annotation.points, result) / n_annotation
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _count_near(points: np.ndarray, other: Boundary) -> int:
    at = points - other.origin
    at = at[((at >= 0) & (at < other.near.shape)).all(1)]
    return int(other.near[at[:, 0], at[:, 1]].sum())


def jaccard(annotation: np.ndarray, result: np.ndarray, num_annotated: int, num_results: int, void: np.ndarray | None = None) -> np.ndarray:
    """J of every annotated object with every result object, (num_annotated, num_results) float64, from two label images.

    Two empty masks score 1. Annotated ids above `num_annotated` count as background; pixels of `void` (H, W) bool do not count.
    """
    columns = num_results + 1
    labels = np.where(annotation > num_annotated, 0, annotation).astype(np.int32) * columns + result
    joint = np.bincount(labels.ravel() if void is None else labels[~void], minlength=(num_annotated + 1) * columns)
    joint = joint.reshape(num_annotated + 1, columns)
    inside = joint[1:, 1:]
    union = joint.sum(1)[1:, None] + joint.sum(0)[1:] - inside
    return np.where(union == 0, 1.0, inside / np.maximum(union, 1))


def frame_scores(annotation: np.ndarray, result: np.ndarray, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """J and F, (num_objects,) float64 each, of one frame's label images; void counts as background. Result ids must not exceed `num_objects`."""
    radius = boundary_radius(*annotation.shape)
    j = jaccard(annotation, result, num_objects, num_objects).diagonal()
    f = [boundary_f(boundary(annotation == i, radius), boundary(result == i, radius)) for i in range(1, num_objects + 1)]
    return j, np.array(f, float)


def sequence_scores(frames: Iterable[tuple[np.ndarray, np.ndarray]], num_objects: int) -> Scores:
    """J and F of each object in each frame of `frames`, which yields (annotation, result) label images.

    The protocol scores all frames but the first (given) and the last; `num_objects` is the first annotation's largest id.
    Raises PyvsegError where sizes differ or a result has more objects than the first annotation.
    """
    rows = []
    for annotation, result in frames:
        if annotation.shape != result.shape:
            raise PyvsegError(f"the result is {_size(result)}, its annotation {_size(annotation)}; save results at the annotation's size")
        if result.max(initial=0) > num_objects:
            raise PyvsegError(f"the result has object id {result.max()}, the first annotation only ids up to {num_objects}")
        rows.append(frame_scores(annotation, result, num_objects))
    if not rows:
        raise PyvsegError("no frame to score: a sequence needs at least three frames, since the first and the last do not count")
    j, f = (np.stack(columns, axis=1) for columns in zip(*rows))
    return Scores(j, f)


def unsupervised_scores(annotations: np.ndarray, results: np.ndarray) -> Scores:
    """The unsupervised protocol on label volumes (T, H, W) uint8: every frame counts, void does not, and each annotated object
    is scored with the proposal that the best assignment of whole sequences gives it.

    Raises PyvsegError where a frame has more than 20 proposals.
    """
    void = annotations == VOID
    num_objects, num_results = int(np.where(void[0], 0, annotations[0]).max()), int(results.max(initial=0))
    if num_results > MAX_PROPOSALS:
        raise PyvsegError(f"the result has proposal id {num_results}; the unsupervised protocol allows {MAX_PROPOSALS}")
    num_results = max(num_results, num_objects)  # proposals that are not there are empty masks
    radius = boundary_radius(*annotations.shape[1:])
    j = np.empty((num_objects, num_results, len(annotations)))
    f = np.empty_like(j)
    for t, (annotation, result) in enumerate(zip(annotations, results)):
        j[..., t] = jaccard(annotation, result, num_objects, num_results, void[t])
        ours = [boundary((annotation == i + 1), radius) for i in range(num_objects)]
        theirs = [boundary((result == i + 1) & ~void[t], radius) for i in range(num_results)]
        f[..., t] = [[boundary_f(a, b) for b in theirs] for a in ours]
    chosen = linear_sum_assignment(-(j.mean(2) + f.mean(2)) / 2)
    return Scores(j[chosen], f[chosen])


def statistics(curve: np.ndarray, *, strict: bool = False) -> Statistics:
    """Mean, recall and decay of one object's values over the scored frames, (T,) float64.

    `strict` repeats the official tool's overflow: it keeps quarter borders in 8 bits, so that its decay is wrong or NaN from 256 frames on.
    """
    borders = np.round(np.linspace(1, len(curve), 5) + 1e-10) - 1
    borders = borders.astype(np.uint8 if strict else np.intp)
    stops = borders + borders.dtype.type(1)  # wraps in 8 bits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing
        first, last = curve[borders[0] : stops[1]].mean(), curve[borders[3] : stops[4]].mean()
    return Statistics(float(curve.mean()), float((curve > 0.5).mean()), float(first - last))


def totals(sequences: Mapping[str, Scores], *, strict: bool = False) -> dict[str, float]:
    """The seven numbers of `COLUMNS`: plain means over all objects of all sequences."""
    j, f = (np.array([statistics(curve, strict=strict) for scores in sequences.values() for curve in scores[i]]).mean(0) for i in (0, 1))
    return dict(zip(COLUMNS, map(float, ((j[0] + f[0]) / 2, *j, *f))))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
