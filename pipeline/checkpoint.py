"""Checkpoints: one folder a step, written whole or not at all, holding tensors and plain data only.

Layout: `checkpoints/step_00000300/` with `state.pt` (student, teacher, optimiser, step, RNG),
`encoder.safetensors` (backbone + neck, for downstream use; a fine-tuning run: `model.safetensors`)
and `manifest.json` (sizes and sha256 of the other two, written last). A folder whose files do not
match its manifest is passed over, with a warning. Surprising: `save` only copies the tensors; a
thread writes them while training goes on, so a checkpoint is there a little after `save` returned,
and `finished` tells how it went.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyarrow import fs
from safetensors.torch import save_file
from torch import Tensor

from pipeline import storage

logger = logging.getLogger(__name__)
ENCODER_FILE = "encoder.safetensors"
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"


class Saved(NamedTuple):
    """How writing a checkpoint ended."""

    step: int
    save_s: float
    """Seconds the writing took, beside training."""
    stall_s: float
    """Seconds training stood still for it: waiting for the one before, copying tensors."""
    num_bytes: int
    error: str | None
    """None when the checkpoint is there, whole."""


class Checkpointer:
    """Writes, finds and prunes the checkpoints of one run.

    Args:
        location: folder of the step folders: a local path or a URI of a pyarrow file system;
            created when the first one is written.
        keep: newest checkpoints kept.
        keep_every_steps: checkpoints of multiples of this step are kept for good; 0: none.
        facts: strings stored in the manifest and in the safetensors header (model, config hash,
            ...).
        export_file: name of the file of weights to go on with.
        warn: told of damaged checkpoints that are passed over, and of old ones that stay.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        keep: int,
        keep_every_steps: int = 0,
        facts: dict[str, str],
        warn: Callable[[str], None] = logger.warning,
        export_file: str = ENCODER_FILE,
    ) -> None:
        self.location = str(location)
        self.keep = keep
        self.keep_every_steps = keep_every_steps
        self.facts = facts
        self._warn = warn
        self._files = (STATE_FILE, export_file)
        self._filesystem, self._root = storage.resolve(self.location)
        self._is_local = storage.is_local(self._filesystem)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Saved] | None = None
        self._finished: list[Saved] = []
        self._downloads: tempfile.TemporaryDirectory[str] | None = None

    def save(self, step: int, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Copy the state and have it written; first waits for the one before.

        Args:
            step: optimiser steps done.
            state: nested dicts and lists of tensors, numbers and strings.
            weights: those to go on with: the state dict of the encoder, or of a fine-tuned model.
        """
        started = time.monotonic()
        self.wait()
        copies: dict[Any, Tensor] = {}  # most of the weights are in the state, too
        state, weights = _snapshot(state, copies), _snapshot(weights, copies)
        stall_s = time.monotonic() - started
        self._pending = self._writer.submit(self._write, step, state, weights, stall_s)

    def wait(self) -> None:
        """Wait until the checkpoint being written is done."""
        if self._pending is not None:
            self._finished.append(self._pending.result())
            self._pending = None

    def finished(self) -> list[Saved]:
        """How the checkpoints ended that were done since the last call; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()
        finished, self._finished = self._finished, []
        return finished

    def latest(self) -> Path | None:
        """Newest checkpoint whose files match its manifest, or None.

        Of a remote location a local copy, which lives as long as this object.
        """
        if self._is_local:
            self._put_back_replaced()
        for step in reversed(self._steps()):
            try:
                folder = self.fetch(step)
                problem = problem_of(folder)
            except FileNotFoundError as error:
                problem = f"{type(error).__name__}: {error}"
            if problem is None:
                return folder
            self._warn(f"checkpoint {self.location}/{_name(step)} is passed over: {problem}")
        return None

    def fetch(self, step: int) -> Path:
        """Local folder of a checkpoint; copies it from a remote location. Does not check it."""
        remote = f"{self._root}/{_name(step)}"
        if self._is_local:
            return Path(remote)
        if self._downloads is None:
            self._downloads = tempfile.TemporaryDirectory(prefix="itpn-checkpoints-")
        local = Path(self._downloads.name) / _name(step)
        local.mkdir(exist_ok=True)
        for name in (MANIFEST_FILE, *self._files):
            storage.download(self._filesystem, f"{remote}/{name}", local / name)
        return local

    def _write(
        self, step: int, state: dict[str, Any], weights: dict[str, Tensor], stall_s: float
    ) -> Saved:
        """In the writing thread."""
        started, num_bytes, problem = time.monotonic(), 0, None
        try:
            if self._is_local:
                num_bytes = self._write_local(step, state, weights)
            else:
                num_bytes = self._upload(step, state, weights)
        except Exception as error:  # torch reports a full disk as a RuntimeError
            problem = _one_line(error)
            logger.warning("the checkpoint of step %d was not written: %s", step, problem)
        else:
            self._prune_or_warn(step)
        return Saved(step, time.monotonic() - started, stall_s, num_bytes, problem)

    def _write_local(self, step: int, state: dict[str, Any], weights: dict[str, Tensor]) -> int:
        root = Path(self._root)
        final, partial = root / _name(step), root / f".partial_{step:08d}"
        self._put_back_replaced()
        for leftover in root.glob(".partial_*"):  # of a killed writer, maybe at another step
            shutil.rmtree(leftover, ignore_errors=True)
        replaced = root / f".replaced_{step:08d}"
        try:
            partial.mkdir(parents=True)
            num_bytes = self._fill(partial, step, state, weights)
            if final.exists():
                os.replace(final, replaced)
            os.replace(partial, final)
            _sync(root)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
            self._put_back_replaced()
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        return num_bytes

    def _put_back_replaced(self) -> None:
        """Undo a replacement that was cut off between moving the old one away and the new one in.

        Otherwise a kill at that moment would leave the run without this step.
        """
        for replaced in Path(self._root).glob(".replaced_*"):
            final = replaced.with_name(_name(int(replaced.name.removeprefix(".replaced_"))))
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # another process was faster
                    os.replace(replaced, final)

    def _upload(self, step: int, state: dict[str, Any], weights: dict[str, Tensor]) -> int:
        remote = f"{self._root}/{_name(step)}"
        with tempfile.TemporaryDirectory(prefix="itpn-checkpoint-") as local:
            num_bytes = self._fill(Path(local), step, state, weights)
            self._remove(step)
            try:
                for name in (*self._files, MANIFEST_FILE):  # which makes the others valid
                    storage.upload(self._filesystem, f"{remote}/{name}", Path(local) / name)
            except Exception:
                with contextlib.suppress(Exception):  # the store may be gone altogether
                    self._remove(step)
                raise
        return num_bytes

    def _fill(
        self, folder: Path, step: int, state: dict[str, Any], weights: dict[str, Tensor]
    ) -> int:
        """Write the files of a checkpoint, down to the disk; returns their bytes."""
        facts = {**self.facts, "step": str(step)}
        torch.save(state, folder / STATE_FILE)
        save_file(weights, folder / self._files[1], metadata=facts)
        files = {name: _fingerprint(folder / name) for name in self._files}
        manifest = {"step": step, "facts": facts, "files": files}
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
        for name in (*self._files, MANIFEST_FILE, "."):
            _sync(folder / name)
        return sum(file["bytes"] for file in files.values())

    def _prune_or_warn(self, written: int) -> None:
        """The new checkpoint counts, also where old ones may not be deleted."""
        try:
            self._prune(written)
        except Exception as error:
            self._warn(f"old checkpoints in {self.location} stay: {_one_line(error)}")

    def _prune(self, written: int) -> None:
        steps = self._steps()
        # Later steps are of a future this run did not take (it fell back to an older checkpoint).
        future = [step for step in steps if step > written]
        every = self.keep_every_steps
        passing = [s for s in steps if s <= written and not (every and s % every == 0)]
        newest = [s for s in steps if s <= written][-self.keep :]
        for step in (*future, *(s for s in passing if s not in newest)):
            self._remove(step)

    def _remove(self, step: int) -> None:
        if self._is_local:
            shutil.rmtree(Path(self._root) / _name(step), ignore_errors=True)
            return
        folder = f"{self._root}/{_name(step)}"
        # First: without it nothing else counts.
        storage.delete_file(self._filesystem, f"{folder}/{MANIFEST_FILE}")
        storage.delete_folder(self._filesystem, folder)

    def _steps(self) -> list[int]:
        """Steps of the folders there are, oldest first."""
        found = storage.list_folder(self._filesystem, self._root)
        names = [info.base_name for info in found if info.type == fs.FileType.Directory]
        return sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdigit())


def step_of(folder: Path) -> int:
    """Step of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def load_state(folder: Path) -> dict[str, Any]:
    """Training state of a checkpoint, on the CPU; never unpickles code."""
    state: dict[str, Any] = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    return state


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _snapshot(value: Any, copies: dict[Any, Tensor]) -> Any:
    """A copy that training does not touch; what shares memory is copied once."""
    if isinstance(value, Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0 or key not in copies:
            copies[key] = value.detach().to("cpu", copy=True).contiguous()
        return copies[key]
    if isinstance(value, dict):
        return {key: _snapshot(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_snapshot(item, copies) for item in value)
    return value


def _one_line(error: Exception) -> str:
    """Class and first line of an error; some, such as MemoryError, have no text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _sync(path: Path) -> None:
    """Have a file's or a folder's content reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def problem_of(folder: Path) -> str | None:
    """Why the files of a checkpoint do not match its manifest, or None."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text())
        for name, expected in manifest["files"].items():
            found = _fingerprint(folder / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, not the {expected['bytes']} written"
            if found != expected:
                return f"{name} has changed since it was written (sha256)"
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILE} is damaged: {type(error).__name__}: {error}"
    return None
