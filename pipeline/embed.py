"""Features of a pre-trained encoder for all images of a data set; see docs/predict.md.

An image is resized and cropped as in evaluation; each feature is the mean over all positions of a
stage (backbone) or level (neck). Surprising: nothing is trained or fine-tuned here, so vectors of
the same encoder can be compared with each other, and with those of no other encoder.
"""

# B batch, S side of the crop, N patches, D features

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import torch
import tyro
from numpy.typing import NDArray
from torch import Tensor

from models.feature_maps import feature_maps
from models.itpn import ITPN, ITPNFeatures, create_itpn
from models.variants import get_variant
from models.weights import load_weights
from pipeline.batch_inference import Inferred, open_images, run_inference
from pipeline.config import PATCH_SIZE, InitConfig, require_choice
from pipeline.config_values import apply_overrides
from pipeline.downstream.batches import normalize, to_pixels
from pipeline.downstream.classify_samples import ClassifySamples
from pipeline.embedding_pictures import (
    MAX_NEIGHBOURS,
    MAX_PICTURES,
    NEIGHBOURS_FILE,
    NUM_QUERIES,
    PCA_FILE,
    evenly_spread,
    index_rows,
    neighbours_picture,
    pca_picture,
    read_crops,
)
from pipeline.encoder_settings import pretrained_encoder_kwargs
from pipeline.finetune_config import ClassifyConfig
from pipeline.frozen_features import probe_config
from pipeline.inference_actor import InferenceConfig, LoadedImage
from pipeline.inference_output import InferenceOutput
from pipeline.init_weights import InitialWeights, read_initial_weights, run_config
from pipeline.quarantine import BadSample
from pipeline.reading import Sample, SampleReader
from pipeline.retrieval import VectorFiles, nearest
from pipeline.sources import Index

logger = logging.getLogger(__name__)
STRIDES = (4, 8, 16)
Column = Literal["stage4", "stage8", "stage16", "pyramid4", "pyramid8", "pyramid16"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # where no run says others


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig(InferenceConfig):
    """What to embed, with which encoder, and where to write it."""

    run: tyro.conf.Positional[str]
    """Folder of a pre-training run, one of its checkpoints, or a weights file; local or a URI."""
    model_name: str = ""
    """A variant of models/variants.py; empty: the one of the run."""
    image_size: int = 0
    """Side of the crops in pixels, a multiple of 16; 0: that of pre-training."""
    batch_size: int = 32
    """Images the encoder gets at a time; changes the speed, not the results."""
    num_pictures: int = 8
    """Images, the first ones, whose features _pca.png shows as colours; 0: no such picture."""
    num_neighbours: int = 5
    """Nearest images that _neighbours.png shows beside each of 8; 0: no such picture."""
    retrieve_by: Column = "stage16"
    """Column whose cosine similarity says what is near."""

    def __post_init__(self) -> None:
        InferenceConfig.__post_init__(self)  # not super(): slots make a new class of this one
        if self.model_name:
            get_variant(self.model_name)
        require_choice("retrieve_by", self.retrieve_by, get_args(Column))
        for key, most in (("num_pictures", MAX_PICTURES), ("num_neighbours", MAX_NEIGHBOURS)):
            if not 0 <= getattr(self, key) <= most:
                raise ValueError(
                    f"{key}={getattr(self, key)} is not between 0 and {most}, what a picture has "
                    "room for; use 0 for no picture"
                )
        if self.image_size < 0 or self.image_size % PATCH_SIZE:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {PATCH_SIZE}; use e.g. 224, or "
                "0 for that of pre-training"
            )


