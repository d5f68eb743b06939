"""No file that somebody else wrote is unpickled or evaluated: in the source, and at every door.

A door is a command line that takes weights, a run or a checkpoint. docs/security.md lists them.
"""

from __future__ import annotations

import ast
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import STATE_FILE
from tests.conftest import REPO_ROOT
from tests.pipeline import inference_runs

ROOMS = ("models", "pipeline", "jobs", "docker", "benchmarks")
SOURCES = sorted(path for room in ROOMS for path in (REPO_ROOT / room).rglob("*.py"))
# Where tensors are read that torch wrote; both with weights_only=True.
TORCH_READERS = {"models/weights.py", "pipeline/checkpoint.py"}
NEVER = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "ray.cloudpickle.load", "ray.cloudpickle.loads"),
    *("joblib.load", "marshal.load", "marshal.loads", "shelve.open", "pandas.read_pickle"),
    *("pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "yaml.load", "yaml.load_all"),
    *("torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package"),
    *("mlflow.pyfunc.load_model", "mlflow.pytorch.load_model", "mlflow.sklearn.load_model"),
}
# What the export has just written is loaded again, by MLflow, to compare it with the model.
OWN_FILES = {("pipeline/exports/mlflow_folder.py", "mlflow.pyfunc.load_model")}
# Keyword arguments that must have this value, or must not.
MUST = {"torch.load": ("weights_only", True)}
MUST_NOT = (("allow_pickle", True), ("shell", True), ("trust_remote_code", True))


def dotted(node: ast.expr) -> str:
    """a.b.c of an expression, or ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (parent := dotted(node.value)):
        return f"{parent}.{node.attr}"
    return ""


def full_names(tree: ast.AST) -> dict[str, str]:
    """What imports call things here: {'load': 'pickle.load', 'pkl': 'pickle'}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def dangers(source: str) -> list[str]:
    """Calls that could run what a file says."""
    tree = ast.parse(source)
    names, found = full_names(tree), []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, _, rest = dotted(call.func).partition(".")
        name = ".".join(part for part in (names.get(first, first), rest) if part)
        given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if name in NEVER:
            found.append(f"line {call.lineno}: {name}")
        if name in MUST and given.get(MUST[name][0]) is not MUST[name][1]:
            found.append(f"line {call.lineno}: {name} without {MUST[name][0]}={MUST[name][1]}")
        found += [
            f"line {call.lineno}: {key}={bad}" for key, bad in MUST_NOT if given.get(key) is bad
        ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO_ROOT)))
def test_nothing_in_a_file_is_unpickled_or_evaluated(path: Path):
    name = str(path.relative_to(REPO_ROOT))
    found = [danger.partition(": ")[2] for danger in dangers(path.read_text())]
    assert sorted(found) == sorted(call for file, call in OWN_FILES if file == name)


@pytest.mark.parametrize(
    "planted",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=careful)",
        "from torch import load as read\nread(path)",
        "pickle.loads(content)",
        "import pickle as p\np.load(file)",
        "from pickle import load\nload(file)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "mlflow.pytorch.load_model(uri)",
    ],
)
def test_a_planted_danger_is_found(planted: str):
    assert len(dangers(planted)) == 1


def test_harmless_calls_are_not_dangers():
    source = "model.eval()\ntorch.load(p, weights_only=True)\nnp.load(p)\nyaml.safe_load(t)"
    assert dangers(f"{source}\nre.compile(t)\njson.load(f)\nsafetensors.torch.load(b)") == []


def test_there_are_two_readers_of_torch_files_and_no_third():
    rooms = (REPO_ROOT / room for room in ("models", "pipeline", "jobs"))
    files = [path for room in rooms for path in room.rglob("*.py")]
    readers = {str(f.relative_to(REPO_ROOT)) for f in files if "torch.load(" in f.read_text()}
    assert readers == TORCH_READERS


# ---- at the doors ----


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def malice(tmp_path: Path) -> tuple[Path, Path]:
    """A weights file as sent by an enemy, and what its code would leave behind."""
    file, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"model": {"weight": torch.ones(1)}, "args": Malicious(trace)}, file)
    torch.load(file, weights_only=False)
    trace.rmdir()  # so it is as bad as it is meant to be
    return file, trace


DEBUG = ("--data.path", "{images}", "--run.storage-path", "{runs}", "--dry-run")
TEACHER = ("--objective.teacher", "timm/vit_tiny_patch16_224", "--objective.teacher-weights")
DOORS = {
    "pretrain --init": ("pretrain", "debug", *DEBUG, "--init", "{evil}"),
    "pretrain --objective.teacher": ("pretrain", "debug", *DEBUG, "--objective.teacher", "{evil}"),
    "pretrain --objective.teacher-weights": ("pretrain", "debug", *DEBUG, *TEACHER, "{evil}"),
    "finetune --init": ("finetune", "classify", "small-classify", *DEBUG, "--init", "{evil}"),
    "embed": ("embed", "{evil}", "--model-name", "itpn_debug", "--images", "{images}"),
    "evaluate": ("evaluate", "{evil}", "--train-data", "{images}", "--data", "{images}"),
    "export": ("export", "{evil}", "--model-name", "itpn_debug", "--to", "{out}"),
    "convert_weights": ("convert_weights", "{evil}", "--to", "{out}"),
    "replay": ("replay", "{dump}"),
    "predict": ("predict", "{finetuned}", "--images", "{images}", "--out", "{out}"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_malicious_file_is_refused_and_its_code_does_not_run(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    image_folder: Path,
    malice: tuple[Path, Path],
    tmp_path: Path,
    door: str,
):
    evil, trace = malice
    finetuned = inference_runs.finetuned_run(tmp_path / "runs" / "classes", "classify")
    (finetuned / "model.safetensors").write_bytes(evil.read_bytes())
    dump = tmp_path / "runs" / "debug" / "nonfinite" / "step_00000001"
    dump.mkdir(parents=True)
    (dump / STATE_FILE).write_bytes(evil.read_bytes())
    words = {"evil": evil, "images": image_folder, "runs": tmp_path / "new", "dump": dump}
    words |= {"finetuned": finetuned, "out": tmp_path / "out"}
    job, *arguments = (part.format(**words) for part in DOORS[door])
    if job == "embed":
        arguments += ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
    assert import_module(f"jobs.{job}").main() == 1
    assert not trace.exists(), "its code has run"
    message = caplog.records[-1].getMessage()
    assert "evil.pth" in message or "classes" in message or "step_00000001" in message, message
