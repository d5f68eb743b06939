"""A place in which the documentation's commands can be run: data, runs, and smaller settings.

Commands are run word for word but for three things, all of them in this file: placeholders (`DIR`,
`/data/images`) become folders made here; settings are added that make hours seconds; and what a
command would write is removed first where an earlier command has written it. Jobs and benchmarks
run in this process, by their own `main`, on the session's Ray cluster.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from pipeline.nonfinite import NonFiniteLossError
from tests.conftest import REPO_ROOT
from tests.pipeline.loop import LocalRun
from tests.pipeline.overflows import overflowing_config, write_dump, write_images

CI_TARGETS = {"install", "lint", "test", "test-faults", "test-long"}
"""make targets that run the tests: .ci/run runs them, all but the last."""
WRITES = ("--out", "--to")
"""Flags of jobs that name what is written."""
SMALL_RUN = shlex.split(
    "--optim.num-steps 2 --data.num-cpus 0 --scaling.num-workers 1 --tracking.no-system-metrics"
)
SMALL_PRETRAINING = shlex.split(
    "--model.name itpn_debug --data.image-size 64 --data.global-batch-size 4 --data.num-eval-crops"
    " 4 --optim.num-epochs None --scaling.no-use-gpu --scaling.max-batch-size-per-worker 4"
)
SMALL_SET = ["optim.num_steps=2", "data.global_batch_size=4"]


class World:
    """A folder to run commands in.

    Args:
        folder: empty; becomes the working folder of the commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: set[tuple[str, ...]] = set()
        self._is_trained: set[tuple[str, ...]] = set()
        for name in ("pyproject.toml", "Makefile", "mkdocs.yml", "docs", "README.md", "docker"):
            if (REPO_ROOT / name).exists():
                (folder / name).symlink_to(REPO_ROOT / name)
        for room in ("models", "pipeline", "jobs", "benchmarks"):
            (folder / room).symlink_to(REPO_ROOT / room)

    def fill_in(self, text: str) -> str:
        """Text with the placeholders of the documentation filled in."""
        data = self.folder / "runs" / "demo-data"
        places = {
            r"/data/(?=\w)": f"{self.folder}/data/",
            r"\bBOXES\b": str(data / "scenes-detect"),
            r"\bMASKS\b": str(data / "scenes-segment"),
            r"\bDIR/": f"{data / 'digits'}/",
            r"\bDIR\b": f"{self.folder}/data/images",
            r"\bNUCLEI\b": f"{self.folder}/data/nuclei",
            r"\bRUN \[RUN \.\.\.\]": "runs/demo",
            r"\bRUN\b": "runs/demo",
            r"\bHOST\b": "127.0.0.1",
            r"runs/an-earlier-run": "runs/demo",
        }
        for pattern, place in places.items():
            text = re.sub(pattern, place, text)
        return text

    def run(self, text: str) -> None:
        """Run one command of a shell block; an AssertionError where it does not succeed."""
        words = shlex.split(self.fill_in(text))
        if tuple(words) not in self._done:  # pages repeat commands of others
            self._run(words)
            self._done.add(tuple(words))

    def _run(self, words: list[str]) -> None:
        match words:
            case ["make", *targets]:
                for target in targets:
                    self._make(target)
            case ["ray", "job", "submit", *options]:
                at = options.index("--")
                assert options[:at][:2] == ["--working-dir", "."], options
                self._run(options[at + 1 :])
            case [program, "-m", module, *arguments] if Path(program).name == "python":
                self._job(module, arguments)
            case [program, script, *arguments] if Path(program).name == "python":
                if script.startswith("jobs/"):
                    self._job(f"jobs.{Path(script).stem}", arguments)
                else:
                    self._benchmark(script, arguments)
            case ["source", activate]:
                assert activate == ".venv/bin/activate"
                assert "VENV := .venv" in (REPO_ROOT / "Makefile").read_text()
            case ["pip", "install", *arguments]:
                pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *arguments]
                subprocess.run(pip, cwd=REPO_ROOT, check=True, timeout=300)
            case [".venv/bin/pre-commit", "install"]:
                self._pre_commit()
            case _:
                raise AssertionError(f"{__file__} does not know how to run: {shlex.join(words)}")

    def _make(self, target: str) -> None:
        if target in CI_TARGETS:
            is_in_ci = f"make {target}\n" in (REPO_ROOT / ".ci" / "run").read_text()
            assert is_in_ci or target == "test-long"
            return
        make = ["make", "--no-print-directory", "-n", "-o", ".venv/.installed", target]
        printed = subprocess.run(make, cwd=REPO_ROOT, check=True, capture_output=True, text=True)
        for line in printed.stdout.splitlines():
            words = shlex.split(line)
            if "python" in Path(words[0]).name:
                self._run(words)
            else:
                self._tool(words)

    def _tool(self, words: list[str]) -> None:
        """A program of the environment; a server is asked for its page and stopped."""
        program = str(Path(sys.executable).parent / Path(words[0]).name)
        if words[1:2] not in (["ui"], ["serve"]):
            subprocess.run([program, *words[1:]], cwd=self.folder, check=True, timeout=300)
            return
        port = free_port()
        where = ["--port", str(port)] if words[1] == "ui" else ["--dev-addr", f"127.0.0.1:{port}"]
        server = subprocess.Popen([program, *words[1:], *where], cwd=self.folder)
        try:
            wait_for_page(f"http://127.0.0.1:{port}/", server)
        finally:
            server.terminate()
            server.wait(30)

    def _pre_commit(self) -> None:
        hooks = self.folder / "hooks"
        hooks.mkdir()
        shutil.copy(REPO_ROOT / ".pre-commit-config.yaml", hooks)
        subprocess.run(["git", "init", "-q"], cwd=hooks, check=True)
        program = str(Path(sys.executable).parent / "pre-commit")
        subprocess.run([program, "install"], cwd=hooks, check=True)
        assert (hooks / ".git" / "hooks" / "pre-commit").exists()

    def _job(self, module: str, arguments: list[str]) -> None:
        if module == "jobs.demo_finetune":  # has no settings; tests/pipeline/test_demo_finetune.py
            assert not arguments
            return
        if module == "jobs.replay":
            self._leave_a_dump(self.folder / arguments[0])
        main = importlib.import_module(module).main
        script, added = f"{module.replace('.', '/')}.py", self._smaller(module, arguments)
        if "--dry-run" not in (*arguments, *added):
            self._remove_what_is_written(arguments)
        with self._in_process(script, [*arguments, *added]):
            status = main()
        assert status == 0, f"{module} {shlex.join(arguments)}"

    def _smaller(self, module: str, arguments: list[str]) -> list[str]:
        """Settings to add. A recipe that has been trained is not trained again, but tried."""
        recipe = (module, *arguments[: 2 if module == "jobs.finetune" else 1])
        again = ["--dry-run", "--run.name", "again"] if recipe in self._is_trained else []
        if "--dry-run" not in arguments:
            self._is_trained.add(recipe)
        match module, arguments:
            case "jobs.pretrain", ["demo", *_]:
                return ["--optim.num-steps", "4", "--data.num-cpus", "0", *again]
            case "jobs.pretrain", [recipe, *rest]:
                teacher = self.folder / "teacher.safetensors"
                to_teacher = ["--objective.teacher", "timm/test_vit", "--objective.teacher-size"]
                to_teacher += ["160", "--objective.teacher-weights", str(teacher)]
                needs = recipe.startswith("clip") or any(a.startswith("timm/") for a in rest)
                steps = [] if "--optim.num-steps" in rest else SMALL_RUN
                return [*steps, *SMALL_PRETRAINING, *(to_teacher if needs else []), *again]
            case "jobs.finetune", _:
                return [*SMALL_RUN, "--data.global-batch-size", "4", *again]
            case "jobs.sweep", _:
                return [*SMALL_RUN, "--data.global-batch-size", "4", "--num-trials", "2", *again]
            case "jobs.export", [file, *_] if file.endswith(".safetensors"):
                return ["--model-name", "itpn_tiny_patch16_224"]
        return []

    def _benchmark(self, script: str, arguments: list[str]) -> None:
        self._remove_what_is_written(arguments)
        name = Path(script).name
        if "--set" in arguments:
            end = arguments.index("--set") + 1
            while end < len(arguments) and not arguments[end].startswith("--"):
                end += 1
            arguments[end:end] = SMALL_SET
        smaller = {
            "ablation_pretrain.py": ["--num-steps", "2", "--batch-size", "4"],
            "ablation_finetune.py": ["--seeds", "0"],
            "ablation_data.py": ["--seeds", "0"],
            "bench_storage.py": ["--rounds", "1", "--num-files", "2", "--large-mb", "1"],
        }
        with self._in_process(script, [*arguments, *smaller.get(name, [])]):
            runpy.run_path(str(REPO_ROOT / script), run_name="__main__")

    def _remove_what_is_written(self, arguments: list[str]) -> None:
        pairs = itertools.pairwise(arguments)
        written = [self.folder / b for a, b in pairs if a in WRITES]
        if "--run.name" in arguments:
            written.append(self.folder / "runs" / arguments[arguments.index("--run.name") + 1])
        for path in written:
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)

    def _leave_a_dump(self, folder: Path) -> None:
        """What a run with an image that overflows leaves, in the place of `folder`."""
        source = self.folder / "overflowing"
        write_images(source / "images", (7,))
        config = overflowing_config(source / "images", optim__max_skipped_steps=0)
        run = LocalRun(config, source / "checkpoints")
        with pytest.raises(NonFiniteLossError):
            run()
        dump = write_dump(config, run.dump)
        shutil.rmtree(folder.parents[1], ignore_errors=True)
        shutil.copytree(dump.parents[1], folder.parents[1])
        (folder.parent / dump.name).rename(folder)

    @contextlib.contextmanager
    def _in_process(self, script: str, arguments: list[str]) -> Iterator[None]:
        before = sys.argv, os.getcwd(), list(sys.path)
        sys.argv = [script, *arguments]
        sys.path.insert(0, str((self.folder / script).parent))  # as Python does for a script
        os.chdir(self.folder)
        try:
            yield
        except SystemExit as error:
            assert not error.code, f"{script} {shlex.join(arguments)}: {error.code}"
        finally:
            sys.argv, sys.path[:] = before[0], before[2]
            os.chdir(before[1])


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_page(url: str, server: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    """Until a server answers; an AssertionError when it ends before."""
    deadline = time.monotonic() + timeout_s
    while True:
        assert server.poll() is None, f"the server of {url} ended"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, f"nothing at {url}"
            time.sleep(0.3)


def write_nuclei(folder: Path) -> None:
    """A set like the nuclei of docs/experiments.md: a dozen small images, some discs on each."""
    generator = np.random.default_rng(0)
    for name in ("images", "semantic"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 12), ("val", 2)):
        images, annotations = [], []
        for i in range(count):
            name = f"{split}_{i:02d}.png"
            pixels = np.full((128, 128), 20 + 8 * i, np.uint8)
            semantic = np.zeros((128, 128), np.uint8)
            rows, columns = np.mgrid[:128, :128]
            for centre in generator.integers(20, 108, (4, 2)):
                disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < 81
                pixels[disc], semantic[disc] = 200, 1
                encoded = coco_mask.encode(np.asfortranarray(disc.astype(np.uint8)))
                encoded["counts"] = encoded["counts"].decode()
                x, y = (int(v) for v in (centre[1] - 8, centre[0] - 8))
                row = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
                row |= {"bbox": [x, y, 17, 17], "area": int(disc.sum()), "segmentation": encoded}
                annotations.append(row)
            Image.fromarray(np.stack([pixels] * 3, -1)).save(folder / "images" / name)
            Image.fromarray(semantic).save(folder / "semantic" / name)
            images.append({"id": i, "file_name": name, "width": 128, "height": 128})
        coco = {"images": images, "annotations": annotations}
        coco["categories"] = [{"id": 1, "name": "nucleus"}]
        (folder / f"instances_{split}.json").write_text(json.dumps(coco))
