"""Scoring fine-tuned runs and probing pre-trained ones: the figures, the files, the refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.itpn import ITPN
from pipeline.cluster import joined_cluster
from pipeline.data import made_ahead
from pipeline.downstream.finetuned import load_finetuned
from pipeline.downstream.probes import knn_predict, linear_probe
from pipeline.evaluate import evaluate_task
from pipeline.evaluation_data import share_of
from pipeline.evaluation_run import VALIDATION, EvaluateConfig, evaluate_run
from pipeline.finetune_config import ClassifyConfig, Task
from pipeline.frozen_features import LabelledFeatures, embed, probe_config
from pipeline.quarantine import TooManyBadSamplesError
from pipeline.shards import SHARD_SCHEMA
from pipeline.sources import build_index
from tests.pipeline.inference_runs import finetuned_run, pretrained_run
from tests.pipeline.labelled_sets import write_labelled_set

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS: tuple[Task, ...] = ("classify", "detect", "segment")
CPU = torch.device("cpu")
# The set of segmentation counts the ground as a class, which the tiny run does not know.
REDUCED = {"segment": {"segmenter.reduce_zero_label": True}}
NUM_VAL = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation set of each task, and train/ for probes."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_labelled_set(folder / task, task, num_samples=NUM_VAL, seed=1)
    write_labelled_set(folder / "train", "classify", num_samples=24)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each task, and one of pre-training."""
    root = tmp_path_factory.mktemp("runs")
    found = {task: finetuned_run(root / task, task, REDUCED.get(task)) for task in TASKS}
    return {**found, "pretrain": pretrained_run(root / "pretrain")[0]}


def evaluated(run: object, **settings: Any) -> dict[str, float]:
    given = {key: value if type(value) is int else str(value) for key, value in settings.items()}
    return evaluate_run(EvaluateConfig(run=str(run), **given))


