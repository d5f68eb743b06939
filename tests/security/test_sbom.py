"""`make sbom`: valid CycloneDX that lists exactly what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.conftest import REPO_ROOT

MAKEFILE = (REPO_ROOT / "Makefile").read_text()


def recipe(target: str, out: Path) -> list[str]:
    """The command of a target, with this environment in the place of .venv."""
    found = re.search(rf"^{target}: .*\n\t(.*)$", MAKEFILE, re.MULTILINE)
    assert found
    command = found[1].replace("$(BIN)", str(Path(sys.executable).parent))
    return command.replace("sbom.cdx.json", str(out)).split()


def installed() -> set[tuple[str, str]]:
    """Names, as PyPI writes them, and versions of all distributions.

    Of site-packages alone: setuptools, once imported, adds those it brings along to the path.
    """
    paths = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
    return {
        (re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(), found.version)
        for found in importlib.metadata.distributions(path=paths)
    }


@pytest.mark.slow
def test_the_sbom_is_valid_and_lists_exactly_what_is_installed(tmp_path: Path):
    out = tmp_path / "sbom.cdx.json"
    subprocess.run(recipe("sbom", out), cwd=REPO_ROOT, check=True, timeout=120)
    text = out.read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    bom = json.loads(text)
    assert validator.validate_str(json.dumps({**bom, "version": "one"})) is not None
    listed = {
        (re.sub(r"[-_.]+", "-", component["name"]).lower(), component["version"])
        for component in [*bom["components"], bom["metadata"]["component"]]
    }
    assert listed == installed()
    assert all(c["purl"].startswith("pkg:pypi/") for c in bom["components"])
    assert str(REPO_ROOT) not in text and str(Path.home()) not in text, (
        "paths are nobody's business"
    )
