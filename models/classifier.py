"""ITPNClassifier: mean-pooled HiViT features, norm, linear head (official pixel fine-tuning)."""

# B batch, N patches, D embed dim

from __future__ import annotations

from timm.layers import trunc_normal_
from torch import Tensor, nn

from models.hivit import HiViT


class ITPNClassifier(nn.Module):
    """Image classifier on the backbone; the neck is not used (as in the official fine-tuning).

    Args:
        backbone: usually with `rel_pos_bias=True`, as the official fine-tuning models.
        num_classes: outputs of the head; 0 returns the pooled, normalised features.
        norm_eps: epsilon of the head's LayerNorm.
    """

    def __init__(self, backbone: HiViT, num_classes: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes = num_classes
        self.fc_norm = nn.LayerNorm(backbone.embed_dim, eps=norm_eps)
        self.head = nn.Linear(backbone.embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Head: trunc_normal std 2e-5, bias 0 (official pixel fine-tuning). Norm: 1, 0."""
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> logits (B, num_classes)."""
        x = self.backbone(images)[16].flatten(2).mean(dim=1)  # (B, D)
        return self.head(self.fc_norm(x))
