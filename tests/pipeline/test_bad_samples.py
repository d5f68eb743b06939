"""Bad files in a data set: found, named, left out of the loss, and never the end of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from pipeline import reading, storage
from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.data import Batch, Draws, SampleFactory
from pipeline.pretrain import (
    TrainState,
    forward_backward,
    to_device,
)
from pipeline.pretrain_config import PretrainConfig
from pipeline.quarantine import (
    BadSample,
    TooManyBadSamplesError,
    check_bad_fraction,
    read_quarantine,
    write_quarantine,
)
from pipeline.recipes import debug
from pipeline.reproducibility import stable_id
from pipeline.sources import build_index
from pipeline.storage import StorageUnavailableError
from tests.pipeline.loop import LocalRun
from tests.pipeline.samples import (
    bad_images,
    encode,
    noise_image,
    odd_images,
    write_files,
    write_prepared,
)
from tests.pipeline.storage_faults import Outage, install, lost_connection
from tests.pipeline.test_pretrain import assert_same_state
from tests.pipeline.two_workers import merge_quarantines

GOOD = {f"good_{i:02d}.png": encode(noise_image(i)) for i in range(14)} | odd_images()
BAD = {name: content for name, (content, _) in bad_images().items()}
ERRORS = {name: error for name, (_, error) in bad_images().items()} | {
    "forbidden.png": "PermissionError",
    "vanished.png": "FileNotFoundError",
}
NUM_SAMPLES = len(GOOD) + len(ERRORS)  # 30
BATCH = 10


@pytest.fixture
def bad_folder(tmp_path: Path) -> Path:
    """Good, odd and bad files; two more that are lost only after the index is built."""
    folder = tmp_path / "images"
    lost = {name: encode(noise_image(99)) for name in ("forbidden.png", "vanished.png")}
    write_files(folder, GOOD | BAD | lost)
    return folder


@pytest.fixture
def lose_files(bad_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Delete one file and forbid another, through `read_bytes`: no file is closed to root."""
    read_bytes = storage.read_bytes

    def read(filesystem: object, path: str) -> bytes:
        if path.endswith("forbidden.png"):
            raise PermissionError(13, "Permission denied", path)
        return read_bytes(filesystem, path)

    def lose() -> None:
        (bad_folder / "vanished.png").unlink(missing_ok=True)
        monkeypatch.setattr(reading.storage, "read_bytes", read)

    return lose


def config_for(folder: Path, **overrides: object) -> PretrainConfig:
    """Three steps an epoch of `bad_folder`, six in all."""
    settings = {
        "data.path": str(folder),
        "data.global_batch_size": BATCH,
        "data.max_bad_fraction": 0.3,
        "optim.num_steps": 6,
        "optim.lr": 1e-3,
    }
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return apply_overrides(debug(), settings | dotted)


def all_rows(factory: SampleFactory, epoch: int = 3) -> Batch:
    rows = np.arange(len(factory.reader))
    return factory.batch(Draws(rows, np.full(len(rows), epoch), rows))


def bad_samples(batch: Batch) -> list[BadSample]:
    return [BadSample(*json.loads(text)) for text in batch["bad"].tolist() if text]


# ---- the factory ----


def test_every_bad_file_is_named_with_its_id_and_error_and_nothing_else_is(
    bad_folder: Path, lose_files: Callable[[], None]
) -> None:
    factory = SampleFactory.build(config_for(bad_folder), build_index(str(bad_folder)))
    lose_files()
    batch = all_rows(factory)
    assert len(batch["row"]) == NUM_SAMPLES
    found = {Path(bad.path).name: bad for bad in bad_samples(batch)}
    assert {name: bad.error for name, bad in found.items()} == ERRORS
    for name, bad in found.items():
        assert bad.path == str(bad_folder / name)
        assert bad.sample_id == stable_id(name)
        assert bad.message and " at 0x" not in bad.message, "the same in every run"
    is_bad = batch["bad"] != ""
    assert not batch["image"][is_bad].any(), "black"
    assert (batch["mask"].sum(1) == 12).all(), "bad samples too have a mask of the exact count"


