"""The moving-average teacher: its update, its independence of the student, and what it looks at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.hivit import HiViT
from models.teacher import EMATeacher, TeacherInput
from models.tokens import gather_tokens, split_tokens
from tests.models import tiny


def fill(model: HiViT, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_update_moves_each_weight_by_one_minus_momentum_towards_the_student():
    student = tiny.backbone()
    teacher = EMATeacher(student)
    fill(teacher.backbone, 1.0)
    fill(student, 3.0)
    for expected in (1.5, 1.875, 2.15625):  # 0.75 * 1 + 0.25 * 3 and so on, exact in binary
        teacher.update(student, 0.75)
        assert all(bool((p == expected).all()) for p in teacher.backbone.parameters())
    assert all(bool((p == 3).all()) for p in student.parameters()), "the student stays"


def test_update_pairs_the_weights_of_teacher_and_student_by_name():
    student = tiny.backbone()
    teacher = EMATeacher(student)
    tiny.randomize(student, seed=5)
    before = {name: p.clone() for name, p in teacher.backbone.named_parameters()}
    teacher.update(student, 0.9)
    for name, p in teacher.backbone.named_parameters():
        expected = 0.9 * before[name] + 0.1 * student.get_parameter(name)
        # lerp and the written-out sum round differently in the last float32 bits
        torch.testing.assert_close(p, expected, atol=1e-6, rtol=0)


def test_momentum_one_freezes_the_teacher():
    student = tiny.backbone()
    teacher = EMATeacher(student)
    before = weights(teacher)
    tiny.randomize(student, seed=5)
    teacher.update(student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(teacher), strict=True))


def test_momentum_zero_copies_the_student():
    student = tiny.backbone()
    teacher = EMATeacher(student)
    tiny.randomize(student, seed=5)
    teacher.update(student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(student), weights(teacher), strict=True))


def test_teacher_and_student_start_equal_but_share_no_memory():
    student = tiny.backbone(rel_pos_bias=True)
    teacher = EMATeacher(student)
    pairs = list(zip(student.parameters(), teacher.backbone.parameters(), strict=True))
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in pairs)
    before = weights(teacher)
    fill(student, 7.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(teacher), strict=True))


def test_teacher_stays_in_evaluation_mode_whatever_its_parent_is_told():
    teacher = EMATeacher(tiny.backbone(drop_path_rate=0.9).train())
    parent = nn.ModuleList([teacher]).train()
    assert parent.training
    assert not any(module.training for module in teacher.modules())
    _, ids_masked = split_tokens(tiny.mask())
    first, second = (teacher(tiny.images(), ids_masked) for _ in range(2))
    assert all(torch.equal(first[s], second[s]) for s in tiny.STRIDES), "nothing is dropped out"


def test_teacher_and_its_features_carry_no_gradient():
    student = tiny.backbone()
    teacher = EMATeacher(student)
    _, ids_masked = split_tokens(tiny.mask())
    features = teacher(tiny.images().requires_grad_(), ids_masked)
    assert not any(f.requires_grad for f in features.values())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters()), "the student still trains"


@pytest.mark.parametrize("teacher_input", ["hidden", "full"])
def test_teacher_yields_the_masked_positions_in_raster_order(teacher_input: TeacherInput):
    student, images = tiny.backbone(), tiny.images()
    _, ids_masked = split_tokens(tiny.mask())
    features = EMATeacher(student, teacher_input=teacher_input)(images, ids_masked)
    dense = student(images)
    for stride in (4, 8):  # these stages do not mix tokens, so both inputs give the same
        expected = gather_tokens(dense[stride], ids_masked)
        # float32 sums over another number of rows
        torch.testing.assert_close(features[stride], expected, atol=1e-5, rtol=0)
    assert features[16].shape == (2, tiny.NUM_PATCHES - tiny.NUM_VISIBLE, 1, 1, 16)


@pytest.mark.parametrize(("teacher_input", "sees_visible"), [("hidden", False), ("full", True)])
def test_visible_pixels_reach_the_teacher_only_if_it_gets_the_full_image(
    teacher_input: TeacherInput, sees_visible: bool
):
    teacher = EMATeacher(tiny.backbone(), teacher_input=teacher_input)
    images, mask = tiny.images(), tiny.mask()
    _, ids_masked = split_tokens(mask)
    changed = torch.where(tiny.pixels_of(mask), images, images + 1)
    first, second = teacher(images, ids_masked), teacher(changed, ids_masked)
    assert torch.equal(first[4], second[4])
    assert torch.equal(first[8], second[8])
    assert torch.equal(first[16], second[16]) != sees_visible
