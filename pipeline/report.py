"""What a run prints first and last."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import tracking
from pipeline.config import TrainingConfig
from pipeline.finetune_config import FinetuneConfig
from pipeline.pretrain_config import PretrainConfig
from pipeline.reproducibility import environment, git_commit
from pipeline.run_folder import RunFolder

_WIDTH = 140


def first_line(models_folder: Path) -> str:
    """Which code runs: the folder `models` came from, the commit, the versions that matter."""
    versions = environment()
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "ray", "mlflow"))
    return f"models from {models_folder} at commit {git_commit(models_folder)}; {shown}"


def final_report(config: PretrainConfig, summary: dict[str, Any]) -> str:
    """Losses against the trivial predictors, where things are, how to open MLflow."""
    folder = RunFolder(config)
    m = summary["metrics"]
    unit = "normalised pixels" if config.objective.norm_pix_loss else "pixels in [0, 1]"
    held_out = (
        "data.val_path" if config.data.val_path else "training images, crops never trained on"
    )
    if config.objective.kind == "distillation":
        lines = [
            "",
            f"held-out crops ({held_out}), squared error at hidden patches against the mean token:",
            *(
                f"  {head:9s} head  model {m[f'val/loss_{head}']:.4f}   mean token "
                f"{m['val/baseline_tokens']:.4f}   ratio {m[f'val/{head}_loss_over_baseline']:.3f}"
                for head in ("main", "auxiliary")
            ),
        ]
        weights = f"encoder   {folder.path / folder.export_file}"
        return "\n".join([*lines, *_ending(config, summary, "reconstructions", weights)])
    lines = [
        "",
        f"held-out crops ({held_out}), error at hidden patches:",
        f"  MIM  model {m['val/loss_mim']:.5f}   "
        f"mean of each position {m['val/baseline_position_mean']:.5f}   "
        f"visible mean colour {m['val/baseline_visible_colour']:.5f}   ({unit})",
        f"       ratio to the better one {summary['mim_loss_over_baseline']:.3f}",
    ]
    if summary["mfm_loss_over_baseline"] is not None:
        for s in (4, 8, 16):
            lines.append(
                f"  MFM  stride {s:<2d}  model {m[f'val/loss_mfm{s}']:.4f}   mean feature "
                f"{m[f'val/baseline_mfm{s}']:.4f}   ratio {m[f'val/mfm{s}_loss_over_baseline']:.3f}"
            )
        lines.append(f"       all stages, ratio {summary['mfm_loss_over_baseline']:.3f}")
    size = m["val/stage16_abs_mean"]
    lines.append(f"features of stage 16 at visible patches: mean absolute value {size:.2f}")
    weights = f"encoder   {folder.path / folder.export_file}"
    return "\n".join([*lines, *_ending(config, summary, "reconstructions", weights)])


def final_finetune_report(config: FinetuneConfig, summary: dict[str, Any]) -> str:
    """The scores, where things are, how to open MLflow."""
    folder = RunFolder(config)
    metrics = summary["metrics"]
    scores = {k: v for k, v in metrics.items() if k.startswith("val/") and k != "val/num_samples"}
    shown = [f"  {key.removeprefix('val/'):20s}{value:8.2f}" for key, value in scores.items()]
    weights = f"model     {folder.path / folder.export_file}"
    return "\n".join(
        [
            "",
            f"{config.task} from {summary['init']}: {summary['metric']} = {summary['value']:.2f} "
            f"on {metrics['val/num_samples']:.0f} validation images",
            *shown,
            *_ending(config, summary, "predictions", weights),
        ]
    )


def _ending(config: TrainingConfig, summary: dict[str, Any], kind: str, weights: str) -> list[str]:
    """What the report of every run ends with."""
    folder = RunFolder(config)
    lines = []
    if summary["bad_samples"]:
        shown = ", ".join(summary["bad_samples"][:5])
        lines.append(f"bad samples, left out and listed in quarantine.parquet: {shown}")
    uri = tracking.tracking_uri(config.tracking.uri, folder.storage_path)
    pictures = sorted((folder.path / kind).glob("*.png"))
    return [
        *lines,
        f"{summary['steps']} steps in {summary['wall_s']:.0f} s, "
        f"{summary['images_per_s']:.1f} images/s, {summary['data_wait_frac']:.0%} waiting for data",
        f"picture   {pictures[-1] if pictures else 'none'}",
        weights,
        f"MLflow    {Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri}",
    ]


def print_table(table: Table) -> None:
    """Print a table, wide where there is no terminal to fit it into."""
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
