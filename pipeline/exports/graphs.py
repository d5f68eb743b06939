"""A model as a graph that runs without our code: torch.export (`model.pt2`) and ONNX.

A graph takes float images in [0, 1]; normalisation is part of it. Surprising: nothing is trusted.
What was written is read back, run on random images at other batch sizes (and image sizes) than the
graph was traced with, and compared with the model; an export that differs is no export.
"""

# B batch, H x W image, F fpn_dim, K classes

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.feature_maps import detection_levels
from models.itpn import ITPN
from models.segmenter import ITPNSegmenter
from pipeline.exports.exportable import Exportable, ExportFailedError, Kind

TOLERANCE = 1e-4
"""Largest difference from the model, as a share of its largest output or, where that is below 1, of
1: logits of hundreds are not exact to 1e-4 in float32."""
OUTPUTS: dict[Kind, tuple[str, ...]] = {
    "encoder": ("p4", "p8", "p16"),
    "classifier": ("logits",),
    "segmenter": ("logits",),
}
"""What a graph yields; a kind that is not here has none."""
ONNX_FILE, TORCH_FILE = "model.onnx", "model.pt2"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_NUM_LEVELS = 3
_FEWEST_TOKENS = 2  # along a side; torch.export makes one a case of its own
_TRACED_BATCH, _CHECKED_BATCHES = 2, (1, 3)


class ImageGraph(nn.Module):
    """Normalisation and the model.

    Args:
        exportable: of a kind in `OUTPUTS`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, exportable: Exportable) -> None:
        super().__init__()
        self.model = exportable.model
        self.register_buffer("mean", torch.tensor(exportable.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(exportable.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """images (B, 3, H, W) in [0, 1] -> pyramid maps (B, F, H/4, W/4), (B, F, H/8, W/8),
        (B, F, H/16, W/16) of an encoder; logits (B, K) of a classifier, (B, K, H, W) of a
        segmenter."""
        x = (images - self.mean) / self.std
        if isinstance(self.model, ITPN):
            side = self.model.backbone.patch_size
            grid = (x.shape[-2] // side, x.shape[-1] // side)
            levels = detection_levels(self.model(x), grid, num_levels=_NUM_LEVELS)
            return tuple(levels.values())
        if isinstance(self.model, ITPNSegmenter):
            logits: Tensor = self.model.predict(x)
            return logits
        logits = self.model(x)
        return logits


def takes_any_size(exportable: Exportable) -> bool:
    """Whether the graph takes images of every size, or only of `image_size`.

    Relative position tables and attention windows are laid out for one size, and the pooling of the
    segmentation head makes windows that depend on it.
    """
    backbone = exportable.backbone
    has_tables = backbone.rel_pos_bias or backbone.decomposed_rel_pos
    is_fixed = has_tables or backbone.token_gathering is not None
    return exportable.kind in ("encoder", "classifier") and not is_fixed


def check_has_graph(exportable: Exportable, form: str) -> None:
    """Refuse a model that no graph can hold.

    Raises:
        ValueError: it is a detector.
    """
    if exportable.kind not in OUTPUTS:
        raise ValueError(
            f"--format {form} cannot hold a {exportable.kind}: how many objects it finds decides "
            "what it computes. Predict with jobs/predict.py, export its weights (--format "
            "safetensors), or export the encoder of the pre-training run it started from"
        )


def check_onnx_installed() -> None:
    """Refuse what cannot be done here before anything is begun.

    Raises:
        ValueError: a package is missing.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {', '.join(missing)}; install them with pip install -e "
            "'.[export]'"
        )


def export_program(exportable: Exportable) -> torch.export.ExportedProgram:
    """The graph, of any batch size and, where the model allows it, of any image size.

    Raises:
        ExportFailedError: torch cannot trace the model.
    """
    dim = torch.export.Dim
    sizes: dict[int, Any] = {0: dim("batch", min=1)}
    height = width = exportable.image_size
    if takes_any_size(exportable):
        patch = exportable.backbone.patch_size
        sizes |= {2: patch * dim("h", min=_FEWEST_TOKENS), 3: patch * dim("w", min=_FEWEST_TOKENS)}
        height, width = height + patch, width + 2 * patch  # nothing that may be taken for a rule
    images = torch.rand(_TRACED_BATCH, 3, height, width)
    try:
        with torch.no_grad(), _silence():
            graph = ImageGraph(exportable).eval()
            program = torch.export.export(graph, (images,), dynamic_shapes=(sizes,))
    except Exception as error:  # what torch raises here is documented nowhere
        raise ExportFailedError(
            f"torch.export cannot trace {exportable.model_name}: {error}"
        ) from error
    return without_traces(program)