@dataclass
class Embedder:
    """An encoder that makes rows of features (an `inference_actor.Inference`)."""

    encoder: ITPN
    probe: ClassifyConfig
    """Of `frozen_features.probe_config`: the crops of evaluation, means and deviations."""
    annotations: tuple[str, ...] = ()

    @property
    def schema(self) -> pa.Schema:
        """stage4 ... pyramid16, float32 lists of fixed size."""
        stages, fpn_dim = self.encoder.backbone.stage_dims, self.encoder.pyramid.fpn_dim
        sizes = {f"stage{s}": stages[s] for s in STRIDES}
        sizes |= {f"pyramid{s}": fpn_dim for s in STRIDES}
        return pa.schema({name: pa.list_(pa.float32(), size) for name, size in sizes.items()})

    def to(self, device: torch.device) -> None:
        """Move the encoder."""
        self.encoder.to(device)

    def load(self, sample: Sample) -> NDArray[np.uint8]:
        """The middle (S, S, 3) of an image.

        Raises:
            BadImageError: the bytes are not an image.
        """
        unlabelled = sample._replace(annotations={"label": 0})  # evaluation wants one
        crop: NDArray[np.uint8] = ClassifySamples(self.probe, 1).evaluate(unlabelled)["image"]
        return crop

    def infer(self, images: list[LoadedImage]) -> list[dict[str, Any]]:
        """A row for each image."""
        vectors = self.vectors([one.image for one in images])
        parts = {name: values.cpu().numpy() for name, values in vectors.items()}
        return [{name: values[i] for name, values in parts.items()} for i in range(len(images))]

    @torch.inference_mode()
    def features(self, crops: list[NDArray[np.uint8]]) -> ITPNFeatures:
        """Of B crops (S, S, 3)."""
        device = next(self.encoder.parameters()).device
        pixels = torch.stack([to_pixels(crop, device) for crop in crops])
        features: ITPNFeatures = self.encoder(normalize(pixels, self.probe.data))
        return features

    def vectors(self, crops: list[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """B crops (S, S, 3) -> (B, D) float32 by name."""
        features = self.features(crops)
        # Each is (B, N, cells, cells, D).
        return {
            f"{part}{s}": values[s].float().mean((1, 2, 3))
            for part, values in (("stage", features.stages), ("pyramid", features.pyramid))
            for s in STRIDES
        }

    def maps(self, crops: list[NDArray[np.uint8]]) -> dict[str, NDArray[np.float32]]:
        """B crops (S, S, 3) -> (B, h, w, D) by name: the levels, and stage 16."""
        stages, pyramid = self.features(crops)
        named = {f"pyramid{s}": pyramid[s] for s in reversed(STRIDES)} | {"stage16": stages[16]}
        side = crops[0].shape[0] // PATCH_SIZE
        maps = feature_maps(named.values(), (side, side), "NHWC")
        return {
            name: values.float().cpu().numpy() for name, values in zip(named, maps, strict=True)
        }


def embed(config: EmbedConfig, *, with_ray: bool = True) -> Inferred:
    """Embed all images and write the output folder.

    Args:
        config: the job.
        with_ray: False embeds here, without actors.

    Raises:
        ValueError: settings, weights, images or output folder that cannot be used; too many bad
            images.
        FileNotFoundError: weights or images do not exist.
        InferenceFailedError: storage or the device failed.
    """
    embedder = load_embedder(config)
    index = open_images(config)
    if "label" in index.annotations:
        embedder.annotations = ("label",)
    facts = {
        "run": config.run,
        "model_name": embedder.probe.model.name,
        "image_size": embedder.probe.data.image_size,
        "classes": list(index.classes),
    }
    return run_inference(
        config,
        embedder,
        index,
        kind="embeddings",
        facts=facts,
        with_ray=with_ray,
        summarise=functools.partial(_draw, config, embedder, index),
    )


def _draw(
    config: EmbedConfig,
    embedder: Embedder,
    index: Index,
    output: InferenceOutput,
    bad: list[BadSample],
) -> None:
    """Add the pictures; what goes wrong with them is told, and costs no row."""
    try:
        if output.num_rows and config.num_pictures:
            output.add_summary(PCA_FILE, _pca(config, embedder, index))
        if output.num_rows > 1 and config.num_neighbours:
            output.add_summary(NEIGHBOURS_FILE, _neighbours(config, embedder, index, len(bad)))
    except Exception as error:  # hours of inference are worth more than the finest picture
        logger.warning("pictures left out: %s: %s", type(error).__name__, error)


def _pca(config: EmbedConfig, embedder: Embedder, index: Index) -> bytes:
    reader = SampleReader(index, config.image_column)
    good = read_crops(reader, embedder.load, range(len(reader)))
    crops = [crop for _, crop in islice(good, config.num_pictures)]
    size = config.batch_size
    parts = [embedder.maps(crops[i : i + size]) for i in range(0, len(crops), size)]
    return pca_picture(crops, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})


def _neighbours(config: EmbedConfig, embedder: Embedder, index: Index, num_bad: int) -> bytes:
    gallery = VectorFiles(config.out, config.retrieve_by)
    queries = evenly_spread(len(gallery), NUM_QUERIES)
    k = min(config.num_neighbours, len(gallery) - 1)
    found = nearest(gallery.read(queries), gallery, k, own_rows=queries)
    reader = SampleReader(index, config.image_column)
    places = index_rows(reader, gallery, sorted({*queries, *found.rows.flat}), num_bad)
    crops = read_crops(reader, embedder.load, sorted(places))
    return neighbours_picture(queries, found, {places[row]: crop for row, crop in crops})


def load_embedder(config: EmbedConfig) -> Embedder:
    """The encoder of a run, with the crops and colours it was trained with.

    Raises:
        ValueError: no weights of an encoder with its neck, or nothing says which variant it is.
        FileNotFoundError: nothing is there.
    """
    weights = read_initial_weights(InitConfig(path=config.run), "run")
    name = config.model_name or weights.model_name
    if not name:
        raise ValueError(
            f"'{config.run}' does not say which variant it is; give the folder of its run, or "
            "--model-name"
        )
    size = config.image_size or weights.image_size or get_variant(name).img_size
    encoder = _encoder(name, size, weights, run_config(config.run))
    data = run_config(config.run).get("data", {})
    probe = probe_config(
        train=config.run,  # the probe reads no data; its config wants a path
        val=config.run,
        image_size=size,
        mean=tuple(data.get("mean", _MEAN)),
        std=tuple(data.get("std", _STD)),
    )
    return Embedder(encoder, apply_overrides(probe, {"model.name": name}))


def _encoder(name: str, image_size: int, weights: InitialWeights, facts: dict[str, Any]) -> ITPN:
    if weights.state is None:
        raise ValueError(f"'{weights.source}' names no weights; give a run or a weights file")
    args = pretrained_encoder_kwargs(name, image_size, weights.state, facts)
    encoder = create_itpn(name, **args)
    report = load_weights(encoder, weights.state)
    if report.new:
        raise ValueError(
            f"{weights.source} lacks {len(report.new)} weights of the encoder, such as "
            f"{report.new[0]}, and its features would be random; give weights of pre-training, "
            "backbone and neck"
        )
    return encoder.eval()
