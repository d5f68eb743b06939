"""COCO run lengths: read as pycocotools writes them, and what must never reach it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.prepare.run_lengths import decode_runs, resize_nearest, run_lengths


def test_run_lengths_are_read_as_pycocotools_writes_them():
    generator = np.random.default_rng(3)
    for density in (0.0, 0.01, 0.5, 1.0):
        pixels = (generator.random((300, 500)) < density).astype(np.uint8)
        runs = decode_runs(coco_mask.encode(np.asfortranarray(pixels))["counts"])
        flat = pixels.ravel(order="F")
        changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
        assert runs == np.diff([0, *changes, flat.size]).tolist()
    assert decode_runs(b"o") is None, "cut off inside a number"


def test_nearest_resizing_takes_the_pixel_under_the_centre():
    pixels = np.arange(12).reshape(2, 6)
    assert resize_nearest(pixels, (2, 1)).tolist() == [[7, 10]]
    assert (resize_nearest(pixels, (6, 2)) == pixels).all()


def test_absurd_polygons_never_reach_pycocotools(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(coco_mask, "frPyObjects", lambda *_: 1 / 0)
    counts = Counter[str]()
    for polygon in ([0, 0, 1e12, 0, 1e12, 1e12], [0, 0, float("inf"), 0, 1, 1], [True]):
        assert run_lengths([polygon], 10, 10, counts) is None
    assert run_lengths(5, 10, 10, counts) is None
