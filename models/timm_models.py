"""Our models under timm: `register_timm_models()`, then `timm.create_model(name, ...)`.

Every name of `models.variants` gives an `ITPNClassifier`; with `features_only=True` the stages of
the backbone, and with `neck=True` besides the levels of the *pre-trained pyramid*. Loading is in
`timm_weights.py`.

The surprising fact: with `features_only=True` a checkpoint goes into the model inside the wrapper,
under the names that files have. Of timm's own models, `checkpoint_path` only knows the wrapper's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    is_model,
    load_checkpoint,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from models.classifier import GlobalPool, ITPNClassifier
from models.feature_maps import OutputFormat, feature_maps
from models.hivit import STRIDES
from models.itpn import ITPN, create_itpn
from models.timm_weights import filter_checkpoint, load_any_layout
from models.variants import VARIANTS, get_variant


def register_timm_models() -> None:
    """Make every name of `models.variants.VARIANTS` known to timm; calling it again does nothing.

    Raises:
        ValueError: timm has a model of such a name already, or reads checkpoints by unpickling.
    """
    if inspect.signature(load_checkpoint).parameters["weights_only"].default is not True:
        raise ValueError(
            f"timm {timm.__version__} unpickles what checkpoint_path names, and a pickle can run "
            "any code; install timm>=1.0.26, which reads tensors only"
        )
    entrypoints = {name: _entrypoint(name) for name in VARIANTS}
    new = {}
    for name, entrypoint in entrypoints.items():
        if not is_model(name):
            new[name] = entrypoint
        elif model_entrypoint(name).__module__ != __name__:
            raise ValueError(
                f"timm {timm.__version__} has a model {name!r} already "
                f"({model_entrypoint(name).__module__}), which ours would replace; rename ours in "
                "models.variants.VARIANTS"
            )
    for entrypoint in new.values():
        register_model(entrypoint)


def _default_cfg(name: str) -> PretrainedCfg:
    """How images are prepared for a model, and what its parts are called."""
    side = get_variant(name).img_size
    is_clip = "_clip_" in name
    return PretrainedCfg(
        architecture=name,
        input_size=(3, side, side),
        crop_pct=1.0 if side > 224 else 0.875,
        interpolation="bicubic",
        mean=IMAGENET_INCEPTION_MEAN if is_clip else IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_INCEPTION_STD if is_clip else IMAGENET_DEFAULT_STD,
        num_classes=1000,
        first_conv="backbone.patch_embed.proj",
        classifier="head",
        fixed_input_size=False,
    )


# timm's `register_model` looks for this name in the module of the entry point.
default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in VARIANTS})


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    """The function timm calls for a name; it registers a function under its `__name__`."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_timm_model(name, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    return build


def build_timm_model(
    name: str, pretrained: bool = False, *, neck: bool = False, **kwargs: Any
) -> nn.Module:
    """Build a model as timm does; `timm.create_model` calls this.

    Args:
        name: a key of `models.variants.VARIANTS`.
        pretrained: read the weights that `pretrained_cfg` or `pretrained_cfg_overlay` name; none
            are hosted.
        neck: with features_only, the levels of the pyramid instead of the stages of the backbone.
        **kwargs: timm's (features_only, out_indices, pretrained_cfg, ...), the classifier's
            (num_classes, global_pool, drop_rate) and those of `create_itpn` (img_size, in_chans,
            drop_path_rate, rel_pos_bias, ...).

    Raises:
        ValueError: pretrained without a source, neck without features_only, or a feature_cls that
            can not lay cells out as maps.
    """
    overlay = kwargs.get("pretrained_cfg_overlay")
    cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise ValueError(
            f"pretrained=True: no weights are hosted for {name!r}; use pretrained=False with "
            "checkpoint_path=<a .safetensors or .pth file>"
        )
    if neck and not kwargs.get("features_only", False):
        raise ValueError(
            "neck=True gives the levels of the pyramid, which the classifier does not use; add "
            "features_only=True"
        )
    if kwargs.get("feature_cls", "getter") != "getter":
        raise ValueError(
            f"feature_cls={kwargs['feature_cls']!r} would return cells by token, not maps; leave "
            "feature_cls out"
        )
    kwargs.pop("feature_cls", None)
    return build_model_with_cfg(
        partial(_pyramid_levels if neck else _classifier, name),
        name,
        pretrained,
        feature_cfg={"out_indices": len(STRIDES), "feature_cls": FeatureNet},
        pretrained_filter_fn=partial(filter_checkpoint, num_classes=cfg.num_classes),
        kwargs_filter=("num_classes", "global_pool", "drop_rate") if neck else None,
        **kwargs,
    )


