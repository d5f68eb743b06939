"""A trained model and what its run says of it: what every form of an export starts from.

Surprising: facts of a run (its recipe, figures, commit) are wanted, not needed. A weights file that
was copied away from its run is exported too; its model card then says that they are not known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pyarrow import fs
from torch import nn

from models.detector import ITPNDetector
from models.itpn import ITPN, create_itpn
from models.segmenter import ITPNSegmenter
from models.variants import get_variant
from models.weights import load_weights
from pipeline import storage
from pipeline.config import PATCH_SIZE, InitConfig
from pipeline.downstream.finetuned import load_finetuned
from pipeline.encoder_settings import plain_encoder_kwargs, pretrained_encoder_kwargs
from pipeline.finetune_config import DetectConfig, FinetuneConfig, SegmentConfig, task_of
from pipeline.init_weights import read_initial_weights, run_config

Kind = Literal["encoder", "classifier", "segmenter", "detector"]
KIND_OF_TASK: dict[str, Kind] = {
    "classify": "classifier",
    "segment": "segmenter",
    "detect": "detector",
}
SUMMARY_FILE, ENVIRONMENT_FILE = "summary.json", "environment.json"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # where no run says others


class ExportFailedError(RuntimeError):
    """A form could not be made, or does not do what the model does."""


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model in eval mode on the CPU, and the facts a user of it needs."""

    kind: Kind
    model: nn.Module
    """ITPN, ITPNClassifier, ITPNSegmenter or ITPNDetector."""
    model_name: str
    """A variant of models/variants.py."""
    model_args: Mapping[str, Any]
    """What `create_itpn`, `create_classifier`, ... build the same model from, beside the name."""
    image_size: int
    """Side in pixels of the crops of training."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    """Name of the run, or of the weights file."""
    classes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Of the run, with every default; empty when nothing says."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Figures of these weights; empty when nothing says."""
    commit: str = "not known"
    """Of the code the run was trained with."""

    @property
    def encoder(self) -> ITPN | None:
        """Backbone and neck; None of a classifier, which has no neck."""
        if isinstance(self.model, ITPN):
            return self.model
        if isinstance(self.model, ITPNSegmenter):
            return self.model.encoder
        if isinstance(self.model, ITPNDetector):
            encoder: ITPN = self.model.backbone.encoder
            return encoder
        return None

    @property
    def backbone(self) -> Any:
        """The trunk, a HiViT."""
        return (self.encoder or self.model).backbone

    @property
    def encoder_args(self) -> dict[str, Any]:
        """What `create_itpn` builds the same encoder from, beside the name."""
        backbone = self.backbone
        args = {
            "img_size": backbone.img_size,
            "pos_embed_size": backbone.pos_embed_grid[0] * backbone.patch_size,
            "rel_pos_bias": backbone.rel_pos_bias,
            "decomposed_rel_pos": backbone.decomposed_rel_pos,
        }
        for key in ("token_migration", "token_gathering"):
            if (option := getattr(backbone, key)) is not None:
                args[key] = asdict(option)
        if self.encoder is not None:
            pyramid = self.encoder.pyramid
            args |= {"fpn_dim": pyramid.fpn_dim, "fpn_depth": pyramid.fpn_depth}
        return args


def load_exportable(run: str, *, model_name: str = "", image_size: int = 0) -> Exportable:
    """Load what is to be exported.

    Args:
        run: folder of a run of pre-training or fine-tuning, a checkpoint of pre-training, or a
            weights file of an encoder.
        model_name: variant of an encoder; empty: the one of its run.
        image_size: side in pixels an encoder is exported for; 0: that of its run.

    Raises:
        ValueError: it holds no whole model, or nothing says which variant it is.
        FileNotFoundError: nothing is there.
    """
    run = run.rstrip("/")
    config = run_config(run)
    task = task_of(config)
    if task is None:
        return _pretrained(run, config, model_name, image_size)
    for setting, value in (("--model-name", model_name), ("--image-size", image_size)):
        if value:
            raise ValueError(
                f"{setting} {value} is for encoders, but '{run}' is of a fine-tuning run, which "
                "says that itself; leave it out"
            )
    if not _facts(run, "config.json"):
        raise ValueError(
            f"'{run}' is only a part of a fine-tuning run; give the folder of the finished run"
        )
    return _finetuned(run)


