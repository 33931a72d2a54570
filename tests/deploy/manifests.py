"""The files of deploy/ as data."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = ROOT / "docs" / "serving" / "dashboards"
# Folders that `kubectl apply --kustomize` takes.
KUSTOMIZATIONS = sorted(
    path.parent
    for path in DEPLOY.rglob("kustomization.yaml")
    if yaml.safe_load(path.read_text())["kind"] == "Kustomization"
)
COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))


def manifests() -> Iterator[tuple[Path, dict[str, Any]]]:
    """All objects for Kubernetes, with their files."""
    for kustomization in DEPLOY.rglob("kustomization.yaml"):
        for name in yaml.safe_load(kustomization.read_text()).get("resources", []):
            path = kustomization.parent / name
            if path.is_file():
                for one in yaml.safe_load_all(path.read_text()):
                    yield path, one


def pod_specs() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path, one in manifests():
        template = one.get("spec", {}).get("template")
        if template is not None:
            yield path, template["spec"]


def containers() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path, spec in pod_specs():
        for one in (*spec.get("initContainers", ()), *spec["containers"]):
            yield path, one


def services(path: Path) -> dict[str, Any]:
    """The services of a Compose file, by name."""
    found: dict[str, Any] = yaml.safe_load(path.read_text())["services"]
    return found


def own_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands that the files run in our image, with where they stand."""
    for path, one in containers():
        if one["image"] == "redline":
            yield f"{path.relative_to(ROOT)}: {one['name']}", [*one.get("command", ()), *one.get("args", ())]
    for path in COMPOSE_FILES:
        for name, one in services(path).items():
            if one.get("image", "").startswith("redline:"):
                command = one["command"]
                yield f"{path.relative_to(ROOT)}: {name}", shlex.split(command) if isinstance(command, str) else command
