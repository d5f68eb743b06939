"""ITPNClassifier: mean-pooled HiViT features, norm, linear head (official pixel fine-tuning).

The surprising facts: the neck is not used, and the trunk has no final norm: the only norm after
stage 3 is `fc_norm` on the pooled token. Any image size works, square or not, with the relative
position bias too (the official code raises there: golden/b1*.json).
"""

# B batch, N patches, D embed dim

from __future__ import annotations

from typing import Any

from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.hivit import HiViT
from models.itpn import create_itpn


class ITPNClassifier(nn.Module):
    """Image classifier on the backbone; the neck is not used (as in the official fine-tuning).

    Source: itpn_pixel/models/models_itpn.py (num_outs=1).

    Args:
        backbone: usually with `rel_pos_bias=True`, as the official fine-tuning models.
        num_classes: outputs of the head; 0 returns the pooled, normalised features.
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
        norm_eps: float = 1e-6,
        head_init_std: float = 2e-5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head_init_std = head_init_std
        self.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=norm_eps)
        self._build_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Head: trunc_normal std `head_init_std`, bias 0. Norm: 1, 0. Backbone: left alone."""
        nn.init.ones_(self.fc_norm.weight)
        nn.init.zeros_(self.fc_norm.bias)
        self._init_head()

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head of `num_classes` outputs on, on the device and in the dtype of the norm.

        Args:
            num_classes: outputs; 0 makes the model return the pooled, normalised features.

        Raises:
            ValueError: num_classes is negative.
        """
        self._build_head(num_classes)
        self._init_head()

    def _build_head(self, num_classes: int) -> None:
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be >= 0; 0 builds no head")
        self.num_classes = num_classes
        weight = self.fc_norm.weight
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Linear(
                self.backbone.embed_dim, num_classes, device=weight.device, dtype=weight.dtype
            )

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=self.head_init_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The head: Linear, or Identity without classes."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning rates in timm's form; see `HiViT.group_matcher`."""
        return self.backbone.group_matcher(coarse, prefix=r"backbone\.")

    def no_weight_decay(self) -> set[str]:
        """Names left undecayed besides biases and 1-D tensors: the position tables."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> tokens (B, N, D) of stage 3, not normalised."""
        return self.backbone(images)[16].flatten(2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) -> logits (B, num_classes), or the normalised mean (B, D)."""
        x = self.fc_norm(x.mean(dim=1))
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
    init_values: float | None = None,
) -> ITPNClassifier:
    """Build a named classifier with fresh weights, as the official fine-tuning does.

    Args:
        name: a key of `models.variants.VARIANTS`.
        num_classes: outputs of the head.
        img_size: side in pixels the position tables are built for; None for the variant's own.
        rel_pos_bias: relative position bias (zero at first, so pre-trained behaviour is unchanged).
        drop_path_rate: stochastic depth of the last block (official: 0.15 base, 0.2 large).
        init_values: initial layer scale, None for none.

    Raises:
        ValueError: unknown name, or an image size that is not a multiple of the patch size.
    """
    kwargs: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    encoder = create_itpn(
        name,
        rel_pos_bias=rel_pos_bias,
        drop_path_rate=drop_path_rate,
        init_values=init_values,
        **kwargs,
    )
    return ITPNClassifier(encoder.backbone, num_classes)
