"""A model in actors over all images of a data set: the driver of `predict.py` and `embed.py`.

The index is cut into tasks of neighbouring rows, actors infer them (see `inference_actor.py`), and
the driver alone writes what they yield, in the order of the index. Surprising: tasks begin at
multiples of the batch size, so a batch holds the same images however many actors share them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from pipeline.cluster import joined_cluster, require_room
from pipeline.config_values import config_to_dict
from pipeline.inference_actor import (
    PICTURE,
    Inference,
    InferenceActor,
    InferenceConfig,
    row_schema,
)
from pipeline.inference_output import PICTURES_FOLDER, InferenceOutput
from pipeline.placement import Work, remote_args, resource_share
from pipeline.prepare.settings import absolute
from pipeline.quarantine import (
    BadSample,
    TooManyBadSamplesError,
    bad_samples,
    check_bad_fraction,
)
from pipeline.reading import SampleReader, UnreadableSampleError
from pipeline.shards import BAD_SAMPLES_FILE
from pipeline.sources import Index, build_index

logger = logging.getLogger(__name__)
_ROWS_PER_TASK = 256
_TASKS_PER_ACTOR = 4  # at least, where there are rows enough: so all actors end at about one time
_LOG_EVERY_S = 10.0


class InferenceFailedError(RuntimeError):
    """Storage or the device failed; says nothing about any image. Nothing is finished."""


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What a job has written."""

    out: str
    kind: str
    num_rows: int
    num_pictures: int
    bad: list[BadSample]
    wall_s: float
    summaries: tuple[str, ...] = ()
    """Files that show all of it at a glance."""

    def report(self) -> str:
        """Lines for the user."""
        lines = [f"{self.num_rows} {self.kind} in {self.out}, in {self.wall_s:.0f} s"]
        if self.num_pictures:
            lines.append(f"{self.num_pictures} pictures in {self.out}/{PICTURES_FOLDER}")
        lines += [f"at a glance: {self.out}/{name}" for name in self.summaries]
        if self.bad:
            listed = f"{self.out}/{BAD_SAMPLES_FILE}"
            lines.append(f"bad images, left out and listed in {listed}: {len(self.bad)}")
            lines += [f"  {sample}" for sample in sorted(self.bad)[:3]]
        return "\n".join(lines)


def open_images(config: InferenceConfig) -> Index:
    """Index of the images; the first is looked up, so that a wrong column ends the job at once.

    Raises:
        ValueError: no images there, no such column, or `out` lies among them.
        FileNotFoundError: the path does not exist.
        StorageUnavailableError: it cannot be read.
    """
    index = build_index(config.images, "images", config.max_bad_fraction)
    images, out = (f"{absolute(path).rstrip('/')}/" for path in (config.images, config.out))
    if out.startswith(images):
        raise ValueError(
            f"out='{config.out}' lies among the images ({config.images}), where its files would be "
            "taken for data; give a folder elsewhere"
        )
    with contextlib.suppress(UnreadableSampleError):  # quarantined later
        SampleReader(index, config.image_column).read(0)
    return index


def run_inference(
    config: InferenceConfig,
    inference: Inference,
    index: Index,
    *,
    kind: str,
    facts: dict[str, Any],
    with_ray: bool = True,
    summarise: Callable[[InferenceOutput, list[BadSample]], None] | None = None,
) -> Inferred:
    """Infer all images and write the output folder.

    Args:
        config: the job.
        inference: what to do with the images.
        index: of `open_images`.
        kind: what the shards are called.
        facts: what `_finished.json` says beside counts and settings.
        with_ray: False infers here, one task after another, which is faster for a few images.
        summarise: called here when all rows are written, before the folder counts as finished.

    Raises:
        ValueError: the output folder is taken; the cluster is too small.
        TooManyBadSamplesError: what has been inferred by then is written, but not as finished.
        InferenceFailedError: storage or the device failed.
    """
    started = time.monotonic()
    settings = config_to_dict(config)
    schema = row_schema(inference, index)
    output = InferenceOutput(config.out, kind)
    output.begin(settings)
    infer = _through_ray if with_ray else _here
    with contextlib.closing(infer(config, inference, index)) as tables:
        bad = _write(config, index, tables, output, schema.names)
    output.flush()
    if summarise is not None:
        summarise(output, bad)
    output.finish({"num_bad": len(bad), **facts, "settings": settings}, schema)
    return Inferred(
        out=output.out,
        kind=kind,
        num_rows=output.num_rows,
        num_pictures=output.num_pictures,
        bad=bad,
        wall_s=time.monotonic() - started,
        summaries=tuple(output.summaries),
    )


