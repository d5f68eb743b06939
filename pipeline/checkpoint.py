"""Checkpoints: one folder a step, written whole or not at all, holding tensors and plain data only.

Layout: `checkpoints/step_00000300/` with `state.pt` (student, teacher, optimiser, step, RNG),
`encoder.safetensors` (backbone + neck, for downstream use) and `manifest.json` (sizes and sha256 of
the other two). A folder whose files do not match its manifest is passed over, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)
ENCODER_FILE = "encoder.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"


class Checkpointer:
    """Writes, finds and prunes the checkpoints of one run.

    Args:
        folder: where the step folders live; created when the first one is written.
        keep: newest checkpoints kept.
        facts: strings stored in the manifest and in the safetensors header (model, config hash,
        ...).
    """

    def __init__(self, folder: Path, *, keep: int, facts: dict[str, str]) -> None:
        self.folder = folder
        self.keep = keep
        self.facts = facts

    def save(self, step: int, state: dict[str, Any], encoder: dict[str, Tensor]) -> Path:
        """Write the checkpoint of a step atomically and prune old ones.

        Args:
            step: optimiser steps done.
            state: nested dicts and lists of tensors, numbers and strings.
            encoder: state dict of the encoder alone.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".partial_{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        torch.save(state, partial / STATE_FILE)
        facts = {**self.facts, "step": str(step)}
        tensors = {key: t.detach().cpu().contiguous() for key, t in encoder.items()}
        save_file(tensors, partial / ENCODER_FILE, metadata=facts)
        files = {name: _fingerprint(partial / name) for name in (STATE_FILE, ENCODER_FILE)}
        manifest = {"step": step, "facts": facts, "files": files}
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        folders = self._step_folders()
        written = folders.index(final)
        # Later steps are of a future this run did not take (it fell back to an older checkpoint).
        for stale in (*folders[: max(0, written + 1 - self.keep)], *folders[written + 1 :]):
            shutil.rmtree(stale, ignore_errors=True)
        return final

    def latest(self) -> Path | None:
        """Newest checkpoint whose files match its manifest, or None."""
        for folder in reversed(self._step_folders()):
            problem = _problem(folder)
            if problem is None:
                return folder
            logger.warning("checkpoint %s is passed over: %s", folder, problem)
        return None

    def _step_folders(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"))


def load_state(folder: Path) -> dict[str, Any]:
    """Training state of a checkpoint, on the CPU; never unpickles code."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _problem(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        for name, expected in manifest["files"].items():
            found = _fingerprint(folder / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, not the {expected['bytes']} written"
            if found != expected:
                return f"{name} has changed since it was written (sha256)"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None
