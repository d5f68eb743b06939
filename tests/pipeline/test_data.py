"""The sample factory and the probe, without Ray: what a sample depends on, and bad images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.config_values import apply_overrides
from pipeline.data import (
    Draws,
    SampleFactory,
    SyntheticBatches,
    micro_batches,
    micros_per_block,
    sample_stream,
)
from pipeline.datasets import SYNTHETIC_SAMPLES, DataSets, probe
from pipeline.masking import block_mask
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from pipeline.reproducibility import EVAL_EPOCH, sample_generator
from pipeline.sampling import SampleStream
from pipeline.sources import build_index
from tests.pipeline.samples import noise_image, write_images, write_prepared


def build_factory(config: PretrainConfig, **overrides: Any) -> SampleFactory:
    """Factory with overrides written as data__path for data.path."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = apply_overrides(config, dotted)
    return SampleFactory.build(config, build_index(config.data.path))


Sample = tuple[NDArray[np.uint8], NDArray[np.bool_]]


def assert_same_sample(a: Sample, b: Sample) -> None:
    for left, right in zip(a, b, strict=True):
        np.testing.assert_array_equal(left, right)


def assert_different_sample(a: Sample, b: Sample) -> None:
    for left, right in zip(a, b, strict=True):
        assert not np.array_equal(left, right)


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """Rows 0 to 5; 2 and 5 are damaged."""
    folder = tmp_path / "damaged"
    write_images(folder, [f"{i}.png" for i in range(6)])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:99])
    (folder / "5.png").write_text("not an image")
    return folder


def test_sample_has_the_shape_the_config_asks_for(debug_config: PretrainConfig) -> None:
    factory = build_factory(debug_config, data__image_size=96, objective__mask_ratio=0.5)
    pixels, mask = factory.sample(0, 3)
    assert (pixels.shape, pixels.dtype) == ((96, 96, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((36,), np.bool_)
    assert mask.sum() == 18


def test_mask_type_of_the_config_is_used(debug_config: PretrainConfig) -> None:
    factory = build_factory(debug_config, data__image_size=224, objective__mask_type="block")
    sample_id = factory.reader.read(3).sample_id
    expected = block_mask(sample_generator(0, 1, sample_id, "mask"), 14, 49)
    np.testing.assert_array_equal(factory.sample(1, 3)[1], expected)


def test_sample_is_a_function_of_seed_epoch_and_id(debug_config: PretrainConfig) -> None:
    sample = build_factory(debug_config).sample(2, 5)
    assert_same_sample(sample, build_factory(debug_config).sample(2, 5))
    assert_different_sample(sample, build_factory(debug_config).sample(3, 5))
    assert_different_sample(sample, build_factory(debug_config, run__seed=1).sample(2, 5))


def test_equal_images_under_other_names_get_their_own_crops_and_masks(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        noise_image(0).save(tmp_path / name)
    factory = build_factory(debug(), data__path=str(tmp_path))
    assert_different_sample(factory.sample(0, 0), factory.sample(0, 1))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.one_of(
        st.integers(1, 60), st.lists(st.integers(1, 9), min_size=1, max_size=9).map(np.array)
    ),
    share=st.integers(1, 12),
    num_workers=st.integers(1, 8),
    largest=st.integers(1, 12),
    window=st.integers(1, 40),
    step=st.integers(0, 9),
)
def test_workers_micro_batches_are_together_the_step_at_any_count_and_size(
    sizes: int | NDArray[np.int64],
    share: int,
    num_workers: int,
    largest: int,
    window: int,
    step: int,
) -> None:
    batch = share * num_workers
    overrides = {
        "data.global_batch_size": batch,
        "scaling.num_workers": num_workers,
        "scaling.max_batch_size_per_worker": largest,
    }
    config = apply_overrides(debug(), overrides)
    stream = SampleStream(0, sizes, window)
    assert config.batch_size_per_worker <= largest
    for world_size in range(1, num_workers + 1):  # also what is left when workers are lost
        by_rank = [micro_batches(stream, config, step, r, world_size) for r in range(world_size)]
        counts = [len(micros) for micros in by_rank]
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1, "shared evenly"
        parts = [micro for micros in by_rank for micro in micros]
        assert {len(micro.rows) for micro in parts} == {config.batch_size_per_worker}
        for column, whole in zip(zip(*parts, strict=True), stream.step(step, batch), strict=True):
            np.testing.assert_array_equal(np.concatenate(column), whole)


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(2, 8), (4, 2)])
def test_steps_hold_the_same_crops_and_masks_at_any_worker_count(
    debug_config: PretrainConfig, num_workers: int, micro_batch: int
) -> None:
    overrides = {
        "scaling__num_workers": num_workers,
        "scaling__max_batch_size_per_worker": micro_batch,
    }
    alone, shared = build_factory(debug_config), build_factory(debug_config, **overrides)
    stream = sample_stream(debug_config, alone.reader.index)
    for step in range(3):  # 48 positions over 24 images: step 1 spans two epochs
        (whole,) = (alone.batch(m) for m in micro_batches(stream, alone.config, step, rank=0))
        parts = [
            shared.batch(micro)
            for rank in range(num_workers)
            for micro in micro_batches(stream, shared.config, step, rank, num_workers)
        ]
        for key, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), values)