def _here(config: InferenceConfig, inference: Inference, index: Index) -> Generator[pa.Table]:
    actor = InferenceActor(inference, index, config)
    for task in _tasks(config, index.num_samples):
        yield from actor({key: np.array([value]) for key, value in task.items()})


def _through_ray(
    config: InferenceConfig, inference: Inference, index: Index
) -> Generator[pa.Table]:
    """Tables from actors, in order."""
    tasks = _tasks(config, index.num_samples)
    with joined_cluster(config.num_actors * config.cpus_per_actor):
        _check_resources(config)
        refs = [ray.put(value) for value in (inference, index, config)]
        # One block a task, made here: `ray.data.range` would start tasks of its own to count.
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
            _RayActor,
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(tasks))),
            num_cpus=config.cpus_per_actor,
            num_gpus=1 if config.use_gpu else None,
            **remote_args(config.worker_resource, config.worker_labels),
            fn_constructor_args=[refs],  # in a list, so that Ray passes the references themselves
        )
        dataset.context.enable_progress_bars = False
        dataset.context.execution_options.preserve_order = True
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


class _RayActor(InferenceActor):
    """An actor that finds its arguments in the object store; the driver keeps them there."""

    def __init__(self, refs: list[ray.ObjectRef]) -> None:
        super().__init__(*ray.get(refs))


def _tasks(config: InferenceConfig, num_samples: int) -> list[dict[str, int]]:
    """Rows first ... last-1 of each task; all begin at multiples of the batch size."""
    wanted = min(_ROWS_PER_TASK, math.ceil(num_samples / (config.num_actors * _TASKS_PER_ACTOR)))
    rows = max(1, wanted // config.batch_size) * config.batch_size
    return [
        {"first": first, "last": min(first + rows, num_samples)}
        for first in range(0, num_samples, rows)
    ]


def _check_resources(config: InferenceConfig) -> None:
    each = {"CPU": float(config.cpus_per_actor)} | ({"GPU": 1.0} if config.use_gpu else {})
    require_room(
        Work(
            what="an actor",
            count=config.num_actors,
            each=each | resource_share(config.worker_resource),
            labels=config.worker_labels,
            settings="num_actors, cpus_per_actor, use_gpu, worker_resource or worker_labels",
        )
    )


def _write(
    config: InferenceConfig,
    index: Index,
    tables: Iterable[pa.Table],
    output: InferenceOutput,
    columns: list[str],
) -> list[BadSample]:
    """Write what comes; returns the bad images."""
    bad = list(index.bad_files)
    progress = _Progress(index.num_samples)
    num_seen = 0
    try:
        for table in tables:
            _check_failure(table, output.out)
            rows = table["_row"].to_numpy()
            in_order = np.array_equal(rows, np.arange(num_seen, num_seen + len(rows)))
            assert in_order, f"Ray Data returned rows {rows} after {num_seen}"
            num_seen += len(rows)
            good = table.filter(pc.is_null(table["_bad"]))
            _write_pictures(good, output)
            output.add(good.select(columns))
            if found := bad_samples({"bad": table["_bad"].to_pylist()}):
                bad += found
                total = index.num_samples + len(index.bad_files)
                check_bad_fraction(bad, total, config.max_bad_fraction, "max_bad_fraction")
            progress.log(num_seen, len(bad))
    except TooManyBadSamplesError as error:
        output.flush()
        output.write_bad(bad)
        raise TooManyBadSamplesError(
            f"{error}; then repeat the command. {output.num_rows} rows and the bad images so far "
            f"are in {output.out}, which counts as unfinished"
        ) from None
    assert num_seen == index.num_samples, f"{num_seen} rows came of {index.num_samples}"
    output.write_bad(bad)
    return bad


def _check_failure(table: pa.Table, out: str) -> None:
    failures = table["_failure"].drop_null().to_pylist()
    if failures:
        raise InferenceFailedError(
            f"{failures[0]}; {out} is unfinished: mend it (a device out of memory: lower "
            "batch_size) and repeat the command, which begins anew"
        )


def _write_pictures(table: pa.Table, output: InferenceOutput) -> None:
    drawn = table.filter(pc.is_valid(table[PICTURE])).select(["_row", "path", PICTURE])
    for row in drawn.to_pylist():
        output.add_picture(row["_row"], row["path"], row[PICTURE])


class _Progress:
    """A line every few seconds."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._started = self._logged = time.monotonic()

    def log(self, num_seen: int, num_bad: int) -> None:
        now = time.monotonic()
        if now - self._logged < _LOG_EVERY_S and num_seen < self._num_samples:
            return
        self._logged = now
        rate = num_seen / max(now - self._started, 1e-9)
        logger.info(
            "%d of %d images, %d bad, %.1f images/s", num_seen, self._num_samples, num_bad, rate
        )
