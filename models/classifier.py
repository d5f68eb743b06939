"""ITPNClassifier: mean-pooled trunk features, norm, linear head (official fine-tuning).

The surprising facts: the neck is not used, and the trunk has no final norm: the only norm after
stage 3 is `fc_norm` on the pooled token. Any image size works, square or not, with the relative
position bias too (the official code raises there: golden/b1*.json).

Its methods are those that timm's models have (`models/timm_models.py` registers them there); as in
timm's other hierarchical models, an intermediate is the output of a stage, not of a block.
"""

# B batch, N patches, D embed dim (a stage's channels once the later stages are pruned)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models.feature_maps import OutputFormat, feature_maps
from models.hivit import STRIDES, HiViT
from models.itpn import create_itpn
from models.layers import init_linear_and_norm

GlobalPool = Literal["avg", ""]
"""As timm: mean over the tokens, or none; there is no class token."""


class ITPNClassifier(nn.Module):
    """Image classifier on the backbone; the neck is not used (as in the official fine-tuning).

    Source: itpn_pixel/models/models_itpn.py (num_outs=1), fast_itpn/modeling_finetune.py.

    Args:
        backbone: HiViT, usually with `rel_pos_bias=True` as the official fine-tuning models, or the
            trunk of Fast-iTPN, which has none.
        num_classes: outputs of the head; 0 returns the pooled, normalised features.
        global_pool: "avg" for the mean of the tokens, "" for all of them.
        use_fc_norm: normalise (`fc_norm`) what was pooled; False normalises (`norm`) the tokens
            before that, as the official Fast-iTPN with use_mean_pooling=False.
        drop_rate: dropout of what the head reads.
        norm_eps: epsilon of the head's LayerNorm.
        head_init_std: standard deviation of the head's initial weights (2e-5 in the official pixel
            fine-tuning, 0.02 in the CLIP one).

    Raises:
        ValueError: num_classes is negative.
    """

    def __init__(
        self,
        backbone: HiViT,
        num_classes: int,
        *,
        global_pool: GlobalPool = "avg",
        use_fc_norm: bool = True,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-6,
        head_init_std: float = 2e-5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_init_std = head_init_std
        norm = nn.LayerNorm(backbone.embed_dim, eps=norm_eps)
        self.norm = nn.Identity() if use_fc_norm else norm
        self.fc_norm = norm if use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self._set_global_pool(global_pool)
        self._build_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Head: trunc_normal std `head_init_std`, bias 0. Norm: 1, 0. Backbone: left alone."""
        for norm in (self.norm, self.fc_norm):
            init_linear_and_norm(norm)
        self._init_head()

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Put a fresh head of `num_classes` outputs on, where the trunk is and in its dtype.

        Args:
            num_classes: outputs; 0 makes the model return the pooled, normalised features.
            global_pool: another way of pooling; None keeps it.

        Raises:
            ValueError: num_classes is negative.
        """
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self._build_head(num_classes)
        self._init_head()

    def _set_global_pool(self, global_pool: GlobalPool) -> None:
        if global_pool not in get_args(GlobalPool):
            raise ValueError(
                f"global_pool={global_pool!r} is unknown; use 'avg', or '' for all tokens (there "
                "is no class token)"
            )
        self.global_pool = global_pool

    def _build_head(self, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be >= 0; 0 builds no head")
        self.num_classes = num_classes
        like = next(self.backbone.parameters())
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(
                self.num_features, num_classes, device=like.device, dtype=like.dtype
            )

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=self.head_init_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The head: Linear, or Identity without classes."""
        return self.head

    @property
    def num_features(self) -> int:
        """Channels D of `forward_features`."""
        return self.backbone.stage_dims[self.backbone.last_stride]

    @property
    def head_hidden_size(self) -> int:
        """Channels the head reads."""
        return self.num_features

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.backbone.in_chans

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and last block of every stage, in timm's form."""
        strides, dims = self.backbone.strides, self.backbone.stage_dims
        ends = (*self.backbone.merges, sum(self.backbone.depths) + 2)
        return [
            {"num_chs": dims[stride], "reduction": stride, "module": f"backbone.blocks.{end - 1}"}
            for stride, end in zip(strides, ends, strict=False)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep only the inputs of the blocks for the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Build the position tables for another image size; see `HiViT.set_input_size`.

        Args:
            img_size: side in pixels, or the same twice; None changes nothing.
            patch_size: only what it is already (timm passes it).

        Raises:
            ValueError: sides that differ, or another patch size.
        """
        height, width = (img_size, img_size) if not isinstance(img_size, Sequence) else img_size
        if patch_size not in (None, self.backbone.patch_size) or height != width:
            raise ValueError(
                f"img_size={img_size}, patch_size={patch_size}: the position tables are square and "
                f"the patch size stays {self.backbone.patch_size}; pass one side, or feed images "
                "of any size without calling this"
            )
        if height is not None:
            self.backbone.set_input_size(height)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates in timm's form; see `HiViT.group_matcher`."""
        return self.backbone.group_matcher(coarse, prefix=r"backbone\.")

    def no_weight_decay(self) -> set[str]:
        """Names left undecayed besides biases and 1-D tensors: the position tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D) of stage 3, not normalised but by `norm`."""
        return self._tokens(self.backbone(images))

    def _tokens(self, features: dict[int, Tensor]) -> Tensor:
        last_stride = max(features)
        x = features[last_stride].flatten(1, 3)  # before stage 3 every cell of a token counts
        return self.norm(x) if last_stride == STRIDES[-1] else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: OutputFormat = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage features, with the output of `forward_features` or without.

        Args:
            x: images (B, C, H, W), normalised.
            indices: stages in the order wanted, the last n of them, or None for all: 0, 1, 2 have
                the strides 4, 8, 16.
            norm: must be False: there is a norm for the last stage only.
            stop_early: stop after the last stage wanted; the first output is then that stage's.
            output_fmt: layout of the stages.
            intermediates_only: return the stages alone (the later ones are then not computed).

        Raises:
            ValueError: norm, or an unknown output_fmt.
        """
        if norm:
            raise ValueError("norm=True: only the last stage has a norm; use norm=False")
        strides = self.backbone.strides
        taken, last = feature_take_indices(len(strides), indices)
        stops = stop_early or intermediates_only
        features = self.backbone(x, last_stride=strides[last if stops else -1])
        grid = self.backbone.token_grid(x)
        maps = feature_maps([features[strides[i]] for i in taken], grid, output_fmt)
        return maps if intermediates_only else (self._tokens(features), maps)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = False
    ) -> list[Tensor]:
        """The last n stages or those of the indices n: cells (B, L, d), or reshaped maps NCHW."""
        fmt: OutputFormat = "NCHW" if reshape else "NLC"
        maps = self.forward_intermediates(x, n, norm, output_fmt=fmt, intermediates_only=True)
        assert isinstance(maps, list), "intermediates_only returns a list"
        return maps

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for these stages; returns their indices, none negative.

        Norms and head go with stage 3, whose width they have.
        """
        strides = self.backbone.strides
        taken, last = feature_take_indices(len(strides), indices)
        self.backbone.prune_stages(strides[last])
        ends_early = strides[last] < strides[-1]
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_head or ends_early:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return list(taken)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, D), or the tokens themselves without pooling."""
        return x.mean(dim=1) if self.global_pool == "avg" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) -> logits (B, num_classes), or the pooled features (B, D)."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: (B, C, H, W), normalised; any size, both sides multiples of the patch size.

        Returns:
            logits (B, num_classes).

        Raises:
            ValueError: H or W is not a multiple of the patch size.
        """
        return self.forward_head(self.forward_features(images))


def create_classifier(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    rel_pos_bias: bool = True,
    drop_path_rate: float = 0.0,
    **backbone_kwargs: Any,
) -> ITPNClassifier:
    """Build a named classifier with fresh weights, as the official fine-tuning does.

    Args:
        name: a key of `models.variants.VARIANTS`.
        num_classes: outputs of the head.
        img_size: side in pixels the position tables are built for; None for the variant's own.
        rel_pos_bias: relative position bias (zero at first, so pre-trained behaviour is unchanged).
        drop_path_rate: stochastic depth of the last block (official: 0.15 base, 0.2 large).
        **backbone_kwargs: passed to `create_itpn`, such as init_values.

    Raises:
        ValueError: unknown name, or an image size that is not a multiple of the patch size.
    """
    if img_size is not None:
        backbone_kwargs["img_size"] = img_size
    encoder = create_itpn(
        name, rel_pos_bias=rel_pos_bias, drop_path_rate=drop_path_rate, **backbone_kwargs
    )
    return ITPNClassifier(encoder.backbone, num_classes)