def test_good_samples_are_the_same_bytes_with_and_without_bad_ones(
    bad_folder: Path, lose_files: Callable[[], None], tmp_path: Path
) -> None:
    write_files(tmp_path / "good", GOOD)
    batches = []
    for folder in (bad_folder, tmp_path / "good"):
        factory = SampleFactory.build(config_for(folder), build_index(str(folder)))
        lose_files()
        batch = all_rows(factory)
        names = [Path(factory.reader.location(row)).name for row in batch["row"].tolist()]
        batches.append(
            {
                name: image.tobytes() + mask.tobytes()
                for name, image, mask in zip(names, batch["image"], batch["mask"], strict=True)
                if name in GOOD
            }
        )
    assert batches[0] == batches[1]
    assert set(batches[0]) == set(GOOD)


@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_samples_of_a_damaged_shard_are_bad_and_the_others_good(
    damage: str, tmp_path: Path
) -> None:
    write_prepared(tmp_path, list(GOOD.values()), rows_per_shard=8, rows_per_group=4)
    factory = SampleFactory.build(config_for(tmp_path), build_index(str(tmp_path)))
    shard = tmp_path / "shard-00001.parquet"
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    batch = all_rows(factory)
    assert np.flatnonzero(batch["bad"] != "").tolist() == list(range(8, 16))
    for place, bad in enumerate(bad_samples(batch)):
        assert bad.path == f"{shard}:{place // 4}:{place % 4}"
        assert bad.sample_id is None, "it lies in the shard"
        assert bad.error == {"gone": "FileNotFoundError", "truncated": "ArrowInvalid"}[damage]
    assert batch["image"][:8].any((1, 2, 3)).all() and batch["image"][16:].any((1, 2, 3)).all()


def test_bad_image_inside_a_good_shard_is_named_with_its_own_id(tmp_path: Path) -> None:
    write_prepared(tmp_path, [*GOOD.values(), b"not an image"], rows_per_group=5)
    factory = SampleFactory.build(config_for(tmp_path), build_index(str(tmp_path)))
    (bad,) = bad_samples(all_rows(factory))
    assert bad.path == f"{tmp_path}/shard-00000.parquet:4:2"
    assert bad.sample_id == stable_id(f"sample-{len(GOOD)}")


