"""The README.md of an export: what the model is, and code that loads every form of it.

Surprising: the code blocks are executed by the tests, in the folder, one process each; a change
here that breaks one breaks `tests/pipeline/test_export_card.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from pipeline.exports.exportable import Exportable
from pipeline.exports.graphs import ONNX_FILE, OUTPUTS, TORCH_FILE, takes_any_size
from pipeline.exports.mlflow_folder import MLFLOW_FOLDER
from pipeline.exports.weight_files import TIMM_FOLDER, crop_ratio

NOT_STATED = "not stated"
_PRIVATE = {"run": ("storage_path", "checkpoint_path"), "tracking": None}
"""Where a run kept its files and whom it told: no part of the recipe, and at times secret."""
_SHAPES = {
    "encoder": "`p4`, `p8`, `p16`: the pyramid as maps (B, F, H/4, W/4), (B, F, H/8, W/8), "
    "(B, F, H/16, W/16)",
    "classifier": "`logits` (B, {K}); softmax makes them probabilities",
    "segmenter": "`logits` (B, {K}, H, W); the largest is the class of a pixel",
}
_ANSWERS = {
    "encoder": "the mean over all positions of stage 16, (B, {D}) float32",
    "classifier": "probabilities (B, {K})",
    "segmenter": "class ids (B, H, W) uint8",
}


def model_card(
    exportable: Exportable,
    *,
    written: Mapping[str, str],
    weights_file: str,
    licence: str,
) -> str:
    """The text of the card.

    Args:
        exportable: the model.
        written: the forms, each with what was found when it was checked.
        weights_file: of the safetensors form.
        licence: of the weights; empty when nobody says.
    """
    sections = [
        _head(exportable, licence),
        _images(exportable),
        _data_and_figures(exportable),
        *(_loading(exportable, form, found, weights_file) for form, found in written.items()),
        _recipe(exportable),
    ]
    return "\n\n".join(sections) + "\n"


def _head(exportable: Exportable, licence: str) -> str:
    count = sum(p.numel() for p in exportable.model.parameters()) / 1e6
    rows = {
        "Model": f"`{exportable.model_name}`, {exportable.kind}, {count:.2f} million parameters",
        "Run": f"`{exportable.source}`",
        "Classes": _classes(exportable.classes),
        "Licence of the weights": licence or NOT_STATED,
        "Made with": f"itpn-ray {importlib.metadata.version('itpn-ray')}",
        "Commit of the run": f"`{exportable.commit}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return f"# {exportable.source}\n\n| | |\n| --- | --- |\n{table}"


def _classes(classes: tuple[str, ...]) -> str:
    """By label from 0, without what would break the table."""
    return ", ".join(f"{i} {name}" for i, name in enumerate(classes)).replace("|", "\\|")


def _images(exportable: Exportable) -> str:
    side, task = exportable.image_size, exportable.config.get("segmenter")
    if exportable.kind == "detector":
        rule = "Images of any size; the model resizes and normalises them itself."
    elif exportable.kind == "segmenter" and task is not None:
        rule = (
            f"In evaluation the short side was resized to {task['eval_short_side']} pixels (0: not "
            f"at all), and windows of {task['window']} (0: the whole image) were predicted every "
            f"{task['stride']} pixels."
        )
    else:
        short = int(side / crop_ratio(side))
        rule = (
            f"Resize the short side to {short} pixels (bicubic, antialiased) and take the middle "
            f"{side}x{side}."
        )
    return (
        f"## Images\n\nRGB. {rule}\n\n"
        f"* size of training: {side}x{side} pixels\n"
        f"* mean: {list(exportable.mean)}, std: {list(exportable.std)}, of pixels in [0, 1]\n\n"
        f"`{ONNX_FILE}` and `{TORCH_FILE}` take `images`, float32 (B, 3, H, W) in [0, 1], and "
        f"`{MLFLOW_FOLDER}/` takes uint8 (B, H, W, 3): normalisation is part of these graphs. The "
        "other forms want normalised images."
    )


def _data_and_figures(exportable: Exportable) -> str:
    data = exportable.config.get("data", {})
    sources = [f"* {name}: `{data[key]}`" for name, key in _DATA.items() if data.get(key)]
    init = exportable.config.get("init", {}).get("path")
    sources += [f"* started from: `{init}`"] if init else []
    metrics = exportable.summary.get("metrics", {})
    figures = [f"| `{k}` | {v:.6g} |" for k, v in metrics.items() if k.startswith("val/")]
    table = ["| figure of the run | value |", "| --- | --- |", *figures]
    return "\n".join(
        [
            "## Data and figures",
            "",
            *(sources or ["The data are not known: nothing beside the weights says."]),
            "",
            *(table if figures else ["No figures are known for these weights."]),
        ]
    )


_DATA = {"training": "path", "validation": "val_path"}


def _loading(exportable: Exportable, form: str, found: str, weights_file: str) -> str:
    text, code = {
        "safetensors": (_SAFETENSORS_TEXT, _SAFETENSORS),
        "timm": (_TIMM_TEXT, _TIMM),
        "onnx": (_graph_text(exportable), _ONNX),
        "torch": (_graph_text(exportable), _TORCH),
        "mlflow": (_mlflow_text(exportable), _MLFLOW),
    }[form]
    side = exportable.image_size
    for name, value in {
        "FILE": weights_file,
        "NAME": exportable.model_name,
        "SIDE": side,
        "OUTPUTS": ", ".join(OUTPUTS.get(exportable.kind, ())),
        "SELECT": "" if len(OUTPUTS.get(exportable.kind, ())) > 1 else "[0]",
    }.items():
        code = code.replace(f"<{name}>", str(value))
    return f"## {form}\n\n{text} Checked when exported: {found}.\n\n```python\n{code}```"


def _graph_text(exportable: Exportable) -> str:
    shape = _SHAPES.get(exportable.kind, "").replace("{K}", str(len(exportable.classes)))
    patch, side = exportable.backbone.patch_size, exportable.image_size
    sizes = (
        f"H and W any multiples of {patch}"
        if takes_any_size(exportable)
        else f"H and W {side} (the positions of this model are of this size)"
    )
    return f"B is any, {sizes}. Yields {shape}."


def _mlflow_text(exportable: Exportable) -> str:
    answer = _ANSWERS.get(exportable.kind, "").replace("{K}", str(len(exportable.classes)))
    return f"Yields {answer.replace('{D}', str(exportable.backbone.embed_dim))}."


def _recipe(exportable: Exportable) -> str:
    if not exportable.config:
        return "## Recipe\n\nNot known: there was no `config.json` beside the weights."
    recipe = json.dumps(public_recipe(exportable.config), indent=1)
    return (
        f"## Recipe\n\nEvery setting of the run, without places of files:\n\n```json\n{recipe}\n```"
    )


def public_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a run without `_PRIVATE`."""
    kept: dict[str, Any] = {}
    for section, values in config.items():
        private = _PRIVATE.get(section, ())
        if private is None:
            continue
        kept[section] = {key: value for key, value in values.items() if key not in private}
    return kept


