"""Random streams: independent of each other, pinned, the same in every process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from pipeline.reproducibility import (
    EVAL_EPOCH,
    Stream,
    environment,
    git_commit,
    sample_generator,
    stable_id,
)

REPO_ROOT = Path(__file__).resolve().parents[2]


def test_same_key_gives_the_same_numbers() -> None:
    draws = [sample_generator(3, 5, 2**62, "crop").random(8).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_streams_that_differ_in_anything_share_no_number() -> None:
    places = itertools.product(
        (0, 1, 12345), (0, 1, 2, EVAL_EPOCH, EVAL_EPOCH + 1), (0, 1, 2**62), get_args(Stream)
    )
    # 64-bit numbers: two of 36,000 are equal by chance once in 3e10 seeds, so a shared number
    # means overlapping streams.
    raw = [sample_generator(*place).bit_generator.random_raw(200) for place in places]
    numbers = np.concatenate(raw)
    assert len(np.unique(numbers)) == len(numbers) == 3 * 5 * 3 * 4 * 200


@pytest.mark.parametrize("sample_id", [2**53, 2**63, 2**64 - 2])
def test_neighbouring_ids_over_all_64_bits_have_their_own_streams(sample_id: int) -> None:
    first, second = (sample_generator(0, 0, sample_id + k, "crop").random(4) for k in (0, 1))
    assert not np.array_equal(first, second)


# A change of these numbers changes every crop, mask and order: old runs can no longer be resumed.
@pytest.mark.parametrize(
    ("place", "numbers"),
    [
        ((0, 0, 0, "order"), [213000021201967259, 4455796210202625458]),
        ((0, 0, 1, "crop"), [3245738530551145091, 3473859874391648748]),
        ((7, 3, 123456789, "mask"), [884884439216080941, 3984054499381411986]),
        ((7, EVAL_EPOCH, 2**62 + 1, "mask"), [10412983483909463625, 4206246890139317011]),
    ],
)
def test_numbers_of_the_streams_are_pinned(
    place: tuple[int, int, int, Stream], numbers: list[int]
) -> None:
    assert sample_generator(*place).bit_generator.random_raw(2).tolist() == numbers


def test_stable_ids_are_pinned_and_the_same_in_every_process() -> None:
    names = ["a.jpg", "sub/b.png", "überraschung.webp"]
    expected = [9918916968011810814, 15164629011226390810, 6764162969495080161]
    assert [stable_id(name) for name in names] == expected
    code = f"from pipeline.reproducibility import stable_id; print([stable_id(n) for n in {names}])"
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code],
            cwd=REPO_ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.strip() == str(expected)


def test_git_commit_marks_local_changes(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert git_commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert len(clean) == 12
    assert int(clean, 16) >= 0
    (tmp_path / "code.py").write_text("2")
    assert git_commit(tmp_path) == f"{clean}-dirty"


def test_environment_names_the_versions_that_decide_results() -> None:
    facts = environment()
    assert facts["numpy"] == np.__version__
    assert {"host", "python", "platform", "torch", "ray", "pillow"} <= set(facts)
    assert "absent" not in facts.values()
