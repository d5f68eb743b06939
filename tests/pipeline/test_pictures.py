"""The reconstruction picture: its layout, and the pixels of its masked column."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.mfm import normalize_features
from models.pretraining import PretrainingModel
from models.teacher import EMATeacher
from pipeline.picture_grid import GAP, HEADER
from pipeline.pictures import reconstruction_picture
from tests.pipeline.samples import MEAN, STD, debug_crops, debug_networks, normalized

ROWS = 3
SIDE = 128  # tiles of 64-pixel images at tile_px=100 are doubled
GREY = 191  # 0.75 of white


def draw(
    model: PretrainingModel, teacher: EMATeacher | None, crops: Tensor, mask: Tensor
) -> NDArray[np.uint8]:
    png = reconstruction_picture(
        model, teacher, normalized(crops), mask, mean=MEAN, std=STD, tile_px=100
    )
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def tiles(picture: NDArray[np.uint8], column: int) -> NDArray[np.int64]:
    """Tiles of a column at one pixel per pixel: (B, 64, 64, 3)."""
    left = GAP + column * (SIDE + GAP)
    tops = [HEADER + GAP + row * (SIDE + GAP) for row in range(ROWS)]
    cut = [picture[top : top + SIDE : 2, left : left + SIDE : 2] for top in tops]
    return np.stack(cut).astype(np.int64)


def hidden(mask: Tensor) -> NDArray[np.bool_]:
    """Mask (B, 16) -> (B, 64, 64)."""
    return np.kron(mask.reshape(-1, 4, 4).numpy(), np.ones((1, 16, 16))).astype(bool)


@pytest.mark.parametrize(("with_mfm", "columns"), [(True, 5), (False, 3)])
def test_picture_has_a_row_an_image_and_feature_columns_with_mfm_only(
    with_mfm: bool, columns: int
) -> None:
    model, teacher = debug_networks(with_mfm=with_mfm)
    picture = draw(model, teacher, *debug_crops(ROWS))
    height = HEADER + GAP + ROWS * (SIDE + GAP)
    assert picture.shape == (height, GAP + columns * (SIDE + GAP), 3)
    for column in range(columns):
        assert all(tile.std() > 0 for tile in tiles(picture, column)), f"column {column} is empty"
        left = GAP + column * (SIDE + GAP)
        assert picture[:HEADER, left : left + SIDE].min() < 100, f"column {column} has no name"


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_columns_show_the_input_and_what_was_hidden(norm_pix_loss: bool) -> None:
    model, teacher = debug_networks(norm_pix_loss=norm_pix_loss)
    crops, mask = debug_crops(ROWS)
    picture = draw(model, teacher, crops, mask)
    shown, masked, reconstruction = (tiles(picture, column) for column in range(3))
    expected = (crops * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(shown - expected).max() <= 1  # normalising and back may turn a rounding over
    is_hidden = hidden(mask)
    assert np.all(masked[is_hidden] == GREY)
    np.testing.assert_array_equal(masked[~is_hidden], shown[~is_hidden])
    np.testing.assert_array_equal(reconstruction[~is_hidden], shown[~is_hidden])
    assert np.any(reconstruction[is_hidden] != shown[is_hidden])


def test_feature_columns_are_grey_at_visible_patches_and_coloured_at_hidden_ones() -> None:
    model, teacher = debug_networks()
    crops, mask = debug_crops(ROWS)
    picture = draw(model, teacher, crops, mask)
    for column in (3, 4):
        features = tiles(picture, column)
        assert np.all(features[~hidden(mask)] == GREY)
        assert np.mean(features[hidden(mask)] == GREY) < 0.1


def test_feature_columns_agree_where_the_prediction_is_the_target() -> None:
    model, teacher = debug_networks()
    assert model.mfm is not None
    assert teacher is not None
    crops, mask = debug_crops(ROWS)
    full = EMATeacher(teacher.backbone, teacher_input="full")
    features = normalize_features(full(normalized(crops), torch.arange(16).expand(ROWS, -1)))
    model.mfm.forward = lambda latent: features  # type: ignore[method-assign]
    picture = draw(model, full, crops, mask)
    # Both columns go through the same projection; float32 rounding may turn one level.
    assert np.abs(tiles(picture, 3) - tiles(picture, 4)).max() <= 1


def test_a_picture_of_a_model_that_diverged_is_drawn_all_the_same() -> None:
    model, teacher = debug_networks()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
        for p in teacher.backbone.parameters():
            p.fill_(float("nan"))
    crops, mask = debug_crops(ROWS)
    picture = draw(model, teacher, crops, mask)
    assert tiles(picture, 0).max() > 0
