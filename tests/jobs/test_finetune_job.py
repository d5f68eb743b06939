"""`python -m jobs.finetune` as a user runs it: its command line, dry, and given bad input."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from jobs.finetune import main
from pipeline.finetune_config import Task
from pipeline.shards import Manifest
from pipeline.trainer import RunFailedError
from tests.pipeline.inference_runs import finetuned_run, pretrained_run
from tests.pipeline.labelled_sets import write_labelled_set

TASKS: tuple[Task, ...] = ("classify", "detect", "segment")


BAD_INPUT: dict[str, tuple[Task, str, str]] = {
    "init not given": ("classify", "--init=", r"--init is not given; .* say '--init scratch'"),
    "init missing": ("classify", "--init PLACES/none", r"--init '.*none' does not exist"),
    "init empty": ("classify", "--init PLACES/empty", r"empty' holds no encoder\.safetensors"),
    "init fine-tuned": (
        "classify",
        "--init PLACES/finetuned",
        r"is of a fine-tuning run; give the pre-training run",
    ),
    "init of no variant": (
        "classify",
        "--init PLACES/foreign.safetensors",
        r"model\.name is empty and .*foreign.* give --model\.name",
    ),
    "init of another variant": (
        "classify",
        "--model.name itpn_nano_patch16_224",
        r"model\.name='itpn_nano.*', but .*pretrained holds a itpn_debug; leave",
    ),
    "weights of another variant": (
        "detect",
        "--init PLACES/encoder.safetensors --model.name itpn_nano_patch16_224",
        r"keys do not fit ITPNDetector; .* it is of another variant \(embed_dim \d+, not \d+\)",
    ),
    "weights of nothing we know": (
        "segment",
        "--init PLACES/foreign.safetensors --model.name itpn_debug",
        r"foreign\.safetensors does not fit: .*ITPNSegmenter.*\n  unexpected key weight",
    ),
    "weights of no encoder": (
        "classify",
        "--init PLACES/headless.safetensors --model.name itpn_debug",
        r"no backbone weight .* among 1 tensors given; .* random weights:\nmatched +0 ",
    ),
    "weights for other classes": (
        "classify",
        "--init PLACES/classifier.safetensors --model.name itpn_debug "
        "--data.path PLACES/four/train --data.val-path PLACES/four/val",
        r"does not fit: .*\n  head\.bias: shape \(3,\) does not fit \(4,\)\n",
    ),
    "data missing": ("classify", "--data.path PLACES/none", r"data\.path='.*none' does not exist"),
    "validation data missing": (
        "segment",
        "--data.val-path PLACES/none",
        r"data\.val_path='.*none' does not exist",
    ),
    "data empty": (
        "classify",
        "--data.path PLACES/empty",
        r"data\.path='.*empty' holds no image among 0 files",
    ),
    "data broken": (
        "classify",
        "--data.path PLACES/broken/train",
        r"data\.path='.*broken/train': none of 12 probed samples can be used; first problem",
    ),
    "other classes": (
        "classify",
        "--data.val-path PLACES/others/val",
        r"only in data\.path: blue; only in data\.val_path: grey.* prepare both with the same",
    ),
    "fewer classes": (
        "classify",
        "--data.val-path PLACES/two/val",
        r"the 3 classes of data\.path and the 2 of data\.val_path differ",
    ),
    "no masks": (
        "segment",
        "--data.path PLACES/detect/train",
        r"data\.path='.*detect/train' has no mask, .* 'segment' needs; it has boxes, box_masks",
    ),
    "no labels": (
        "classify",
        "--data.val-path PLACES/segment/val",
        r"data\.val_path='.*segment/val' has no label, .* it has mask: prepare class folders",
    ),
    "no box masks": (
        "detect",
        "--data.path PLACES/boxes/train",
        r"has no box_masks, .* train without: --detector\.kind faster_rcnn",
    ),
}
"""What is wrong: task, arguments, what the error says."""


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/finetune.py", *arguments])
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        return main()
    finally:
        signal.signal(signal.SIGINT, handlers[0])
        signal.signal(signal.SIGTERM, handlers[1])


def with_manifest(folder: Path, **changes: Any) -> None:
    """Change what a labelled set says of itself."""
    filesystem = fs.LocalFileSystem()
    manifest = Manifest.read(filesystem, str(folder))
    assert manifest is not None
    dataclasses.replace(manifest, **changes).write(filesystem, str(folder))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of each task, sets that do not fit, and weights that do and do not."""
    root = tmp_path_factory.mktemp("places")
    for task in TASKS:
        write_labelled_set(root / task / "train", task)
        write_labelled_set(root / task / "val", task, num_samples=7, seed=1)
    write_labelled_set(root / "others" / "val", "classify")
    with_manifest(root / "others" / "val", classes=["red", "green", "grey"])
    write_labelled_set(root / "two" / "val", "classify")
    with_manifest(root / "two" / "val", classes=["red", "green"])
    for split in ("train", "val"):
        write_labelled_set(root / "four" / split, "classify")
        with_manifest(root / "four" / split, classes=["red", "green", "blue", "white"])
    write_labelled_set(root / "boxes" / "train", "detect")
    with_manifest(root / "boxes" / "train", annotations=["boxes"])
    write_labelled_set(root / "broken" / "train", "classify", num_bad=12)
    (root / "empty").mkdir()
    pretrained_run(root / "pretrained")
    finetuned_run(root / "finetuned", "classify")
    # Alone, files do not say what they are of.
    shutil.copy(root / "pretrained" / "encoder.safetensors", root)
    shutil.copy(root / "finetuned" / "model.safetensors", root / "classifier.safetensors")
    save_file({"weight": torch.zeros(2)}, root / "foreign.safetensors")
    save_file({"decoder.mask_token": torch.zeros(2)}, root / "headless.safetensors")
    return root


