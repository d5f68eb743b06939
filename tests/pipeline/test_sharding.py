"""Sharded training computes what data parallelism does, and its checkpoints are anybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from pipeline.sharding import gathered, is_sharded
from tests.pipeline.loop import LocalRun
from tests.pipeline.test_pretrain import assert_same_state
from tests.pipeline.two_shards import train_together

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_STEPS = 6


@pytest.fixture(scope="module")
def config(image_folder: Path) -> PretrainConfig:
    """Two micro-batches a worker, an odd number of held-out crops, clipping, drop path."""
    return apply_overrides(
        debug(),
        {
            "data.path": str(image_folder),
            "data.image_size": 32,
            "data.global_batch_size": 8,
            "data.num_eval_crops": 5,
            "scaling.num_workers": 2,
            "scaling.max_batch_size_per_worker": 2,
            "optim.num_steps": NUM_STEPS,
            "optim.lr": 1e-3,
            "optim.clip_grad_norm": 0.5,
            "model.drop_path_rate": 0.2,
            "run.evaluate_every_steps": 2,
            "run.picture_every_steps": 4,
            "run.checkpoint_every_steps": 3,
        },
    )


@pytest.fixture(scope="module")
def folder(
    config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory, one_thread: None
) -> Path:
    """Folders of the runs of `two_shards`, and NAME-RANK.pt with what each process saw."""
    folder = tmp_path_factory.mktemp("shards")
    mp.spawn(train_together, args=(str(folder / "init"), str(folder), config), nprocs=2)
    return folder


def seen(folder: Path, name: str, rank: int = 0) -> tuple[dict[int, Any], dict[int, bytes], int]:
    history, pictures, started_at = torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
    return history, pictures, started_at


def final_state(folder: Path, name: str, step: int = NUM_STEPS) -> dict[str, Any]:
    return load_state(folder / name / f"step_{step:08d}")


def assert_close_history(left: dict[int, Any], right: dict[int, Any]) -> None:
    assert left.keys() == right.keys()
    for step, record in left.items():
        assert record.keys() == right[step].keys()
        for key, value in record.items():
            assert value == pytest.approx(right[step][key], rel=2e-5), (step, key)


def test_shares_have_the_losses_metrics_and_pictures_of_whole_models(folder: Path):
    (ddp, ddp_pictures, _), (full, full_pictures, _) = (seen(folder, n) for n in ("ddp", "full"))
    assert list(full) == list(range(1, NUM_STEPS + 1))
    assert_close_history(full, ddp)
    assert full[1]["train/grad_norm"] > 0.5, "clipping has something to do"
    assert list(full_pictures) == list(ddp_pictures) == [4, 6]
    assert seen(folder, "full", rank=1)[:2] == ({}, {}), "worker 0 alone reports"


def test_a_sharded_checkpoint_is_that_of_a_whole_model_and_holds_plain_tensors(folder: Path):
    full, ddp = (final_state(folder, name) for name in ("full", "ddp"))
    tensors: list[torch.Tensor] = []

    def compare(left: Any, right: Any, where: str) -> None:
        assert type(left) is type(right), where
        if isinstance(left, torch.Tensor):
            tensors.append(left)
            torch.testing.assert_close(left, right, rtol=1e-3, atol=2e-6, msg=where)
        elif isinstance(left, dict):
            assert left.keys() == right.keys(), where
            for key in left:
                compare(left[key], right[key], f"{where}.{key}")
        elif isinstance(left, (list, tuple)):
            for i, pair in enumerate(zip(left, right, strict=True)):
                compare(*pair, f"{where}[{i}]")

    compare(full, ddp, "state")
    assert len(tensors) > 300 and all(type(tensor) is torch.Tensor for tensor in tensors)


def test_a_stopped_sharded_run_goes_on_bit_for_bit(folder: Path):
    assert seen(folder, "resumed")[2] == 3
    assert_same_state(final_state(folder, "resumed"), final_state(folder, "full"))


def test_a_sharded_run_goes_on_in_one_process_and_a_whole_one_sharded(
    folder: Path, config: PretrainConfig
):
    ddp = seen(folder, "ddp")[0]
    later = {step: record for step, record in ddp.items() if step > 3}
    taken_over, _, started_at = seen(folder, "taken_over")
    assert started_at == 3
    assert_close_history(taken_over, later)
    alone = LocalRun(config, folder / "handed_over")
    alone()
    assert alone.started_at == 3
    history = {s: {k: v for k, v in r.items() if k in later[s]} for s, r in alone.history().items()}
    assert_close_history(history, later)


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.ones(2)
    tree = {"a": [tensor, 1], "b": (None, "x")}
    same = gathered(tree)
    assert same == tree and same["a"][0] is tensor
    assert not is_sharded(nn.Linear(1, 1))


def test_one_worker_has_nothing_to_share(config: PretrainConfig, tmp_path: Path):
    runs = []
    for sharding in ("none", "full"):
        settings = {"scaling.sharding": sharding, "optim.num_steps": 2}
        runs.append(LocalRun(apply_overrides(config, settings), tmp_path / sharding))
        runs[-1]()
    assert runs[0].history() == runs[1].history()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling.sharding": "half"}, r"scaling.sharding='half' must be one of none, full"),
        (
            {"scaling.sharding": "full", "scaling.num_workers": (1, 2)},
            r"needs a fixed number of workers, not scaling.num_workers=\(1, 2\).*give one number",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(
    config: PretrainConfig, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        apply_overrides(config, settings)
