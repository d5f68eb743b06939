"""Features of labelled images, and the neighbours' accuracy that watches pre-training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from models.itpn import ITPN, create_itpn
from pipeline.config_values import apply_overrides
from pipeline.data import Batch, made_ahead
from pipeline.downstream.probes import knn_predict
from pipeline.downstream.samples import maker_builder, unpack
from pipeline.downstream.task_samples import task_samples
from pipeline.evaluation_data import share_of
from pipeline.finetune_config import ClassifyConfig
from pipeline.frozen_features import LabelledFeatures, OnlineKnn, embed, probe_config
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import debug
from pipeline.sources import Index, build_index
from pipeline.train_state import Worker
from tests.pipeline.labelled_sets import write_labelled_set
from tests.pipeline.samples import encode, noise_image, write_files, write_prepared

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NUM_TRAIN, NUM_VAL, NUM_BAD = 26, 11, 2
VALIDATION = maker_builder(task_samples, is_training=False)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, whose first two samples are bad, and val/."""
    folder = tmp_path_factory.mktemp("frozen")
    write_labelled_set(folder / "train", "classify", num_samples=NUM_TRAIN, num_bad=NUM_BAD)
    write_labelled_set(folder / "val", "classify", num_samples=NUM_VAL, seed=1)
    return folder


def config(sets: Path, **overrides: Any) -> PretrainConfig:
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    paths = {"data.path": str(sets / "train"), "data.val_path": str(sets / "val")}
    colours = {"data.mean": MEAN, "data.std": STD}
    sizes = {"scaling.max_batch_size_per_worker": 4}
    return apply_overrides(debug(), {**paths, **colours, **sizes, **settings})


def indices(sets: Path) -> tuple[Index, Index]:
    return build_index(str(sets / "train")), build_index(str(sets / "val"))


def encoder() -> ITPN:
    """With weights so large that images have features of their own."""
    torch.manual_seed(0)
    built = create_itpn("itpn_debug", img_size=64, drop_path_rate=0.9).eval()
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return built


def probe(sets: Path, batch_size: int = 4) -> ClassifyConfig:
    return probe_config(
        train=str(sets / "train"),
        val=str(sets / "val"),
        image_size=64,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
    )


def batches(sets: Path, split: str, size: int) -> list[Batch]:
    maker = VALIDATION(probe(sets), build_index(str(sets / split)))
    return list(made_ahead(maker, share_of(maker, size)))


