"""The trunk of Fast-iTPN beside its parity: convolutions, visible tokens, what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.fast_itpn import FAST_LAYERS, CellMlp, FastAttention, FastPatchMerge
from models.feature_maps import fold_cells
from models.hivit import HiViT
from models.itpn import create_itpn
from models.pretraining import create_pretraining_model
from models.tokens import gather_tokens, split_tokens
from tests.models import tiny


def fast_backbone() -> HiViT:
    return tiny.backbone(layers=FAST_LAYERS, init_values=0.1, mlp_ratio=3.0).eval()


def test_products_over_cells_are_the_convolutions_over_images():
    x, grid = torch.randn(2, 6, 4, 4, 8), (2, 3)
    image = fold_cells(x, grid)  # (2, 8, 8, 12)
    merge = tiny.randomize(FastPatchMerge(8, eps=1e-6))
    normed = merge.norm(image.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(fold_cells(merge(x), grid), merge.reduction(normed))
    mlp = tiny.randomize(CellMlp(8, 24, eps=1e-6))
    hidden = F.gelu(mlp.fc1(image))
    expected = mlp.fc2(mlp.ffn_ln(hidden.movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(fold_cells(mlp(x), grid), expected)


def test_visible_tokens_alone_give_the_dense_stages_4_and_8_at_those_tokens():
    backbone, images = fast_backbone(), tiny.images()
    visible, _ = split_tokens(tiny.mask())
    dense, sparse = backbone(images), backbone(images, visible)
    for stride in (4, 8):
        torch.testing.assert_close(sparse[stride], gather_tokens(dense[stride], visible))
    assert not torch.allclose(sparse[16], gather_tokens(dense[16], visible), atol=1e-3)


def test_hidden_pixels_do_not_matter():
    backbone, images, mask = fast_backbone(), tiny.images(), tiny.mask()
    visible, _ = split_tokens(mask)
    other = torch.where(tiny.pixels_of(mask), torch.randn_like(images), images)
    for stride, feature in backbone(images, visible).items():
        assert torch.equal(feature, backbone(other, visible)[stride])


def test_keys_have_no_bias():
    attention = tiny.randomize(FastAttention(16, 2))
    x = torch.randn(1, 5, 16)
    q, k, v = (
        projection(x) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, v = q + attention.q_bias, v + attention.v_bias
    heads = [t.reshape(1, 5, 2, 8).transpose(1, 2) for t in (q, k, v)]
    scores = (heads[0] @ heads[1].transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = attention.proj((scores @ heads[2]).transpose(1, 2).reshape(1, 5, 16))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("kind", ["rel_pos_bias", "decomposed_rel_pos"])
def test_relative_positions_are_refused_with_the_way_out(kind: str):
    with pytest.raises(ValueError, match=r"Fast-iTPN has no relative positions.*--model\.no-rel"):
        create_itpn("fast_itpn_debug", **{kind: True})


def test_masked_pretraining_reaches_every_weight():
    model = tiny.randomize(create_pretraining_model("fast_itpn_debug", mfm_weight=0))
    model(tiny.images(), tiny.mask()).total.backward()
    frozen = {"decoder.pos_embed"}
    assert {n for n, p in model.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize("name", ["itpn_debug", "fast_itpn_debug"])
def test_checkpointed_activations_give_the_same_gradients(name: str):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(1)
        encoder = tiny.randomize(create_itpn(name, drop_path_rate=0.2))
        encoder.backbone.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        encoder(tiny.images()).pyramid[4].square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.backbone.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


def test_both_kinds_of_relative_positions_at_once_are_refused():
    with pytest.raises(ValueError, match="two kinds of relative positions"):
        create_itpn("itpn_debug", rel_pos_bias=True, decomposed_rel_pos=True)


def test_decomposed_positions_of_some_tokens_are_refused():
    backbone = tiny.backbone(decomposed_rel_pos=True)
    visible, _ = split_tokens(tiny.mask())
    with pytest.raises(ValueError, match="need all tokens"):
        backbone(tiny.images(), visible)
