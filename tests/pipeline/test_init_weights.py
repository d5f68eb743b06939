"""What `--init` names becomes the weights of a model, or an error that says why it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.itpn import ITPN, create_itpn
from models.weight_shapes import create_encoder, infer_shape
from models.weights import to_official
from pipeline.checkpoint import Checkpointer
from pipeline.config import InitConfig
from pipeline.config_values import apply_overrides, config_to_dict
from pipeline.downstream.tasks import create_task
from pipeline.finetune_config import FinetuneConfig, Task
from pipeline.finetuning_run import build_model, resolve_init
from pipeline.init_weights import InitialWeights, read_initial_weights, with_model_name
from pipeline.recipes import debug
from tests.pipeline.downstream import tiny_tasks
from tests.pipeline.inference_runs import finetuned_run, pretrained_run

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANT, OTHER = "itpn_debug", "itpn_nano_patch16_224"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ITPN]:
    """A finished run of pre-training, and its encoder."""
    return pretrained_run(tmp_path_factory.mktemp("init") / "run")


def read(path: object, **settings: Any) -> InitialWeights:
    return read_initial_weights(InitConfig(path=str(path), **settings))


def config(name: Task, init: object, **overrides: Any) -> FinetuneConfig:
    """A tiny config that names no variant itself."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return tiny_tasks.config(name, {"init.path": str(init), "model.name": "", **settings})


def state_of(weights: InitialWeights) -> dict[str, Tensor]:
    assert weights.state is not None
    return weights.state


