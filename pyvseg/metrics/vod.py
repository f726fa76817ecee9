# SPDX-License-Identifier: Apache-2.0
"""Video object detection: AP of boxes, image by image, as COCO counts it (Lin et al. 2014). ImageNet VID is quoted at an IoU of 0.5."""

from __future__ import annotations

import contextlib
import io

import numpy as np

COLUMNS = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")


def average_precision(truth: dict, results: list[dict]) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """The numbers of `COLUMNS` as fractions, of all categories and of each that is annotated; NaN where there is nothing to find.

    truth    the annotation document: images, categories, annotations
    results  entries with image_id, category_id, bbox (x, y, width, height) and score; of each image and category the 100 best count
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        evaluation = COCOeval(annotated, annotated.loadRes(results) if results else COCO(), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][:, :, :, 0, -1], evaluation.eval["recall"][:, :, 0]
    keys = evaluation.params.catIds
    each = {key: _summary(precision[:, :, k : k + 1], recall[:, k : k + 1]) for k, key in enumerate(keys) if (recall[:, k] > -1).any()}
    return _summary(precision, recall), each


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Of precision (T, R, K) and recall (T, K, M)."""
    values = [precision, precision[0], precision[5], *np.moveaxis(recall, 2, 0)]
    return {name: _mean(value) for name, value in zip(COLUMNS, values)}


def _mean(values: np.ndarray) -> float:
    there = values[values > -1]
    return float(there.mean()) if there.size else float("nan")