def command(places: Path, task: Task, storage: Path, *more: str) -> list[str]:
    """A command line that would train, were it not for `more`."""
    return [
        *(task, f"small-{task}", "--init", f"{places}/pretrained"),
        *("--data.path", f"{places}/{task}/train", "--data.val-path", f"{places}/{task}/val"),
        *("--run.storage-path", str(storage)),
        *(argument.replace("PLACES", str(places)) for argument in more),
    ]


@pytest.mark.parametrize(
    ("task", "loaded", "num_parameters", "settings"),
    [
        # Classification has no neck, as the official one.
        ("classify", r"matched +35 .*\n +resized +0.*\n +new +5 .*\n.* 40 +enc", 18_701, "augment"),
        ("detect", r"matched +75 .*\n +resized +0.*\n +new +48 .*\n.* 0 ", 308_463, "detector"),
        ("segment", r"matched +75 .*\n +resized +0.*\n +new +83 .*\n.* 0 ", 600_066, "segmenter"),
    ],
    ids=TASKS,
)
def test_dry_run_reports_weights_classes_and_memory_and_trains_nothing(
    task: Task,
    loaded: str,
    num_parameters: int,
    settings: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    storage = tmp_path / "runs"
    assert run_main(monkeypatch, *command(places, task, storage, "--dry-run")) == 0
    classes = "4 classes (background, red, green, blue)"
    for part in (
        f'"{settings}": {{',
        '"name": "itpn_debug"',  # as the pre-training run says
        classes if task == "segment" else "3 classes (red, green, blue)",
        "on 12 images",
        "7 validation images",
        f"weights   {places}/pretrained",
        f"model     {num_parameters:,} parameters, {num_parameters:,} trainable",
        "GiB a worker: weights, gradients, AdamW",
        "ms an image on one",
        f"{storage}/small-{task} is writable",
        "dry run: nothing was trained",
    ):
        assert part in caplog.text, part
    assert re.search(loaded, caplog.text), caplog.text
    assert not storage.exists()


@pytest.mark.parametrize(("task", "arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(
    task: Task,
    arguments: str,
    message: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    storage = tmp_path / "runs"
    before = sorted(places.rglob("*"))
    assert run_main(monkeypatch, *command(places, task, storage, *arguments.split())) == 1
    (error,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert re.match(rf"error: .*{message}", error.getMessage()), error.getMessage()
    assert error.exc_info is None and "Traceback" not in caplog.text
    assert not storage.exists() and sorted(places.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "small-clasify"], "unknown recipe 'small-clasify'; did you mean 'small-cl"),
        (["detect", "small-classify"], "Known: small-detect, base-coco-1x"),
        (["segment"], "usage: python -m jobs.finetune segment RECIPE"),
        (["classify", "small-classify", "--optm.lr", "1"], "--optim.lr"),
        (["classify", "small-classify", "--detector.kind", "mask_rcnn"], "--detector.kind"),
        (["classify", "small-classify", "--data.path", ""], "data.path is empty; give a prepared"),
        (
            ["segment", "small-segment", "--scaling.max-batch-size-per-worker", "1"],
            "micro-batches of 1 image are too small for the batch norm",
        ),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_way_out(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capfd
):
    with pytest.raises(SystemExit) as error:
        run_main(monkeypatch, *arguments)
    printed = capfd.readouterr()
    assert error.value.code == 2
    assert message in " ".join(printed.err.replace("│", " ").split())
    assert not printed.out


@pytest.mark.parametrize("arguments", [[], ["clasify"], ["small-classify"]])
def test_without_a_task_the_usage_names_all_of_them_and_the_status_is_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_main(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert "usage: python -m jobs.finetune classify|detect|segment RECIPE --init" in printed.err
    assert not printed.out


def test_help_is_no_error_at_any_depth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run_main(monkeypatch, "--help") == 0
    assert "classify|detect|segment" in capsys.readouterr().out
    shown = {"detect": "base-coco-3x", "detect small-detect": "--detector.min-sizes"}
    for arguments, part in shown.items():
        with pytest.raises(SystemExit) as leaving:
            run_main(monkeypatch, *arguments.split(), "--help")
        assert leaving.value.code == 0
        printed = capsys.readouterr()
        assert part in printed.out and not printed.err


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (RunFailedError("worker 0 is lost"), 1, "error: worker 0 is lost"),
        (KeyboardInterrupt(), 130, "the same command resumes the run"),
    ],
    ids=["failed", "interrupted"],
)
def test_a_run_that_fails_or_is_interrupted_says_so_in_one_line(
    raised: BaseException,
    status: int,
    said: str,
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def run(config: object) -> None:
        raise raised

    monkeypatch.setattr("jobs.finetune.run_finetuning", run)
    assert run_main(monkeypatch, *command(places, "classify", tmp_path)) == status
    (error,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert said in error.getMessage() and "Traceback" not in caplog.text
