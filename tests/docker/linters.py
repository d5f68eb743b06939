"""Running the linters of `make install`, as anyone would on a command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import REPO_ROOT

BIN = Path(sys.executable).parent
DOCKER = REPO_ROOT / "docker"


def lint(*command: str | Path) -> tuple[int, str]:
    """Exit status and everything that was printed; paths relative to the repository root."""
    tool, *arguments = (str(part) for part in command)
    done = subprocess.run(
        [str(BIN / tool), *arguments], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr
