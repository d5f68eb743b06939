"""Exports: every form says what the model says, and nothing else is ever written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.classifier import create_classifier
from models.itpn import ITPN, create_itpn
from models.timm_models import register_timm_models
from models.variants import VARIANTS
from models.weights import load_weights, read_state_dict
from pipeline.downstream.finetuned import load_finetuned
from pipeline.export import ExportConfig, Exported, export
from pipeline.exports import graphs
from pipeline.exports.exportable import ExportFailedError, load_exportable
from pipeline.served_model import ServedModel
from tests.models.tiny import randomize
from tests.pipeline.exported_runs import (
    FAMILIES,
    know_clip_debug,
    pyramid_maps,
    random_images,
    weights_file,
)
from tests.pipeline.inference_runs import finetuned_run, pretrained_run

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]
SLOW = pytest.mark.slow  # the first use of a family exports it in all forms
ATOL = 2e-4  # outputs are about 10 in size; what export itself allows is a 1e-4 of that


@pytest.fixture(scope="module", autouse=True)
def clip_debug() -> Iterator[None]:
    know_clip_debug()
    yield
    del VARIANTS["clip_debug"]


@pytest.fixture(scope="module", params=FAMILIES, ids=FAMILIES.values())
def encoder_export(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Exported, ITPN]:
    """All forms of an encoder of one family, and the encoder."""
    folder = tmp_path_factory.mktemp(request.param)
    path, encoder = weights_file(request.param, folder)
    config = ExportConfig(
        run=str(path), to=str(folder / "out"), format="all", model_name=request.param
    )
    return export(config), encoder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs of all kinds."""
    folder = tmp_path_factory.mktemp("runs")
    for task in ("classify", "segment", "detect"):
        finetuned_run(folder / task, task)
    pretrained_run(folder / "pretrain")
    return folder


def config(run: Path, to: Path, **settings: Any) -> ExportConfig:
    return ExportConfig(run=str(run), to=str(to), **settings)


def onnx_runner(path: Path, inputs: list[str], outputs: list[str]) -> Callable[..., list[Tensor]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == inputs
    assert [node.name for node in session.get_outputs()] == outputs
    return lambda images: [
        torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})
    ]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=ATOL, rtol=0)


@SLOW
def test_graphs_of_an_encoder_yield_its_pyramid_at_any_batch_size(
    encoder_export: tuple[Exported, ITPN],
):
    exported, encoder = encoder_export
    assert set(exported.written) == {"safetensors", "timm", "onnx", "torch", "mlflow"}
    run = onnx_runner(exported.to / "model.onnx", ["images"], ["p4", "p8", "p16"])
    module = torch.export.load(exported.to / "model.pt2").module()
    for batch in (1, 5):
        images = random_images(batch)
        expected = pyramid_maps(encoder, images)
        assert_near(run(images), expected)
        assert_near(list(module(images)), expected)
        assert not torch.allclose(expected[0], pyramid_maps(encoder, images.flip(3))[0], atol=ATOL)


@SLOW
def test_graphs_take_other_image_sizes_unless_positions_are_of_one_size(
    encoder_export: tuple[Exported, ITPN],
):
    exported, encoder = encoder_export
    run = onnx_runner(exported.to / "model.onnx", ["images"], ["p4", "p8", "p16"])
    module = torch.export.load(exported.to / "model.pt2").module()
    images = random_images(2, 48, 112)
    if encoder.backbone.rel_pos_bias:
        assert "only this size" in exported.report()
        with pytest.raises(Exception, match=r"Got: 48 Expected: 64"):
            run(images)
        return
    assert "any size in multiples of 16" in exported.report()
    assert_near(run(images), pyramid_maps(encoder, images))
    assert_near(list(module(images)), pyramid_maps(encoder, images))


@SLOW
def test_weights_go_back_into_an_encoder_bit_for_bit(encoder_export: tuple[Exported, ITPN]):
    exported, encoder = encoder_export
    path = exported.to / "encoder.safetensors"
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    model = create_itpn(facts["model_name"], **json.loads(facts["model_args"]))
    report = load_weights(model, path)
    assert not report.new and not report.dropped and not report.resized
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert facts["format"] == "pt" and facts["licence"] == "not stated"
    assert (facts["image_size"], json.loads(facts["mean"])) == ("64", [0.485, 0.456, 0.406])


@SLOW
def test_an_encoder_in_timm_yields_its_pooled_and_normalised_features(
    encoder_export: tuple[Exported, ITPN],
):
    exported, encoder = encoder_export
    model = timm_model(exported.to / "timm")
    images = random_images(2)
    with torch.no_grad():
        tokens = encoder.backbone(images)[16].flatten(2).mean(1)
        expected = torch.nn.functional.layer_norm(tokens, tokens.shape[1:], eps=1e-6)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def timm_model(folder: Path) -> torch.nn.Module:
    register_timm_models()
    cfg, name, args = timm.models._hub.load_model_config_from_path(folder)
    model = timm.create_model(
        name,
        checkpoint_path=folder / "model.safetensors",
        num_classes=cfg["num_classes"],
        **args,
    )
    return model.eval()


