"""What to run next: commands that fit what the run is and how it ended."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pipeline import tracking
from pipeline.credentials import without_passwords
from pipeline.html_report.contents import RunContents
from pipeline.html_report.settings import Recipe, start_command


@dataclass(frozen=True)
class Step:
    """A command and what it is for."""

    purpose: str
    command: str


def next_steps(run: RunContents, recipe: Recipe | None) -> list[Step]:
    """Commands in the order in which one would want them, without passwords."""
    steps = []
    if run.status != "FINISHED" and recipe is not None:
        steps.append(Step("Go on from the newest checkpoint", start_command(run, recipe)))
    path = shlex.quote(_short(run.path))
    if run.status == "FINISHED" and run.kind == "pretrain":
        steps += [
            Step(
                "Fine-tune backbone and neck on your labels",
                f"python -m jobs.finetune classify small-classify --init {path} "
                "--data.path DIR/train --data.val-path DIR/val --run.name NAME",
            ),
            Step(
                "Embed images and see what the encoder finds alike",
                f"python -m jobs.embed {path} --images DIR --out embeddings",
            ),
        ]
    elif run.status == "FINISHED" and run.kind != "unknown":
        val_path = run.section("data").get("val_path") or "DIR"
        steps += [
            Step("Predict images", f"python -m jobs.predict {path} --images DIR --out predictions"),
            Step(
                "Score it again, or on other data",
                f"python -m jobs.evaluate {path} --data {shlex.quote(str(val_path))} --out scores",
            ),
        ]
    if run.status == "FINISHED":
        steps.append(
            Step(
                "Export weights, ONNX or an MLflow model",
                f"python -m jobs.export {path} --to exported --format all",
            )
        )
    dumps = sorted((run.path / "nonfinite").glob("step_*"))
    if dumps:
        dump = shlex.quote(_short(dumps[-1]))
        steps.append(Step("Find the samples at fault", f"python -m jobs.replay {dump}"))
    steps += [_browse(run), Step("Write this page again", f"python -m jobs.report {path}")]
    return [Step(step.purpose, without_passwords(step.command)) for step in steps]


def _browse(run: RunContents) -> Step:
    uri = run.section("tracking").get("uri") or tracking.default_tracking_uri(run.path.parent)
    uri = str(uri)
    if uri.startswith("http"):
        return Step("Open MLflow in a browser", uri)
    command = f"python -m mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return Step("Browse runs in MLflow", command)


def _short(path: Path) -> str:
    """Relative to where we are, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
