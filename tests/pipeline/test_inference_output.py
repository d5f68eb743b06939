"""The output folder of a batch inference: shards, what is never overwritten, what is redone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inference_output import InferenceOutput
from pipeline.quarantine import BadSample
from tests.pipeline.inference_runs import finished, read_rows

SCHEMA = pa.schema({"path": pa.string(), "value": pa.int32()})


def table(*values: int) -> pa.Table:
    return pa.Table.from_pylist([{"path": f"{v}.jpg", "value": v} for v in values], SCHEMA)


def values(out: Path) -> list[int]:
    return [row["value"] for row in read_rows(out)]


def test_shards_hold_the_rows_in_order_whatever_the_tables_that_came(tmp_path: Path):
    sizes = []
    for name, parts in {"a": [5, 1, 1, 4], "b": [11], "c": [1] * 11}.items():
        output = InferenceOutput(str(tmp_path / name), "predictions", rows_per_shard=3)
        output.begin({})
        first = 0
        for size in parts:
            output.add(table(*range(first, first + size)))
            first += size
        output.finish({}, SCHEMA)
        assert values(tmp_path / name) == list(range(11))
        assert finished(tmp_path / name)["num_rows"] == 11
        sizes.append([shard["num_rows"] for shard in finished(tmp_path / name)["shards"]])
    assert sizes == [[3, 3, 3, 2]] * 3


def test_large_rows_are_not_gathered_until_there_are_many(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pipeline.inference_output._BYTES_PER_SHARD", 100)
    output = InferenceOutput(str(tmp_path / "out"), "predictions")
    output.begin({})
    for first in (0, 20):
        output.add(table(*range(first, first + 20)))
    assert output.num_rows == 40 and len(output.shards) == 2


def test_no_row_at_all_still_gives_a_table_with_columns(tmp_path: Path):
    output = InferenceOutput(str(tmp_path / "out"), "predictions")
    output.begin({})
    output.finish({}, SCHEMA)
    assert pq.read_table(tmp_path / "out").schema.names == SCHEMA.names


def test_readers_of_parquet_folders_see_neither_pictures_nor_bad_images(tmp_path: Path):
    output = InferenceOutput(str(tmp_path / "out"), "predictions")
    output.begin({})
    output.add(table(1))
    output.add_picture(1, "photos/a b:3.jpg", b"picture")
    output.write_bad([BadSample("b.jpg", None, "OSError", "broken")])
    output.finish({}, SCHEMA)
    assert values(tmp_path / "out") == [1]
    assert (tmp_path / "out/_overlays/000001_a_b_3.jpg").read_bytes() == b"picture"
    assert pq.read_table(tmp_path / "out/_quarantine.parquet").num_rows == 1
    assert not (tmp_path / "out/_unfinished.json").exists()


def test_a_finished_output_is_never_overwritten(tmp_path: Path):
    output = InferenceOutput(str(tmp_path / "out"), "predictions")
    output.begin({})
    output.add(table(1))
    output.finish({}, SCHEMA)
    with pytest.raises(ValueError, match="holds finished predictions, which are never overwritten"):
        InferenceOutput(str(tmp_path / "out"), "predictions").begin({})
    assert values(tmp_path / "out") == [1]


def test_an_unfinished_output_is_done_anew_and_nothing_old_stays(tmp_path: Path):
    out = tmp_path / "out"
    killed = InferenceOutput(str(out), "predictions", rows_per_shard=1)
    killed.begin({})
    killed.add(table(1, 2, 3))
    killed.add_picture(7, "7.png", b"old")
    killed.write_bad([BadSample("b.jpg", None, "OSError", "broken")])
    (out / "predictions-00009.parquet.0123abcd.part").write_bytes(b"cut short")
    (out / "notes.txt").write_text("somebody's")

    again = InferenceOutput(str(out), "predictions")
    again.begin({})
    again.add(table(4))
    again.finish({}, SCHEMA)
    assert (out / "notes.txt").read_text() == "somebody's", "only a job's own files may go"
    (out / "notes.txt").unlink()
    assert values(out) == [4]
    left = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert left == {"predictions-00000.parquet", "_finished.json"}


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "predictions-00000.parquet").write_bytes(b"from elsewhere")
    with pytest.raises(ValueError, match=r"holds 2 files that are no predictions.*photo\.jpg"):
        InferenceOutput(str(tmp_path), "predictions").begin({})
    assert len(list(tmp_path.iterdir())) == 2