def assert_holds(weights: InitialWeights, encoder: ITPN) -> None:
    """Every tensor of the encoder and nothing else, under its own name."""
    state, expected = state_of(weights), encoder.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def unfinished_run(folder: Path, steps: dict[int, float]) -> Path:
    """A run that has checkpoints only, whose encoders are filled with a number each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(debug())))
    add_checkpoints(folder, steps)
    return folder


def add_checkpoints(folder: Path, steps: dict[int, float]) -> None:
    checkpointer = Checkpointer(folder / "checkpoints", keep=9, facts={})
    for step, number in steps.items():
        checkpointer.save(step, {"step": step}, {"backbone.x": torch.full((2,), number)})
        checkpointer.wait()


def test_weights_must_be_named_and_nothing_means_random_ones() -> None:
    with pytest.raises(ValueError, match=r"--init is not given; name .* say '--init scratch'"):
        read("")
    weights = read("scratch")
    assert weights == InitialWeights(None, "random weights (--init scratch)", "", None)
    # A folder that happens to have the word in its path is a folder.
    with pytest.raises(FileNotFoundError, match="'scratch/run' does not exist"):
        read("scratch/run")


def test_a_finished_run_gives_its_weights_its_variant_and_its_image_size(
    run: tuple[Path, ITPN],
) -> None:
    for path in (str(run[0]), f"{run[0]}/", f"file://{run[0]}"):
        weights = read(path)
        assert_holds(weights, run[1])
        assert weights.source == path.rstrip("/")
        assert (weights.model_name, weights.image_size) == (VARIANT, debug().data.image_size)


def test_of_an_unfinished_run_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    folder = unfinished_run(tmp_path / "run", {})
    partial = folder / "checkpoints" / ".partial_00002000"
    partial.mkdir(parents=True)
    save_file({"backbone.x": torch.zeros(2)}, partial / "encoder.safetensors")
    with pytest.raises(ValueError, match="no checkpoint with one"):
        read(folder)
    add_checkpoints(folder, {900: 1.0, 1000: 2.0})
    partial.mkdir(exist_ok=True)  # the next one is under way
    save_file({"backbone.x": torch.zeros(2)}, partial / "encoder.safetensors")
    weights = read(folder)
    assert state_of(weights)["backbone.x"].tolist() == [2.0, 2.0]
    assert weights.model_name == VARIANT
    # The encoder of the end, once it is there, is taken before any checkpoint's.
    save_file({"backbone.x": torch.full((2,), 3.0)}, folder / "encoder.safetensors")
    assert state_of(read(folder))["backbone.x"].tolist() == [3.0, 3.0]


def test_runs_may_lie_below_a_hidden_folder(tmp_path: Path) -> None:
    folder = unfinished_run(tmp_path / ".cache" / "run", {5: 1.0})
    assert state_of(read(folder))["backbone.x"].tolist() == [1.0, 1.0]


def test_a_checkpoint_folder_is_taken_as_it_is_and_knows_its_run(tmp_path: Path) -> None:
    folder = unfinished_run(tmp_path / "run", {900: 1.0, 1000: 2.0})
    weights = read(folder / "checkpoints" / "step_00000900")
    assert state_of(weights)["backbone.x"].tolist() == [1.0, 1.0]
    assert (weights.model_name, weights.image_size) == (VARIANT, debug().data.image_size)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_weights_file_alone_shows_its_variant_by_its_shapes(
    run: tuple[Path, ITPN], suffix: str, tmp_path: Path
) -> None:
    file = tmp_path / f"weights{suffix}"
    state = run[1].state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save({"model": state}, file)
    weights = read(file)
    assert_holds(weights, run[1])
    assert (weights.model_name, weights.image_size) == ("", None)
    for name in ("", VARIANT):
        resolved, _ = resolve_init(config("classify", file, model__name=name))
        assert resolved.model == config("classify", file, model__name=VARIANT).model


def test_the_neck_of_the_weights_is_built_whatever_the_variant_says(tmp_path: Path) -> None:
    encoder = create_itpn(VARIANT, fpn_dim=24, fpn_depth=2)
    save_file(encoder.state_dict(), tmp_path / "wide.safetensors")
    resolved, weights = resolve_init(config("segment", tmp_path / "wide.safetensors"))
    model = resolved.model
    assert (model.name, model.fpn_dim, model.fpn_depth) == (VARIANT, 24, 2)
    built, report = build_model(create_task(resolved, tiny_tasks.CLASSES), weights)
    assert report is not None and not [key for key in report.new if "pyramid" in key]
    assert torch.equal(
        built.encoder.pyramid.align_dim_8to4.weight, encoder.pyramid.align_dim_8to4.weight
    )


def test_weights_of_no_named_variant_need_a_name(tmp_path: Path) -> None:
    encoder = create_encoder(
        dataclasses.replace(infer_shape(create_itpn(VARIANT).state_dict()), embed_dim=48)
    )
    save_file(encoder.state_dict(), tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"model.name is empty and .* does not say which variant"):
        resolve_init(config("classify", tmp_path / "odd.safetensors"))


def test_a_config_takes_the_variant_of_the_run_and_refuses_another(run: tuple[Path, ITPN]) -> None:
    empty = config("segment", run[0])
    resolved, weights = resolve_init(empty)
    assert resolved == apply_overrides(empty, {"model.name": VARIANT})
    same = config("segment", run[0], model__name=VARIANT)
    assert with_model_name(same, weights) == same
    other = config("segment", run[0], model__name=OTHER)
    with pytest.raises(ValueError, match=f"model.name='{OTHER}', but .*run holds a {VARIANT}"):
        resolve_init(other)
    with pytest.raises(ValueError, match=r"model.name is empty and random weights"):
        resolve_init(config("segment", "scratch"))


def test_a_folder_without_weights_names_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--init '.*nowhere' does not exist; give a run"):
        read(tmp_path / "nowhere")
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds no encoder.safetensors and no checkpoint with"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["classify", "detect", "segment"])
def test_a_fine_tuning_run_is_refused_with_the_way_out(name: Task, tmp_path: Path) -> None:
    folder = finetuned_run(tmp_path / "run", name)
    # Even where an encoder lies beside it.
    save_file({"backbone.x": torch.zeros(2)}, folder / "encoder.safetensors")
    for path in (folder, folder / "model.safetensors", folder / "encoder.safetensors"):
        with pytest.raises(ValueError, match=r"is of a fine-tuning run; give the pre-training run"):
            read(path)


def test_a_weights_file_in_its_run_knows_the_run(run: tuple[Path, ITPN]) -> None:
    weights = read(run[0] / "encoder.safetensors")
    assert_holds(weights, run[1])
    assert (weights.model_name, weights.image_size) == (VARIANT, debug().data.image_size)


def test_the_state_of_a_checkpoint_and_other_files_are_no_weights(tmp_path: Path) -> None:
    folder = unfinished_run(tmp_path / "run", {1: 0.0})
    message = r"is no weights file; give one of .safetensors, .pth, .pt \(of a checkpoint its enc"
    with pytest.raises(ValueError, match=f"state.pt' {message}"):
        read(folder / "checkpoints" / "step_00000001" / "state.pt")
    with pytest.raises(ValueError, match=f"config.json' {message}"):
        read(folder / "config.json")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_damaged_file_is_an_error_a_user_can_read(
    run: tuple[Path, ITPN], suffix: str, scheme: str, tmp_path: Path
) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    state = run[1].state_dict()
    save_file(state, whole) if suffix == ".safetensors" else torch.save(state, whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"cut{suffix}' is damaged, .*; copy it again") as caught:
        read(f"{scheme}{cut}")
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"cut{suffix}' is damaged"):
        read(cut)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": create_itpn(VARIANT)}, tmp_path / "whole_model.pth")
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        read(tmp_path / "whole_model.pth")


@pytest.mark.parametrize("name", ["detect", "segment"])
@pytest.mark.parametrize("layout", ["own", "official"])
def test_without_the_neck_the_backbone_arrives_and_the_neck_stays_random(
    run: tuple[Path, ITPN], name: Task, layout: str, tmp_path: Path
) -> None:
    file = tmp_path / "weights.pth"
    torch.save(run[1].state_dict() if layout == "own" else to_official(run[1]), file)
    settings = {"model__name": VARIANT, "init__path": str(file)}
    random = found_in(config(name, "scratch", **{**settings, "init__path": "scratch"}))
    for neck in (True, False):
        found = found_in(config(name, file, **settings, init__neck=neck))
        for key, value in run[1].state_dict().items():
            is_taken = neck or key.startswith("backbone.")
            expected = value if is_taken else random[key]
            assert torch.equal(found[key], expected), (neck, key)
    weights = read(file, neck=False)
    assert weights.source == f"{file} (backbone only)"
    num_backbone = sum(key.startswith("backbone.") for key in run[1].state_dict())
    assert len(state_of(weights)) == num_backbone


def found_in(config: FinetuneConfig) -> dict[str, Tensor]:
    """Tensors of the encoder of a downstream model, as the run starts with them."""
    config, weights = resolve_init(config)
    model, _ = build_model(create_task(config, tiny_tasks.CLASSES), weights)
    prefix = "backbone.encoder." if config.task == "detect" else "encoder."
    state = model.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_scratch_leaves_the_seeded_initialisation_untouched() -> None:
    states = []
    for seed in (3, 3, 4):
        settings = {"model__name": VARIANT, "run__seed": seed}
        resolved, weights = resolve_init(config("classify", "scratch", **settings))
        task = create_task(resolved, tiny_tasks.CLASSES)
        torch.manual_seed(100 + len(states))  # what was drawn before does not matter
        model, report = build_model(task, weights)
        assert report is None
        states.append(model.state_dict())
    torch.manual_seed(3)
    states.append(task.build().state_dict())
    key = "backbone.blocks.0.mlp.fc1.weight"
    assert not torch.equal(states[0][key], states[2][key])
    for other in (states[1], states[3]):
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_weights_that_match_nothing_are_an_error_with_the_report(tmp_path: Path) -> None:
    save_file({"head.weight": torch.zeros(3, 32)}, tmp_path / "head.safetensors")
    torch.save({}, tmp_path / "empty.pth")
    for name in ("head.safetensors", "empty.pth"):
        path = tmp_path / name
        resolved, weights = resolve_init(config("segment", path, model__name=VARIANT))
        with pytest.raises(ValueError, match="no backbone weight for ITPNSegmenter") as caught:
            build_model(create_task(resolved, tiny_tasks.CLASSES), weights)
        text = str(caught.value)
        assert text.startswith(f"--init {path} does not fit: ") and "train from random" in text
        assert "\nmatched" in text and "\ndropped by design" in text


def test_weights_of_another_variant_are_an_error_that_says_so(tmp_path: Path) -> None:
    save_file(create_itpn(OTHER, img_size=64).state_dict(), tmp_path / "nano.safetensors")
    resolved, weights = resolve_init(
        config("classify", tmp_path / "nano.safetensors", model__name=VARIANT)
    )
    with pytest.raises(ValueError, match=r"of another variant \(embed_dim 128, not 32\)"):
        build_model(create_task(resolved, tiny_tasks.CLASSES), weights)


def test_the_report_tells_what_became_of_every_tensor(run: tuple[Path, ITPN]) -> None:
    resolved, weights = resolve_init(config("classify", run[0]))
    model, report = build_model(create_task(resolved, tiny_tasks.CLASSES), weights)
    assert report is not None
    file = load_file(run[0] / "encoder.safetensors")
    backbone = {key for key in file if key.startswith("backbone.")}
    assert set(report.matched) | set(report.resized) == backbone
    assert len(report.dropped) == len(file) - len(backbone)
    assert set(report.new) == model.state_dict().keys() - backbone
