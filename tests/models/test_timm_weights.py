"""Weights through timm: every layout and either way in, and everything that is refused."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from models.classifier import create_classifier
from models.feature_distillation import create_feature_distillation_model
from models.pretraining import create_pretraining_model
from models.timm_models import register_timm_models
from models.weights import to_official
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread", "registered")


@pytest.fixture(scope="module")
def registered() -> None:
    register_timm_models()


def pixel() -> nn.Module:
    return create_pretraining_model("itpn_debug", mfm_weight=0)


def clip(name: str = "itpn_debug") -> nn.Module:
    return create_feature_distillation_model(name, teacher_dim=8)


def fine_tuned(name: str = "itpn_debug") -> nn.Module:
    return create_classifier(name, num_classes=5, rel_pos_bias=name == "itpn_debug")


WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"features_only": True},
    {"features_only": True, "neck": True},
)
SOURCES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "pixel": ("itpn_debug", pixel),
    "clip": ("itpn_debug", clip),
    "fine-tuned": ("itpn_debug", fine_tuned),
    "fast": ("fast_itpn_debug", lambda: clip("fast_itpn_debug")),
    "fast fine-tuned": ("fast_itpn_debug", lambda: fine_tuned("fast_itpn_debug")),
}


def trunk(model: nn.Module) -> dict[str, Tensor]:
    """Weights of backbone and neck by their names in an encoder."""
    state = {k.split("model.")[-1]: v for k, v in model.state_dict().items()}
    state = {k.removeprefix("encoder."): v for k, v in state.items()}
    return {k: v for k, v in state.items() if k.startswith(("backbone.", "pyramid."))}


def assert_holds(model: nn.Module, source: nn.Module) -> None:
    """Every weight of the model's trunk is the source's, tables that it alone has excepted."""
    wanted = trunk(source)
    found = {k: v for k, v in trunk(model).items() if k in wanted or "bias_table" not in k}
    assert len(found) > 20
    assert all(torch.equal(v, wanted[k]) for k, v in found.items())


@pytest.mark.parametrize("layout", ["ours", "official"])
@pytest.mark.parametrize("kind", SOURCES)
def test_checkpoint_path_reads_every_layout(tmp_path: Path, kind: str, layout: str):
    name, build = SOURCES[kind]
    source = tiny.randomize(build())
    if layout == "ours":
        file = tmp_path / "model.safetensors"
        save_file(source.state_dict(), file)
    else:
        file = tmp_path / "official.pth"
        torch.save({"model": to_official(source), "args": argparse.Namespace(lr=1)}, file)
    model = timm.create_model(name, num_classes=5, checkpoint_path=str(file)).eval()
    assert_holds(model, source)
    if "fine-tuned" in kind:
        images = tiny.images()
        assert torch.equal(model(images), source.eval()(images))


@pytest.mark.parametrize("out_indices", [(0,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("neck", [False, True])
def test_checkpoint_path_reaches_into_features_only(
    tmp_path: Path, neck: bool, out_indices: tuple[int, ...]
):
    """The own encoder.safetensors, also where stages of it are pruned."""
    source = tiny.randomize(pixel())
    file = tmp_path / "encoder.safetensors"
    save_file(source.encoder.state_dict(), file)
    model = timm.create_model(
        "itpn_debug",
        features_only=True,
        neck=neck,
        out_indices=out_indices,
        checkpoint_path=str(file),
    )
    wanted, found = trunk(source), trunk(model)
    found = {k: v for k, v in found.items() if "bias_table" not in k}
    assert found and all(torch.equal(v, wanted[k]) for k, v in found.items())
    assert any(k.startswith("pyramid.") for k in found) == neck


def test_state_dicts_round_trip_also_through_the_wrapper_and_other_sizes():
    images = tiny.images()
    for kwargs in WAYS:
        a, b = (timm.create_model("itpn_debug", **kwargs).eval() for _ in range(2))
        tiny.randomize(a)
        assert b.load_state_dict(a.state_dict()) is not None
        ours, theirs = a(images), b(images)
        pairs = zip(ours, theirs, strict=True) if kwargs else [(ours, theirs)]
        assert all(torch.equal(x, y) for x, y in pairs)


def test_what_a_file_does_not_have_stays_fresh_and_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    file = tmp_path / "encoder.safetensors"
    save_file(pixel().encoder.state_dict(), file)
    with caplog.at_level(logging.INFO, "models.timm_weights"):
        timm.create_model("itpn_debug", checkpoint_path=str(file))
        timm.create_model("itpn_debug", features_only=True, neck=True, checkpoint_path=str(file))
    first, second = (r for r in caplog.records if r.name == "models.timm_weights")
    assert first.levelname == "WARNING" and "head.weight (1)" in first.getMessage()
    assert second.levelname == "INFO"


# ---- refused ----


@pytest.mark.parametrize("kwargs", WAYS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_renamed_key_is_an_error_that_names_it(
    tmp_path: Path, suffix: str, kwargs: dict[str, Any]
):
    state = pixel().encoder.state_dict()
    attention = "backbone.blocks.4.attn"
    state[f"{attention}.projection.weight"] = state.pop(f"{attention}.proj.weight")
    file = tmp_path / f"renamed{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    message = r"unexpected key .*blocks\.4\.attn\.projection\.weight\s+missing key .*proj\.weight"
    with pytest.raises(ValueError, match=message):
        timm.create_model("itpn_debug", checkpoint_path=str(file), **kwargs)


def test_another_variant_and_another_number_of_classes_are_errors(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file(fine_tuned().state_dict(), file)
    with pytest.raises(ValueError, match=r"of another variant \(embed_dim 32, not 128\)"):
        timm.create_model("itpn_nano_patch16_224", checkpoint_path=str(file))
    with pytest.raises(ValueError, match=r"head.weight: shape \(5, 32\) does not fit \(7, 32\)"):
        timm.create_model("itpn_debug", num_classes=7, checkpoint_path=str(file))


class Payload:
    """Touches a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("kwargs", [{}, {"features_only": True, "neck": True}])