@SLOW
def test_the_mlflow_model_of_an_encoder_takes_bytes_and_yields_stage_16(
    encoder_export: tuple[Exported, ITPN],
):
    import mlflow

    exported, encoder = encoder_export
    model = mlflow.pyfunc.load_model(str(exported.to / "mlflow"))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        expected = encoder.backbone(pixels)[16].mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(model.predict(images), expected, atol=1e-4)


@SLOW
def test_no_file_names_a_path_of_this_machine(encoder_export: tuple[Exported, ITPN]):
    folder = encoder_export[0].to
    here = (str(folder.parent).encode(), str(Path(graphs.__file__).parents[2]).encode())
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert not any(root in path.read_bytes() for root in here), path


@SLOW
def test_all_forms_of_a_classifier_say_what_it_says(runs: Path, tmp_path: Path):
    exported = export(config(runs / "classify", tmp_path / "out", format="all"))
    finetuned = load_finetuned(runs / "classify")
    images = random_images(3)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = finetuned.model((images - mean) / std)
        normalised = timm_model(exported.to / "timm")((images - mean) / std)
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=0)
    assert_near(onnx_runner(exported.to / "model.onnx", ["images"], ["logits"])(images), [expected])
    module = torch.export.load(exported.to / "model.pt2").module()
    assert_near([module(images)], [expected])

    with safe_open(exported.to / "model.safetensors", "pt") as file:
        facts = file.metadata()
    model = create_classifier(facts["model_name"], **json.loads(facts["model_args"])).eval()
    assert not load_weights(model, exported.to / "model.safetensors").new
    with torch.no_grad():
        assert torch.equal(model((images - mean) / std), expected)
    assert json.loads(facts["classes"]) == ["red", "green", "blue"]
    config_file = json.loads((exported.to / "timm/config.json").read_text())
    assert (config_file["num_classes"], config_file["label_names"][2]) == (3, "blue")