def by_hand(encoder: ITPN, sets: Path, split: str) -> LabelledFeatures:
    """One image at a time, in float64 but for the encoder."""
    features, labels = [], []
    for batch in batches(sets, split, 1):
        if batch["bad"][0]:
            continue
        (sample,) = unpack(batch)
        pixels = (sample["image"] / 255 - np.array(MEAN)) / np.array(STD)
        image = torch.from_numpy(pixels.transpose(2, 0, 1)).float()[None]
        with torch.no_grad():
            stage = encoder(image).stages[16]  # (1, N, 1, 1, D)
        mean = stage.double().flatten(0, -2).mean(0)
        features.append((mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt())
        labels.append(int(sample["label"]))
    return LabelledFeatures(torch.stack(features).float(), torch.tensor(labels))


@pytest.mark.parametrize("size", [1, 4, 100])
def test_features_of_the_good_samples_are_those_worked_out_by_hand(sets: Path, size: int) -> None:
    built = encoder()
    expected = by_hand(built, sets, "train")
    found = embed(built, batches(sets, "train", size), probe(sets), CPU)
    assert found.labels.tolist() == [i % 3 for i in range(NUM_BAD, NUM_TRAIN)]
    assert found.labels.tolist() == expected.labels.tolist()
    # Single precision in another order; features are of size 1.
    torch.testing.assert_close(found.features, expected.features, rtol=0, atol=2e-4)
    assert torch.pdist(expected.features).min() > 0.01, "images that look alike prove nothing"
    assert not found.features.requires_grad


def test_bad_samples_alone_give_no_features_of_the_right_width(sets: Path) -> None:
    (bad,) = batches(sets, "train", NUM_BAD)[:1]
    assert all(bad["bad"])
    for given in ([], [bad]):
        found = embed(encoder(), given, probe(sets), CPU)
        assert found.features.shape == (0, 32) and found.labels.shape == (0,)
        assert found.labels.dtype == torch.int64


def online(config: PretrainConfig, sets: Path, worker: Worker = Worker()) -> OnlineKnn:
    found = OnlineKnn.where_labelled(config, *indices(sets), worker)
    assert found is not None
    return found


def rows_looked_at(knn: OnlineKnn, encoder: ITPN) -> list[int]:
    """Rows of every micro-batch of a call, in order."""
    rows: list[int] = []

    def remember(encoder: ITPN, given: Iterator[Batch], *rest: Any) -> LabelledFeatures:
        seen = list(given)
        rows.extend(int(row) for batch in seen for row in batch["row"])
        return embed(encoder, seen, *rest)

    with mock.patch("pipeline.frozen_features.embed", remember):
        knn(encoder)
    return rows


def test_the_accuracy_is_that_of_neighbours_over_all_features(sets: Path) -> None:
    built = encoder()
    train, val = (by_hand(built, sets, split) for split in ("train", "val"))
    votes = knn_predict(*train, val.features, num_classes=3)
    expected = 100 * float((votes.argmax(1) == val.labels).double().mean())
    assert online(config(sets), sets)(built) == {"val/knn_top1": pytest.approx(expected)}
    # Told apart better than by the largest class: the colours are there to be seen.
    assert expected > 50


def test_validation_labels_that_are_wrong_are_found_out(sets: Path) -> None:
    """The accuracy is of the validation labels, not of the training labels."""
    knn = online(config(sets), sets)
    built = encoder()
    right = knn(built)["val/knn_top1"]
    with mock.patch("pipeline.frozen_features.embed", with_shifted_labels(NUM_VAL)):
        assert knn(built)["val/knn_top1"] <= 100 - right


def with_shifted_labels(num_samples: int) -> Callable[..., LabelledFeatures]:
    """`embed` with labels of the next class for the set of that size."""

    def shifted(*args: Any) -> LabelledFeatures:
        found = embed(*args)
        is_val = len(found.labels) == num_samples
        return found._replace(labels=(found.labels + 1) % 3) if is_val else found

    return shifted


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_any_number_of_workers_finds_the_same_on_all_of_them(sets: Path, world_size: int) -> None:
    """Nine have fewer micro-batches than workers; some embed nothing."""
    built = encoder()
    whole = online(config(sets), sets)(built)
    workers = [online(config(sets), sets, Worker(rank, world_size)) for rank in range(world_size)]
    shares: list[list[LabelledFeatures]] = []
    for knn in workers:  # what each would send
        sent: list[LabelledFeatures] = []

        def send(
            mine: LabelledFeatures, worker: Worker, sent: list[LabelledFeatures] = sent
        ) -> list[LabelledFeatures]:
            sent.append(mine)
            return [mine]

        with mock.patch("pipeline.frozen_features.gather_from_workers", send):
            knn(built)
        shares.append(sent)
    assert sum(len(train.labels) for train, _ in shares) == NUM_TRAIN - NUM_BAD
    assert sum(len(val.labels) for _, val in shares) == NUM_VAL
    for knn in workers:
        received = iter([[share[turn] for share in shares] for turn in (0, 1)])
        with mock.patch(
            "pipeline.frozen_features.gather_from_workers",
            lambda mine, worker, received=received: next(received),
        ):
            assert knn(built) == whole


@pytest.mark.parametrize("num_images", [1, 5, 10, 11, 12, 1000])
def test_no_more_images_than_asked_for_are_looked_at(sets: Path, num_images: int) -> None:
    """From all over each set: with an even step from its first to near its last row."""
    knn = online(config(sets, data__num_knn_images=num_images), sets)
    expected = []
    for size in (NUM_TRAIN, NUM_VAL):
        looked_at = range(0, size, -(-size // num_images))
        assert len(looked_at) <= num_images
        expected += list(looked_at)
    assert rows_looked_at(knn, encoder()) == expected


def test_no_good_image_gives_no_figure(sets: Path) -> None:
    """The first row of the training set, the only one looked at, is bad."""
    assert online(config(sets, data__num_knn_images=1), sets)(encoder()) == {}


@pytest.mark.parametrize("is_training", [True, False])
def test_the_encoder_is_asked_in_eval_mode_and_gets_its_mode_back(
    sets: Path, is_training: bool
) -> None:
    built = encoder()
    expected = online(config(sets), sets)(built)
    built.train(is_training)  # stochastic depth would spoil the features
    state = {key: value.clone() for key, value in built.state_dict().items()}
    before = torch.get_rng_state()
    modes: list[bool] = []

    def watching(encoder: ITPN, *rest: Any) -> LabelledFeatures:
        modes.append(any(module.training for module in encoder.modules()))
        return embed(encoder, *rest)

    with mock.patch("pipeline.frozen_features.embed", watching):
        assert online(config(sets), sets)(built) == expected
    assert modes == [False, False]
    assert all(module.training is is_training for module in built.modules())
    assert torch.equal(torch.get_rng_state(), before), "training would draw other numbers"
    assert all(torch.equal(value, state[key]) for key, value in built.state_dict().items())


def test_only_labelled_sets_of_the_same_classes_are_watched(sets: Path, tmp_path: Path) -> None:
    train, val = indices(sets)
    plain = config(sets)

    def watched(train: Index, val: Index, config: PretrainConfig = plain) -> bool:
        return OnlineKnn.where_labelled(config, train, val, Worker()) is not None

    assert watched(train, val)
    assert not watched(train, val, config(sets, data__num_knn_images=0))
    assert not watched(train, train), "images would be their own neighbours"
    for change in (
        {"classes": ("green", "red", "blue")},  # labels would mean different things
        {"annotations": ("boxes",)},
        {"is_prepared": False},
    ):
        assert not watched(train, replace(val, **change)), change
        assert not watched(replace(train, **change), val), change
    write_labelled_set(tmp_path / "masks", "segment", num_samples=3)
    write_prepared(tmp_path / "unlabelled", [encode(noise_image(i)) for i in range(3)])
    write_files(tmp_path / "folder", {"a.png": encode(noise_image(0))})
    for name in ("masks", "unlabelled", "folder"):
        other = build_index(str(tmp_path / name))
        assert not watched(other, replace(other)), name


def test_samples_of_a_probe_are_evaluation_crops_in_the_colours_of_the_run(sets: Path) -> None:
    found = online(config(sets), sets)
    assert found.config == probe(sets) and found.classes == ("red", "green", "blue")
    images = [s["image"] for batch in batches(sets, "val", 4) for s in unpack(batch)]
    again = [s["image"] for batch in batches(sets, "val", 3) for s in unpack(batch)]
    assert {(image.shape, image.dtype.name) for image in images} == {((64, 64, 3), "uint8")}
    np.testing.assert_array_equal(images, again)  # nothing of them is random
