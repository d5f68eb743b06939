"""The command line: what it prints and returns for right and wrong arguments."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest

from pipeline.cli import get_recipe, parse_recipe_command
from pipeline.config_values import apply_overrides
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import PRETRAIN_RECIPES, debug
from tests.conftest import REPO_ROOT


def parse(*argv: str) -> PretrainConfig:
    return parse_recipe_command(
        PRETRAIN_RECIPES, argv, prog="pretrain.py", description="Pre-train."
    )


def parse_and_exit(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, the latter two without tyro's frames and line breaks."""
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    out, err = (re.sub(r"[\s│╭╮╰╯─]+", " ", text) for text in capsys.readouterr())
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, out, err


def test_overrides_of_every_kind_arrive() -> None:
    command = (
        "debug --run.name x --optim.lr 1e-4 --data.crop-scale 0.5 0.9 --objective.norm-pix-loss "
        "--tracking.no-system-metrics --objective.mfm-loss smooth_l1 --optim.num-steps None "
        "--optim.num-epochs 2.5"
    )
    expected = {
        "run.name": "x",
        "optim.lr": 1e-4,
        "data.crop_scale": (0.5, 0.9),
        "objective.norm_pix_loss": True,
        "tracking.system_metrics": False,
        "objective.mfm_loss": "smooth_l1",
        "optim.num_steps": None,
        "optim.num_epochs": 2.5,
    }
    assert parse(*command.split()) == apply_overrides(debug(), expected)


@pytest.mark.parametrize(("arguments", "expected"), [("2", 2), ("1 2", (1, 2)), ("2 2", (2, 2))])
def test_number_of_workers_is_one_number_or_two(arguments: str, expected: object) -> None:
    assert parse(*f"debug --scaling.num-workers {arguments}".split()) == apply_overrides(
        debug(), {"scaling.num_workers": expected}
    )


@pytest.mark.parametrize("arguments", ["", "1 2 3", "a", "1.5", "2 1"])
def test_other_numbers_of_workers_exit_with_2(
    capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    code, _, err = parse_and_exit(capsys, *f"debug --scaling.num-workers {arguments}".split())
    assert code == 2 and err


@pytest.mark.parametrize("name", PRETRAIN_RECIPES)
def test_recipe_without_overrides_is_the_recipe(name: str) -> None:
    assert parse(name) == get_recipe(PRETRAIN_RECIPES, name)


def test_dry_run_needs_no_prefix() -> None:
    assert parse("debug", "--dry-run").run.dry_run
    assert not parse("debug").run.dry_run


def test_unknown_recipe_exits_with_2_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = parse_and_exit(capsys, "debgu")
    assert (code, out) == (2, "")
    assert "unknown recipe 'debgu'; did you mean 'debug'?" in err
    assert all(name in err for name in PRETRAIN_RECIPES)


def test_unknown_field_exits_with_2_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = parse_and_exit(capsys, "debug", "--optim.base-lrr", "3")
    assert code == 2
    assert re.search(
        r"Unrecognized options: --optim.base-lrr.*Perhaps you meant: --optim.base-lr ", err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.image-size 100", "data.image_size=100 is not a multiple of 16; use 96"),
        (
            "--data.global-batch-size 100 --scaling.num-workers 8",
            "data.global_batch_size=100 is not divisible by scaling.num_workers=8; use 96 or 104",
        ),
    ],
)
def test_invalid_value_exits_with_2_and_our_message(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    code, _, err = parse_and_exit(capsys, "debug", *arguments.split())
    assert code == 2
    assert message in err


def test_help_of_a_recipe_lists_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = parse_and_exit(capsys, "debug", "--help")
    assert code == 0
    listed = set(re.findall(r"--[\w.-]+", out))
    fields = {
        f"--{section.name}.{field.name}".replace("_", "-")
        for section in dataclasses.fields(debug())
        for field in dataclasses.fields(getattr(debug(), section.name))
    }
    renamed = {"--run.dry-run": "--dry-run", "--init.path": "--init"}
    assert {renamed.get(name, name) for name in fields} <= listed


@pytest.mark.parametrize(("argv", "status"), [((), 2), (("--help",), 0), (("--optim.lr", "1"), 2)])
def test_command_without_a_recipe_lists_the_recipes(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], status: int
) -> None:
    code, out, err = parse_and_exit(capsys, *argv)
    assert code == status
    text, silent = (err, out) if status else (out, err)
    assert silent == ""
    assert all(f" {name} " in text for name in PRETRAIN_RECIPES)


def test_leaving_keeps_status_output_and_exit_functions_and_takes_nothing_apart() -> None:
    code = """if True:
        import atexit, gc, pipeline.cli, sys
        class Late:
            def __del__(self): sys.stdout.write(" taken apart"); sys.stdout.flush()
        late = Late()
        atexit.register(lambda: sys.stdout.write(" atexit"))
        sys.stdout.write("said")
        sys.stderr.write("wrong")
        pipeline.cli.leave(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO_ROOT, timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "said atexit", "wrong")


def test_leaving_with_nobody_reading_keeps_the_status() -> None:
    code = "import pipeline.cli, sys; sys.stdin.read(); print('late'); pipeline.cli.leave(0)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPO_ROOT, env=buffered, **pipes
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
