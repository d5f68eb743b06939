"""Pre-training that learns from frozen teachers, or starts from weights: the loop end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.itpn import create_itpn
from models.weights import load_weights, to_official
from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.pretrain_weights import read_pretrain_weights
from pipeline.teachers import read_teacher
from pipeline.train_state import TrainState
from tests.models import tiny
from tests.pipeline.loop import LocalRun
from tests.pipeline.test_pretrain import assert_same_state

CPU = torch.device("cpu")
STEPS = {"optim.num_steps": 4, "run.checkpoint_every_steps": 2}


@pytest.fixture(scope="module")
def vit_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's smallest ViT with random weights, as a file a user would have."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


@pytest.fixture
def own_run(tmp_path: Path) -> Path:
    """A folder with the encoder and the config of a pre-training run."""
    folder = tmp_path / "own"
    folder.mkdir()
    encoder = tiny.randomize(create_itpn("itpn_debug"))
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    (folder / "config.json").write_text(
        '{"model": {"name": "itpn_debug"}, "data": {"image_size": 64}}'
    )
    return folder


def timm_teacher(weights: Path, **changes: Any) -> dict[str, Any]:
    return {
        "objective.teacher": "timm/test_vit",
        "objective.teacher_weights": str(weights),
        **STEPS,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }


@pytest.mark.parametrize("kind", ["masked", "distillation"])
def test_a_run_with_a_frozen_teacher_resumes_bit_for_bit_without_storing_it(
    debug_config: PretrainConfig, vit_weights: Path, tmp_path: Path, kind: str
):
    settings = timm_teacher(
        vit_weights, objective__kind=kind, model__drop_path_rate=0.3, optim__num_steps=6
    )
    config = apply_overrides(debug_config, settings)
    whole = LocalRun(config, tmp_path / "whole")
    summary = whole()
    stopped = LocalRun(config, tmp_path / "stopped", stop_at=3)
    assert stopped()["is_stopped"]
    resumed = LocalRun(config, tmp_path / "stopped")
    resumed()
    assert resumed.started_at == 3
    states = [load_state(run.checkpointer.latest()) for run in (whole, resumed)]
    assert_same_state(*states)
    assert states[0]["teacher"] == {}, "a frozen teacher is read again, not stored"
    names = {
        "masked": ("train/loss_mfm4", "val/mfm_loss_over_baseline"),
        "distillation": ("train/loss_auxiliary", "val/main_loss_over_baseline"),
    }[kind]
    assert set(names) <= set(summary["metrics"])
    assert "optim/teacher_momentum" not in whole.records[1]
    assert whole.pictures, "there is a picture"


def test_distillation_learns_the_teacher(
    debug_config: PretrainConfig, vit_weights: Path, tmp_path: Path
):
    settings = timm_teacher(
        vit_weights, objective__kind="distillation", optim__num_steps=40, optim__lr=3e-3
    )
    config = apply_overrides(debug_config, {**settings, "run.checkpoint_every_steps": 100})
    run = LocalRun(config, tmp_path)
    run()
    first, last = run.records[1], run.records[40]
    assert last["train/loss_main"] < 0.9 * first["train/loss_main"]
    assert last["train/loss_auxiliary"] < 0.9 * first["train/loss_auxiliary"]


def test_two_micro_batches_distil_as_one(
    debug_config: PretrainConfig, vit_weights: Path, tmp_path: Path
):
    histories = []
    for size in (16, 8):
        settings = timm_teacher(vit_weights, objective__kind="distillation")
        config = apply_overrides(
            debug_config, {**settings, "scaling.max_batch_size_per_worker": size}
        )
        run = LocalRun(config, tmp_path / str(size))
        run()
        histories.append([run.records[step]["train/loss"] for step in range(1, 5)])
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_the_encoder_of_another_run_teaches(
    debug_config: PretrainConfig, own_run: Path, tmp_path: Path
):
    config = apply_overrides(debug_config, {"objective.teacher": str(own_run), **STEPS})
    state = TrainState.build(config, CPU, read_pretrain_weights(config))
    encoder = create_itpn("itpn_debug")
    load_weights(encoder, own_run / "encoder.safetensors")
    for name, tensor in state.teacher.backbone.state_dict().items():
        assert torch.equal(tensor, encoder.backbone.state_dict()[name]), name
    assert state.average is None
    summary = LocalRun(config, tmp_path / "run")()
    assert summary["metrics"]["train/loss_mfm16"] > 0


@pytest.mark.parametrize("layout", ["ours", "official"])
def test_pretraining_starts_from_weights_and_resumes_from_its_own(
    debug_config: PretrainConfig, tmp_path: Path, layout: str
):
    source = tiny.pretraining_model(mfm_weight=0)
    state = source.encoder.state_dict() if layout == "ours" else to_official(source)
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    config = apply_overrides(debug_config, {"init.path": str(file), **STEPS})
    built = TrainState.build(config, CPU, read_pretrain_weights(config))
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(built.model.encoder.state_dict()[name], tensor), name
        if name.startswith("backbone."):
            teacher = built.teacher.backbone.state_dict()[name.removeprefix("backbone.")]
            assert torch.equal(teacher, tensor), "the average starts from the same weights"
    has_decoder = torch.equal(built.model.decoder.mask_token, source.decoder.mask_token)
    assert has_decoder == (layout == "official")
    LocalRun(config, tmp_path / "run", stop_at=2)()
    resumed = LocalRun(config, tmp_path / "run")
    resumed()
    assert resumed.started_at == 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective.teacher": "timm/test_vitt"}, r"no such model; did you mean 'test_vit"),
        ({"objective.teacher": "timm/test_vit2"}, r"timm cannot give the weights|does not fit"),
        ({"init.path": "OWN", "model.name": "itpn_nano_patch16_224"}, "holds a itpn_debug"),
    ],
)
def test_wrong_names_are_refused_with_the_way_out(
    debug_config: PretrainConfig,
    vit_weights: Path,
    own_run: Path,
    settings: dict[str, str],
    message: str,
):
    values = {key: str(own_run) if value == "OWN" else value for key, value in settings.items()}
    if values.get("objective.teacher") == "timm/test_vit2":
        values["objective.teacher_weights"] = str(vit_weights)
    config = apply_overrides(debug_config, values)
    with pytest.raises(ValueError, match=message):
        read_pretrain_weights(config)


def test_a_teacher_that_cannot_be_downloaded_is_refused(
    debug_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
):
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if pretrained:
            raise OSError("no route to host\nmore")
        return create(name, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    config = apply_overrides(debug_config, {"objective.teacher": "timm/test_vit"})
    with pytest.raises(ValueError, match=r"OSError: no route to host\); .*--objective.teacher-w"):
        read_teacher(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective.kind": "distillation"}, "needs a frozen teacher"),
        ({"objective.teacher": ""}, "objective.teacher is empty"),
        ({"objective.teacher_weights": "x.pth"}, "teacher_weights='x.pth' is of a timm teacher"),
        ({"objective.teacher_size": -1}, "objective.teacher_size=-1"),
        ({"objective.mask_at": "stage2"}, "objective.mask_at='stage2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    debug_config: PretrainConfig, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        apply_overrides(debug_config, settings)


def test_weights_of_the_pixel_objective_alone_need_no_teacher(debug_config: PretrainConfig):
    config = apply_overrides(
        debug_config, {"objective.mfm_weight": 0.0, "objective.teacher": "timm/no_such_model"}
    )
    assert read_teacher(config) is None


def test_a_teacher_sees_images_of_the_size_asked_for(
    debug_config: PretrainConfig, vit_weights: Path
):
    config = apply_overrides(debug_config, timm_teacher(vit_weights, objective__teacher_size=96))
    state = TrainState.build(config, CPU, read_pretrain_weights(config))
    assert state.teacher.image_size == (96, 96)
    assert state.teacher.feature_map(torch.zeros(1, 3, 64, 64)).shape[-2:] == (6, 6)
