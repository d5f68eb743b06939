"""Evaluation of pre-training on held-out crops, against predictors that have learnt nothing.

A falling loss proves nothing: it drops at once to the loss of predicting the average image and can
stay there. So both objectives are reported as ratios to trivial predictors *on the same crops*:
* pixels: the better of the mean of every pixel position (over these very crops, so the baseline is
  told their average) and the mean colour of the image's own visible patches;
* features: the mean feature of each stage and cell (again over these very crops).

Neither ratio shows when the trunk's last stage, which no norm follows, outgrows its use: its size
is reported, too. Features many times as large as at the start have transferred worse than random
weights while the ratios fell (docs/experiments.md).
"""

# B batch, N patches, M masked patches, P patch side, C channels, c cells per token side

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.hivit import STRIDES
from models.mfm import normalize_features
from models.mim import patch_statistics
from models.pretraining import PretrainingModel
from models.teacher import Teacher
from models.tokens import gather_tokens, patchify, split_tokens, unpatchify


class PretrainEvaluation:
    """Sums over held-out crops; `result()` turns them into losses, baselines and ratios.

    Args:
        model: the student.
        teacher: needed when the model has an MFM part.
        std: channel deviations the images were normalised with; raw-pixel errors are reported in
            [0, 1] pixel units.
    """

    def __init__(
        self, model: PretrainingModel, teacher: Teacher | None, std: tuple[float, ...]
    ) -> None:
        self.model = model
        self.teacher = teacher
        self.std = torch.tensor(std)
        device = next(model.parameters()).device
        self.sums: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float64, device=device)
        )

    @torch.no_grad()
    def add(self, images: Tensor, mask: Tensor) -> None:
        """Add a batch: images (B, C, H, W) normalised, mask (B, N) True = masked."""
        ids_visible, ids_masked = split_tokens(mask)
        stages, pyramid = self.model.encoder(images, ids_visible)
        self._sum("stage16/abs", stages[16].abs().sum())
        self._sum("stage16/count", torch.tensor(stages[16].numel()))
        latent = self.model.decoder(pyramid, ids_visible)
        mim = self.model.mim
        target, pred = mim.targets(images), mim(latent).float()  # (B, N, P*P*C)
        if not mim.norm_pix_loss:
            scale = self.std.to(images).repeat(mim.patch_size**2)  # channels are innermost
            target, pred = target * scale, pred * scale
        self._add_pixels(target, pred, ids_visible, mask)
        if self.model.mfm is not None:
            assert self.teacher is not None, "a model with MFM needs a teacher"
            targets = normalize_features(self.teacher(images, ids_masked))
            features = self.model.mfm(gather_tokens(latent, ids_masked))
            for s in STRIDES:
                flat = targets[s].flatten(0, 1).double()  # (B*M, c, c, d)
                self._sum(f"mfm{s}/error", F.mse_loss(features[s], targets[s], reduction="sum"))
                self._sum(f"mfm{s}/target", flat.sum(0))
                self._sum(f"mfm{s}/square", flat.square().sum(0))
                self._sum(f"mfm{s}/count", torch.tensor(flat.shape[0]))

    def _add_pixels(self, target: Tensor, pred: Tensor, ids_visible: Tensor, mask: Tensor) -> None:
        channels = self.std.numel()
        hidden = mask[..., None].double()  # (B, N, 1)
        exact = target.double()
        self._sum("mim/error", ((pred - target).square() * hidden).sum())
        self._sum("mim/count", hidden.sum() * target.shape[-1])
        # Position mean m over all crops; error at hidden pixels = sum h (x - m)^2, expanded.
        self._sum("pos/count", torch.tensor(target.shape[0]))
        self._sum("pos/x", exact.sum(0))
        self._sum("pos/h", hidden.sum(0))
        self._sum("pos/hx", (hidden * exact).sum(0))
        self._sum("pos/hxx", (hidden * exact.square()).sum(0))
        visible = gather_tokens(exact, ids_visible)  # (B, V, P*P*C)
        colour = visible.reshape(visible.shape[0], -1, channels).mean(1)  # (B, C)
        error = exact - colour[:, None].repeat(1, 1, target.shape[-1] // channels)
        self._sum("colour/error", (error.square() * hidden).sum())

    def _sum(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key] + value.to(self.sums[key])

    def result(self) -> dict[str, float]:
        """Metrics over all crops of all workers.

        Keys: val/loss_mim, val/baseline_position_mean, val/baseline_visible_colour,
        val/mim_loss_over_baseline, val/stage16_abs_mean (mean absolute value of the features of
        stage 16 at visible patches); with MFM also val/loss_mfm{s}, val/baseline_mfm{s},
        val/mfm{s}_loss_over_baseline and val/mfm_loss_over_baseline (losses and baselines summed).
        """
        if dist.is_initialized():
            for key in sorted(self.sums):
                dist.all_reduce(self.sums[key])
        s = self.sums
        count = s["mim/count"]
        mean = s["pos/x"] / s["pos/count"]
        position = (s["pos/hxx"] - 2 * mean * s["pos/hx"] + mean.square() * s["pos/h"]).sum()
        metrics = {
            "val/loss_mim": float(s["mim/error"] / count),
            "val/baseline_position_mean": float(position / count),
            "val/baseline_visible_colour": float(s["colour/error"] / count),
        }
        best = min(metrics["val/baseline_position_mean"], metrics["val/baseline_visible_colour"])
        metrics["val/mim_loss_over_baseline"] = ratio(metrics["val/loss_mim"], best)
        metrics["val/stage16_abs_mean"] = float(s["stage16/abs"] / s["stage16/count"])
        if self.model.mfm is None:
            return metrics
        losses, baselines = [], []
        for stride in STRIDES:
            n = s[f"mfm{stride}/count"]
            feature_mean = s[f"mfm{stride}/target"] / n
            variance = s[f"mfm{stride}/square"] / n - feature_mean.square()
            losses.append(float(s[f"mfm{stride}/error"] / n / variance.numel()))
            baselines.append(float(variance.mean()))
            metrics[f"val/loss_mfm{stride}"] = losses[-1]
            metrics[f"val/baseline_mfm{stride}"] = baselines[-1]
            metrics[f"val/mfm{stride}_loss_over_baseline"] = ratio(losses[-1], baselines[-1])
        metrics["val/mfm_loss_over_baseline"] = ratio(sum(losses), sum(baselines))
        return metrics


def ratio(loss: float, baseline: float) -> float:
    """Of crops without any variation the trivial predictor makes no error: a huge, finite ratio."""
    return loss / max(baseline, 1e-12)


@torch.no_grad()
def reconstruct(model: PretrainingModel, images: Tensor, mask: Tensor) -> Tensor:
    """Images with their hidden patches predicted and their visible patches pasted.

    With per-patch-normalised targets the prediction is un-normalised with the *true* statistics of
    each hidden patch, as is customary; with raw pixels nothing is borrowed.

    Args:
        images: (B, C, H, W), normalised.
        mask: (B, N) bool, True = masked.

    Returns:
        (B, C, H, W), normalised like the input.
    """
    mim = model.mim
    patches = patchify(images.float(), mim.patch_size)
    pred = model.predict(images, mask).pixels.float()
    if mim.norm_pix_loss:
        mean, std = patch_statistics(patches)
        pred = pred * std + mean
    mixed = torch.where(mask[..., None], pred, patches)
    grid = (images.shape[-2] // mim.patch_size, images.shape[-1] // mim.patch_size)
    return unpatchify(mixed, grid, mim.patch_size)
