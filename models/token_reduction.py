"""Fewer tokens in stage 3: the token migration and the token gathering of Fast-iTPN.

The journal version of arXiv:2211.12735 says one sentence about each and the authors released code
of neither: "token migration drops redundant tokens of the backbone and replenishes them in the
feature pyramid without attention operations"; "token gathering reduces the computation of global
attention by introducing a few gathering tokens" beside window attention. Everything beyond these
sentences is **our reading**; each choice is marked `OURS`.

The surprising fact: no weight belongs to migration, and to gathering only `gathering_tokens`. Both
run the blocks there are, so weights of an ordinary trunk load, and the features have the shapes of
an ordinary trunk's. A block whose attention is windowed is computed here from its parts: hooks of
the block itself and of its attention are then not called.
"""

# B batch, N patches, V tokens encoded (N or some), K tokens kept or head dim, G gathering tokens,
# D embed dim, H heads, S tokens of a window

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, attention, scaled


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenMigration:
    """Redundant tokens leave the trunk early and are back in their places at its end.

    OURS: a token is redundant as far as it is similar to the mean token of its image (cosine; no
    parameters, no randomness); they leave at one block, not little by little; they come back with
    the features they had when they left, at the end of stage 3, so that the pyramid, whose layers
    have no attention, is what "replenishes" them.
    """

    after_block: int
    """Block of stage 3, counted from 0, after which tokens leave."""
    keep_ratio: float
    """Share of the encoded tokens that stay, rounded down to a number, at least one."""

    def __post_init__(self) -> None:
        if self.after_block < 0:
            raise ValueError(
                f"after_block={self.after_block} must be >= 0: the blocks of stage 3 are counted "
                "from 0"
            )
        if not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} must be above 0 and at most 1; 0.5 keeps every "
                "second token, 1 all of them"
            )

    def blocks_before(self, depth: int) -> int:
        """Blocks of `depth` that all tokens run through: every one when no token leaves."""
        return depth if self.keep_ratio == 1.0 else self.after_block + 1

    def num_kept(self, num_tokens: int) -> int:
        """Tokens of `num_tokens` that stay, the same for every image."""
        # 0.29 * 100 is 28.999... in floating point, and 29 tokens are meant
        return max(1, int(num_tokens * self.keep_ratio + 1e-6))

    def kept(self, x: Tensor, num_tokens: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which tokens stay.

        Args:
            x: (B, V + G, D), the tokens of the image, then gathering tokens, which always stay.
            num_tokens: V.
            ids: (B, V) raster indices of the tokens of the image, or None for all.

        Returns:
            places (B, K + G) in x, ascending, and raster indices (B, K) of the tokens of the image.
            Of equally redundant tokens the first ones stay.
        """
        tokens = x[:, :num_tokens].detach().float()
        redundancy = F.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=-1)  # (B, V)
        order = redundancy.argsort(dim=1, stable=True)  # the least redundant first
        kept = order[:, : self.num_kept(num_tokens)].sort(dim=1).values
        gathering = torch.arange(num_tokens, x.shape[1], device=x.device).expand(x.shape[0], -1)
        return torch.cat([kept, gathering], dim=1), kept if ids is None else ids.gather(1, kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGathering:
    """Attention inside windows, and a few learned tokens that carry what is seen across them.

    OURS: the windows are squares that do not overlap and are never shifted. The queries of a window
    see its tokens and all gathering tokens; gathering tokens see everything. They run through every
    block of stage 3 as tokens do, have no position, and are left behind at its end.
    """

    window: int
    """Side of a window in tokens."""
    num_tokens: int
    """Gathering tokens; 0 leaves windows that know nothing of each other."""
    global_every: int
    """Every so many blocks one keeps global attention (2: blocks 1, 3, ...); 0: none does."""

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("num_tokens", 0), ("global_every", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(
                    f"{name}={value} must be >= {least}; for ordinary attention build the trunk "
                    "with token_gathering=None"
                )

    def is_global(self, block: int) -> bool:
        """Whether this block of stage 3, counted from 0, attends to all tokens."""
        return self.global_every > 0 and (block + 1) % self.global_every == 0

    def new_tokens(self, embed_dim: int) -> nn.Parameter | None:
        """The learned tokens (1, G, D), still zero; None for none of them."""
        if not self.num_tokens:
            return None
        return nn.Parameter(torch.zeros(1, self.num_tokens, embed_dim))

    def windowed(
        self, blocks: list[Callable[..., Tensor]], grid: tuple[int, int], ids: Tensor | None
    ) -> list[Callable[..., Tensor]]:
        """The blocks of stage 3, their attention inside windows but for the global ones."""
        windows = self.windows(grid, ids)
        return [
            block if self.is_global(i) else partial(windowed_block, block=block, windows=windows)
            for i, block in enumerate(blocks)
        ]

    def windows(self, grid: tuple[int, int], ids: Tensor | None) -> Windows:
        """The windows of a token grid.

        Args:
            grid: tokens in height and width.
            ids: (B, V) raster indices of the encoded tokens, or None for all of them.
        """
        height, width = min(self.window, grid[0]), min(self.window, grid[1])
        if ids is None:
            return Windows(self.num_tokens, grid, (height, width), None)
        row, column = ids // grid[1] // height, ids % grid[1] // width
        window = row * grid[1] + column  # (B, V), a number of its own for every window
        seen = window[:, :, None] == window[:, None, :]  # (B, V, V)
        seen = torch.cat([seen, seen.new_ones(*ids.shape, self.num_tokens)], dim=2)
        return Windows(self.num_tokens, grid, (height, width), seen[:, None])


class Windows(NamedTuple):
    """What the tokens of a sequence see: V tokens of the image, then G gathering tokens."""

    num_gathering: int
    """Gathering tokens at the end of the sequence."""
    grid: tuple[int, int]
    """Tokens of the image in height and width."""
    shape: tuple[int, int]
    """Tokens of a window in height and width, never more than the grid has."""
    seen: Tensor | None
    """(B, 1, V, V + G) bool, True = the query in that row sees that key; None when all tokens are
    there, so that they can be laid out in windows instead."""


def check_options(
    migration: TokenMigration | None,
    gathering: TokenGathering | None,
    depth: int,
    rel_pos_bias: bool,
    decomposed_rel_pos: bool,
) -> None:
    """Raise ValueError unless a trunk with `depth` blocks in stage 3 can do what is asked for."""
    if migration is not None and migration.after_block >= depth - 1:
        raise ValueError(
            f"after_block={migration.after_block} leaves no block for the tokens that stay: stage "
            f"3 has {depth}, counted from 0; use less than {depth - 1}, or token_migration=None"
        )
    if migration is not None and decomposed_rel_pos:
        raise ValueError(
            "decomposed_rel_pos=True with token_migration: decomposed relative positions need all "
            "tokens of an image; use rel_pos_bias=True, or token_migration=None"
        )
    if gathering is not None and (rel_pos_bias or decomposed_rel_pos):
        name = "rel_pos_bias" if rel_pos_bias else "decomposed_rel_pos"
        raise ValueError(
            f"{name}=True with token_gathering: gathering tokens have no place on the grid that "
            f"others could be relative to; use {name}=False, or token_gathering=None"
        )


def laid_out(x: Tensor, kept: Tensor, y: Tensor) -> Tensor:
    """Tokens x (B, L, D) with y (B, K, D) in the places `kept` (B, K), the others as they are."""
    return x.scatter(1, kept[:, :, None].expand_as(y), y)


def windowed_block(x: Tensor, positions: None, *, block: Any, windows: Windows) -> Tensor:
    """What `Block` or `FastBlock` does, with attention inside windows.

    Args:
        x: (B, V + G, D), tokens of the image, then gathering tokens.
        positions: none; every block of stage 3 is called with them.
        block: what to run.
        windows: what each token sees.

    Returns:
        (B, V + G, D).
    """
    attended = windowed_attention(block.norm1(x), block.attn, windows)
    x = x + block.drop_path(scaled(attended, block.gamma_1))
    return x + block.drop_path(scaled(block.mlp(block.norm2(x)), block.gamma_2))


def windowed_attention(x: Tensor, attn: Any, windows: Windows) -> Tensor:
    """Attention of x (B, V + G, D) with the weights of `attn` -> (B, V + G, D)."""
    q, k, v = projections(x, attn)  # each (B, H, V + G, K)
    num_image = x.shape[1] - windows.num_gathering
    q_image, q_gathering = q[:, :, :num_image], q[:, :, num_image:]
    if windows.seen is None:
        image = attention_in_windows(q_image, k, v, windows)
    else:
        image = attention(q_image, k, v, windows.seen)
    if windows.num_gathering:
        gathering = attention(q_gathering, k, v)  # (B, H, G, K)
        image = torch.cat([image, gathering], dim=2)
    return attn.proj(image.transpose(1, 2).flatten(2))


def projections(x: Tensor, attn: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of x (B, L, D), each (B, H, L, K)."""
    if isinstance(attn, Attention):
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
    else:  # FastAttention, whose file imports the trunk, so that it cannot be imported here
        q = F.linear(x, attn.q_proj.weight, attn.q_bias)
        k = F.linear(x, attn.k_proj.weight)
        v = F.linear(x, attn.v_proj.weight, attn.v_bias)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
    return q, k, v


def attention_in_windows(q: Tensor, k: Tensor, v: Tensor, windows: Windows) -> Tensor:
    """Attention of all tokens of the image, laid out in windows.

    Args:
        q: (B, H, N, K), queries of the image in raster order.
        k: (B, H, N + G, K), keys of the image, then of the gathering tokens.
        v: as the keys.
        windows: how the grid is divided.

    Returns:
        (B, H, N, K).
    """
    B, _, N, _ = q.shape
    ones = q.new_ones(1, 1, N, 1)
    is_token = to_windows(ones, windows).bool().transpose(2, 3)  # (windows, 1, 1, S)
    num_windows = is_token.shape[0]
    q = to_windows(q, windows)  # (B * windows, H, S, K)
    k, v = (
        torch.cat(
            [to_windows(x[:, :, :N], windows), x[:, :, N:].repeat_interleave(num_windows, dim=0)],
            dim=2,
        )
        for x in (k, v)
    )  # (B * windows, H, S + G, K)
    # Windows that the grid does not fill are padded rather than refused: detectors and segmenters
    # meet grids of every size. Padding is never a key; its queries are thrown away.
    is_padded = num_windows * is_token.shape[-1] != N
    seen = F.pad(is_token, (0, windows.num_gathering), value=True) if is_padded else None
    seen = None if seen is None else seen.repeat(B, 1, 1, 1)
    return from_windows(attention(q, k, v, seen), windows, B)


def to_windows(x: Tensor, windows: Windows) -> Tensor:
    """x (B, H, N, K) in raster order -> (B * windows, H, S, K), padded with zeros."""
    (h, w), (p, q) = windows.grid, windows.shape
    x = F.pad(x.unflatten(2, (h, w)), (0, 0, 0, -w % q, 0, -h % p))
    x = x.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # (B, H, rows, p, columns, q, K)
    return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5).flatten(0, 2)


def from_windows(x: Tensor, windows: Windows, batch_size: int) -> Tensor:
    """The inverse of `to_windows`; what was padded is dropped."""
    (h, w), (p, q) = windows.grid, windows.shape
    x = x.unflatten(0, (batch_size, -(-h // p), -(-w // q))).unflatten(4, (p, q))
    x = (
        x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    )  # (B, H, rows * p, columns * q, K)
    return x[:, :, :h, :w].flatten(2, 3)
