"""Runs the loop in this process, without Ray: batches straight from a SampleFactory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.between_steps import Hooks
from pipeline.checkpoint import Checkpointer
from pipeline.data import Batch, SampleFactory, micro_batches, sample_stream
from pipeline.pretrain import pretrain
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import read_pretrain_weights
from pipeline.quarantine import BadSample
from pipeline.sources import build_index
from pipeline.train_state import Worker


@dataclass
class LocalRun:
    """One run of the loop and what it reported."""

    config: PretrainConfig
    folder: Path
    change_batch: Callable[[int, Batch], Batch] = lambda step, batch: batch
    stop_at: int = -1
    worker: Worker = Worker()
    save_at: tuple[int, ...] = ()
    """Steps at which `wants_checkpoint` asks for one."""
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    """Stream positions in the order the loop consumed them."""
    rows: list[int] = field(default_factory=list)
    """Index rows, likewise."""
    bad_rows: list[int] = field(default_factory=list)
    """Those of them that came as bad samples."""
    quarantines: list[list[BadSample]] = field(default_factory=list)
    """What `on_quarantine` was called with, call by call."""
    started_at: int = -1
    dump: dict[str, Any] = field(default_factory=dict)
    """What `on_non_finite` was called with."""
    on_step: Callable[[int], None] = lambda step: None
    saved: list[int] = field(default_factory=list)
    """Steps that `on_checkpoint` was called with."""

    def __call__(self) -> dict[str, Any]:
        index = build_index(
            self.config.data.path, max_bad_fraction=self.config.data.max_bad_fraction
        )
        factory = SampleFactory.build(self.config, index)
        if self.config.data.val_path:
            index = build_index(self.config.data.val_path, max_bad_fraction=0)
        held_out = SampleFactory.build(self.config, index).evaluation_batch(*self.worker[:2])
        checkpointer = self.checkpointer
        try:
            return pretrain(
                self.config,
                num_samples=len(factory.reader),
                batches_from=lambda step: self._batches(factory, step),
                evaluation_batch=held_out,
                weights=read_pretrain_weights(self.config),
                checkpointer=checkpointer,
                worker=self.worker,
                hooks=Hooks(
                    on_step=self.on_step,
                    on_start=self._on_start,
                    on_metrics=self._on_metrics,
                    wants_checkpoint=lambda step: step in self.save_at,
                    on_quarantine=self.quarantines.append,
                    on_picture=lambda step, kind, png: self.pictures.update({step: png}),
                    on_checkpoint=self._on_checkpoint,
                    on_non_finite=self.dump.update,
                ),
            )
        finally:
            checkpointer.wait()  # this process goes on, and with it the thread that writes

    @property
    def checkpointer(self) -> Checkpointer:
        return Checkpointer(self.folder, keep=self.config.run.keep_checkpoints, facts={})

    def _batches(self, factory: SampleFactory, start: int) -> Iterator[Batch]:
        stream = sample_stream(self.config, factory.reader.index)
        step = start
        while True:
            for micro in micro_batches(stream, self.config, step, *self.worker[:2]):
                batch = factory.batch(micro)
                self.seen += micro.positions.tolist()
                self.rows += micro.rows.tolist()
                self.bad_rows += micro.rows[batch["bad"] != ""].tolist()
                yield self.change_batch(step, batch)
            step += 1

    def _on_start(self, step: int) -> None:
        self.started_at = step

    def _on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        self.records[step] = metrics
        return step == self.stop_at

    def _on_checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        self.saved.append(step)

    def history(self) -> dict[int, dict[str, float]]:
        """Records without what depends on the clock."""
        return {
            step: {k: v for k, v in metrics.items() if not k.startswith(("perf/", "memory/"))}
            for step, metrics in self.records.items()
        }