@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path, way: str, kwargs: dict[str, Any]):
    touched, file = tmp_path / "touched", tmp_path / "evil.pth"
    torch.save({**to_official(pixel()), "payload": Payload(touched)}, file)
    source = {
        "checkpoint_path": {"checkpoint_path": str(file)},
        "pretrained_cfg_overlay": {
            "pretrained": True,
            "pretrained_cfg_overlay": {"file": str(file)},
        },
    }[way]
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model("itpn_debug", **source, **kwargs)
    assert not touched.exists()
    torch.load(file, weights_only=False)  # the file is as bad as it is meant to be
    assert touched.exists()


# ---- pretrained=True with a source of one's own ----


def test_pretrained_reads_a_named_file_and_leaves_a_head_of_other_classes_out(tmp_path: Path):
    source, file = tiny.randomize(fine_tuned()), tmp_path / "official.pth"
    torch.save({"model": to_official(source)}, file)

    def build(num_classes: int, **kwargs: Any) -> Any:
        overlay = {"file": str(file), "num_classes": 5}
        return timm.create_model(
            "itpn_debug",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            **kwargs,
        ).eval()

    images = tiny.images()
    assert torch.equal(build(5)(images), source.eval()(images))
    other = build(9)
    assert_holds(other, source)
    assert not other.head.bias.any() and torch.equal(other.fc_norm.bias, source.fc_norm.bias)
    features = build(5, features_only=True)(images)
    assert torch.equal(features[2].flatten(2).transpose(1, 2), source.forward_features(images))


def test_pretrained_is_as_strict_when_classes_differ(tmp_path: Path):
    """timm goes on with strict=False then."""
    state, file = to_official(fine_tuned()), tmp_path / "renamed.pth"
    state["blocks.0.mlp.fc9.weight"] = state.pop("blocks.0.mlp.fc1.weight")
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"unexpected key .*blocks\.0\.mlp\.fc9\.weight"):
        timm.create_model(
            "itpn_debug", pretrained=True, pretrained_cfg_overlay={"file": str(file)}, num_classes=9
        )


def test_a_folder_that_timm_saved_comes_back_with_its_size_and_head(tmp_path: Path):
    model = timm.create_model("itpn_debug", num_classes=5)
    model.set_input_size(96)
    model.reset_classifier(7)
    tiny.randomize(model).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = tiny.images(height=96, width=96)
    assert again.backbone.img_size == 96 and torch.equal(again(images), model(images))