def without_traces(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without the stack traces of its nodes: they name paths of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_torch(program: torch.export.ExportedProgram, exportable: Exportable, path: Path) -> str:
    """Write `model.pt2` and check it; returns what to report.

    Raises:
        ExportFailedError: what was written differs from the model.
    """
    torch.export.save(program, path)
    graph = torch.export.load(path).module()
    return f"torch.export, {_checked(exportable, graph, 'torch')}"


def write_onnx(program: torch.export.ExportedProgram, exportable: Exportable, path: Path) -> str:
    """Write `model.onnx` and check it in onnxruntime on the CPU; returns what to report.

    Raises:
        ExportFailedError: the exporter failed, or what was written differs from the model.
    """
    import onnxruntime

    try:
        with _silence():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=list(OUTPUTS[exportable.kind]),
            )
            assert exported is not None, "dynamo=True returns a program"
            exported.save(path)  # weights above 2 GB go to model.onnx.data by themselves
    except Exception as error:  # as in `export_program`
        raise ExportFailedError(
            f"torch.onnx cannot export {exportable.model_name}: {error}"
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        outputs = session.run(list(OUTPUTS[exportable.kind]), {"images": images.numpy()})
        return tuple(torch.from_numpy(output) for output in outputs)

    opset = exported.model.opset_imports[""]
    return f"ONNX opset {opset}, {_checked(exportable, run, 'onnxruntime')}"


def _checked(
    exportable: Exportable, run: Callable[[Tensor], Tensor | tuple[Tensor, ...]], runner: str
) -> str:
    """Compare a graph with the model; returns the largest difference, for people."""
    side, patch = exportable.image_size, exportable.backbone.patch_size
    sizes = [(side, side)]
    if takes_any_size(exportable):
        sizes += [(side + 2 * patch, side), (_FEWEST_TOKENS * patch, side + patch)]
    generator = torch.Generator().manual_seed(0)
    graph, largest = ImageGraph(exportable).eval(), 0.0
    for batch in _CHECKED_BATCHES:
        for height, width in sizes:
            images = torch.rand(batch, 3, height, width, generator=generator)
            with torch.no_grad():
                expected, found = _as_tuple(graph(images)), _run(run, images, runner)
            for name, a, b in zip(OUTPUTS[exportable.kind], expected, found, strict=True):
                scale = max(1.0, float(a.abs().max()))
                difference = (
                    float((a - b).abs().max()) / scale if a.shape == b.shape else float("inf")
                )
                if not difference <= TOLERANCE:
                    raise ExportFailedError(
                        f"{name} of {runner} differs from the model by {difference:.2g} of its "
                        f"largest value for images {tuple(images.shape)}, more than {TOLERANCE}; "
                        "this model cannot be exported in this form with this version of torch"
                    )
                largest = max(largest, difference)
    tried = ", ".join(f"{height}x{width}" for height, width in sizes)
    batches = " and ".join(map(str, _CHECKED_BATCHES))
    return (
        f"within {largest:.1e} of the model at batches of {batches}, images of {tried}; "
        f"{'any size in multiples of ' + str(patch) if len(sizes) > 1 else 'only this size'}"
    )


def _run(
    run: Callable[[Tensor], Tensor | tuple[Tensor, ...]], images: Tensor, runner: str
) -> tuple[Tensor, ...]:
    try:
        return _as_tuple(run(images))
    except Exception as error:  # as in `export_program`
        raise ExportFailedError(
            f"{runner} cannot run the graph on images {tuple(images.shape)}: {error}"
        ) from error


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without torch's notes on its own internals, on stdout, stderr and by warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