def _encoder(name: str, *, img_size: int | Sequence[int] | None = None, **kwargs: Any) -> ITPN:
    # Zero at first, so the tables change nothing unless a file has them.
    kwargs.setdefault("rel_pos_bias", not get_variant(name).fast)
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height != width:
            raise ValueError(
                f"img_size={img_size}: the position tables are square; pass one side, the model "
                "takes images of any size"
            )
        kwargs["img_size"] = height
    return create_itpn(name, **kwargs)


def _classifier(
    name: str,
    *,
    num_classes: int,
    global_pool: GlobalPool = "avg",
    drop_rate: float = 0.0,
    **kwargs: Any,
) -> TimmClassifier:
    backbone = _encoder(name, **kwargs).backbone
    return TimmClassifier(backbone, num_classes, global_pool=global_pool, drop_rate=drop_rate)


def _pyramid_levels(name: str, **kwargs: Any) -> PyramidLevels:
    encoder = _encoder(name, **kwargs)
    return PyramidLevels(encoder.backbone, encoder.pyramid)


class TimmClassifier(ITPNClassifier):
    """ITPNClassifier whose `load_state_dict` reads every layout, since timm has no other hook."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `load_any_layout` where strict, else as torch."""
        if not strict or assign:
            return super().load_state_dict(state_dict, strict, assign)
        return load_any_layout(self, state_dict)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """As of the classifier; `timm.models.save_for_hf` then writes the size down."""
        super().set_input_size(img_size, patch_size)
        self._model_args = {**getattr(self, "_model_args", {}), "img_size": self.backbone.img_size}


class PyramidLevels(ITPN):
    """The pre-trained pyramid where timm expects intermediates: 0, 1, 2 of strides 4, 8, 16.

    The pyramid works from the coarsest level down, so nothing is left out for fewer levels.
    """

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.backbone.in_chans

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and output module of every level, in timm's form."""
        modules = [f"pyramid.fpn_modules.{i}" for i in (2, 1, 0)]  # the coarsest comes first
        return [
            {"num_chs": self.pyramid.fpn_dim, "reduction": stride, "module": module}
            for stride, module in zip(STRIDES, modules, strict=True)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in the backbone."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutputFormat = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Levels, with the tokens (B, N, D) of the backbone or without.

        Args:
            x: images (B, C, H, W), normalised.
            indices: levels in the order wanted, the last n of them, or None for all.
            norm: must be False: the levels are what the heads read.
            stop_early: changes nothing: the finest level needs all others.
            output_fmt: layout of the levels.
            intermediates_only: return the levels alone.

        Raises:
            ValueError: norm, or an unknown output_fmt.
        """
        if norm:
            raise ValueError("norm=True: the pyramid ends without a norm; use norm=False")
        taken, _ = feature_take_indices(len(STRIDES), indices)
        features = self(x)
        levels = [features.pyramid[STRIDES[i]] for i in taken]
        maps = feature_maps(levels, self.backbone.token_grid(x), output_fmt)
        return maps if intermediates_only else (features.stages[16].flatten(1, 3), maps)


class FeatureNet(FeatureGetterNet):
    """timm's wrapper of features_only, with checkpoints going into the model inside."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory."""
        self.model.set_grad_checkpointing(enable)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Its own keys (`model.*`) as torch, others as `load_any_layout` where strict."""
        is_own = all(key.startswith("model.") for key in state_dict)
        if is_own or not strict or assign:
            return super().load_state_dict(state_dict, strict, assign)
        return load_any_layout(self.model, state_dict)
