"""The machinery of batch inference, with a stand-in for the model: tasks, failures, lost actors."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline import inference_actor
from pipeline.batch_inference import InferenceFailedError, _tasks, open_images, run_inference
from pipeline.inference_actor import InferenceActor, InferenceConfig, LoadedImage
from pipeline.reading import Sample
from tests.pipeline.inference_runs import finished, read_rows
from tests.pipeline.samples import write_images


@dataclass
class Lengths:
    """The length of each file; may end its process, or run out of memory, at one of the files."""

    deadly_file: str = ""
    """Its process ends, if the file still exists."""
    too_large: bool = False
    annotations: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        return pa.schema({"length": pa.int64(), "batch": pa.int32()})

    def to(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def load(self, sample: Sample) -> int:
        return len(sample.encoded)

    def infer(self, images: list[LoadedImage]) -> list[dict[str, Any]]:
        if self.too_large:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        if self.deadly_file and images[0].row >= 4 and os.path.exists(self.deadly_file):
            os.remove(self.deadly_file)
            os._exit(1)
        return [{"length": one.image, "batch": len(images)} for one in images]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", [f"{i}.png" for i in range(10)])
    return tmp_path / "images"


def config(images: Path, **settings: Any) -> InferenceConfig:
    return InferenceConfig(images=str(images), out=str(images.parent / "out"), **settings)


def lengths(images: Path) -> list[int]:
    return [path.stat().st_size for path in sorted(images.iterdir())]


@pytest.mark.parametrize("num_samples", [1, 7, 255, 256, 257, 5000])
@pytest.mark.parametrize("batch_size", [1, 8, 300])
@pytest.mark.parametrize("num_actors", [1, 3])
def test_tasks_cover_all_rows_once_and_begin_at_whole_batches(
    num_samples: int, batch_size: int, num_actors: int
):
    wanted = InferenceConfig(images="x", out="y", batch_size=batch_size, num_actors=num_actors)
    tasks = _tasks(wanted, num_samples)
    rows = [row for task in tasks for row in range(task["first"], task["last"])]
    assert rows == list(range(num_samples))
    assert all(task["first"] % batch_size == 0 for task in tasks)
    assert all(task["last"] - task["first"] <= max(256, batch_size) for task in tasks)


def test_batches_are_whole_and_only_the_last_is_short(images: Path):
    wanted = config(images, batch_size=4)
    inferred = run_inference(
        wanted, Lengths(), open_images(wanted), kind="lengths", facts={"by": "me"}, with_ray=False
    )
    rows = read_rows(Path(wanted.out))
    assert [row["length"] for row in rows] == lengths(images)
    assert [row["batch"] for row in rows] == [4] * 8 + [2] * 2
    assert finished(Path(wanted.out))["by"] == "me"
    assert inferred.report().startswith(f"10 lengths in {wanted.out}")


def test_decoding_is_one_batch_ahead_of_the_model_and_no_more(images: Path):
    wanted = config(images, batch_size=2)
    loaded: list[int] = []
    all_asked = threading.Event()

    class Watched(Lengths):
        def load(self, sample: Sample) -> int:
            loaded.append(len(loaded))
            if len(loaded) == 4:
                all_asked.set()
            return super().load(sample)

        def infer(self, images: list[LoadedImage]) -> list[dict[str, Any]]:
            if images[0].row == 0:
                assert all_asked.wait(10), "the second batch is decoded while the first is inferred"
                assert len(loaded) == 4
            return super().infer(images)

    tables = InferenceActor(Watched(), open_images(wanted), wanted).tables(range(10))
    assert next(tables).num_rows == 2
    assert sum(table.num_rows for table in tables) == 8


@pytest.mark.parametrize("use_gpu", [False, True])
def test_actors_on_cpus_use_onednn(use_gpu: bool, images: Path, monkeypatch: pytest.MonkeyPatch):
    happened: list[str] = []

    class Moved(Lengths):
        def to(self, device: torch.device) -> None:
            happened.append(device.type)

    monkeypatch.setattr(inference_actor, "use_onednn", lambda: happened.append("onednn"))
    wanted = config(images, use_gpu=use_gpu)
    InferenceActor(Moved(), open_images(wanted), wanted)
    assert happened == (["cuda"] if use_gpu else ["onednn", "cpu"])


def test_a_device_out_of_memory_ends_the_job_with_a_way_out(images: Path):
    wanted = config(images)
    with pytest.raises(InferenceFailedError, match=r"80 GiB.*lower batch_size"):
        run_inference(
            wanted,
            Lengths(too_large=True),
            open_images(wanted),
            kind="lengths",
            facts={},
            with_ray=False,
        )
    assert not (Path(wanted.out) / "_finished.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_images_of_an_actor_that_died_are_done_again(
    ray_cluster: str, images: Path, tmp_path: Path
):
    deadly = tmp_path / "deadly"
    deadly.write_text("")
    wanted = config(images, batch_size=1, num_actors=2)
    run_inference(wanted, Lengths(str(deadly)), open_images(wanted), kind="lengths", facts={})
    assert not deadly.exists(), "no actor died"
    assert [row["length"] for row in read_rows(Path(wanted.out))] == lengths(images)
