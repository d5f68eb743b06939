#!/bin/sh
# Installs what itpn-ray needs, and not itpn-ray itself, into the environment of $PYTHON.
#
#   docker/install.sh cpu|cuda pyproject.toml
#
# The one place that says how the environment of the image is built: docker/Dockerfile runs this
# file, and so does tests/docker/test_image_environment.py, in a fresh venv.
#
# cpu:  torch from the index of CPU builds, $TORCH_INDEX.
# cuda: torch from the ordinary index, whose Linux wheels are CUDA builds.
set -eu

VARIANT=${1:?"which torch? docker/install.sh cpu|cuda pyproject.toml"}
PYPROJECT=${2:?"which dependencies? docker/install.sh cpu|cuda pyproject.toml"}
PYTHON=${PYTHON:-python3}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

# dependencies torch|others: requirements of pyproject.toml, one a line. `server` is what the MLflow
# server of compose.yaml needs besides (PostgreSQL, S3, passwords), `demo` the pictures of the demos.
dependencies() {
    "$PYTHON" - "$PYPROJECT" "$1" <<'PY'
import re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for line in [*project["dependencies"], *extras["demo"], *extras["server"]]:
    is_torch = re.match(r"[\w.-]+", line)[0] in ("torch", "torchvision")
    if is_torch == (sys.argv[2] == "torch"):
        print(line)
PY
}

# Wheels only: the image has no compiler, and a source distribution would say so at great length.
install() {
    "$PYTHON" -m pip install --only-binary=:all: "$@"
}

REQUIREMENTS=$(mktemp -d)
trap 'rm -rf "$REQUIREMENTS"' EXIT
dependencies torch >"$REQUIREMENTS/torch.txt"
dependencies others >"$REQUIREMENTS/others.txt"

# torch and torchvision in one call: each release of one fits one release of the other.
case $VARIANT in
cpu) install --index-url "$TORCH_INDEX" -r "$REQUIREMENTS/torch.txt" ;;
cuda) install -r "$REQUIREMENTS/torch.txt" ;;
*)
    echo "variant '$VARIANT' must be cpu or cuda" >&2
    exit 2
    ;;
esac
install -r "$REQUIREMENTS/others.txt"
"$PYTHON" -m pip check