def test_storage_that_is_down_is_no_property_of_a_sample(
    bad_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(0, lost_connection)
    install(monkeypatch, outage)
    path = f"faulty://{bad_folder}"
    factory = SampleFactory.build(config_for(bad_folder), build_index(path))
    whole = all_rows(factory)
    outage.num_failures = np.inf
    with pytest.raises(StorageUnavailableError):
        all_rows(factory)
    outage.num_failures = 4
    np.testing.assert_array_equal(all_rows(factory)["bad"], whole["bad"])


# ---- the loop ----


class LosingRun(LocalRun):
    """A run during whose start files are lost."""

    lose: Callable[[], None] = staticmethod(lambda: None)

    def _on_start(self, step: int) -> None:
        super()._on_start(step)
        self.lose()


def losing_run(config: PretrainConfig, folder: Path, lose: Callable[[], None]) -> LosingRun:
    run = LosingRun(config, folder)
    run.lose = lose
    return run


def test_a_run_over_bad_files_uses_every_good_sample_once_an_epoch(
    bad_folder: Path, lose_files: Callable[[], None], tmp_path: Path
) -> None:
    run = losing_run(config_for(bad_folder), tmp_path / "run", lose_files)
    summary = run()
    assert summary["steps"] == 6
    # the loop may have asked for the batch after the last one
    rows = run.rows[: 6 * BATCH]
    for epoch in range(2):
        used = rows[epoch * NUM_SAMPLES : (epoch + 1) * NUM_SAMPLES]
        assert sorted(used) == list(range(NUM_SAMPLES)), "nothing lost, nothing repeated"
    assert len(run.bad_rows) == 2 * len(ERRORS)
    assert summary["bad_samples"] == sorted(str(bad_folder / name) for name in ERRORS)
    last = run.quarantines[-1]
    assert {Path(bad.path).name: bad.error for bad in last} == ERRORS
    assert len(last) == len(ERRORS), "met twice, kept once"
    assert len(run.quarantines) <= 3, "called with new ones only, so in the first epoch"
    assert run.records[6]["data/bad_samples"] == len(ERRORS)
    assert all(np.isfinite(record["train/loss"]) for record in run.records.values())


def test_too_many_bad_samples_stop_the_run_and_name_the_first(
    bad_folder: Path, tmp_path: Path
) -> None:
    config = config_for(bad_folder, data__max_bad_fraction=0.1)  # 6 of 30 are bad
    run = LocalRun(config, tmp_path / "run")
    message = (
        r"(?s)[456] of 30 samples are bad, more than data.max_bad_fraction=0.1 allows:\n"
        rf"  {bad_folder}/\w+.\w+: \w+: .*\nmend or remove them, or raise the limit"
    )
    with pytest.raises(TooManyBadSamplesError, match=message):
        run()
    assert 1 <= max(run.records) <= 3, "within the first epoch"


def test_one_bad_file_ends_no_small_run_unless_none_is_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_files(folder, dict(list(GOOD.items())[:5]) | {"bad.jpg": b""})
    config = config_for(folder, data__max_bad_fraction=0.01, optim__num_steps=2)
    assert LocalRun(config, tmp_path / "run")()["bad_samples"] == [str(folder / "bad.jpg")]
    strict = apply_overrides(config, {"data.max_bad_fraction": 0.0})
    with pytest.raises(TooManyBadSamplesError, match="1 of 6 samples are bad"):
        LocalRun(strict, tmp_path / "strict")()


def test_a_killed_run_keeps_its_quarantine_and_ends_like_one_that_was_not(
    bad_folder: Path, tmp_path: Path
) -> None:
    config = config_for(bad_folder, run__checkpoint_every_steps=2)
    whole = LocalRun(config, tmp_path / "whole")
    whole()

    class KilledError(Exception):
        pass

    def die(step: int, batch: Batch) -> Batch:
        if step == 3:
            raise KilledError
        return batch

    killed = LocalRun(config, tmp_path / "killed", change_batch=die)
    with pytest.raises(KilledError):
        killed()
    saved = load_state(killed.checkpointer.latest())
    assert saved["step"] == 2 and 0 < len(saved["quarantine"]) <= len(BAD)
    resumed = LocalRun(config, tmp_path / "killed")
    summary = resumed()
    assert resumed.started_at == 2
    states = [load_state(run.checkpointer.latest()) for run in (whole, resumed)]
    assert_same_state(*states)
    assert len(states[0]["quarantine"]) == len(summary["bad_samples"]) == len(BAD)


def test_a_stop_between_log_steps_keeps_the_bad_samples_met_since(
    bad_folder: Path, tmp_path: Path
) -> None:
    settings = {f"run__{name}_every_steps": 100 for name in ("log", "checkpoint", "picture")}
    config = config_for(bad_folder, **settings, run__evaluate_every_steps=3)
    run = LocalRun(config, tmp_path / "run", stop_at=3)  # one epoch
    assert run()["is_stopped"]
    assert len(load_state(run.checkpointer.latest())["quarantine"]) == len(BAD)
    assert len(run.quarantines[-1]) == len(BAD)


def test_a_step_of_bad_samples_alone_moves_nothing_but_the_decay(
    bad_folder: Path, tmp_path: Path
) -> None:
    """Weight 0 everywhere: the loss is 0, no gradient is, and nothing is not a number."""

    def spoil(step: int, batch: Batch) -> Batch:
        bad = [json.dumps(BadSample(f"{step}:{i}", i, "E", "m")) for i in range(BATCH)]
        return batch | {"bad": np.array(bad)}

    config = config_for(bad_folder, data__max_bad_fraction=1.0, optim__num_steps=1)
    run = LocalRun(config, tmp_path / "run", change_batch=spoil)
    run()
    assert run.records[1]["train/loss"] == run.records[1]["train/grad_norm"] == 0


# ---- losses ----


def batch_with_bad_ones(folder: Path) -> tuple[PretrainConfig, Batch]:
    config = config_for(folder)
    factory = SampleFactory.build(config, build_index(str(folder)))
    rows = np.arange(BATCH)
    batch = factory.batch(Draws(rows, np.zeros(BATCH, np.int64), rows))
    assert 0 < (batch["bad"] != "").sum() < BATCH
    return config, batch


def gradients(state: TrainState) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None}
    state.optimizer.zero_grad(set_to_none=True)
    return found


