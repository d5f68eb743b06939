"""The sample factory and the probe, without Ray: what a sample depends on, and bad images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import PretrainConfig, apply_overrides
from pipeline.data import SampleFactory, micro_batches, probe
from pipeline.recipes import debug
from pipeline.sampling import step_positions
from pipeline.sources import build_index
from tests.pipeline.samples import noise_image, write_images


def build_factory(config: PretrainConfig, **overrides: Any) -> SampleFactory:
    """Factory with overrides written as data__path for data.path."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = apply_overrides(config, dotted)
    return SampleFactory.build(config, build_index(config.data.path))


def assert_same_sample(a: dict[str, Any], b: dict[str, Any]) -> None:
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["mask"], b["mask"])


def assert_different_sample(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert not np.array_equal(a["image"], b["image"])
    assert not np.array_equal(a["mask"], b["mask"])


@pytest.fixture
def damaged_folder(tmp_path: Path) -> Path:
    """Rows 0 to 5; 2 and 5 are damaged."""
    folder = tmp_path / "damaged"
    write_images(folder, [f"{i}.png" for i in range(6)])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:99])
    (folder / "5.png").write_text("not an image")
    return folder


def test_sample_has_the_shape_the_config_asks_for(debug_config: PretrainConfig) -> None:
    sample = build_factory(debug_config, data__image_size=96, objective__mask_ratio=0.5).sample(
        0, 3
    )
    assert (sample["image"].shape, sample["image"].dtype) == ((96, 96, 3), np.uint8)
    assert (sample["mask"].shape, sample["mask"].dtype) == ((36,), np.bool_)
    assert sample["mask"].sum() == 18
    assert (sample["row"], sample["bad_row"]) == (3, -1)


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


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(2, 8), (4, 2)])
def test_steps_hold_the_same_samples_at_any_worker_count(
    debug_config: PretrainConfig, num_workers: int, micro_batch: int
) -> None:
    overrides = {
        "scaling__num_workers": num_workers,
        "scaling__max_batch_size_per_worker": micro_batch,
    }
    alone, shared = build_factory(debug_config), build_factory(debug_config, **overrides)
    for step in range(3):  # 48 positions over 24 images: step 1 spans two epochs
        whole = alone.batch(step_positions(step, global_batch_size=16))
        parts = [
            shared.batch(micro)
            for rank in range(num_workers)
            for micro in micro_batches(step, shared.config, rank)
        ]
        for key, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), values)


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


def test_bad_image_is_replaced_by_the_next_readable_one_and_reported(damaged_folder: Path) -> None:
    factory = build_factory(debug(), data__path=str(damaged_folder))
    for row, substitute in ((2, 3), (5, 0)):  # the last row wraps around
        sample = factory.sample(1, row)
        assert (sample["row"], sample["bad_row"]) == (substitute, row)
        assert_same_sample(sample, factory.sample(1, substitute))


def test_batch_reports_bad_rows_and_keeps_its_size(damaged_folder: Path) -> None:
    factory = build_factory(debug(), data__path=str(damaged_folder))
    batch = factory.batch(np.arange(6))
    assert batch["image"].shape == (6, 64, 64, 3)
    assert batch["position"].tolist() == list(range(6))
    assert sorted(batch["bad_row"].tolist()) == [-1, -1, -1, -1, 2, 5]
    assert set(batch["row"].tolist()) == {0, 1, 3, 4}


@pytest.mark.parametrize(("num_bad", "tried"), [(20, 16), (3, 3)])
def test_too_many_bad_images_in_a_row_stop_with_the_last_problem(
    tmp_path: Path, num_bad: int, tried: int
) -> None:
    for i in range(num_bad):
        (tmp_path / f"bad_{i:02d}.png").write_text("not an image")
    message = f"^{tried} images in a row cannot be decoded, last .*bad_{tried - 1:02d}.png: Unident"
    with pytest.raises(ValueError, match=message):
        build_factory(debug(), data__path=str(tmp_path)).sample(0, 0)


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
    first, second = ({key: v[i] for key, v in whole.items()} for i in (0, 24))
    assert_different_sample(first, second)


def test_evaluation_crops_are_none_of_the_training_crops(debug_config: PretrainConfig) -> None:
    factory = build_factory(debug_config, data__num_eval_crops=1)
    crop = {key: values[0] for key, values in factory.evaluation_batch().items()}
    for epoch in range(5):
        assert_different_sample(crop, factory.sample(epoch, crop["row"]))


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

    def remember(self: SampleFactory, epoch: int, row: int) -> dict[str, Any]:
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
