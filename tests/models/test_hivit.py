"""The backbone and its layers: masked path, attention, patch embed and merges, initial values."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models.classifier import ITPNClassifier
from models.hivit import HiViT
from models.layers import Block, PatchEmbed, PatchMerge, PatchSplit
from models.pos_embed import resize_pos_embed, sincos_pos_embed_2d
from models.pyramid import FeaturePyramid
from models.tokens import gather_tokens, split_tokens
from tests.models import tiny

# float32 sums of other lengths or in another order, on activations of order one
ATOL = 1e-5


def capture_inputs(module: nn.Module) -> list[tuple[Tensor, ...]]:
    """The positional arguments of every later call of the module."""
    calls: list[tuple[Tensor, ...]] = []
    module.register_forward_pre_hook(lambda _, args: calls.append(args))
    return calls


# ---- visible tokens only ----


@pytest.mark.parametrize("init_values", [None, 0.1])
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_visible_tokens_alone_give_the_dense_stages_4_and_8_at_those_tokens(
    rel_pos_bias: bool, init_values: float | None
):
    model = tiny.backbone(rel_pos_bias=rel_pos_bias, init_values=init_values)
    images = tiny.images()
    ids_visible, _ = split_tokens(tiny.mask())
    masked, dense = model(images, ids_visible), model(images)
    for stride in (4, 8):
        expected = gather_tokens(dense[stride], ids_visible)
        torch.testing.assert_close(masked[stride], expected, atol=ATOL, rtol=0)


def test_attention_over_visible_tokens_differs_from_dense_attention():
    model, images = tiny.backbone(), tiny.images()
    ids_visible, _ = split_tokens(tiny.mask())
    expected = gather_tokens(model(images)[16], ids_visible)
    difference = (model(images, ids_visible)[16] - expected).detach().abs()
    assert float(difference.max()) > 1e-2


def test_hidden_pixels_change_no_output_of_the_visible_path():
    model, images, mask = tiny.backbone(rel_pos_bias=True), tiny.images(), tiny.mask()
    ids_visible, _ = split_tokens(mask)
    # NaN spreads through any arithmetic, multiplication by zero included
    spoiled = images.masked_fill(tiny.pixels_of(mask), torch.nan)
    clean, other = model(images, ids_visible), model(spoiled, ids_visible)
    for stride in tiny.STRIDES:
        assert torch.equal(clean[stride], other[stride])


def test_pyramid_of_some_tokens_is_the_dense_pyramid_at_those_tokens():
    pyramid = tiny.randomize(FeaturePyramid({4: 4, 8: 8, 16: 16}, fpn_dim=8))
    stages = tiny.backbone()(tiny.images())
    ids = torch.tensor([[7, 2, 11], [0, 15, 3]])
    dense = pyramid(stages)
    some = pyramid({stride: gather_tokens(f, ids) for stride, f in stages.items()})
    for stride in tiny.STRIDES:
        expected = gather_tokens(dense[stride], ids)
        torch.testing.assert_close(some[stride], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("level", "stages"), [(16, {16}), (8, {8, 16}), (4, {4, 8, 16})])
def test_each_pyramid_level_learns_from_its_own_stage_and_every_coarser_one(
    level: int, stages: set[int]
):
    pyramid = tiny.randomize(FeaturePyramid({4: 4, 8: 8, 16: 16}, fpn_dim=8))
    features = {s: f.detach().requires_grad_() for s, f in tiny.backbone()(tiny.images()).items()}
    pyramid(features)[level].square().sum().backward()
    assert {s for s, f in features.items() if f.grad is not None and f.grad.any()} == stages


def test_feature_shapes_follow_the_strides():
    features = tiny.backbone()(tiny.images(), torch.tensor([[0, 3, 5], [1, 2, 4]]))
    assert {stride: tuple(f.shape) for stride, f in features.items()} == {
        4: (2, 3, 4, 4, 4),
        8: (2, 3, 2, 2, 8),
        16: (2, 3, 1, 1, 16),
    }


def test_all_tokens_given_as_visible_are_the_dense_forward_but_for_resampled_positions():
    model, images = tiny.backbone(rel_pos_bias=True, init_values=0.1), tiny.images()
    with torch.no_grad():  # a constant table is the same however it is resampled
        model.pos_embed.copy_(model.pos_embed[:, :1].expand_as(model.pos_embed).clone())
    ids = torch.arange(tiny.NUM_PATCHES).expand(2, -1)
    masked, dense = model(images, ids), model(images)
    for stride in tiny.STRIDES:
        torch.testing.assert_close(masked[stride], dense[stride], atol=ATOL, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_stage_16_starts_from_the_second_merge_plus_each_tokens_own_position(masked: bool):
    model = tiny.backbone()
    ids_visible, _ = split_tokens(tiny.mask())
    first_block = capture_inputs(model.blocks[-2])
    features = model(tiny.images(), ids_visible if masked else None)
    positions = model.pos_embed
    if masked:  # the official forward resamples the table of a masked image even at its own size
        table = resize_pos_embed(positions, (4, 4), "scale_factor", even_if_equal=True)
        positions = torch.stack([table[0, ids] for ids in ids_visible])
    expected = model.blocks[4](features[8]).flatten(2) + positions
    torch.testing.assert_close(first_block[0][0], expected, atol=ATOL, rtol=0)


# ---- attention ----


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_an_explicit_softmax_with_relative_bias(masked: bool):
    model = tiny.backbone(rel_pos_bias=True).double()
    ids_visible, _ = split_tokens(tiny.mask())
    attention = model.blocks[-1].attn
    calls = capture_inputs(attention)
    model(tiny.images().double(), ids_visible if masked else None)
    x, positions = calls[0]
    ids = ids_visible if masked else torch.arange(tiny.NUM_PATCHES).expand(2, -1)

    num_tokens, num_heads, head_dim, side = ids.shape[1], 2, 8, 4
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = (part.unflatten(-1, (num_heads, head_dim)) for part in qkv.chunk(3, dim=-1))
    out = torch.zeros_like(x)
    for b in range(2):
        for head in range(num_heads):
            for i in range(num_tokens):
                scores = []
                for j in range(num_tokens):
                    (row_i, col_i), (row_j, col_j) = (divmod(int(ids[b, t]), side) for t in (i, j))
                    entry = (row_i - row_j + side - 1) * (2 * side - 1) + col_i - col_j + side - 1
                    bias = attention.relative_position_bias_table[entry, head]
                    scores.append(q[b, i, head] @ k[b, j, head] / head_dim**0.5 + bias)
                weights = torch.stack(scores).exp()
                weights = weights / weights.sum()
                out[b, i, head * head_dim : (head + 1) * head_dim] = weights @ v[b, :, head]
    expected = out @ attention.proj.weight.T + attention.proj.bias
    # double precision: only rounding of the last bits is left
    torch.testing.assert_close(attention(x, positions), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_only_a_model_with_relative_bias_has_bias_tables(rel_pos_bias: bool):
    names = [n for n, _ in tiny.backbone(rel_pos_bias=rel_pos_bias).named_parameters()]
    tables = [n for n in names if n.endswith("relative_position_bias_table")]
    assert len(tables) == (2 if rel_pos_bias else 0)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(96, 96), (32, 80)])
def test_another_image_size_works_and_changes_only_the_number_of_tokens(
    height: int, width: int, rel_pos_bias: bool
):
    model = tiny.backbone(rel_pos_bias=rel_pos_bias)
    features = model(tiny.images(height=height, width=width))
    num_patches = height * width // 256
    native = model(tiny.images())
    for stride in tiny.STRIDES:
        assert features[stride].isfinite().all()
        assert features[stride].shape[:2] == (2, num_patches)
        assert features[stride].shape[2:] == native[stride].shape[2:]


# ---- patch embed, merge, split ----


def test_patch_embed_equals_the_strided_convolution_it_replaces():
    embed = tiny.randomize(PatchEmbed(16, 3, 4, eps=1e-6))
    images = tiny.images(height=32, width=48)
    cells = embed.proj(images).permute(0, 2, 3, 1)  # (B, 8, 12, 4), cells in raster order
    expected = embed.norm(cells)
    ours = embed(images)
    for y in range(2):
        for x in range(3):
            block = expected[:, y * 4 : y * 4 + 4, x * 4 : x * 4 + 4]
            torch.testing.assert_close(ours[:, y * 3 + x], block, atol=ATOL, rtol=0)


def test_patch_merge_concatenates_neighbours_column_by_column():
    merge = tiny.randomize(PatchMerge(3, eps=1e-6))
    x = torch.randn(2, 5, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    merged = merge(x)
    assert merged.shape == (2, 5, 2, 2, 6)
    for row in range(2):
        for column in range(2):
            top, left = 2 * row, 2 * column
            neighbours = [
                x[:, :, top, left],
                x[:, :, top + 1, left],
                x[:, :, top, left + 1],
                x[:, :, top + 1, left + 1],
            ]
            expected = merge.reduction(merge.norm(torch.cat(neighbours, dim=-1)))
            torch.testing.assert_close(merged[:, :, row, column], expected, atol=ATOL, rtol=0)


def test_patch_split_lays_the_four_parts_of_a_cell_out_row_by_row():
    split = tiny.randomize(PatchSplit(6, 5, eps=1e-6))
    x = torch.randn(2, 3, 2, 2, 6, generator=torch.Generator().manual_seed(0))
    cells = split(x)
    assert cells.shape == (2, 3, 4, 4, 5)
    parts = split.reduction(split.norm(x)).chunk(4, dim=-1)
    for i, part in enumerate(parts):
        assert torch.equal(cells[:, :, i // 2 :: 2, i % 2 :: 2], part)


# ---- construction ----


def test_drop_path_rates_rise_linearly_from_zero():
    model = HiViT(16, depths=(2, 1, 3), num_heads=2, img_size=32, drop_path_rate=0.5)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_drop_path_acts_in_training_only():
    model, images = tiny.backbone(drop_path_rate=0.9), tiny.images()
    torch.manual_seed(0)
    model.train()
    assert not torch.equal(model(images)[16], model(images)[16])
    model.eval()
    assert torch.equal(model(images)[16], model(images)[16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 18}, "embed_dim=18 must be a multiple of 4"),
        ({"img_size": 60}, "img_size=60 a multiple of patch_size=16"),
        ({"pos_embed_size": 60}, "pos_embed_size=60"),
        ({"patch_size": 10, "img_size": 60}, "patch_size=10 must be a multiple of 4"),
        ({"num_heads": 3}, "embed_dim=16 is not divisible by num_heads=3"),
    ],
)
def test_dimensions_that_do_not_divide_are_refused(change: dict[str, int], message: str):
    arguments = {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": 2, "img_size": 64, **change}
    with pytest.raises(ValueError, match=message):
        HiViT(arguments.pop("embed_dim"), **arguments)


def test_initial_values_of_the_backbone_are_those_of_its_table():
    torch.manual_seed(0)
    model = HiViT(64, depths=(1, 1, 2), num_heads=2, img_size=64, rel_pos_bias=True)
    tiny.assert_linear_and_norm_init(model)
    assert torch.equal(model.pos_embed[0], sincos_pos_embed_2d(64, (4, 4)))
    assert model.pos_embed.requires_grad
    for block in model.blocks:
        if isinstance(block, Block):
            assert not block.attn.relative_position_bias_table.any()
    bound = 48**-0.5  # torch's default for a convolution of fan-in 3 * 4 * 4: uniform up to this
    weight = model.patch_embed.proj.weight.detach()
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    assert bool(model.patch_embed.proj.bias.any())


def test_initial_values_of_the_classifier_head_leave_the_backbone_alone():
    torch.manual_seed(0)
    backbone = tiny.backbone()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = ITPNClassifier(backbone, 100)
    tiny.assert_std(model.head.weight, 2e-5, "head.weight")
    assert not model.head.bias.any()
    assert bool((model.fc_norm.weight == 1).all()) and not model.fc_norm.bias.any()
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_classifier_without_classes_returns_the_normalised_mean_of_the_tokens():
    model, images = ITPNClassifier(tiny.backbone(), 0), tiny.images()
    mean = model.backbone(images)[16].reshape(2, 16, 16).mean(dim=1)
    centred = mean - mean.mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model(images), expected, atol=ATOL, rtol=0)
