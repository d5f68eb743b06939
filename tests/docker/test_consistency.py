"""Image, compose, Kubernetes, Slurm and their page name the same things."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import parse_recipe_command
from pipeline.pretrain_config import PretrainConfig
from pipeline.recipes import PRETRAIN_RECIPES
from tests.conftest import REPO_ROOT
from tests.docker.compose_file import compose, service, variables
from tests.docker.linters import DOCKER
from tests.docker.manifests import documents

README = (DOCKER / "README.md").read_text()
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
SLURM = (DOCKER / "slurm" / "train.sbatch").read_text()
VERSION = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]["version"]
RAY_SERVICES = ["ray-head", "ray-worker-1", "ray-worker-2"]


def environment_of(path: Path) -> dict[str, str]:
    """Lines KEY=value of a file."""
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {key: value for key, _, value in pairs if key and not key.startswith("#")}


def images(value: Any) -> list[str]:
    """Everything called image, anywhere in a document."""
    if isinstance(value, list):
        return [name for part in value for name in images(part)]
    if not isinstance(value, dict):
        return []
    here = [value["image"]] if isinstance(value.get("image"), str) else []
    return here + [name for part in value.values() for name in images(part)]


def test_all_images_have_a_version_and_ours_is_the_one_of_pyproject():
    every = [*images(compose()), *images(compose("compose.cuda.yaml"))]
    every += images(list(documents().values())) + re.findall(r"-t (\S+) \.$", README, re.MULTILINE)
    ours = {name.rpartition("/")[2] for name in every if "itpn-ray" in name}
    assert ours == {f"itpn-ray:{VERSION}-cpu", f"itpn-ray:{VERSION}-cuda"}
    assert f"ARG VERSION={VERSION}\n" in DOCKERFILE
    for name in every:
        assert re.fullmatch(r"\S+:v?\d+\.\d+\S*", name), f"{name}: which version?"


def test_the_ray_of_the_manifests_is_one_that_pyproject_allows():
    asked = re.search(r'"ray\[.*\]>=([\d.]+)"', (REPO_ROOT / "pyproject.toml").read_text())
    version = documents()["RayCluster"]["spec"]["rayVersion"]
    assert asked and tuple(map(int, version.split(".")[:2])) >= tuple(map(int, asked[1].split(".")))


def test_every_secret_of_compose_is_required_and_listed_without_a_value():
    listed = environment_of(DOCKER / ".env.example")
    needed = variables()
    assert all(needed.values()), "a variable without :? would be empty, with :- it has a default"
    from_files = {secret["environment"] for secret in compose()["secrets"].values()}
    assert listed.keys() == needed.keys() | from_files
    assert {key for key, value in listed.items() if value} == {"MLFLOW_ADMIN_USERNAME"}


def test_no_secret_of_ours_reaches_git_or_the_upload_of_a_job():
    for name in ("docker/.env", ".ray-token-4711"):
        done = subprocess.run(["git", "check-ignore", "-q", name], cwd=REPO_ROOT, timeout=30)
        assert done.returncode == 0, f"{name} is not in .gitignore, which Ray's upload respects too"


def test_ports_are_published_on_this_machine_only():
    published = {
        name: ports
        for name, service in compose()["services"].items()
        if (ports := service.get("ports"))
    }
    assert published == {"ray-head": ["127.0.0.1:8265:8265"], "mlflow": ["127.0.0.1:5000:5000"]}
    assert not any("network_mode" in service for service in compose()["services"].values())


def test_services_find_each_other():
    services = compose()["services"]
    text = (DOCKER / "compose.yaml").read_text() + (DOCKER / "mlflow_auth.ini").read_text()
    hosts = set(re.findall(r"(?://|@|--address=)([a-z][\w-]*):(\d+)", text))
    ports = {"ray-head": "6379", "mlflow": "5000", "s3": "7070", "postgres": "5432"}
    assert hosts == set(ports.items()) and ports.keys() <= services.keys()
    assert "--port=6379" in services["ray-head"]["command"]
    assert "--port=5000" in services["mlflow"]["command"]
    assert services["s3"]["environment"]["VGW_PORT"] == ":7070"
    for name, entry in services.items():
        for other, how in entry.get("depends_on", {}).items():
            is_once = other == "buckets"
            wanted = "service_completed_successfully" if is_once else "service_healthy"
            assert how["condition"] == wanted, (name, other)
            assert is_once or "healthcheck" in services[other] or other in RAY_SERVICES
    assert "HEALTHCHECK" in DOCKERFILE


def test_users_of_mlflow_live_in_the_data_base_of_mlflow_and_jobs_are_one_of_them():
    mlflow, ray = service("mlflow")["environment"], service("ray-head")["environment"]
    users = ConfigParser()
    users.read(DOCKER / "mlflow_auth.ini")
    assert users["mlflow"]["database_uri"] == mlflow["MLFLOW_BACKEND_STORE_URI"]
    assert "admin_password" not in users["mlflow"]
    assert ray["MLFLOW_TRACKING_PASSWORD"] == mlflow["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert ray["MLFLOW_TRACKING_USERNAME"] == mlflow["MLFLOW_AUTH_ADMIN_USERNAME"]
    postgres = service("postgres")["environment"]
    assert mlflow["PGPASSWORD"] == postgres["POSTGRES_PASSWORD"]
    found = re.search(r"//(\w+)@postgres:5432/(\w+)$", mlflow["MLFLOW_BACKEND_STORE_URI"])
    assert found and found.groups() == (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"])


def test_object_store_client_and_server_share_their_keys_and_the_buckets_exist():
    server, client = service("s3")["environment"], service("mlflow")["environment"]
    assert server["ROOT_ACCESS_KEY"] == client["AWS_ACCESS_KEY_ID"]
    assert server["ROOT_SECRET_KEY"] == client["AWS_SECRET_ACCESS_KEY"]
    buckets = set(service("buckets")["command"][2:])
    text = f"{README}{yaml.safe_dump(compose())}{yaml.safe_dump(documents()['RayJob'])}"
    assert set(re.findall(r"s3://([\w-]+)", text)) == buckets


def test_compose_and_kubernetes_give_jobs_the_same_variables():
    container = documents()["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    kubernetes = {entry["name"] for entry in container[0]["env"]}
    for name in RAY_SERVICES:
        ours = service(name)["environment"].keys()
        # Of the token KubeRay takes care itself, by authOptions.
        assert ours - {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"} == kubernetes
    assert f"`{'`, `'.join(sorted(k for k in kubernetes if 'AWS_' in k and 'KEY' in k))}`" in README
    for entry in container[0]["env"]:
        assert "valueFrom" not in entry or f"`{entry['name']}`" in README


def test_the_token_is_asked_for_everywhere():
    auth = documents()["RayCluster"]["spec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": "itpn-ray-token"}
    assert "secret generic itpn-ray-token --from-literal=auth_token=" in README
    assert "RAY_AUTH_MODE=token" in DOCKERFILE and "export RAY_AUTH_MODE=token" in SLURM
    for name in RAY_SERVICES:
        entry = service(name)
        assert entry["environment"]["RAY_AUTH_MODE"] == "token"
        path = entry["environment"]["RAY_AUTH_TOKEN_PATH"]
        assert entry["secrets"] == [path.removeprefix("/run/secrets/")] == ["ray_token"]


def test_run_folders_are_on_storage_that_every_node_sees():
    volume = documents()["PersistentVolumeClaim"]
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = documents()["RayCluster"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claim == volume["metadata"]["name"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/runs"}]
    for name in RAY_SERVICES:
        assert service(name)["volumes"] == ["runs:/mnt/runs"]
    assert "runs" in compose()["volumes"] and "/mnt/runs" in DOCKERFILE


def test_policy_and_pods_agree_on_labels():
    submitter = documents()["RayJob"]["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    sources = documents()["NetworkPolicy"]["spec"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": submitter}} in sources


def test_health_is_asked_with_the_script_of_the_image():
    assert 'CMD ["python", "/opt/itpn-ray/healthcheck.py"]' in DOCKERFILE
    for document in (documents()["RayCluster"], documents()["RayJob"]):
        assert str(document).count("['python', '/opt/itpn-ray/healthcheck.py']") == 6
    copied = re.findall(r"docker/(\S+\.(?:py|sh))", DOCKERFILE)
    assert {"healthcheck.py", "create_buckets.py", "install.sh"} == set(copied)
    kept = (REPO_ROOT / ".dockerignore").read_text()
    assert all(f"!docker/{name}" in kept and (DOCKER / name).exists() for name in copied)


def commands() -> list[str]:
    """Every command of the page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    return [line for block in blocks for line in block.splitlines()]


