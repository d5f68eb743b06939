"""Runs the loop in this process, without Ray: batches straight from a SampleFactory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Checkpointer
from pipeline.config import PretrainConfig
from pipeline.data import Batch, SampleFactory, micro_batches
from pipeline.pretrain import Hooks, pretrain
from pipeline.sources import build_index


@dataclass
class LocalRun:
    """One run of the loop and what it reported."""

    config: PretrainConfig
    folder: Path
    change_batch: Callable[[int, Batch], Batch] = lambda step, batch: batch
    stop_at: int = -1
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)
    seen: list[int] = field(default_factory=list)
    """Stream positions in the order the loop consumed them."""
    started_at: int = -1

    def __call__(self) -> dict[str, Any]:
        factory = SampleFactory.build(self.config, build_index(self.config.data.path))
        return pretrain(
            self.config,
            num_samples=len(factory.reader),
            batches_from=lambda step: self._batches(factory, step),
            evaluation_batch=factory.evaluation_batch(),
            checkpointer=self.checkpointer,
            hooks=Hooks(
                on_start=self._on_start,
                on_metrics=self._on_metrics,
                on_picture=self.pictures.__setitem__,
            ),
        )

    @property
    def checkpointer(self) -> Checkpointer:
        return Checkpointer(self.folder, keep=self.config.run.keep_checkpoints, facts={})

    def _batches(self, factory: SampleFactory, start: int) -> Iterator[Batch]:
        step = start
        while True:
            for micro in micro_batches(step, self.config, rank=0):
                self.seen += micro.tolist()
                yield self.change_batch(step, factory.batch(micro))
            step += 1

    def _on_start(self, step: int) -> None:
        self.started_at = step

    def _on_metrics(self, step: int, metrics: dict[str, float]) -> bool:
        self.records[step] = metrics
        return step == self.stop_at

    def history(self) -> dict[int, dict[str, float]]:
        """Records without what depends on the clock."""
        return {
            step: {k: v for k, v in metrics.items() if not k.startswith(("perf/", "memory/"))}
            for step, metrics in self.records.items()
        }
