"""Exporting a trained model for those who do not train; see docs/export.md.

Surprising: the folder appears in one go. Everything is written and checked in a folder beside it,
so what fails, or is killed, leaves nothing that looks like an export; and `--overwrite` replaces
only what an export has made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from models.variants import get_variant
from pipeline.config import require_choice
from pipeline.exports import weight_files
from pipeline.exports.exportable import Exportable, load_exportable
from pipeline.exports.graphs import (
    ONNX_FILE,
    TORCH_FILE,
    check_has_graph,
    check_onnx_installed,
    export_program,
    write_onnx,
    write_torch,
)
from pipeline.exports.mlflow_folder import MLFLOW_FOLDER, write_mlflow
from pipeline.exports.model_card import NOT_STATED, model_card

Form = Literal["safetensors", "timm", "onnx", "torch", "mlflow"]
FORMS: tuple[Form, ...] = get_args(Form)
CARD_FILE, FACTS_FILE = "README.md", "export.json"
"""`export.json` is written last and marks a folder as an export."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """What to export, in which forms, and where to."""

    run: tyro.conf.Positional[str]
    """Folder of a run of pre-training or fine-tuning, a checkpoint of pre-training, or a weights
    file of an encoder."""
    to: str
    """New local folder."""
    format: Literal["safetensors", "timm", "onnx", "torch", "mlflow", "all"] = "safetensors"
    """Form; all: every one that the model allows."""
    part: Literal["", "backbone", "encoder", "full"] = ""
    """Of --format safetensors: the trunk, trunk and neck, or a whole fine-tuned model; empty: the
    largest there is."""
    model_name: str = ""
    """A variant of models/variants.py, for a weights file; empty: the one of the run."""
    image_size: int = 0
    """Side in pixels an encoder is exported for, a multiple of 16; 0: that of pre-training."""
    licence: str = ""
    """Of the weights, for the model card; depends on the data they were trained on."""
    overwrite: bool = False
    """Replace an earlier export."""

    def __post_init__(self) -> None:
        require_choice("format", self.format, (*FORMS, "all"))
        require_choice("part", self.part, ("", *get_args(weight_files.Part)))
        if self.model_name:
            get_variant(self.model_name)
        if self.part and self.format not in ("safetensors", "all"):
            raise ValueError(
                f"part={self.part} is for --format safetensors; --format {self.format} always "
                "holds all it needs, so leave --part out"
            )
        if not self.to.strip("/"):
            raise ValueError(f"to='{self.to}' is no folder to write; give --to FOLDER")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    to: Path
    written: dict[str, str]
    """Forms, each with what its check found."""
    left_out: dict[str, str]
    """Forms of --format all that the model does not allow, with the reason."""

    def report(self) -> str:
        """For the end of the job."""
        lines = [f"{form:12s}{found}" for form, found in self.written.items()]
        lines += [f"{form:12s}left out: {reason}" for form, reason in self.left_out.items()]
        return "\n".join([*lines, f"in {self.to}, described in {self.to / CARD_FILE}"])


def export(config: ExportConfig) -> Exported:
    """Export a model and write its card.

    Raises:
        ValueError: settings, a run, a target folder or a form that cannot be.
        FileNotFoundError: there is no such run.
        ExportFailedError: a form could not be made, or does not do what the model does.
    """
    target = Path(config.to).absolute()
    check_target(target, overwrite=config.overwrite)
    exportable = load_exportable(
        config.run, model_name=config.model_name, image_size=config.image_size
    )
    part = weight_files.part_of(exportable, config.part)
    forms, left_out = _possible(exportable, config.format)
    with replaced(target) as folder:
        written = _write(exportable, folder, forms, part, config.licence or NOT_STATED)
        card = model_card(
            exportable,
            written=written,
            weights_file=_weights_file(part),
            licence=config.licence,
        )
        (folder / CARD_FILE).write_text(card)
        facts = {
            "run": exportable.source,
            "model_name": exportable.model_name,
            "kind": exportable.kind,
            "image_size": exportable.image_size,
            "mean": exportable.mean,
            "std": exportable.std,
            "classes": exportable.classes,
            "licence": config.licence or NOT_STATED,
            "forms": written,
        }
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1))
    return Exported(target, written, left_out)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an export that may be replaced.

    Raises:
        ValueError: it may not be written.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / FACTS_FILE).is_file():
        raise ValueError(
            f"{target} exists and is no earlier export, so it is never replaced; give another --to"
        )
    if not overwrite:
        raise ValueError(f"{target} holds an earlier export; give another --to, or --overwrite")


def _possible(exportable: Exportable, wanted: str) -> tuple[list[Form], dict[str, str]]:
    """The forms to make, and of `all` those that cannot be, with the reason.

    Raises:
        ValueError: the one form that is wanted cannot be.
    """
    possible: list[Form] = []
    left_out: dict[str, str] = {}
    for form in FORMS:
        if wanted not in (form, "all"):
            continue
        try:
            _check_form(exportable, form)
        except ValueError as error:
            if wanted != "all":
                raise
            left_out[form] = str(error)
        else:
            possible.append(form)
    return possible, left_out


def _check_form(exportable: Exportable, form: Form) -> None:
    if form == "timm":
        weight_files.check_is_for_timm(exportable)
    elif form != "safetensors":
        check_has_graph(exportable, form)
        if form == "onnx":
            check_onnx_installed()


def _write(
    exportable: Exportable,
    folder: Path,
    forms: list[Form],
    part: weight_files.Part,
    licence: str,
) -> dict[str, str]:
    """Write the forms; what the check of each found."""
    written: dict[str, str] = {}
    program = None
    if "onnx" in forms or "torch" in forms:
        program = export_program(exportable)
    for form in forms:
        if form == "safetensors":
            weight_files.write_safetensors(
                exportable, part, folder / _weights_file(part), licence=licence
            )
            written[form] = f"{part}, read back bit for bit"
        elif form == "timm":
            weight_files.write_timm(exportable, folder / weight_files.TIMM_FOLDER, licence=licence)
            written[form] = "read back bit for bit"
        elif form == "mlflow":
            written[form] = write_mlflow(exportable, folder / MLFLOW_FOLDER)
        else:
            assert program is not None, "traced above"
            write, name = (write_onnx, ONNX_FILE) if form == "onnx" else (write_torch, TORCH_FILE)
            written[form] = write(program, exportable, folder / name)
    return written


def _weights_file(part: weight_files.Part) -> str:
    return "model.safetensors" if part == "full" else f"{part}.safetensors"


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A new folder beside the target that takes its place when the block is done, and not before.

    The target must be absent, empty or replaceable (`check_target`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.{os.getpid()}.part")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