def test_files_that_the_page_and_the_scripts_name_exist():
    texts = [README, SLURM, *commands()]
    named = {n for t in texts for n in re.findall(r"\b((?:docker|jobs)/[\w./-]+\w)", t)}
    assert len(named) > 8
    assert not [name for name in named - {"docker/.env"} if not (REPO_ROOT / name).exists()]


def test_commands_in_comments_are_those_of_the_page():
    for path in (DOCKER / "Dockerfile", DOCKER / "compose.cuda.yaml"):
        for command in re.findall(r"^#   (docker .*)$", path.read_text(), re.MULTILINE):
            assert command in commands()


def job_commands() -> list[list[str]]:
    """Arguments of jobs/pretrain.py wherever it is called."""
    entrypoint = documents()["RayJob"]["spec"]["entrypoint"]
    comment = re.search(r"^#   sbatch (.*?)\n#\n", SLURM, re.MULTILINE | re.DOTALL)
    assert comment
    texts = [*commands(), entrypoint, re.sub(r"\\\n#\s*", "", comment[1])]
    words = [shlex.split(text) for text in texts if "jobs/pretrain.py" in text]
    return [found[found.index("jobs/pretrain.py") + 1 :] for found in words]


@pytest.mark.parametrize("arguments", job_commands(), ids=lambda arguments: arguments[0])
def test_jobs_are_called_with_settings_that_exist_and_resources_that_nodes_offer(
    arguments: list[str],
):
    parse: Callable[..., PretrainConfig] = parse_recipe_command
    config = parse(PRETRAIN_RECIPES, arguments, prog="pretrain", description="")
    groups = documents()["RayCluster"]["spec"]["workerGroupSpecs"]
    trainers, data_nodes = (group["resources"] for group in groups)
    if config.scaling.worker_resource:
        assert int(trainers[config.scaling.worker_resource]) == int(trainers["GPU"])
        assert config.scaling.max_workers == int(trainers["GPU"]) * groups[0]["replicas"]
        assert config.data.worker_resource in data_nodes.keys() - trainers.keys()
