"""Command lines: a recipe name, then dotted overrides of any field of its config."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import tyro

from pipeline.config_values import ConfigT


def parse_recipe_command(
    recipes: Mapping[str, Callable[[], ConfigT]],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
) -> ConfigT:
    """Parse `RECIPE [--section.field VALUE ...]`.

    Prints help or an error and exits (status 2 for a wrong command line), as tyro does.
    """
    if not argv or argv[0].startswith("-"):
        lines = [
            f"  {name:20s}{(make.__doc__ or '').splitlines()[0]}" for name, make in recipes.items()
        ]
        text = f"usage: {prog} RECIPE [--section.field VALUE ...]\n\n{description}\n\nrecipes:\n"
        text += "\n".join(lines) + f"\n\n{prog} RECIPE --help lists every setting with its default."
        is_help = bool(argv) and argv[0] in ("-h", "--help")
        print(text, file=sys.stdout if is_help else sys.stderr)
        raise SystemExit(0 if is_help else 2)
    try:
        default = get_recipe(recipes, argv[0])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return tyro.cli(
        type(default),
        default=default,
        args=list(argv[1:]),
        prog=f"{prog} {argv[0]}",
        description=description,
    )


def get_recipe(recipes: Mapping[str, Callable[[], ConfigT]], name: str) -> ConfigT:
    """The config of a named recipe.

    Raises:
        ValueError: no such recipe; names the nearest one and all known ones.
    """
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.4)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ValueError(f"unknown recipe '{name}'{hint} Known: {', '.join(recipes)}")
    return recipes[name]()


def set_up_logging() -> None:
    """Plain messages to stdout for our own loggers; other libraries from WARNING on."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # it sets its loggers up on import
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    for name in ("pipeline", "models", "jobs"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("mlflow", "alembic"):  # they announce every table they create
        logging.getLogger(name).setLevel(logging.WARNING)


def interrupt_on_signals() -> None:
    """Let SIGTERM, which `ray job stop` sends, end a job like Ctrl-C: by KeyboardInterrupt."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def leave(status: int) -> NoReturn:
    """End the process of a job, as `sys.exit(status)` would, but at once.

    The interpreter would first take apart, one by one, the 700,000 objects of torch, Ray and
    MLflow: two seconds for nothing. What is registered with atexit is done; threads are not
    waited for.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def quieten_ray_data() -> None:
    """Leave telling the progress of a job to its own lines."""
    for name, level in (("", logging.WARNING), ("._internal.progress", logging.ERROR)):
        logging.getLogger(f"ray.data{name}").setLevel(level)