@SLOW
def test_a_segmenter_yields_logits_of_every_pixel_and_labels_under_mlflow(
    runs: Path, tmp_path: Path
):
    import mlflow

    exported = export(config(runs / "segment", tmp_path / "out", format="all"))
    assert set(exported.left_out) == {"timm"} and "image classifiers" in exported.report()
    finetuned = load_finetuned(runs / "segment")
    data = finetuned.config.data
    images = random_images(3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    expected = finetuned.model.predict((images - mean) / std)
    assert expected.shape == (3, 3, 64, 64)
    assert_near(onnx_runner(exported.to / "model.onnx", ["images"], ["logits"])(images), [expected])
    assert_near([torch.export.load(exported.to / "model.pt2").module()(images)], [expected])

    pixels = (images * 255).byte().permute(0, 2, 3, 1)
    labels = mlflow.pyfunc.load_model(str(exported.to / "mlflow")).predict(pixels.numpy())
    with torch.no_grad():
        served = ServedModel(finetuned.model, mean=data.mean, std=data.std)(pixels).numpy()
    assert labels.dtype == np.uint8 and labels.shape == (3, 64, 64)
    assert (labels == served).mean() > 0.999  # equal logits may fall either way
    assert len(np.unique(labels)) > 1


def test_an_encoder_whose_neck_is_not_that_of_its_variant_is_read_off_its_weights(tmp_path: Path):
    """As the released pixel base model, which has 512 channels where its code says 256."""
    torch.manual_seed(0)
    encoder = create_itpn("itpn_debug", fpn_dim=24, fpn_depth=2)
    save_file(encoder.state_dict(), tmp_path / "wide.safetensors")
    settings = config(tmp_path / "wide.safetensors", tmp_path / "out", model_name="itpn_debug")
    path = export(settings).to / "encoder.safetensors"
    with safe_open(path, "pt") as file:
        args = json.loads(file.metadata()["model_args"])
    assert (args["fpn_dim"], args["fpn_depth"]) == (24, 2)
    again = create_itpn("itpn_debug", **args)
    assert not load_weights(again, path).new
    assert torch.equal(again.pyramid.align_dim_8to4.weight, encoder.pyramid.align_dim_8to4.weight)


@pytest.mark.parametrize(
    ("run", "part", "names"),
    [
        ("pretrain", "backbone", {"backbone"}),
        ("pretrain", "", {"backbone", "pyramid"}),
        ("classify", "backbone", {"backbone"}),
        ("classify", "", {"backbone", "fc_norm", "head"}),
        ("segment", "encoder", {"backbone", "pyramid"}),
        ("detect", "encoder", {"backbone", "pyramid"}),
        ("detect", "full", {"backbone", "rpn", "roi_heads"}),
    ],
)
def test_parts_hold_what_they_are_called_and_load(
    run: str, part: Any, names: set[str], runs: Path, tmp_path: Path
):
    exported = export(config(runs / run, tmp_path / "out", part=part, licence="CC0-1.0"))
    (path,) = exported.to.glob("*.safetensors")
    state = read_state_dict(path)
    assert {key.split(".")[0] for key in state} == names
    encoder = create_itpn("itpn_debug", rel_pos_bias=run != "pretrain", img_size=64)
    report = load_weights(encoder.backbone, path)
    assert not report.new
    source = load_exportable(str(runs / run)).backbone.state_dict()
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, source[name]), name
    with safe_open(path, "pt") as file:
        assert file.metadata()["licence"] == "CC0-1.0"


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("detect", {"format": "onnx"}, r"--format onnx cannot hold a detector: .*jobs/predict.py"),
        ("detect", {"format": "torch"}, "--format torch cannot hold a detector"),
        ("detect", {"format": "mlflow"}, "--format mlflow cannot hold a detector"),
        ("segment", {"format": "timm"}, "--format timm holds image classifiers, not a segmenter"),
        ("classify", {"part": "encoder"}, "which a classifier does not have; use --part backbone"),
        ("pretrain", {"part": "full"}, "--part full is for fine-tuned models.*use --part encoder"),
        ("classify", {"model_name": "itpn_debug"}, "says that itself; leave it out"),
        ("pretrain", {"image_size": 100}, "--image-size 100 is not a multiple of 16"),
        ("classify/model.safetensors", {}, "give the folder of the finished run"),
        ("pretrain/config.json", {}, "is no weights file"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    run: str, settings: dict[str, Any], message: str, runs: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        export(config(runs / run, tmp_path / "out", **settings))
    assert not list(tmp_path.iterdir())


def test_paths_and_settings_that_are_wrong_are_named(runs: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="none' does not exist"):
        export(config(tmp_path / "none", tmp_path / "out"))
    with pytest.raises(ValueError, match=r"does not say which variant it is; .*--model-name"):
        path, _ = weights_file("itpn_debug", tmp_path)
        export(config(path, tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no encoder.safetensors"):
        export(config(tmp_path / "empty", tmp_path / "out"))
    with pytest.raises(ValueError, match="part='neck' must be one of"):
        config(runs / "pretrain", tmp_path / "out", part="neck")
    with pytest.raises(ValueError, match="part=backbone is for --format safetensors"):
        config(runs / "pretrain", tmp_path / "out", part="backbone", format="onnx")
    with pytest.raises(ValueError, match="unknown model 'itpn_debg'"):
        config(runs / "pretrain", tmp_path / "out", model_name="itpn_debg")
    assert not (tmp_path / "out").exists()


def test_only_an_export_is_ever_replaced(runs: Path, tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    export(config(runs / "pretrain", target))  # an empty folder is no obstacle
    (target / "stale").touch()
    with pytest.raises(ValueError, match="holds an earlier export; give another --to, or --over"):
        export(config(runs / "classify", target))
    assert (target / "encoder.safetensors").exists()
    export(config(runs / "classify", target, overwrite=True))
    assert {path.name for path in target.iterdir()} == {
        *("model.safetensors", "README.md", "export.json"),
    }
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years")
    with pytest.raises(ValueError, match="is no earlier export, so it is never replaced"):
        export(config(runs / "classify", tmp_path / "thesis", overwrite=True))
    assert (tmp_path / "thesis/chapter.txt").read_text() == "years"


def test_a_graph_of_another_model_is_no_export_and_leaves_the_old_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also shows that the comparison can fail: the other model differs by its weights alone."""
    target = tmp_path / "out"
    export(config(runs / "pretrain", target))
    before = (target / "README.md").read_text()
    trace = graphs.export_program

    def trace_another(exportable: Any) -> Any:
        other = load_exportable(str(runs / "pretrain"))
        randomize(other.model)
        return trace(other)

    monkeypatch.setattr("pipeline.export.export_program", trace_another)
    with pytest.raises(ExportFailedError, match=r"p4 of torch differs from the model by .*, more"):
        export(config(runs / "pretrain", target, format="torch", overwrite=True))
    assert (target / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_onnx_needs_is_named_where_it_is_missing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxscript" else object()
    )
    with pytest.raises(ValueError, match=r"needs onnxscript; install .*'\.\[export\]'"):
        export(config(runs / "pretrain", tmp_path / "out", format="onnx"))