def _pretrained(run: str, config: dict[str, Any], model_name: str, image_size: int) -> Exportable:
    if run == "scratch":
        raise ValueError("'scratch' names no weights; give a run or a weights file")
    if image_size < 0 or image_size % PATCH_SIZE:
        raise ValueError(
            f"--image-size {image_size} is not a multiple of {PATCH_SIZE}; use e.g. 224, or 0 for "
            "that of pre-training"
        )
    weights = read_initial_weights(InitConfig(path=run), "run")
    assert weights.state is not None, "only 'scratch' has none"
    name = model_name or weights.model_name
    if not name:
        raise ValueError(
            f"'{run}' does not say which variant it is; give the folder of its run, or --model-name"
        )
    size = image_size or weights.image_size or get_variant(name).img_size
    args = pretrained_encoder_kwargs(name, size, weights.state, config)
    encoder = create_itpn(name, **args)
    if new := load_weights(encoder, weights.state).new:
        raise ValueError(
            f"'{run}' lacks {len(new)} weights of the encoder, such as {new[0]}, and they would be "
            "exported random; give weights of pre-training, backbone and neck"
        )
    data = config.get("data", {})
    return Exportable(
        kind="encoder",
        model=encoder.eval(),
        model_name=name,
        model_args=args,
        image_size=size,
        mean=tuple(data.get("mean", _MEAN)),
        std=tuple(data.get("std", _STD)),
        source=config.get("run", {}).get("name") or run.rsplit("/", 1)[-1],
        config=config,
        summary=_facts(run, SUMMARY_FILE),
        commit=_commit(run),
    )


def _finetuned(run: str) -> Exportable:
    finetuned = load_finetuned(run)
    config = finetuned.config
    return Exportable(
        kind=KIND_OF_TASK[config.task],
        model=finetuned.model,
        model_name=config.model_name,
        model_args=_downstream_args(config, finetuned),
        image_size=config.data.image_size,
        mean=config.data.mean,
        std=config.data.std,
        source=config.run.name,
        classes=finetuned.classes,
        config=run_config(run),
        summary=_facts(run, SUMMARY_FILE),
        commit=_commit(run),
    )


def _downstream_args(config: FinetuneConfig, finetuned: Any) -> dict[str, Any]:
    """As `DownstreamTask.build`, without what matters in training only."""
    args: dict[str, Any] = {
        "num_classes": len(finetuned.classes),
        "rel_pos_bias": config.model.rel_pos_bias,
        "decomposed_rel_pos": config.model.decomposed_rel_pos,
    }
    encoder = plain_encoder_kwargs(config.model)
    if isinstance(config, DetectConfig):
        detector = config.detector
        return args | {
            "encoder_kwargs": encoder,
            "kind": detector.kind,
            "pos_embed_size": finetuned.task.pretrain_size,
            "head_dim": detector.head_dim,
            "fc_dim": detector.fc_dim,
            "min_size": detector.eval_min_size,
            "max_size": detector.max_size,
            "image_mean": config.data.mean,
            "image_std": config.data.std,
        }
    args |= encoder
    args["img_size"] = config.data.image_size
    if isinstance(config, SegmentConfig):
        args["pos_embed_size"] = finetuned.task.pretrain_size
        args["channels"] = config.segmenter.channels
    return args


def _commit(run: str) -> str:
    """Of the run, also where `run` is one of its checkpoints or its weights file."""
    for folder in (run, run.rpartition("/")[0], "/".join(run.split("/")[:-2])):
        if facts := _facts(folder, ENVIRONMENT_FILE):
            return str(facts.get("git_commit", "not known"))
    return "not known"


def _facts(folder: str, name: str) -> dict[str, Any]:
    """A small JSON file of a folder; empty where there is none."""
    if not folder:
        return {}
    filesystem, root = storage.resolve(folder)
    file = f"{root}/{name}"
    if storage.info_of(filesystem, file).type != fs.FileType.File:
        return {}
    values: dict[str, Any] = json.loads(storage.read_bytes(filesystem, file))
    return values