def by_hand(run: Path, data: Path, size: int = 2) -> dict[str, float]:
    """Metrics of `evaluate_task` on micro-batches of another size."""
    finetuned = load_finetuned(run)
    maker = VALIDATION(finetuned.config, build_index(str(data)))
    batches = made_ahead(maker, share_of(maker, size))
    return evaluate_task(finetuned.task, finetuned.model, batches)[0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_fine_tuned_run_gets_the_scores_of_its_task(
    task: Task, batch_size: int, runs: dict[str, Path], data: Path
) -> None:
    """At any batch size, also one that training would refuse."""
    expected = by_hand(runs[task], data / task)
    found = evaluated(runs[task], data=data / task, batch_size=batch_size)
    assert found.keys() == expected.keys() and found["val/num_samples"] == NUM_VAL
    for key, value in expected.items():
        # Logits of another batch size differ in the last bits.
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_without_data_the_validation_set_of_the_run_is_taken(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run = finetuned_run(tmp_path / "run", "classify", {"data.val_path": str(data / "classify")})
    assert evaluated(run) == evaluated(runs["classify"], data=data / "classify")
    with pytest.raises(FileNotFoundError, match="data='val' does not exist"):
        evaluated(runs["classify"])


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_scores_and_pictures_are_written_where_asked(
    task: Task, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    metrics = evaluated(runs[task], data=data / task, out=out)
    assert json.loads((out / "scores.json").read_text()) == metrics
    pictures = {path.stem for path in out.glob("*.png")}
    finetuned = load_finetuned(runs[task])
    maker = VALIDATION(finetuned.config, build_index(str(data / task)))
    (whole,) = made_ahead(maker, share_of(maker, 32))
    _, scores = evaluate_task(finetuned.task, finetuned.model, [whole])
    expected = finetuned.task.pictures(finetuned.model, whole, CPU, scores)
    assert "predictions" in pictures and pictures == set(expected)
    for name, png in expected.items():
        assert (out / f"{name}.png").read_bytes() == png, name
    assert len(list(out.iterdir())) == 1 + len(expected)


def test_bad_samples_are_left_out_up_to_the_limit_of_the_run(tmp_path: Path) -> None:
    broken = write_labelled_set(tmp_path / "val", "classify", num_samples=9, num_bad=2)
    lenient = finetuned_run(tmp_path / "lenient", "classify", {"data.max_bad_fraction": 0.5})
    found = evaluated(lenient, data=broken)
    assert (found["val/num_samples"], found["val/bad_samples"]) == (7, 2)
    strict = finetuned_run(tmp_path / "strict", "classify")
    with pytest.raises(TooManyBadSamplesError, match="2 of 9"):
        evaluated(strict, data=broken, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_classes_than_those_of_the_run_are_refused(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["classify"], run)
    facts = json.loads((run / "classes.json").read_text())
    (run / "classes.json").write_text(json.dumps({**facts, "classes": ["green", "red", "blue"]}))
    with pytest.raises(
        ValueError, match=r"has the classes red, green, blue, \.\.\., the run green, red, blue"
    ):
        evaluated(run, data=data / "classify")


def test_a_split_without_the_last_classes_may_list_fewer(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    labels = [0, 1, 1, 0, 1]
    found = []
    for name, classes in (("all", ["red", "green", "blue"]), ("fewer", ["red", "green"])):
        folder = relabelled(tmp_path / name, labels)
        facts = json.loads((folder / "_manifest.json").read_text())
        (folder / "_manifest.json").write_text(json.dumps({**facts, "classes": classes}))
        found.append(evaluated(runs["classify"], data=folder))
    assert found[0] == found[1] and found[0]["val/num_samples"] == 5


def test_products_go_the_way_they_go_in_training(runs: dict[str, Path], data: Path) -> None:
    paths = {"train_data": data / "train", "data": data / "classify"}
    with mock.patch("pipeline.evaluation_run.use_onednn") as use_onednn:
        evaluated(runs["classify"], data=data / "classify")
        use_onednn.assert_called_once_with()
        evaluated(runs["pretrain"], **paths)
        assert use_onednn.call_count == 2


def test_data_of_another_task_are_refused(runs: dict[str, Path], data: Path) -> None:
    with pytest.raises(ValueError, match="has no boxes and no box_masks, which task 'detect'"):
        evaluated(runs["detect"], data=data / "classify")


def test_probes_tell_colours_apart_and_find_out_wrong_labels(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Colours are plain to see even for random weights; labels of the next class are all wrong."""
    paths = {"train_data": data / "train", "data": data / "classify"}
    found = evaluated(runs["pretrain"], **paths, out=tmp_path / "out")
    assert found == {"val/knn_top1": 100.0, "val/linear_top1": 100.0, "val/num_samples": NUM_VAL}
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == found
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.json"]
    shifted = relabelled(tmp_path / "shifted", [(i + 1) % 3 for i in range(NUM_VAL)])
    wrong = evaluated(runs["pretrain"], train_data=data / "train", data=shifted)
    assert (wrong["val/knn_top1"], wrong["val/linear_top1"]) == (0.0, 0.0)


def test_probes_are_those_of_the_features_of_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """Labels are drawn, so the figures lie in between, and change with the neighbours asked."""
    generator = np.random.default_rng(7)
    train, val = (
        relabelled(tmp_path / name, generator.integers(0, 3, size).tolist())
        for name, size in (("train", 24), ("val", 30))
    )
    encoder = pretrained_run(tmp_path / "same")[1]
    from_train, from_val = (features(encoder, folder) for folder in (train, val))
    linear = linear_probe(*from_train, *from_val)
    accuracies = set()
    for k in (1, 5, 20):
        found = evaluated(runs["pretrain"], train_data=train, data=val, knn_k=k, batch_size=7)
        votes = knn_predict(*from_train, from_val.features, num_classes=3, k=k)
        knn = 100 * float((votes.argmax(1) == from_val.labels).double().mean())
        expected = {"val/knn_top1": knn, "val/linear_top1": linear, "val/num_samples": 30}
        assert found == pytest.approx(expected) and 0 < linear < 100
        accuracies.add(round(knn, 6))
    assert len(accuracies) == 3 and not accuracies & {0, 100}


def relabelled(folder: Path, labels: list[int]) -> Path:
    """Coloured rectangles with labels that have nothing to do with their colours."""
    write_labelled_set(folder, "classify", num_samples=len(labels), seed=1)
    shard = folder / "shard-00000.parquet"
    rows = pq.read_table(shard).to_pylist()
    table = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    pq.write_table(pa.Table.from_pylist(table, SHARD_SCHEMA), shard)
    manifest = json.loads((folder / "_manifest.json").read_text())
    manifest["shards"][0]["num_bytes"] = shard.stat().st_size
    (folder / "_manifest.json").write_text(json.dumps(manifest))
    return folder


def features(encoder: ITPN, folder: Path) -> LabelledFeatures:
    """Of all images in one batch, in the colours of `pretrained_run`."""
    config = probe_config(
        train=str(folder),
        val=str(folder),
        image_size=64,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    maker = VALIDATION(config, build_index(str(folder)))
    return embed(encoder, made_ahead(maker, share_of(maker, 64)), config, CPU)


def test_checkpoints_and_uris_are_probed_like_the_folder_of_their_run(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """With the variant, the image size and the colours of the run."""
    run, seen = runs["pretrain"], []
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    shutil.copy(run / "config.json", tmp_path / "run")
    shutil.copy(run / "encoder.safetensors", checkpoint)

    def watching(encoder: ITPN, batches: Any, config: ClassifyConfig, device: Any) -> Any:
        seen.append((config.data.mean, config.data.std, config.data.image_size))
        return embed(encoder, batches, config, device)

    with mock.patch("pipeline.evaluation_run.embed", watching):
        paths = {"train_data": data / "train", "data": data / "classify"}
        for given in (run, f"{run}/", checkpoint, tmp_path / "run", f"file://{run}"):
            assert evaluated(given, **paths)["val/num_samples"] == NUM_VAL
    assert seen == 10 * [((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)]


def test_a_probe_says_what_it_lacks(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    run, labelled = runs["pretrain"], data / "classify"
    for given in ({}, {"data": labelled}, {"train_data": labelled}):
        with pytest.raises(
            ValueError, match=r"is pre-trained, and knows no classes: give labelled"
        ):
            evaluated(run, **given)
    pair = {"train_data": data / "train", "data": labelled}
    with pytest.raises(ValueError, match="does not say which variant it is; give the folder"):
        evaluated(shutil.copy(run / "encoder.safetensors", tmp_path / "alone.safetensors"), **pair)
    with pytest.raises(ValueError, match=r"^data='.*segment' has no label, which task 'classify'"):
        evaluated(run, train_data=data / "train", data=data / "segment")
    with pytest.raises(ValueError, match=r"^train_data='.*segment' has no label"):
        evaluated(run, train_data=data / "segment", data=labelled)
    with pytest.raises(FileNotFoundError, match=r"^train_data='.*nowhere' does not exist"):
        evaluated(run, train_data=tmp_path / "nowhere", data=labelled)
    other = tmp_path / "other"
    shutil.copytree(labelled, other)
    facts = json.loads((other / "_manifest.json").read_text())
    (other / "_manifest.json").write_text(json.dumps({**facts, "classes": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="so labels mean different things"):
        evaluated(run, train_data=data / "train", data=other)


def test_a_run_that_is_not_there_or_not_whole_is_named(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    pair = {"train_data": data / "train", "data": data / "classify"}
    for given in ({}, pair):
        with pytest.raises(FileNotFoundError, match=r"^run '.*nowhere' does not exist; give a run"):
            evaluated(tmp_path / "nowhere", **given)
    cut = tmp_path / "cut"
    shutil.copytree(runs["pretrain"], cut)
    whole = (cut / "encoder.safetensors").read_bytes()
    (cut / "encoder.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"^run '.*cut/encoder.safetensors' is damaged"):
        evaluated(cut, **pair)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs["classify"], unfinished)
    (unfinished / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors: the run is not finished"):
        evaluated(unfinished, data=data / "classify")
    with pytest.raises(FileNotFoundError, match=r"no run at .*; give the folder of a fine-tuning"):
        evaluated(runs["classify"] / "checkpoints" / "step_1", data=data / "classify")


@pytest.mark.parametrize("key", ["num_workers", "batch_size", "knn_k"])
def test_counts_must_be_positive(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=0 must be greater than 0"):
        EvaluateConfig(run="run", **{key: 0})  # type: ignore[arg-type]


@pytest.mark.ray
@pytest.mark.slow
def test_several_workers_give_the_figures_of_one(
    ray_cluster: str, runs: dict[str, Path], data: Path
) -> None:
    """Three of them have shares of unlike sizes."""
    settings = {"data": data / "classify", "batch_size": 2}
    whole = evaluated(runs["classify"], **settings)
    with mock.patch("pipeline.evaluation_run.joined_cluster", wraps=joined_cluster) as joined:
        shared = evaluated(runs["classify"], **settings, num_workers=3)
    joined.assert_called_once_with(3)
    assert whole == pytest.approx(shared, rel=1e-6) and whole["val/num_samples"] == NUM_VAL
