"""Features of whole data sets: those of the encoder, of the crops of evaluation."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import fs
from safetensors.torch import save_file

from models.itpn import ITPN
from pipeline.decoding import EncodedImage
from pipeline.downstream.resized_crop import resized_crop
from pipeline.embed import STRIDES, EmbedConfig, embed, load_embedder
from pipeline.quarantine import read_quarantine
from pipeline.shards import SHARD_SCHEMA
from tests.pipeline.inference_runs import (
    SIZES,
    finetuned_run,
    finished,
    image_folder,
    pretrained_run,
    read_rows,
)
from tests.pipeline.preparing import read_manifest
from tests.pipeline.samples import encode, noise_image, write_prepared

NAMES = [f"{part}{s}" for part in ("stage", "pyramid") for s in STRIDES]
DIMS = {"stage4": 8, "stage8": 16, "stage16": 32, "pyramid4": 16, "pyramid8": 16, "pyramid16": 16}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("embed") / "images")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ITPN]:
    return pretrained_run(tmp_path_factory.mktemp("runs") / "pretrained")


def config(run: Path, images: Path, out: Path, **settings: Any) -> EmbedConfig:
    return EmbedConfig(run=str(run), images=str(images), out=str(out), **settings)


@torch.no_grad()
def asked_directly(encoder: ITPN, path: Path) -> dict[str, np.ndarray]:
    """Features of one image, written out: crop, colours of the run, means over all positions."""
    image = EncodedImage.open(path.read_bytes())
    short = int(64 / (224 / 256))
    width, height = (int(short * side / min(image.size)) for side in image.size)
    left, upper = round((width - 64) / 2), round((height - 64) / 2)
    crop = resized_crop(image, (width, height), (left, upper, left + 64, upper + 64))
    pixels = torch.tensor(crop).permute(2, 0, 1).float()[None] / 255
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])[:, None, :, None, None]
    stages, pyramid = encoder((pixels - mean) / std)
    found = {}
    for s in STRIDES:
        for name, values in ((f"stage{s}", stages[s]), (f"pyramid{s}", pyramid[s])):
            found[name] = values.flatten(0, 3).mean(0).numpy()
    return found


def assert_features(rows: list[dict[str, Any]], encoder: ITPN, folder: Path) -> None:
    paths = sorted(folder.rglob("*.png"))
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths, strict=True):
        expected = asked_directly(encoder, path)
        for name in NAMES:
            # Batches of other sizes sum in another order.
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_features_are_those_of_the_encoder_for_the_crops_of_evaluation(
    batch_size: int, run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    inferred = embed(
        config(run[0], folder, tmp_path / "out", batch_size=batch_size), with_ray=False
    )
    assert_features(read_rows(tmp_path / "out"), run[1], folder)
    assert inferred.num_rows == len(SIZES)
    (bad,) = read_quarantine(str(tmp_path / "out/_quarantine.parquet"))
    assert bad.path.endswith("3_bad.jpg")


def test_images_do_not_share_their_features(run: tuple[Path, ITPN], folder: Path, tmp_path: Path):
    embed(config(run[0], folder, tmp_path / "out"), with_ray=False)
    for name in NAMES:
        vectors = np.array([row[name] for row in read_rows(tmp_path / "out")])
        apart = np.abs(vectors[:, None] - vectors[None]).max(2) + np.eye(len(vectors))
        assert apart.min() > 1e-3, name


def test_vectors_are_lists_of_fixed_size_and_the_last_file_says_of_what(
    run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    embed(config(run[0], folder, tmp_path / "out"), with_ray=False)
    table = pq.read_table(tmp_path / "out")
    assert table.schema.names == ["path", "sample_id", *NAMES]
    for name, dim in DIMS.items():
        assert table.schema.field(name).type.list_size == dim
        assert table[name].type.value_type == "float"
    facts = finished(tmp_path / "out")
    assert (facts["model_name"], facts["image_size"]) == ("itpn_debug", 64)


def test_labels_and_names_of_a_prepared_set_are_kept(run: tuple[Path, ITPN], tmp_path: Path):
    write_labelled(tmp_path / "prepared", [1, None, 0])
    embed(config(run[0], tmp_path / "prepared", tmp_path / "out"), with_ray=False)
    rows = read_rows(tmp_path / "out")
    assert [row["label"] for row in rows] == [1, None, 0]
    assert [row["name"] for row in rows] == [f"sample-{i}" for i in range(3)]
    assert finished(tmp_path / "out")["classes"] == ["cat", "dog"]


def write_labelled(folder: Path, labels: list[int | None]) -> None:
    """A prepared set with labels."""
    write_prepared(folder, [encode(noise_image(i)) for i in range(len(labels))])
    manifest = read_manifest(folder)
    (shard,) = manifest.shards
    rows = pq.read_table(folder / shard.file).to_pylist()
    labelled = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    pq.write_table(pa.Table.from_pylist(labelled, SHARD_SCHEMA), folder / shard.file)
    shard = replace(shard, num_bytes=(folder / shard.file).stat().st_size)
    manifest = replace(manifest, annotations=["label"], shards=[shard])
    manifest.write(fs.LocalFileSystem(), str(folder))


def test_a_larger_image_size_is_taken_where_it_is_asked_for(
    run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    embedder = load_embedder(config(run[0], folder, tmp_path, image_size=96))
    assert embedder.probe.data.image_size == 96
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of 16"):
        config(run[0], folder, tmp_path, image_size=100)


def test_weights_files_want_their_variant_and_whole_encoders(
    run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    file = tmp_path / "alone.safetensors"
    file.write_bytes((run[0] / "encoder.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not say which variant"):
        load_embedder(config(file, folder, tmp_path))
    loaded = load_embedder(config(file, folder, tmp_path, model_name="itpn_debug")).encoder
    for name, value in run[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name

    backbone = {k: v for k, v in run[1].state_dict().items() if k.startswith("backbone.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    with pytest.raises(ValueError, match=r"lacks .* weights of the encoder, such as pyramid\."):
        load_embedder(
            config(tmp_path / "backbone.safetensors", folder, tmp_path, model_name="itpn_debug")
        )
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="is damaged"):
        load_embedder(
            config(tmp_path / "cut.safetensors", folder, tmp_path, model_name="itpn_debug")
        )


def test_a_checkpoint_of_a_run_has_the_colours_of_the_run(
    run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    checkpoint = tmp_path / "run/checkpoints/step-1"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run/config.json").write_text((run[0] / "config.json").read_text())
    shutil.copy(run[0] / "encoder.safetensors", checkpoint)
    for path in (checkpoint, tmp_path / "run"):
        data = load_embedder(config(path, folder, tmp_path)).probe.data
        assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_runs_that_hold_no_features_are_refused_without_words_of_other_jobs(
    folder: Path, tmp_path: Path
):
    finetuned = finetuned_run(tmp_path / "finetuned", "classify")
    for path, error, message in (
        (finetuned, ValueError, "is of a fine-tuning run; give the pre-training run"),
        (tmp_path / "nowhere", FileNotFoundError, "does not exist"),
        ("scratch", ValueError, "names no weights|does not say which variant"),
    ):
        with pytest.raises(error, match=message) as caught:
            load_embedder(config(Path(path), folder, tmp_path))
        assert not str(caught.value).startswith("--init")


@pytest.mark.ray
@pytest.mark.slow
def test_two_actors_give_the_features_of_the_encoder_in_order(
    ray_cluster: str, run: tuple[Path, ITPN], folder: Path, tmp_path: Path
):
    wanted = config(run[0], folder, tmp_path / "out", num_actors=2, batch_size=2)
    assert len(embed(wanted).bad) == 1
    assert_features(read_rows(tmp_path / "out"), run[1], folder)
