"""Replaying a dump: it names the samples that overflow, and refuses what it cannot replay."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import ENCODER_FILE, STATE_FILE, load_state
from pipeline.config_values import apply_overrides
from pipeline.nonfinite import NonFiniteLossError
from pipeline.onednn_products import use_onednn
from pipeline.pretrain_config import PretrainConfig
from pipeline.replay import ReplayedStep, replay, replay_report
from tests.pipeline.loop import LocalRun
from tests.pipeline.overflows import BATCH, overflowing_config, write_dump, write_images

pytestmark = pytest.mark.usefixtures("one_thread")
BRIGHT = (2, 3, 5, 8, 13, 21)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> LocalRun:
    """A run that ended because its steps 2, 3 and 4 (the first is 0) held overflowing images."""
    folder = tmp_path_factory.mktemp("failed")
    write_images(folder / "images", BRIGHT)
    config = overflowing_config(folder / "images", scaling__max_batch_size_per_worker=4)
    run = LocalRun(config, folder / "checkpoints")
    with pytest.raises(NonFiniteLossError, match=r"step 5: .* the 3\. such step"):
        run()
    return run


@pytest.fixture
def dump(failed: LocalRun) -> Path:
    """The dump of that run."""
    return write_dump(failed.config, failed.dump)


def guilty(config: PretrainConfig, rows: list[int]) -> list[str]:
    return [f"{config.data.path}/{row:02d}.png" for row in rows if row in BRIGHT]


def test_replay_names_exactly_the_overflowing_samples_of_every_step(
    failed: LocalRun, dump: Path
) -> None:
    replayed = replay(dump)
    assert [step.step for step in replayed] == [2, 3, 4]
    for step in replayed:
        rows = failed.rows[BATCH * step.step : BATCH * (step.step + 1)]
        assert step.bad_samples == guilty(failed.config, rows) != []
        assert not math.isfinite(step.loss)
        assert not math.isfinite(step.recorded_grad_norm) and not math.isfinite(step.grad_norm)


@pytest.mark.parametrize("is_one_broken", [False, True], ids=["sound", "one undecodable"])
def test_replay_repeats_the_step_of_the_run_to_the_last_bit(
    failed: LocalRun, tmp_path: Path, is_one_broken: bool
) -> None:
    """A dump as if step 2 of a good run had been refused. A bad image weighs nothing, as there."""
    write_images(tmp_path / "images", ())
    order = failed.rows  # of the seed, the same for any 24 images
    if is_one_broken:
        (tmp_path / "images" / f"{order[2 * BATCH]:02d}.png").write_bytes(b"no image")
    overrides = {
        "run.storage_path": str(tmp_path / "runs"),
        "data.path": str(tmp_path / "images"),
        "data.max_bad_fraction": 1.0,
        "optim.num_steps": 3,
    }
    config = apply_overrides(failed.config, overrides)
    is_used = use_onednn()  # as workers do
    run = LocalRun(config, tmp_path / "checkpoints")
    run()
    torch.set_float32_matmul_precision("highest")  # a new process
    assert run.rows == order[: 3 * BATCH] and len(run.bad_rows) == is_one_broken
    streak = [part for part in failed.dump["streak"] if part["step"] == 2]
    before = load_state(run.checkpointer.fetch(2))
    (step,) = replay(write_dump(config, {**before, "streak": streak}))
    assert (torch.get_float32_matmul_precision() == "medium") is is_used
    assert step.step == 2 and step.bad_samples == []
    assert step.grad_norm == run.records[3]["train/grad_norm"]
    num_good = BATCH - is_one_broken  # the logged loss is the mean over the good ones
    assert step.loss * BATCH / num_good == pytest.approx(run.records[3]["train/loss"], rel=1e-6)
    assert "no single sample is at fault" in replay_report([step])


def test_replay_names_every_sample_when_the_weights_are_at_fault(failed: LocalRun) -> None:
    model = {key: value.clone() for key, value in failed.dump["model"].items()}
    model["mim.pred.bias"][0] = math.nan
    streak = failed.dump["streak"][:1]
    (step,) = replay(write_dump(failed.config, {**failed.dump, "model": model, "streak": streak}))
    assert len(step.bad_samples) == BATCH


def test_replay_names_samples_also_where_only_the_gradient_overflows(
    failed: LocalRun, tmp_path: Path
) -> None:
    """Weights of 1e30 behind inputs of 0: the loss is finite, what flows back through them not."""
    write_images(tmp_path / "images", ())
    overrides = {"data.path": str(tmp_path / "images"), "run.storage_path": str(tmp_path / "runs")}
    config = apply_overrides(failed.config, overrides)
    model = {key: value.clone() for key, value in failed.dump["model"].items()}
    model["decoder.norm.weight"][:] = model["decoder.norm.bias"][:] = 0.0
    model["mim.pred.weight"][:] = 1e30
    streak = failed.dump["streak"][:1]
    (step,) = replay(write_dump(config, {**failed.dump, "model": model, "streak": streak}))
    assert math.isfinite(step.loss) and math.isinf(step.grad_norm)
    assert len(step.bad_samples) == BATCH


def test_report_has_a_line_a_step_and_one_a_sample() -> None:
    steps = [
        ReplayedStep(11, math.nan, math.inf, math.nan, ["a.png", "b.png"]),
        ReplayedStep(12, 0.5, 2.25, math.inf, []),
    ]
    assert replay_report(steps).splitlines() == [
        "step 12: loss nan, gradient norm inf (the run had nan)",
        "  not finite because of a.png",
        "  not finite because of b.png",
        "step 13: loss 0.5, gradient norm 2.25 (the run had inf)",
    ]


# ---- what cannot be replayed ----


def test_what_is_no_dump_is_refused_with_an_example(dump: Path, tmp_path: Path) -> None:
    example = "give a folder such as RUN/nonfinite/step_00000012"
    for wrong in (tmp_path / "nowhere", tmp_path, dump.parent, dump / STATE_FILE):
        with pytest.raises(ValueError, match=f"'{wrong}' is no dump of a run; {example}"):
            replay(wrong)


def test_a_checkpoint_is_refused_as_a_dump(failed: LocalRun, dump: Path) -> None:
    checkpoint = dump.parent.parent / "checkpoints" / "step_00000002"
    shutil.copytree(failed.checkpointer.fetch(2), checkpoint)
    with pytest.raises(ValueError, match=r"is a checkpoint, not a dump; give a folder such as RUN"):
        replay(checkpoint)


@pytest.mark.parametrize("file_name", [STATE_FILE, ENCODER_FILE])
def test_a_damaged_dump_is_refused(dump: Path, file_name: str) -> None:
    content = (dump / file_name).read_bytes()
    (dump / file_name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"is damaged: {file_name} has \d+ bytes, not the \d+"):
        replay(dump)


def test_a_data_set_that_has_changed_is_refused(failed: LocalRun, tmp_path: Path) -> None:
    write_images(tmp_path / "images", BRIGHT)
    (tmp_path / "images" / "07.png").unlink()
    overrides = {"data.path": str(tmp_path / "images"), "run.storage_path": str(tmp_path / "runs")}
    config = apply_overrides(failed.config, overrides)
    message = r"step 2 was fed other samples than data.path=.* gives now; replay with the data set"
    with pytest.raises(ValueError, match=message):
        replay(write_dump(config, failed.dump))


def test_a_run_on_random_pixels_is_refused(failed: LocalRun, tmp_path: Path) -> None:
    overrides = {"data.synthetic": True, "run.storage_path": str(tmp_path / "runs")}
    config = apply_overrides(failed.config, overrides)
    with pytest.raises(ValueError, match="was fed random pixels"):
        replay(write_dump(config, failed.dump))


def test_replay_leaves_the_dump_as_it_was(dump: Path) -> None:
    before = {path.name: path.read_bytes() for path in dump.iterdir()}
    assert replay(dump)[0].bad_samples == replay(dump)[0].bad_samples
    assert {path.name: path.read_bytes() for path in dump.iterdir()} == before