_SAFETENSORS_TEXT = "With itpn-ray importable; the header of the file says what to build."
_SAFETENSORS = """\
import json
from safetensors import safe_open
from models import classifier, detector, itpn, segmenter
from models.weights import load_weights

with safe_open("<FILE>", "pt") as file:
    facts = file.metadata()
create = {
    "create_itpn": itpn.create_itpn,
    "create_classifier": classifier.create_classifier,
    "create_segmenter": segmenter.create_segmenter,
    "create_detector": detector.create_detector,
}[facts["create"]]
model = create(facts["model_name"], **json.loads(facts["model_args"]))
if facts["part"] == "backbone":
    model = model.backbone
report = load_weights(model, "<FILE>")
assert not report.new, report  # every weight is from the file
model.eval()
"""
_TIMM_TEXT = "A folder as timm's hub has it, with itpn-ray importable."
_TIMM = f"""\
import json
import timm
from models.timm_models import register_timm_models

register_timm_models()
config = json.load(open("{TIMM_FOLDER}/config.json"))
model = timm.create_model(
    config["architecture"],
    num_classes=config["num_classes"],
    checkpoint_path="{TIMM_FOLDER}/model.safetensors",
    **config["model_args"],
).eval()
"""
_ONNX = f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{ONNX_FILE}", providers=["CPUExecutionProvider"])
images = np.random.rand(4, 3, <SIDE>, <SIDE>).astype(np.float32)  # RGB in [0, 1]
<OUTPUTS> = session.run(None, {{"images": images}})<SELECT>
"""
_TORCH = f"""\
import torch

model = torch.export.load("{TORCH_FILE}").module()
images = torch.rand(4, 3, <SIDE>, <SIDE>)  # RGB in [0, 1]
<OUTPUTS> = model(images)
"""
_MLFLOW = f"""\
import mlflow
import numpy as np

model = mlflow.pyfunc.load_model("{MLFLOW_FOLDER}")
images = np.random.randint(0, 256, (4, <SIDE>, <SIDE>, 3), dtype=np.uint8)  # RGB
answers = model.predict(images)
classes = model.metadata.metadata["classes"]
"""