def test_the_stream_of_a_run_has_its_seed_sizes_and_window(tmp_path: Path) -> None:
    write_prepared(tmp_path, [b"x"] * 300, rows_per_group=10)
    overrides = {"data.path": str(tmp_path), "data.shuffle_window": 25, "run.seed": 7}
    config = apply_overrides(debug(), overrides)
    stream = sample_stream(config, build_index(str(tmp_path)))
    expected = SampleStream(7, np.full(30, 10), 25)
    for left, right in zip(stream.step(3, 100), expected.step(3, 100), strict=True):
        np.testing.assert_array_equal(left, right)


def test_adding_a_file_leaves_the_samples_of_the_others_alone(
    image_folder: Path, tmp_path: Path, debug_config: PretrainConfig
) -> None:
    shutil.copytree(image_folder, tmp_path / "grown")
    write_images(tmp_path / "grown", ["0_first.png"])
    old = build_factory(debug_config)
    new = build_factory(debug_config, data__path=str(tmp_path / "grown"))
    for row in range(0, 24, 5):
        assert Path(new.reader.location(row + 1)).name == Path(old.reader.location(row)).name
        assert_same_sample(new.sample(4, row + 1), old.sample(4, row))


def test_batch_is_the_samples_of_its_draws(debug_config: PretrainConfig) -> None:
    factory = build_factory(debug_config)
    draws = Draws(np.array([7, 5, 6]), np.array([0, 2, 1]), np.array([3, 0, 23]))
    batch = factory.batch(draws)
    assert set(batch) == {"position", "row", "image", "mask", "bad"}
    for key, values in (("position", draws.positions), ("row", draws.rows)):
        np.testing.assert_array_equal(batch[key], values)
    assert batch["image"].flags.c_contiguous
    assert batch["bad"].tolist() == ["", "", ""]
    for i, (epoch, row) in enumerate([(0, 3), (2, 0), (1, 23)]):
        assert_same_sample((batch["image"][i], batch["mask"][i]), factory.sample(epoch, row))


@pytest.mark.parametrize(("num_bad", "tried"), [(20, 16), (3, 3)])
def test_held_out_images_that_are_all_bad_stop_with_the_last_problem(
    tmp_path: Path, num_bad: int, tried: int
) -> None:
    for i in range(num_bad):
        (tmp_path / f"bad_{i:02d}.png").write_text("not an image")
    message = f"^{tried} images in a row are bad, last .*bad_{tried - 1:02d}.png: Unident"
    with pytest.raises(ValueError, match=message):
        build_factory(debug(), data__path=str(tmp_path)).evaluation_batch()


def test_next_readable_image_is_evaluated_in_place_of_a_bad_one(damaged_folder: Path) -> None:
    factory = build_factory(debug(), data__path=str(damaged_folder), data__num_eval_crops=6)
    batch = factory.evaluation_batch()
    assert batch["row"].tolist() == [0, 1, 3, 3, 4, 0], "after the last row comes the first"
    for i, row in enumerate(batch["row"].tolist()):
        expected = factory.sample(EVAL_EPOCH, row)
        assert_same_sample((batch["image"][i], batch["mask"][i]), expected)


def test_evaluation_crops_are_fixed_and_partitioned_over_the_ranks(
    debug_config: PretrainConfig,
) -> None:
    factory = build_factory(debug_config, data__num_eval_crops=30)  # 24 images
    whole = factory.evaluation_batch()
    assert whole["row"].tolist() == [*range(24), *range(6)]
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            share = factory.evaluation_batch(rank, world_size)
            for key, values in whole.items():
                np.testing.assert_array_equal(share[key], values[rank::world_size])
    first, second = ((whole["image"][i], whole["mask"][i]) for i in (0, 24))
    assert_different_sample(first, second)


