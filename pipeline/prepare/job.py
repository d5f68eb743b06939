"""Any image source -> prepared shards, as a Ray Data job: plan, write shards, manifest.

The order that makes a kill harmless: plan (once), shards (each whole or absent, then noted as
finished), quarantine, manifest, and only then the working folder goes. Surprising: there is no
"resume" switch; the same command goes on where it stopped, another command in that folder is
refused.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray.data

from pipeline import storage
from pipeline.cluster import joined_cluster, require_room
from pipeline.placement import Work, remote_args, resource_share
from pipeline.prepare.plan import finished_before, make_plan, refusal
from pipeline.prepare.plan_folder import WORK_FOLDER, FinishedShard, Plan, PlanFolder
from pipeline.prepare.settings import PrepareConfig, settings_diff
from pipeline.prepare.shard_writer import write_planned_shard
from pipeline.quarantine import (
    BadSample,
    TooManyBadSamplesError,
    check_bad_fraction,
    write_quarantine,
)
from pipeline.shards import BAD_SAMPLES_FILE, Manifest

logger = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0


class PreparationFailedError(RuntimeError):
    """Reading or writing failed for a reason that is no sample's; what is finished is kept."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a preparation has written."""

    manifests: dict[str, Manifest]
    """One for each split."""
    bad: list[BadSample]
    wall_s: float
    was_finished: bool = False
    """The folder held the same data set already; nothing was done."""


def prepare(config: PrepareConfig, *, with_ray: bool = True) -> Prepared:
    """Prepare a source, or go on with what an earlier call left unfinished.

    Args:
        config: what to prepare.
        with_ray: False writes the shards here, one after another: a set of one small shard is
            written before a Ray task would have started.

    Raises:
        ValueError: settings, source or output folder that cannot be used; too many bad samples.
        FileNotFoundError: a source that does not exist.
        PreparationFailedError: storage failed; the same call goes on later.
    """
    started = time.monotonic()
    folder = PlanFolder(config.out)
    try:
        plan = folder.read_plan()
        if plan is None:
            finished = finished_before(config, folder)
            if finished:
                folder.remove()
                return Prepared(manifests=finished, bad=[], wall_s=0.0, was_finished=True)
            plan = make_plan(config, folder)
        elif differences := settings_diff(plan.settings, config.settings()):
            raise ValueError(refusal(f"{config.out}/{WORK_FOLDER} was begun", differences))
        done = _write_shards(config, folder, plan, with_ray)
        manifests = _finish(folder, plan, done)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PreparationFailedError(
            f"{type(error).__name__}: {error}; mend it and repeat the command"
        ) from error
    bad = [*plan.bad, *(sample for shard in done for sample in shard.bad)]
    return Prepared(manifests=manifests, bad=bad, wall_s=time.monotonic() - started)


def _write_shards(
    config: PrepareConfig, folder: PlanFolder, plan: Plan, with_ray: bool
) -> list[FinishedShard]:
    """Write what is not finished yet; returns all finished shards in the order of the plan."""
    done = {shard.number: shard for shard in folder.read_finished(plan)}
    todo = [number for number in range(len(plan.shards)) if number not in done]
    if done:
        logger.info("%d of %d shards are finished already", len(done), len(plan.shards))
    progress = _Progress(plan, done)
    try:
        _check_bad(config, plan, done)
        if todo:
            with _tasks(config, folder.uri, todo, with_ray) as tasks:
                for finished in tasks:
                    done[finished.number] = finished
                    progress.log(done)
                    _check_bad(config, plan, done)
    except TooManyBadSamplesError as error:
        folder.mark_failed()
        raise TooManyBadSamplesError(
            f"{error}; then repeat the command (it looks at the bad ones again). Files you removed "
            f"stay in its plan: to plan anew, delete {config.out}/{WORK_FOLDER} and the unfinished "
            "splits"
        ) from None
    return [done[number] for number in sorted(done)]


def _check_bad(config: PrepareConfig, plan: Plan, done: dict[int, FinishedShard]) -> None:
    bad = [*plan.bad, *(sample for shard in done.values() for sample in shard.bad)]
    total = plan.num_records + len(plan.bad)
    check_bad_fraction(bad, total, config.max_bad_fraction, "max_bad_fraction")


@contextlib.contextmanager
def _tasks(
    config: PrepareConfig, out: str, todo: list[int], with_ray: bool
) -> Iterator[Iterable[FinishedShard]]:
    """The shards to do, each yielded when it is finished."""
    if not with_ray:
        yield (write_planned_shard(out, number) for number in todo)
        return
    with (
        joined_cluster(config.num_cpus),
        contextlib.closing(_run_tasks(config, out, todo)) as tasks,
    ):
        yield tasks


