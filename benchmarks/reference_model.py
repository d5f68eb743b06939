"""The official arithmetic of a pre-training step, written plainly, for `bench_model.py`.

Eager and unfused throughout, as the released pixel code computes it (facts of its arithmetic, none
of its text): the whole image is embedded before visible tokens are picked, attention has an
explicit softmax, merges slice and concatenate, every level of the decoder is filled up with mask
tokens and unshuffled, pixels are predicted at every position and the loss masks them afterwards,
AdamW and the moving average go from parameter to parameter. No code of MFM was ever released: here
it is our objective in the same plain way.

Surprising: the names are those of `PretrainingModel`, so its weights load, and the two must agree
on losses and gradients (tests/benchmarks/test_bench_model.py).
"""

# B batch, N patches, V tokens encoded, D embed dim, H heads, K head dim, c cells per token side

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pos_embed import resize_pos_embed
from models.pretraining import PretrainingModel

EPS = 1e-6


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, V, D = x.shape
        qkv = self.qkv(x).reshape(B, V, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, V, K)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, V, D))


class Block(nn.Module):
    """With attention when `num_heads` is given; without, the block of stages 1-2 and the neck."""

    def __init__(self, dim: int, hidden: int, num_heads: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS) if num_heads else None
        self.attn = Attention(dim, num_heads) if num_heads else None
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=EPS), Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int, cell: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=cell, stride=cell)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(images)  # (B, d, 4h, 4w)
        B, d, h, w = x.shape
        x = x.view(B, d, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        return self.norm(x.reshape(B, h * w // 16, 4, 4, d))


class PatchMerge(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class PatchSplit(nn.Module):
    def __init__(self, dim: int, fpn_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.reduction = nn.Linear(dim, 4 * fpn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, V, c, _, _ = x.shape
        x = self.reduction(self.norm(x)).reshape(B, V, c, c, 2, 2, -1)
        return x.permute(0, 1, 2, 4, 3, 5, 6).reshape(B, V, 2 * c, 2 * c, -1)


class Backbone(nn.Module):
    def __init__(self, ours: PretrainingModel) -> None:
        super().__init__()
        theirs = ours.encoder.backbone
        D, (one, two, three) = theirs.embed_dim, theirs.depths
        block = theirs.attention_blocks[0]
        heads, hidden = block.attn.num_heads, block.mlp.fc1.out_features
        self.grid, self.first_attention = theirs.grid, one + two + 2
        self.patch_embed = PatchEmbed(theirs.in_chans, D // 4, theirs.patch_size // 4)
        self.pos_embed = nn.Parameter(torch.zeros_like(theirs.pos_embed))
        self.blocks = nn.ModuleList(
            [
                *(Block(D // 4, D // 4 * 3) for _ in range(one)),
                PatchMerge(D // 4),
                *(Block(D // 2, D // 2 * 3) for _ in range(two)),
                PatchMerge(D // 2),
                *(Block(D, hidden, heads) for _ in range(three)),
            ]
        )

    def forward(self, images: Tensor, ids: Tensor) -> dict[int, Tensor]:
        x = self.patch_embed(images)  # (B, N, 4, 4, D/4): every token, the hidden ones too
        x = x.gather(1, ids[:, :, None, None, None].expand(-1, -1, *x.shape[2:]))
        features = {}
        for i, block in enumerate(self.blocks):
            if isinstance(block, PatchMerge):
                features[16 // x.shape[2]] = x
            if i == self.first_attention:
                # the official code resamples the table of a masked image at its own size, too
                table = resize_pos_embed(
                    self.pos_embed, self.grid, "scale_factor", even_if_equal=True
                )
                table = table.expand(x.shape[0], -1, -1)
                positions = table.gather(1, ids[:, :, None].expand(-1, -1, table.shape[2]))
                x = x[:, :, 0, 0] + positions
            x = block(x)
        features[16] = x[:, :, None, None]
        return features


class Pyramid(nn.Module):
    def __init__(self, ours: PretrainingModel) -> None:
        super().__init__()
        theirs = ours.encoder.pyramid
        fpn_dim, depth, dims = theirs.fpn_dim, theirs.fpn_depth, ours.encoder.backbone.stage_dims

        def blocks(number: int) -> nn.ModuleList:
            return nn.ModuleList(Block(fpn_dim, 4 * fpn_dim) for _ in range(number))

        self.align_dim_16tofpn = nn.Linear(dims[16], fpn_dim)
        self.align_dim_16to8 = nn.Linear(dims[8], fpn_dim, bias=False)
        self.split_16to8 = PatchSplit(dims[16], fpn_dim)
        self.block_16to8 = blocks(depth)
        self.align_dim_8to4 = nn.Linear(dims[4], fpn_dim, bias=False)
        self.split_8to4 = PatchSplit(fpn_dim, fpn_dim)
        self.block_8to4 = blocks(depth)
        self.fpn_modules = blocks(3)

    def forward(self, features: dict[int, Tensor]) -> list[Tensor]:
        p16 = self.align_dim_16tofpn(features[16])
        p8 = self.split_16to8(features[16]) + self.align_dim_16to8(features[8])
        for block in self.block_16to8:
            p8 = block(p8)
        p4 = self.split_8to4(p8) + self.align_dim_8to4(features[4])
        for block in self.block_8to4:
            p4 = block(p4)
        return [out(x) for out, x in zip(self.fpn_modules, (p16, p8, p4), strict=True)]


class Decoder(nn.Module):
    def __init__(self, ours: PretrainingModel) -> None:
        super().__init__()
        theirs = ours.decoder
        D, fpn_dim = theirs.dim, ours.encoder.pyramid.fpn_dim
        block = theirs.blocks[0]
        self.embed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(fpn_dim, eps=EPS), nn.Linear(fpn_dim, D // cells))
            for cells in (1, 4, 16)
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros_like(theirs.pos_embed), requires_grad=False)
        hidden, heads = block.mlp.fc1.out_features, block.attn.num_heads
        self.blocks = nn.ModuleList(Block(D, hidden, heads) for _ in theirs.blocks)
        self.norm = nn.LayerNorm(D, eps=EPS)

    def forward(self, pyramid: list[Tensor], restore: Tensor) -> Tensor:
        x: Tensor | int = 0
        for embed, level in zip(self.embed, pyramid, strict=True):
            tokens = embed(level).flatten(2)  # (B, V, D)
            B, V, D = tokens.shape
            tokens = torch.cat([tokens, self.mask_token.expand(B, restore.shape[1] - V, -1)], dim=1)
            x = x + tokens.gather(1, restore[:, :, None].expand(-1, -1, D))
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Encoder(nn.Module):
    def __init__(self, ours: PretrainingModel) -> None:
        super().__init__()
        self.backbone, self.pyramid = Backbone(ours), Pyramid(ours)


class ReferenceModel(nn.Module):
    """Takes over the weights of a PretrainingModel of the pixel family; pixels are normalised."""

    def __init__(self, ours: PretrainingModel) -> None:
        super().__init__()
        self.patch_size, self.mfm_weight = ours.encoder.backbone.patch_size, ours.mfm_weight
        self.encoder, self.decoder = Encoder(ours), Decoder(ours)
        self.mim, self.mfm = copy.deepcopy(ours.mim), copy.deepcopy(ours.mfm)
        self.load_state_dict(ours.state_dict())

    def forward(
        self, images: Tensor, mask: Tensor, targets: dict[int, Tensor] | None = None
    ) -> Tensor:
        """The loss.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, N) bool, True = masked.
            targets: {stride: (B, M, c, c, d)} of the teacher at the hidden positions.
        """
        order = mask.int().argsort(dim=1, stable=True)
        num_visible = int((~mask[0]).sum())
        stages = self.encoder.backbone(images, order[:, :num_visible])
        latent = self.decoder(self.encoder.pyramid(stages), order.argsort(dim=1))  # (B, N, D)
        share = mask.float() / mask.sum()
        pred = self.mim.pred(latent)  # (B, N, P*P*C)
        error = ((pred - self.pixel_targets(images)) ** 2).mean(dim=-1)
        loss = (error * share).sum()
        for stride, features in (targets or {}).items():
            pred = self.mfm.pred[str(stride)](latent)
            target = torch.zeros_like(pred)
            where = order[:, num_visible:, None].expand(-1, -1, pred.shape[2])
            flat = F.layer_norm(features, features.shape[-1:]).flatten(2)
            target.scatter_(1, where, flat.to(target.dtype))
            loss = loss + self.mfm_weight * (((pred - target) ** 2).mean(dim=-1) * share).sum()
        return loss

    def pixel_targets(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        P = self.patch_size
        x = images.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(B, -1, P * P * C)
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()


class ReferenceTeacher(nn.Module):
    """Moving average of the reference's backbone, on the hidden patches."""

    def __init__(self, student: ReferenceModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(student.encoder.backbone).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor) -> dict[int, Tensor]:
        order = mask.int().argsort(dim=1, stable=True)
        return self.backbone(images, order[:, int((~mask[0]).sum()) :])

    @torch.no_grad()
    def update(self, student: ReferenceModel, momentum: float) -> None:
        pairs = zip(self.backbone.parameters(), student.encoder.backbone.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.mul_(momentum).add_(theirs, alpha=1 - momentum)
