"""The reconstruction picture: what went in, what was hidden, what the model made of it.

One row an image: input | masked | reconstruction | teacher features | predicted features. Features
are those of one stage at the hidden positions, as colours: the first three principal components
of the teacher's targets, and the prediction projected on the same three.
"""

# B batch, N patches, M masked patches, P patch side, c cells per token side

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.mfm import normalize_features
from models.pretraining import PretrainingModel
from models.teacher import Teacher
from models.tokens import gather_tokens, patchify, split_tokens, unpatchify
from pipeline.picture_grid import picture_grid, png_bytes
from pipeline.pretrain_evaluation import reconstruct

PICTURE_STRIDE = 8  # 2x2 colours a token: finer than stage 16, less noisy than stage 4
_GREY = 0.75


@torch.no_grad()
def reconstruction_picture(
    model: PretrainingModel,
    teacher: Teacher | None,
    images: Tensor,
    mask: Tensor,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tile_px: int = 160,
) -> bytes:
    """Draw the picture.

    Args:
        model: the student.
        teacher: None when the model has no MFM part; the feature columns are then left out.
        images: (B, C, H, W), normalised.
        mask: (B, N) bool, True = masked.
        mean: channel means to un-normalise with.
        std: channel deviations to un-normalise with.
        tile_px: smallest side of a tile in the picture.

    Returns:
        PNG bytes.
    """
    scale, shift = _to_unit(images, mean, std)
    shown = images * scale + shift
    columns = {
        "input": shown,
        "masked": _fill_hidden(shown, mask, model.mim.patch_size),
        "reconstruction": reconstruct(model, images, mask) * scale + shift,
    }
    if teacher is not None and model.mfm is not None:
        _, ids_masked = split_tokens(mask)
        targets = normalize_features(teacher(images, ids_masked))[PICTURE_STRIDE]
        features = model.predict(images, mask).features[PICTURE_STRIDE]  # (B, N, c, c, d)
        answers = gather_tokens(features, ids_masked).float()
        target, predicted = _feature_colours(targets, answers, mask, ids_masked)
        columns["teacher features"] = target
        columns["predicted features"] = predicted
    return _compose({name: tiles.float().cpu() for name, tiles in columns.items()}, tile_px)


@torch.no_grad()
def distillation_picture(
    images: Tensor,
    mask: Tensor,
    targets: Tensor,
    predicted: Tensor,
    *,
    patch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tile_px: int = 160,
) -> bytes:
    """Draw a teacher's tokens and their prediction at the hidden patches.

    Args:
        images: (B, C, H, W), normalised.
        mask: (B, N) bool, True = masked.
        targets: (B, N, T), the teacher's.
        predicted: (B, N, T), the student's.
        patch_size: token side in pixels.
        mean: channel means to un-normalise with.
        std: channel deviations to un-normalise with.
        tile_px: smallest side of a tile in the picture.

    Returns:
        PNG bytes.
    """
    scale, shift = _to_unit(images, mean, std)
    shown = images * scale + shift
    _, ids_masked = split_tokens(mask)
    hidden = [gather_tokens(x.float(), ids_masked)[:, :, None, None] for x in (targets, predicted)]
    target, answer = _feature_colours(hidden[0], hidden[1], mask, ids_masked)
    columns = {
        "input": shown,
        "masked": _fill_hidden(shown, mask, patch_size),
        "teacher features": target,
        "predicted features": answer,
    }
    return _compose({name: tiles.float().cpu() for name, tiles in columns.items()}, tile_px)


def _to_unit(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Scale and shift that bring normalised images to [0, 1], each (1, C, 1, 1)."""
    scale, shift = (torch.tensor(values).view(1, -1, 1, 1).to(images) for values in (std, mean))
    return scale, shift


def _fill_hidden(images: Tensor, mask: Tensor, patch_size: int) -> Tensor:
    patches = patchify(images, patch_size)
    patches = patches.masked_fill(mask[..., None], _GREY)
    return unpatchify(
        patches, (images.shape[-2] // patch_size, images.shape[-1] // patch_size), patch_size
    )


def _feature_colours(
    target: Tensor, predicted: Tensor, mask: Tensor, ids_masked: Tensor
) -> tuple[Tensor, Tensor]:
    """Features (B, M, c, c, d) at the masked patches as pictures (B, 3, h*c, w*c) in [0, 1]."""
    # A run that diverges must end with its own error, not with that of a picture.
    target, predicted = (torch.nan_to_num(f, posinf=0.0, neginf=0.0) for f in (target, predicted))
    flat = target.flatten(0, -2)  # (B*M*c*c, d)
    center = flat.mean(0)
    _, _, axes = torch.linalg.svd(flat - center, full_matrices=False)
    coordinates = [(f.flatten(0, -2) - center) @ axes[:3].T for f in (target, predicted)]
    low, high = coordinates[0].quantile(torch.tensor([0.02, 0.98]).to(flat), dim=0)
    colours = [((c - low) / (high - low).clamp_min(1e-6)).clamp(0, 1) for c in coordinates]

    B, N = mask.shape
    side = round(N**0.5)
    cells = target.shape[2]
    maps = []
    for colour in colours:
        tokens = torch.full((B, N, cells * cells * 3), _GREY, device=mask.device)
        index = ids_masked[..., None].expand(-1, -1, tokens.shape[-1])
        tokens = tokens.scatter(1, index, colour.reshape(B, -1, tokens.shape[-1]))
        maps.append(unpatchify(tokens, (side, side), cells))
    return maps[0], maps[1]


def _compose(columns: dict[str, Tensor], tile_px: int) -> bytes:
    base = next(iter(columns.values())).shape[-1]
    side = base * max(1, -(-tile_px // base))
    drawn = [[_tile(image, side) for image in images] for images in columns.values()]
    rows = list(zip(*drawn, strict=True))
    return png_bytes(picture_grid(rows, list(columns)))


def _tile(image: Tensor, side: int) -> Image.Image:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    tile = Image.fromarray(np.ascontiguousarray(pixels))
    return tile.resize((side, side), Image.Resampling.NEAREST)
