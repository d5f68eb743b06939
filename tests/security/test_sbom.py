"""`make sbom`: valid CycloneDX that lists exactly what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import REPO_ROOT

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(error is not None)
"""


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
    out, tools = tmp_path / "sbom.cdx.json", tmp_path / "tools"
    environment = [f"BIN={Path(sys.executable).parent}", f"TOOLS={tools}", f"SBOM={out}"]
    make = ["make", "-o", ".venv/.installed", *environment, f"PYTHON={sys.executable}", "sbom"]
    subprocess.run(make, cwd=REPO_ROOT, check=True, timeout=280)
    text = out.read_text()
    bom = json.loads(text)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({**bom, "version": "one"}))
    for file, status in ((out, 0), (broken, 1)):
        validation = [str(tools / "bin" / "python"), "-c", VALIDATE, str(file)]
        assert subprocess.run(validation, timeout=60).returncode == status
    listed = {
        (re.sub(r"[-_.]+", "-", component["name"]).lower(), component["version"])
        for component in [*bom["components"], bom["metadata"]["component"]]
    }
    assert listed == installed()
    assert all(c["purl"].startswith("pkg:pypi/") for c in bom["components"])
    assert str(REPO_ROOT) not in text and str(Path.home()) not in text, (
        "paths are nobody's business"
    )


def test_nothing_installed_costs_every_process_of_ray_a_second():
    """jsonschema, which Ray imports, imports it where it is there."""
    assert importlib.util.find_spec("rfc3987_syntax") is None, "pip uninstall rfc3987-syntax"
