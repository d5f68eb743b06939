"""Token migration and token gathering: what leaves, what comes back, who sees whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.fast_itpn import FAST_LAYERS
from models.hivit import HiViT, TrunkLayers
from models.itpn import create_itpn
from models.pretraining import create_pretraining_model
from models.token_reduction import (
    TokenGathering,
    TokenMigration,
    Windows,
    from_windows,
    laid_out,
    to_windows,
)
from models.tokens import gather_tokens, split_tokens
from models.weights import load_weights
from tests.models import tiny

# float32 sums of other lengths or in another order, on activations of order one
ATOL = 2e-5
DEPTH = 3
TRUNKS = {"hivit": TrunkLayers(), "fast_itpn": FAST_LAYERS}
MIGRATION = TokenMigration(after_block=0, keep_ratio=0.5)
GATHERING = TokenGathering(window=2, num_tokens=3, global_every=0)


def trunk(layers: str = "hivit", **kwargs: Any) -> HiViT:
    """A trunk with three attention blocks and the same weights whatever the options are."""
    torch.manual_seed(0)  # parameters of norms and biases start constant, so randomize says more
    defaults = {"depths": (1, 1, DEPTH), "init_values": 0.5, "layers": TRUNKS[layers]}
    plain = tiny.backbone(
        **{**defaults, **kwargs, "token_migration": None, "token_gathering": None}
    )
    model = tiny.backbone(**{**defaults, **kwargs})
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def visible_ids() -> Tensor:
    """Six tokens of each of two images, different ones."""
    noise = torch.rand(2, tiny.NUM_PATCHES, generator=torch.Generator().manual_seed(5))
    return noise.argsort(dim=1)[:, :6].sort(dim=1).values


def record_outputs(module: nn.Module) -> list[Tensor]:
    outputs: list[Tensor] = []
    module.register_forward_hook(lambda _, __, output: outputs.append(output))
    return outputs


# ---- migration: which tokens leave ----


def test_tokens_most_similar_to_the_mean_leave_and_of_equal_ones_the_last():
    # The mean is (1, 1) / 4 times something positive. Cosines to it: 1 for (1, 1) and (2, 2),
    # 1 / sqrt 2 for (1, 0) and (0, 1), and -1 / sqrt 2 for (0, -1), (-1, 0).
    x = torch.tensor([[[1, 1], [1, 0], [2, 2], [0, -1], [0, 1], [-1, 0], [1, 0], [0, 1]]]).float()
    for num_kept, expected in [
        (1, [3]),
        (2, [3, 5]),
        (4, [1, 3, 4, 5]),
        (6, [1, 3, 4, 5, 6, 7]),
        (7, [0, 1, 3, 4, 5, 6, 7]),
    ]:
        migration = TokenMigration(after_block=0, keep_ratio=num_kept / 8)
        places, ids = migration.kept(x, 8)
        assert places.tolist() == ids.tolist() == [expected]


def test_raster_indices_of_some_tokens_follow_and_gathering_tokens_stay():
    x = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])  # the last one gathers
    migration = TokenMigration(after_block=0, keep_ratio=0.7)
    places, ids = migration.kept(x, 3, torch.tensor([[4, 7, 9]]))
    assert places.tolist() == [[1, 2, 3]]
    assert ids.tolist() == [[7, 9]]


@pytest.mark.parametrize(
    ("keep_ratio", "num_tokens", "expected"),
    [(0.5, 16, 8), (0.5, 7, 3), (0.29, 100, 29), (0.7, 10, 7), (0.01, 16, 1), (1.0, 49, 49)],
)
def test_the_number_that_stays_is_rounded_down_to_at_least_one(
    keep_ratio: float, num_tokens: int, expected: int
):
    assert TokenMigration(after_block=0, keep_ratio=keep_ratio).num_kept(num_tokens) == expected


def test_tokens_are_laid_out_again_in_their_places():
    x, y = torch.zeros(2, 4, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    out = laid_out(x, torch.tensor([[0, 3], [1, 2]]), y)
    assert out[..., 0].tolist() == [[1, 0, 0, 2], [0, 3, 4, 0]]


# ---- migration in the trunk ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"rel_pos_bias": True}, {"layers": "fast_itpn"}])
def test_keeping_all_tokens_is_the_ordinary_trunk_bit_for_bit(masked: bool, kwargs: dict[str, Any]):
    images, ids = tiny.images(), visible_ids() if masked else None
    migration = TokenMigration(after_block=0, keep_ratio=1.0)
    expected = trunk(**kwargs)(images, ids)
    found = trunk(token_migration=migration, **kwargs)(images, ids)
    assert all(torch.equal(found[stride], expected[stride]) for stride in tiny.STRIDES)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kwargs", [{}, {"rel_pos_bias": True}, {"layers": "fast_itpn"}])
def test_migration_is_the_rest_of_the_trunk_on_the_tokens_that_stay(
    masked: bool, kwargs: dict[str, Any]
):
    """Against the same blocks called one by one on one image."""
    images, ids = tiny.images(), visible_ids() if masked else None
    model = trunk(token_migration=MIGRATION, **kwargs)
    found, blocks = model(images, ids), list(model.attention_blocks)
    for b in range(2):
        own = None if ids is None else ids[b : b + 1]
        raster = torch.arange(tiny.NUM_PATCHES)[None] if own is None else own
        _, x = model.forward_cells(model.patch_embed(images[b : b + 1], own))
        x = model.add_positions(x, (4, 4), own)
        left = blocks[0](x, model.relative_positions((4, 4), own, x.device))
        cosine = torch.cosine_similarity(left, left.mean(dim=1, keepdim=True), dim=-1)[0]
        stays = sorted(cosine.topk(raster.shape[1] // 2, largest=False).indices.tolist())
        leaves = sorted(set(range(raster.shape[1])) - set(stays))
        y = left[:, stays]
        for block in blocks[1:]:
            y = block(y, model.relative_positions((4, 4), raster[:, stays], x.device))
        out = found[16][b : b + 1].flatten(1, 3)
        torch.testing.assert_close(out[:, stays], y, atol=ATOL, rtol=0)
        torch.testing.assert_close(out[:, leaves], left[:, leaves], atol=ATOL, rtol=0)


def test_tokens_that_left_keep_their_features_exactly():
    model = trunk(token_migration=MIGRATION)
    first, last = (record_outputs(model.attention_blocks[i]) for i in (0, -1))
    out = model(tiny.images())[16].flatten(1, 3)
    kept, _ = MIGRATION.kept(first[0], tiny.NUM_PATCHES)
    assert torch.equal(gather_tokens(out, kept), last[0])
    _, leaves = split_tokens(torch.ones(2, tiny.NUM_PATCHES).scatter(1, kept, 0).bool())
    assert torch.equal(gather_tokens(out, leaves), gather_tokens(first[0], leaves))
    assert not torch.equal(kept[0], kept[1])  # or the test would not see a mix-up of images


@pytest.mark.parametrize("masked", [False, True])
def test_migration_changes_no_shape_and_nothing_before_stage_3(masked: bool):
    images, ids = tiny.images(), visible_ids() if masked else None
    plain, found = trunk()(images, ids), trunk(token_migration=MIGRATION)(images, ids)
    assert {s: f.shape for s, f in found.items()} == {s: f.shape for s, f in plain.items()}
    assert torch.equal(found[4], plain[4]) and torch.equal(found[8], plain[8])
    assert not torch.allclose(found[16], plain[16])


# ---- gathering: who sees whom ----


@pytest.mark.parametrize("layers", TRUNKS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [4, 7])
def test_one_window_without_gathering_tokens_is_the_ordinary_trunk(
    layers: str, masked: bool, window: int
):
    gathering = TokenGathering(window=window, num_tokens=0, global_every=0)
    images, ids = tiny.images(), visible_ids() if masked else None
    expected = trunk(layers)(images, ids)[16]
    found = trunk(layers, token_gathering=gathering)(images, ids)[16]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("layers", TRUNKS)
def test_one_window_with_gathering_tokens_is_global_attention_over_both(layers: str):
    """The ordinary blocks on the sequence with the gathering tokens appended."""
    model = trunk(layers, token_gathering=TokenGathering(window=4, num_tokens=3, global_every=0))
    images = tiny.images()
    _, x = model.forward_cells(model.patch_embed(images))
    x = torch.cat([model.add_positions(x, (4, 4)), model.gathering_tokens.expand(2, -1, -1)], dim=1)
    for block in model.attention_blocks:
        x = block(x)
    found = model(images)[16].flatten(1, 3)
    torch.testing.assert_close(found, x[:, : tiny.NUM_PATCHES], atol=ATOL, rtol=0)


@pytest.mark.parametrize("layers", TRUNKS)
@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (16, 64)])
@pytest.mark.parametrize("window", [2, 3])
def test_windows_and_mask_agree_on_all_tokens(
    layers: str, num_tokens: int, height: int, width: int, window: int
):
    gathering = TokenGathering(window=window, num_tokens=num_tokens, global_every=0)
    model = trunk(layers, token_gathering=gathering)
    grid = (height // 16, width // 16)
    x = torch.randn(2, grid[0] * grid[1], 16, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(x.shape[1]).expand(2, -1)
    dense, masked = (model.forward_attention(x, grid, which) for which in (None, ids))
    torch.testing.assert_close(dense, masked, atol=ATOL, rtol=0)


def test_the_order_of_visible_tokens_does_not_matter():
    model, images, ids = trunk(token_gathering=GATHERING), tiny.images(), visible_ids()
    expected = model(images, ids)[16].flip(1)
    torch.testing.assert_close(model(images, ids.flip(1))[16], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("window", [2, 3])
def test_windows_laid_out_and_back_are_the_tokens(window: int):
    windows = Windows(0, (4, 5), (window, window), None)
    x = torch.arange(20.0).reshape(1, 1, 20, 1).expand(3, 2, -1, 4)
    laid = to_windows(x, windows)
    assert torch.equal(from_windows(laid, windows, 3), x)
    if window == 2:  # 2 x 3 windows, the last column of them half full
        assert laid.shape == (18, 2, 4, 4)
        assert laid[0, 0, :, 0].tolist() == [0, 1, 5, 6]
        assert laid[2, 0, :, 0].tolist() == [4, 0, 9, 0]
        assert laid[4, 0, :, 0].tolist() == [12, 13, 17, 18]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "global_every", "crosses"),
    [(0, 0, False), (3, 0, True), (0, DEPTH, True), (0, DEPTH + 1, False)],
)
def test_only_gathering_tokens_and_global_blocks_carry_across_windows(
    num_tokens: int, global_every: int, crosses: bool, masked: bool
):
    gathering = TokenGathering(window=2, num_tokens=num_tokens, global_every=global_every)
    model = trunk(token_gathering=gathering)
    ids = torch.arange(tiny.NUM_PATCHES).expand(2, -1) if masked else None
    images = tiny.images()
    changed = images.clone()
    changed[:, :, 3, 5] += 5.0  # in token 0, whose window has tokens 0, 1, 4, 5
    moved = (model(images, ids)[16] != model(changed, ids)[16]).flatten(2).any(dim=2)
    inside = torch.zeros(tiny.NUM_PATCHES, dtype=torch.bool)
    inside[[0, 1, 4, 5]] = True
    assert bool(moved[:, inside].all())
    assert bool(moved[:, ~inside].all()) == bool(moved[:, ~inside].any()) == crosses


def test_one_block_of_gathering_does_not_carry_across_windows_yet():
    """Tokens read the gathering tokens as they were before the block; it takes a second one."""
    model = trunk(depths=(1, 1, 1), token_gathering=GATHERING)
    images = tiny.images()
    changed = images.clone()
    changed[:, :, 3, 5] += 5.0
    moved = (model(images)[16] != model(changed)[16]).flatten(2).any(dim=2)
    assert moved[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("global_every", "expected"),
    [(0, []), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5]), (7, [])],
)
def test_every_so_many_blocks_one_is_global(global_every: int, expected: list[int]):
    gathering = TokenGathering(window=2, num_tokens=1, global_every=global_every)
    assert [i for i in range(6) if gathering.is_global(i)] == expected


# ---- both, and each for itself ----

OPTIONS = {
    "migration": {"token_migration": MIGRATION},
    "gathering": {"token_gathering": GATHERING},
    "both": {"token_migration": MIGRATION, "token_gathering": GATHERING},
}


@pytest.mark.parametrize("layers", TRUNKS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_does_not_depend_on_the_others_of_its_batch(
    layers: str, option: str, masked: bool
):
    model, images = trunk(layers, **OPTIONS[option]), tiny.images()
    ids = visible_ids() if masked else None
    together = model(images, ids)[16]
    for b in range(2):
        alone = model(images[b : b + 1], None if ids is None else ids[b : b + 1])[16]
        torch.testing.assert_close(together[b : b + 1], alone, atol=ATOL, rtol=0)


def test_both_are_gathering_until_the_tokens_leave_and_among_those_that_stay():
    model, images = trunk(**OPTIONS["both"]), tiny.images()
    x = model.add_positions(model.forward_cells(model.patch_embed(images))[1], (4, 4))
    # by hand: the mask of attention among [tokens, gathering tokens] in global blocks
    seq = torch.cat([x, model.gathering_tokens.expand(2, -1, -1)], dim=1)
    ids = torch.arange(tiny.NUM_PATCHES).expand(2, -1)
    blocks = list(model.attention_blocks)
    seq = explicit_block(seq, blocks[0], ids)
    kept, kept_ids = MIGRATION.kept(seq, tiny.NUM_PATCHES)
    y = gather_tokens(seq, kept)
    for block in blocks[1:]:
        y = explicit_block(y, block, kept_ids)
    expected = laid_out(seq, kept, y)[:, : tiny.NUM_PATCHES]
    found = model(images)[16].flatten(1, 3)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def explicit_block(x: Tensor, block: Any, ids: Tensor) -> Tensor:
    """A block with windows of 2x2 tokens on a grid of 4x4, token by token."""
    V, num_heads = ids.shape[1], block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x))
    q, k, v = (part.unflatten(-1, (num_heads, -1)) for part in qkv.chunk(3, dim=-1))  # (B, L, H, K)
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            seen = [j for j in range(x.shape[1]) if i >= V or j >= V or same(ids[b, i], ids[b, j])]
            for head in range(num_heads):
                scores = k[b, seen, head] @ q[b, i, head] / q.shape[-1] ** 0.5
                out[b, i, head] = scores.softmax(dim=0) @ v[b, seen, head]
    x = x + block.gamma_1 * block.attn.proj(out.flatten(2))
    return x + block.gamma_2 * block.mlp(block.norm2(x))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two raster indices on a grid of 4x4 lie in the same window of 2x2."""
    (row_a, column_a), (row_b, column_b) = divmod(int(a), 4), divmod(int(b), 4)
    return (row_a // 2, column_a // 2) == (row_b // 2, column_b // 2)


@pytest.mark.parametrize("layers", TRUNKS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_parameter_gets_a_gradient(layers: str, option: str, masked: bool):
    model = trunk(layers, **OPTIONS[option])
    features = model(tiny.images(), visible_ids() if masked else None)
    weights = torch.randn(features[16].shape, generator=torch.Generator().manual_seed(4))
    (features[16] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("option", OPTIONS)
def test_checkpointing_changes_neither_features_nor_gradients(option: str):
    results = []
    for enable in (False, True):
        model = trunk(**OPTIONS[option])
        model.set_grad_checkpointing(enable)
        out = model(tiny.images())[16]
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("option", OPTIONS)
def test_pre_training_and_its_pyramid_work_with_it(option: str):
    name = "itpn_nano_patch16_224"
    model = create_pretraining_model(name, img_size=64, mfm_weight=0.0, **OPTIONS[option])
    losses = model(tiny.images(), tiny.mask())
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("option", OPTIONS)
def test_pyramid_of_named_models_has_the_ordinary_shapes(option: str):
    model = create_itpn("itpn_nano_patch16_224", img_size=64, **OPTIONS[option])
    levels = model(tiny.images()).pyramid
    shapes = [(s, tuple(f.shape[:4])) for s, f in levels.items()]
    assert shapes == [(4, (2, 16, 4, 4)), (8, (2, 16, 2, 2)), (16, (2, 16, 1, 1))]


# ---- around the trunk ----


@pytest.mark.parametrize("option", OPTIONS)
def test_intermediates_of_a_classifier_are_the_stages_and_pruning_drops_the_new_tokens(option: str):
    model, images = ITPNClassifier(trunk(**OPTIONS[option]), 5).eval(), tiny.images()
    x, maps = model.forward_intermediates(images)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4)]
    stage = model.backbone(images)[16].reshape(2, 4, 4, 16).permute(0, 3, 1, 2)
    assert torch.equal(maps[-1], stage) and torch.equal(x, model.forward_features(images))
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert "backbone.gathering_tokens" not in dict(model.named_parameters())
    pruned = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, maps[:2], strict=True))


