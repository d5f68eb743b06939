"""Nearest neighbours: those of brute force, whatever the chunks, the files and the ties."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.retrieval import VectorFiles, nearest
from tests.conftest import REPO_ROOT


def random_vectors(num: int, dim: int = 12, seed: int = 0) -> NDArray[np.float32]:
    """Around a common direction, as features are: cosines are near 1 and near each other."""
    generator = np.random.default_rng(seed)
    return (1 + 0.1 * generator.standard_normal((num, dim))).astype(np.float32)


def write_embeddings(
    folder: Path, vectors: NDArray[np.float32], sizes: list[int], paths: list[str] | None = None
) -> Path:
    """An output folder as `jobs/embed.py` leaves it, with files of some numbers of rows."""
    folder.mkdir()
    paths = paths or [f"{i}.jpg" for i in range(len(vectors))]
    first = 0
    for i, size in enumerate(sizes):
        part = slice(first, first + size)
        flat = pa.array(vectors[part].ravel(), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        table = pa.table({"path": pa.array(paths[part], pa.string()), "stage16": column})
        pq.write_table(table, folder / f"embeddings-{i:05d}.parquet", row_group_size=4)
        first += size
    pq.write_table(pa.table({"path": ["bad"]}), folder / "_quarantine.parquet")
    (folder / "_pca.png").write_bytes(b"a picture")
    return folder


def brute_force(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], k: int, own: list[int] | None
) -> tuple[list[list[int]], NDArray[np.float64]]:
    """Written out in float64, a pair at a time."""
    rows, similarities = [], []
    for q, query in enumerate(queries.astype(np.float64)):
        found = []
        for row, vector in enumerate(gallery.astype(np.float64)):
            cosine = (query * vector).sum() / np.sqrt((query**2).sum() * (vector**2).sum())
            if own is None or own[q] != row:
                found.append((-cosine, row))
        found.sort()
        rows.append([row for _, row in found[:k]])
        similarities.append([-cosine for cosine, _ in found[:k]])
    return rows, np.array(similarities)


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(6, 30), seed=st.integers(0, 99), k=st.integers(1, 5), chunk=st.integers(1, 31)
)
def test_neighbours_are_those_of_brute_force_in_float64(num: int, seed: int, k: int, chunk: int):
    gallery, queries = random_vectors(num, seed=seed), random_vectors(3, seed=1000 + seed)
    found = nearest(queries, gallery, k, chunk_rows=chunk)
    rows, similarities = brute_force(queries, gallery, k, None)
    assert found.rows.tolist() == rows
    np.testing.assert_allclose(found.similarities, similarities, rtol=1e-7)  # float32's rounding


def test_a_query_is_not_its_own_neighbour():
    vectors = random_vectors(20)
    own = list(range(20))
    found = nearest(vectors, vectors, 19)
    assert found.rows.tolist() == brute_force(vectors, vectors, 19, own)[0]
    some = [17, 4]
    asked = nearest(vectors[some], vectors, 19, own_rows=some)
    np.testing.assert_array_equal(asked.rows, found.rows[some])
    strangers = nearest(vectors.copy(), vectors, 1)
    assert strangers.rows[:, 0].tolist() == own, "a set of the same values is another set"


@pytest.mark.parametrize("chunk_rows", [1, 2, 3, 7, 100])
def test_equal_vectors_keep_the_order_of_the_gallery(chunk_rows: int):
    one, other = random_vectors(2, dim=129)
    gallery = np.stack([other, one, 2 * one, other, one, one, one])
    found = nearest(one[None], gallery, 7, chunk_rows=chunk_rows)
    assert found.rows.tolist() == [[1, 2, 4, 5, 6, 0, 3]]
    assert found.similarities[0, :5].tolist() == [1.0] * 5
    assert found.similarities[0, 5] == found.similarities[0, 6] < 1


@pytest.mark.parametrize("chunk_rows", [1, 13, 64, 999])
def test_chunks_change_no_bit(chunk_rows: int, monkeypatch: pytest.MonkeyPatch):
    gallery = random_vectors(1000, dim=64)
    gallery[500:600] = gallery[:100]  # ties across chunks
    whole = nearest(gallery, gallery, 9)
    monkeypatch.setattr("pipeline.retrieval._QUERIES_AT_A_TIME", 77)
    parts = nearest(gallery, gallery, 9, chunk_rows=chunk_rows)
    np.testing.assert_array_equal(parts.rows, whole.rows)
    np.testing.assert_array_equal(parts.similarities, whole.similarities)


@pytest.mark.parametrize("sizes", [[25], [10, 10, 5], [1, 0, 24]])
@pytest.mark.parametrize("chunk_rows", [3, 4096])
def test_files_are_a_gallery_as_the_array_in_them(
    sizes: list[int], chunk_rows: int, tmp_path: Path
):
    vectors = random_vectors(25)
    files = VectorFiles(str(write_embeddings(tmp_path / "out", vectors, sizes)), "stage16")
    assert (len(files), files.dim) == (25, 12)
    rows = [24, 0, 9, 10, 0]
    np.testing.assert_array_equal(files.read(rows), vectors[rows])
    assert files.paths(rows) == ["24.jpg", "0.jpg", "9.jpg", "10.jpg", "0.jpg"]
    assert all(len(chunk) <= chunk_rows for chunk in files.chunks(chunk_rows))
    found = nearest(vectors[rows], files, 24, own_rows=rows, chunk_rows=chunk_rows)
    expected = nearest(vectors, vectors, 24)
    np.testing.assert_array_equal(found.rows, expected.rows[rows])
    np.testing.assert_array_equal(found.similarities, expected.similarities[rows])


def test_vectors_without_a_direction_are_similar_to_none():
    gallery = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [-1, 0], [1, 1]], np.float32)
    found = nearest(np.array([[3, 0], [0, 0]], np.float32), gallery, 5)
    assert found.rows.tolist() == [[4, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    np.testing.assert_allclose(found.similarities[0], [0.5**0.5, 0, 0, 0, -1], rtol=1e-7)
    assert not found.similarities[1].any()


def test_what_cannot_be_asked_is_named_with_the_rule_and_a_way_out(tmp_path: Path):
    vectors = random_vectors(7)
    for k in (0, 8, -1):
        with pytest.raises(ValueError, match=rf"k={k} is not between 1 and the 7 .* use 1 to 7"):
            nearest(vectors.copy(), vectors, k)
    with pytest.raises(ValueError, match=r"k=7 is not between 1 and the 6 .* use 1 to 6"):
        nearest(vectors, vectors, 7)
    with pytest.raises(ValueError, match=r"k=1 .* the 0 vectors .* give a larger gallery"):
        nearest(vectors[:1], vectors[:1].copy(), 1, own_rows=[0])
    with pytest.raises(ValueError, match=r"\(7, 5\) do not fit a gallery of 12 features; give"):
        nearest(vectors[:, :5], vectors, 1)
    with pytest.raises(ValueError, match="own_rows has 2 places for 7 queries; give one for each"):
        nearest(vectors, vectors, 1, own_rows=[0, 1])

    out = str(write_embeddings(tmp_path / "out", vectors, [7]))
    for column in ("stage32", "path"):
        with pytest.raises(ValueError, match=rf"column='{column}' is not .* use one of stage16"):
            VectorFiles(out, column)
    with pytest.raises(ValueError, match=r"row 7 is none of 7; use 0 to 6"):
        VectorFiles(out, "stage16").read([0, 7])
    with pytest.raises(ValueError, match=r"holds no Parquet files of embeddings; give the --out"):
        VectorFiles(str(tmp_path / "nowhere"), "stage16")


def test_the_example_of_the_documentation_finds_the_nearest_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = (REPO_ROOT / "docs/predict.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "retrieval" in c]
    vectors = random_vectors(9)
    paths = [f"/data/photos/{name}.jpg" for name in "abcdefgh"] + ["/data/photos/cat.jpg"]
    write_embeddings(tmp_path / "embeddings", vectors, [5, 4], paths)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (rows,), ((*similarities,),) = brute_force(vectors[8:], vectors, 5, [8])
    printed = [f"{cosine:.5f} {paths[row]}" for row, cosine in zip(rows, similarities, strict=True)]
    assert capsys.readouterr().out.splitlines() == printed
