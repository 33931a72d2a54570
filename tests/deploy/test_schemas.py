"""Files of deploy/ against the schemas of Kubernetes, Compose and Ray, and the Dockerfile against hadolint's rules."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import COMPOSE_FILES, DEPLOY, KUSTOMIZATIONS, ROOT, manifests

KUBERNETES = "1.33"
KUBECTL = shutil.which("kubectl")
DOCKERFILE = ROOT / "Dockerfile"


def run(*command: str) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """A program of the virtual environment."""
    return str(Path(sys.prefix) / "bin" / name)


def check(one: dict[str, Any]) -> None:
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    "one", [pytest.param(one, id=f"{path.stem}-{one['kind']}-{one['metadata']['name']}") for path, one in manifests()]
)
def test_manifests_follow_the_schemas_of_kubernetes(one: dict[str, Any]) -> None:
    check(one)


def test_a_wrong_field_is_found() -> None:
    _, deployment = next(found for found in manifests() if found[1]["kind"] == "Deployment")
    wrong = json.loads(json.dumps(deployment))
    wrong["spec"]["template"]["spec"]["containers"][0]["ressources"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="ressources"):
        check(wrong)


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_what_kustomize_makes_follows_them(folder: Path) -> None:
    assert KUBECTL is not None
    made = list(yaml.safe_load_all(run(KUBECTL, "kustomize", str(folder))))
    assert made
    for one in made:
        check(one)
    images = set(re.findall(r"image: (\S*redline\S*)", yaml.safe_dump_all(made)))
    assert all(re.fullmatch(r"registry\.example\.com/redline:(cpu|cuda)", image) for image in images), images


@pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")
def test_the_server_on_a_gpu_asks_for_one() -> None:
    assert KUBECTL is not None
    made = yaml.safe_load_all(run(KUBECTL, "kustomize", str(DEPLOY / "kubernetes" / "cuda")))
    [deployment] = [one for one in made if one["kind"] == "Deployment"]
    [server] = deployment["spec"]["template"]["spec"]["containers"]
    assert server["image"].endswith("redline:cuda")
    assert server["args"][-2:] == ["--device", "cuda"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_files_follow_the_specification(path: Path) -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(path))


def test_the_ray_cluster_is_one_that_ray_accepts() -> None:
    """By the functions that `ray up` calls before it connects to a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    assert config["max_workers"] == len(given["provider"]["worker_ips"])
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all(one.startswith("~/redline-env/bin/ray ") for one in commands)


def test_the_dockerfile_follows_the_linter() -> None:
    run(tool("hadolint"), "--failure-threshold", "info", str(DOCKERFILE))