def _run_tasks(config: PrepareConfig, out: str, todo: list[int]) -> Generator[FinishedShard]:
    """Write shards in Ray Data tasks; yields each when it is finished.

    Raises:
        ValueError: no node has room for a task.
        PreparationFailedError: a task could not read or write.
    """
    require_room(
        Work(
            what="writing a shard",
            count=1,  # where there is less room than wanted, fewer are written at a time
            each={"CPU": 1.0, **resource_share(config.worker_resource)},
            labels=config.worker_labels,
            settings="worker_resource or worker_labels",
        )
    )
    # One block a shard, made here: `ray.data.range` would start tasks of its own to count.
    items = [{"number": number} for number in todo]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _write_shard_task,
        fn_kwargs={"out": out},
        compute=ray.data.TaskPoolStrategy(size=min(config.num_cpus, len(todo))),
        num_cpus=1,
        **remote_args(config.worker_resource, config.worker_labels),
    )
    dataset.context.enable_progress_bars = False
    for row in dataset.iter_rows():
        if row["error"]:
            raise PreparationFailedError(
                f"{row['error']}; mend it and repeat the command, which goes on from here"
            )
        yield FinishedShard.from_json(row["finished"])


def _write_shard_task(row: dict[str, Any], *, out: str) -> dict[str, Any]:
    """One task; storage errors come back as text, so that the user sees no remote traceback."""
    number = int(row["number"])
    try:
        return {"finished": write_planned_shard(out, number).to_json(), "error": ""}
    except OSError as error:
        text = f"shard {number} of {out} was not written: {type(error).__name__}: {error}"
        return {"finished": "", "error": text}


class _Progress:
    """A line every few seconds."""

    def __init__(self, plan: Plan, done: dict[int, FinishedShard]) -> None:
        self._plan = plan
        self._before = self._samples(done)
        self._started = self._logged = time.monotonic()

    def _samples(self, done: dict[int, FinishedShard]) -> int:
        return sum(self._plan.shards[number].num_records for number in done)

    def log(self, done: dict[int, FinishedShard]) -> None:
        now, total = time.monotonic(), len(self._plan.shards)
        if now - self._logged < _LOG_EVERY_S and len(done) < total:
            return
        self._logged = now
        samples = self._samples(done)
        rate = (samples - self._before) / max(now - self._started, 1e-9)
        num_bad = sum(len(shard.bad) for shard in done.values())
        logger.info(
            "%d of %d shards, %d of %d samples, %d bad, %.0f samples/s",
            *(len(done), total, samples, self._plan.num_records, num_bad, rate),
        )


def _finish(folder: PlanFolder, plan: Plan, done: list[FinishedShard]) -> dict[str, Manifest]:
    """Quarantine and manifest of each split; then the working folder goes."""
    splits = list(dict.fromkeys(shard.split for shard in plan.shards))
    highest = max(shard.highest_mask_id for shard in done)
    classes = plan.classes or [str(i) for i in range(highest + 1)]
    parts = {split: [f for f in done if plan.shards[f.number].split == split] for split in splits}
    manifests = {}
    for split, part in parts.items():
        bad = [sample for finished in part for sample in finished.bad]
        bad += plan.bad if split == splits[0] else []
        manifests[split] = _manifest(plan, part, classes, len(bad))
        if bad:
            write_quarantine(f"{folder.uri}/{split}/{BAD_SAMPLES_FILE}", bad)
    for split, manifest in manifests.items():
        _remove_leftovers(folder, f"{folder.out}/{split}")
        manifest.write(folder.filesystem, f"{folder.out}/{split}")
    folder.remove()
    return manifests


def _manifest(plan: Plan, part: list[FinishedShard], classes: list[str], num_bad: int) -> Manifest:
    shards = [finished.shard for finished in part if finished.shard]
    if not shards:
        raise ValueError(f"no sample of {plan.image_root} could be used; see the errors above")
    counts: Counter[str] = Counter()
    for finished in part:
        counts.update(finished.counts)
    present = {name for finished in part for name in finished.annotations}
    return Manifest(
        num_samples=sum(shard.num_samples for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        classes=classes,
        annotations=[n for n in ("label", "boxes", "box_masks", "mask") if n in present],
        shards=shards,
        preparation={
            "settings": plan.settings,
            "kind": plan.kind,
            "num_bad": num_bad,
            "counts": dict(sorted(counts.items())),
        },
    )


def _remove_leftovers(folder: PlanFolder, path: str) -> None:
    """Temporary files of tasks that were killed."""
    for info in storage.list_files(folder.filesystem, path):
        if info.path.endswith(".part"):
            folder.filesystem.delete_file(info.path)
