"""Run folders as a run leaves them, written by hand: what the HTML report is tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.config_values import config_to_dict
from pipeline.finetune_recipes import small_classify
from pipeline.quarantine import BadSample, write_quarantine
from pipeline.recipes import demo

NASTY = '<script>alert("1")</script> & \'x\' "><img src=x onerror=alert(1)>'
"""What would run if it were not escaped."""


def pretrain_records(num_steps: int = 50, every: int = 10) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of a run that learns."""
    records = []
    for step in range(every, num_steps * every + 1, every):
        records.append(
            {
                "step": step,
                "time": 1_700_000_000.0 + step,
                "train/loss": 2.0 / step**0.2,
                "train/loss_mim": 1.0 / step**0.2,
                "train/loss_mfm4": 0.9 / step**0.3,
                "train/loss_mfm8": 0.8 / step**0.3,
                "train/loss_mfm16": 0.7 / step**0.4,
                "train/grad_norm": 1.0 + step % 7,
                "train/epoch": step / 10,
                "train/skipped_steps": 0.0,
                "optim/lr": 5e-4 * (1 - step / (num_steps * every + 1)),
                "perf/images_per_s": 100.0 + step % 30,
                "perf/data_wait_frac": 0.0123,
                "perf/step_s": 0.1,
                "memory/peak_gib": 1.5,
                "scaling/num_workers": 2.0,
            }
        )
    for record in records[num_steps // 2 - 1 :: max(1, num_steps // 2)]:
        record |= {
            "val/loss_mim": 0.02,
            "val/mim_loss_over_baseline": 0.7157544874692334,
            "val/mfm_loss_over_baseline": 0.30141360417731766,
            "val/stage16_abs_mean": 1.6154696989059447,
        }
    return records


def write_run(folder: Path, *, nasty: bool = False) -> Path:
    """A finished pre-training run that was resumed once after a crash; returns the folder."""
    odd = NASTY if nasty else "plain"
    folder.mkdir(parents=True)
    config = config_to_dict(demo())
    config["run"]["name"] = odd if nasty else "my-run"
    config["data"]["path"] = f"/data/{odd}"
    config["optim"]["lr"] = 1e-3
    write_json(folder / "config.json", config)
    write_lines(folder / "metrics.jsonl", pretrain_records())
    write_json(
        folder / "summary.json",
        {"run": odd, "steps": 500, "wall_s": 81.5, "images_per_s": 131.41, "data_wait_frac": 0.011},
    )
    write_json(folder / "environment.json", {"torch": "2.6.0", "host": odd})
    write_json(folder / "classes.json", {"classes": ["cat", odd]})
    start = 1_700_000_000.0
    events: list[dict[str, Any]] = [
        {"event": "submit", "time": start, "num_workers": 2},
        {"event": "start", "time": start + 10, "num_workers": 2},
        {"event": "resume", "time": start + 11, "step": 0, "lost_steps": 0, "num_workers": 2},
        {"event": "checkpoint", "time": start + 100, "step": 150, "save_s": 0.1, "bytes": 18409279},
        {"event": "checkpoint_failed", "time": start + 150, "step": 200, "error": odd},
        {"event": "crash", "time": start + 200, "rank": 1, "error": f"ValueError: {odd}"},
        {"event": "start", "time": start + 210, "num_workers": 2},
        {"event": "resume", "time": start + 211, "step": 150, "lost_steps": 70, "num_workers": 2},
        {"event": "checkpoint", "time": start + 400, "step": 500, "save_s": 0.1, "bytes": 18409279},
        {"event": "end", "time": start + 401, "status": "FINISHED"},
    ]
    write_lines(folder / "events.jsonl", events)
    bad = BadSample(f"/data/{odd}.jpg", 7, "UnidentifiedImageError", f"cannot identify {odd}")
    write_quarantine(str(folder / "quarantine.parquet"), [bad])
    for step in (250, 500):
        write_picture(folder / "reconstructions" / f"step_{step:08d}.png")
    return folder


def write_finetuned_run(folder: Path) -> Path:
    """A finished classification run; returns the folder."""
    folder.mkdir(parents=True)
    config = config_to_dict(small_classify())
    config["init"]["path"] = "runs/demo"
    write_json(folder / "config.json", config)
    records = [
        {"step": step, "time": 1e9 + step, "train/loss": 2.0 - step / 100, "val/top1": step / 3}
        for step in (100, 150)
    ]
    write_lines(folder / "metrics.jsonl", records)
    summary = {
        "run": "small-classify",
        "task": "classify",
        "init": "runs/demo",
        "images_per_s": 9.0,
    }
    write_json(folder / "summary.json", summary)
    write_picture(folder / "confusion" / "step_00000150.png", size=(300, 300))
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file."""
    path.write_text(json.dumps(content))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_picture(
    path: Path, size: tuple[int, int] = (400, 640), *, is_noise: bool = False
) -> None:
    """A PNG; of noise where it is not to get smaller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = (
        Image.effect_noise(size, 90).convert("RGB") if is_noise else Image.radial_gradient("L")
    )
    picture.resize(size).convert("RGB").save(path)