def test_losses_and_gradients_are_the_sums_over_good_samples_by_the_batch_size(
    bad_folder: Path,
) -> None:
    config, batch = batch_with_bad_ones(bad_folder)
    state = TrainState.build(config, torch.device("cpu"))
    images, mask = to_device(batch, config, torch.device("cpu"))
    is_good = torch.from_numpy(batch["bad"] == "")
    images[~is_good] = torch.randn_like(images[~is_good])  # whatever they hold
    losses = forward_backward(
        state.model, state.teacher, images, mask, config, weight=is_good.float()
    )
    ours = gradients(state)
    expected_losses = torch.zeros_like(losses)
    expected: dict[str, Tensor] = {}
    for i in torch.nonzero(is_good).flatten().tolist():
        expected_losses += forward_backward(
            state.model, state.teacher, images[i : i + 1], mask[i : i + 1], config
        )
        for name, gradient in gradients(state).items():
            expected[name] = expected.get(name, 0) + gradient
    # float32 sums in another order
    torch.testing.assert_close(losses, expected_losses / BATCH, rtol=1e-5, atol=1e-6)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name] / BATCH, rtol=1e-3, atol=1e-6)


def test_logged_loss_is_the_mean_over_the_good_samples(bad_folder: Path, tmp_path: Path) -> None:
    batches: list[Batch] = []

    def keep(step: int, batch: Batch) -> Batch:
        batches.append(batch)
        return batch

    config = config_for(
        bad_folder, optim__num_steps=1, scaling__max_batch_size_per_worker=BATCH // 2
    )
    run = LocalRun(config, tmp_path / "run", change_batch=keep)
    run()
    assert len(batches) == 2 and sum((b["bad"] != "").sum() for b in batches) > 0
    state = TrainState.build(config, torch.device("cpu"))
    losses = [
        float(forward_backward(state.model, state.teacher, *part, config)[0])
        for batch in batches
        for images, mask in [to_device(batch, config, torch.device("cpu"))]
        for i in np.flatnonzero(batch["bad"] == "").tolist()
        for part in [(images[i : i + 1], mask[i : i + 1])]
    ]
    # `forward_backward` divides by the accumulation steps, of which there are two
    assert run.records[1]["train/loss"] == pytest.approx(2 * np.mean(losses), rel=1e-5)


# ---- several workers ----


def test_workers_merge_their_bad_samples_and_agree_on_the_mean_loss(tmp_path: Path) -> None:
    multiprocessing.spawn(merge_quarantines, args=(str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    assert sorted(results[0]["paths"]) == ["0.png", "1.png", "both.png"]
    assert results[0]["grew"] == [True, False]
    # The mean over 8 samples is (3 + 1) / 2; 7 of them are good.
    assert results[0]["loss"] == pytest.approx(2 * 8 / 7)


# ---- the file ----


def test_quarantine_file_round_trips_sorted_by_path(tmp_path: Path) -> None:
    path = str(tmp_path / "run" / "quarantine.parquet")
    assert read_quarantine(path) == []
    samples = [
        BadSample("b.png", 2**64 - 1, "OSError", "truncated"),
        BadSample("a.parquet", None, "ArrowInvalid", "no footer"),
    ]
    write_quarantine(path, samples)
    assert read_quarantine(path) == samples[::-1]
    write_quarantine(path, samples[:1])
    assert read_quarantine(path) == samples[:1]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["quarantine.parquet"]


def test_bad_sample_of_an_error_tells_its_cause() -> None:
    try:
        try:
            raise FileNotFoundError(2, "No such file", "a.png")
        except FileNotFoundError as error:
            raise ValueError("cannot be read") from error
    except ValueError as error:
        bad = BadSample.of("a.png", 1, error)
    assert (bad.error, bad.message) == ("FileNotFoundError", "[Errno 2] No such file: 'a.png'")
    assert BadSample.of("a.png", 1, KeyError()).message == "KeyError"
    told = BadSample.of("a.png", 1, OSError("cannot read <_io.BytesIO object at 0x7f12ab>"))
    assert told.message == "cannot read <_io.BytesIO object>"


@pytest.mark.parametrize(
    ("num_bad", "fraction", "is_allowed"),
    [
        *((0, 0.0, True), (1, 0.0, False), (1, 1e-9, True), (2, 1e-9, False)),
        *((10, 0.1, True), (11, 0.1, False), (100, 1.0, True)),
    ],
)
def test_limit_of_bad_samples(num_bad: int, fraction: float, is_allowed: bool) -> None:
    bad = [BadSample(f"{i}.png", None, "E", "m") for i in range(num_bad)]
    if is_allowed:
        check_bad_fraction(bad, 100, fraction, "limit")
    else:
        with pytest.raises(TooManyBadSamplesError, match=f"{num_bad} of 100 .* limit={fraction}"):
            check_bad_fraction(bad, 100, fraction, "limit")