def test_evaluation_crops_are_none_of_the_training_crops(debug_config: PretrainConfig) -> None:
    factory = build_factory(debug_config, data__num_eval_crops=1)
    batch = factory.evaluation_batch()
    for epoch in range(5):
        crop = (batch["image"][0], batch["mask"][0])
        assert_different_sample(crop, factory.sample(epoch, int(batch["row"][0])))


def test_probe_counts_problems_and_measures_sizes(damaged_folder: Path) -> None:
    noise_image(9, (30, 70)).save(damaged_folder / "1.png")
    noise_image(9, (90, 20)).save(damaged_folder / "4.png")
    config = apply_overrides(debug(), {"data.path": str(damaged_folder)})
    facts = probe(config, build_index(config.data.path))
    assert (facts["num_samples"], facts["num_probed"]) == (6, 6)
    assert [problem.split(": ")[0] for problem in facts["problems"]] == [
        str(damaged_folder / name) for name in ("2.png", "5.png")
    ]
    assert facts["smallest"] == (30, 20)
    assert facts["largest"] == (90, 70)
    assert 0 < facts["seconds_per_image"] < 1


def test_probe_looks_at_the_asked_number_of_images_from_first_to_last(
    debug_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    sample = SampleFactory.sample

    def remember(self: SampleFactory, epoch: int, row: int) -> Sample:
        read.append(row)
        return sample(self, epoch, row)

    monkeypatch.setattr(SampleFactory, "sample", remember)
    facts = probe(debug_config, build_index(debug_config.data.path), num_images=4)
    assert facts["num_probed"] == len(read) == 4
    assert (read[0], read[-1]) == (0, 23)


def test_probe_of_nothing_readable_names_the_first_problem(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_text("not an image")
    config = apply_overrides(debug(), {"data.path": str(tmp_path)})
    message = "none of 2 probed images can be decoded; first problem: .*a.png: Unidentified"
    with pytest.raises(ValueError, match=message):
        probe(config, build_index(config.data.path))


# ---- data sets of a run ----


def test_without_held_out_images_the_training_images_are_evaluated(
    debug_config: PretrainConfig, tmp_path: Path
) -> None:
    data = DataSets.open(debug_config)
    assert data.val is data.train
    assert data.num_samples == 24 and data.facts["num_samples"] == 24
    write_images(tmp_path / "val", ["a.png", "b.png"])
    config = apply_overrides(debug_config, {"data.val_path": str(tmp_path / "val")})
    assert DataSets.open(config).val.num_samples == 2


def test_missing_held_out_images_are_named_by_their_own_setting(
    debug_config: PretrainConfig,
) -> None:
    config = apply_overrides(debug_config, {"data.val_path": "/nowhere/val"})
    with pytest.raises(FileNotFoundError, match=r"data.val_path='/nowhere/val' does not exist"):
        DataSets.open(config)


def test_synthetic_data_need_no_path_and_are_one_batch_for_ever() -> None:
    config = apply_overrides(
        debug(), {"data.path": "", "data.synthetic": True, "scaling.max_batch_size_per_worker": 8}
    )
    data = DataSets.open(config)
    assert (data.train, data.num_samples) == (None, SYNTHETIC_SAMPLES)
    batches = iter(SyntheticBatches(config))
    first, second = next(batches), next(batches)
    assert first is second
    assert (first["image"].shape, first["image"].dtype) == ((8, 64, 64, 3), np.uint8)
    assert ((~first["mask"]).sum(1) == config.num_visible).all()
    assert first["bad"].tolist() == [""] * 8


@pytest.mark.parametrize(
    "image_size, batch_size, micros_per_task, expected",
    [
        (224, 64, 8, 1),  # 9.6 MB each
        (160, 16, 32, 3),  # 1.2 MB each: 11 blocks, the last one of two
        (64, 16, 32, 16),  # 0.2 MB each, 21 would fit: two even blocks
        (32, 8, 64, 64),  # all of them
    ],
)
def test_micro_batches_travel_in_even_blocks_of_up_to_4_mib(
    image_size: int, batch_size: int, micros_per_task: int, expected: int
):
    settings = {
        "data.image_size": image_size,
        "data.global_batch_size": batch_size,
        "scaling.max_batch_size_per_worker": batch_size,
    }
    config = apply_overrides(debug(), settings)
    assert micros_per_block(config, micros_per_task) == expected
