"""The last lines of a preparation: what was written, what was left out, what to run next."""

from __future__ import annotations

from collections import Counter

from pipeline.prepare.job import Prepared
from pipeline.prepare.plan_folder import PlanFolder
from pipeline.prepare.settings import PrepareConfig
from pipeline.shards import BAD_SAMPLES_FILE, Manifest


def prepare_report(config: PrepareConfig, prepared: Prepared) -> str:
    """Lines for the user."""
    out = PlanFolder(config.out).uri
    lines = [_split_line(out, *item) for item in prepared.manifests.items()]
    for split, manifest in prepared.manifests.items():
        if manifest.preparation["num_bad"]:
            lines.append(
                f"left out of {split}: {manifest.preparation['num_bad']} bad samples, listed in "
                f"{out}/{split}/{BAD_SAMPLES_FILE}"
            )
    lines += [f"  {sample}" for sample in sorted(prepared.bad)[:3]]
    counts: Counter[str] = Counter()
    for manifest in prepared.manifests.values():
        counts.update(manifest.preparation["counts"])
    lines += [f"{name.replace('_', ' ')}: {count}" for name, count in sorted(counts.items())]
    if prepared.was_finished:
        lines.append("already prepared with these settings; nothing was done")
    else:
        lines.append(f"done in {prepared.wall_s:.0f} s")
    return "\n".join([*lines, f"train on it: {_next_command(config, out)}"])


def _split_line(out: str, split: str, manifest: Manifest) -> str:
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    columns = f" ({', '.join(manifest.annotations)})" if manifest.annotations else ""
    return (
        f"{split}: {manifest.num_samples} samples{classes}{columns}, "
        f"{manifest.num_bytes / 1e6:,.1f} MB in {len(manifest.shards)} shards, {out}/{split}"
    )


def _next_command(config: PrepareConfig, out: str) -> str:
    name = out.rsplit("/", 1)[-1] or "run-1"
    command = f"python -m jobs.pretrain pixel-base-in1k --data.path {out}/{config.split_name}"
    val = f" --data.val-path {out}/val" if config.val_fraction else ""
    return f"{command}{val} --run.name {name}"