def test_only_gathering_tokens_are_new_and_they_start_small():
    plain = HiViT(64, depths=(1, 1, 2), num_heads=2, img_size=64)
    gathering = TokenGathering(window=2, num_tokens=50, global_every=0)
    model = HiViT(64, depths=(1, 1, 2), num_heads=2, img_size=64, token_gathering=gathering)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"gathering_tokens"}
    assert model.gathering_tokens.shape == (1, 50, 64)
    tiny.assert_std(model.gathering_tokens, 0.02, "gathering_tokens")
    none = TokenGathering(window=2, num_tokens=0, global_every=0)
    model = HiViT(64, depths=(1, 1, 2), num_heads=2, img_size=64, token_gathering=none)
    assert set(model.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("layers", TRUNKS)
def test_weights_of_an_ordinary_trunk_load_and_come_back(layers: str):
    plain, model = (ITPNClassifier(trunk(layers, **o), 5) for o in ({}, OPTIONS["both"]))
    report = load_weights(model, plain.state_dict())
    assert report.new == ["backbone.gathering_tokens"] and not report.dropped
    report = load_weights(plain, model.state_dict())
    assert report.dropped == ["encoder.backbone.gathering_tokens"]


def test_other_numbers_of_gathering_tokens_do_not_fit():
    other = TokenGathering(window=2, num_tokens=4, global_every=0)
    theirs, ours = (ITPNClassifier(trunk(token_gathering=g), 5) for g in (GATHERING, other))
    with pytest.raises(ValueError, match=r"gathering_tokens: shape \(1, 3, 16\) does not fit"):
        load_weights(ours, theirs.state_dict())


def test_gathering_tokens_learn_at_the_full_rate_under_layer_decay():
    model = ITPNClassifier(trunk(token_gathering=GATHERING), 5)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers["backbone.gathering_tokens"] == layers["head.weight"] == max(layers.values())


# ---- refused ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenMigration(after_block=-1, keep_ratio=0.5), "after_block=-1 must be >= 0"),
        (lambda: TokenMigration(after_block=0, keep_ratio=0.0), "keep_ratio=0.0 must be above 0"),
        (lambda: TokenMigration(after_block=0, keep_ratio=1.5), "keep_ratio=1.5 must be above 0"),
        (
            lambda: TokenGathering(window=0, num_tokens=1, global_every=0),
            "window=0 must be >= 1; .* token_gathering=None",
        ),
        (
            lambda: TokenGathering(window=1, num_tokens=-1, global_every=0),
            "num_tokens=-1 must be >= 0",
        ),
        (
            lambda: TokenGathering(window=1, num_tokens=1, global_every=-2),
            "global_every=-2 must be >= 0",
        ),
        (
            lambda: tiny.backbone(token_migration=TokenMigration(after_block=1, keep_ratio=0.5)),
            "after_block=1 leaves no block .* stage 3 has 2, .* use less than 1",
        ),
        (
            lambda: tiny.backbone(token_migration=MIGRATION, decomposed_rel_pos=True),
            "decomposed_rel_pos=True with token_migration.* use rel_pos_bias=True",
        ),
        (
            lambda: tiny.backbone(token_gathering=GATHERING, rel_pos_bias=True),
            "rel_pos_bias=True with token_gathering.* use rel_pos_bias=False",
        ),
        (
            lambda: tiny.backbone(token_gathering=GATHERING, decomposed_rel_pos=True),
            "decomposed_rel_pos=True with token_gathering",
        ),
    ],
)
def test_options_that_can_not_work_are_refused(build: Any, message: str):
    with pytest.raises(ValueError, match=message):
        build()
