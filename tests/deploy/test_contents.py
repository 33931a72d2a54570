"""What the files of deploy/ name exists: flags of commands, services, volumes, and files that are mounted or copied."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import (
    COMPOSE_FILES,
    DASHBOARDS,
    DEPLOY,
    ROOT,
    containers,
    manifests,
    own_commands,
    pod_specs,
    services,
)
from tests.test_documented_commands import check_redline, split_commands

VARIABLE = re.compile(r"\$\{\w+(?::-([^}]*))?\}")
SERVE = re.compile(r"\bredline\W+serve\b")
PROMTOOL = shutil.which("promtool")
MONITORING = DEPLOY / "monitoring"


def redline_commands() -> list[tuple[str, tuple[str, ...]]]:
    """The `redline` commands of all files, also those of scripts for a shell; variables have their defaults."""
    found = []
    for where, words in own_commands():
        filled = [VARIABLE.sub(lambda variable: variable[1] or "", word) for word in words]
        commands = split_commands(filled[-1], "bash") if filled[0] in ("bash", "sh") else [tuple(filter(None, filled))]
        found += [(where, command) for command in commands if command[0] == "redline"]
    return found


@pytest.mark.parametrize(("where", "words"), redline_commands())
def test_flags_of_commands_are_right(where: str, words: tuple[str, ...]) -> None:
    check_redline(list(words[1:]))


def test_servers_listen_for_others() -> None:
    """A server on 127.0.0.1 of its container can't be reached."""
    serving = [words for _, words in redline_commands() if words[1] == "serve"]
    assert len(serving) >= 3
    for words in serving:
        assert words[words.index("--host") + 1] == "0.0.0.0"


def test_a_server_on_several_nodes_waits_for_a_cpu_for_each_of_its_ranks() -> None:
    """It ends if the nodes that have joined have fewer."""
    [script] = [words[-1] for _, words in own_commands() if "ray start --head" in words[-1]]
    [loop] = re.findall(r"^until \[ .* -ge (\d+) \]; do", script, re.MULTILINE)
    [serve] = [words for words in split_commands(script, "bash") if words[:2] == ("redline", "serve")]
    cpus = sum(
        one["spec"]["replicas"] * int(one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for path, one in manifests()
        if path.parent.name == "ray" and one["kind"] == "Deployment"
    )
    assert int(loop) == int(serve[serve.index("--tp") + 1]) <= cpus


def names(kind: str) -> set[str]:
    """Names of all objects of a kind; of ConfigMaps, those that kustomize makes."""
    found = {one["metadata"]["name"] for _, one in manifests() if one["kind"] == kind}
    if kind == "ConfigMap":
        for path in (*DEPLOY.rglob("kustomization.yaml"), DASHBOARDS / "kustomization.yaml"):
            found |= {one["name"] for one in yaml.safe_load(path.read_text()).get("configMapGenerator", ())}
    return found


def test_volumes_and_mounts_belong_together() -> None:
    for path, spec in pod_specs():
        defined = {one["name"] for one in spec.get("volumes", ())}
        mounted = {mount["name"] for one in spec["containers"] for mount in one.get("volumeMounts", ())}
        assert mounted == defined, path
        for one in spec.get("volumes", ()):
            if "configMap" in one:
                assert one["configMap"]["name"] in names("ConfigMap"), path
            if "persistentVolumeClaim" in one:
                assert one["persistentVolumeClaim"]["claimName"] in names("PersistentVolumeClaim"), path


def test_ports_that_probes_and_services_name_are_opened() -> None:
    opened = {
        (label, port["name"])
        for _, one in manifests()
        if "template" in one.get("spec", {})
        for label in [one["spec"]["template"]["metadata"]["labels"]["app"]]
        for container in one["spec"]["template"]["spec"]["containers"]
        for port in container.get("ports", ())
    }
    for path, one in manifests():
        if one["kind"] == "Service":
            wanted = {(one["spec"]["selector"]["app"], port["targetPort"]) for port in one["spec"]["ports"]}
            assert wanted <= opened, f"{path}: {one['metadata']['name']}"
    for path, one in containers():
        own = {port["name"] for port in one.get("ports", ())}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            for handler in ("httpGet", "tcpSocket"):
                port = one.get(probe, {}).get(handler, {}).get("port")
                assert port is None or port in own, f"{path}: {probe}"


def test_pods_end_after_the_requests_that_run() -> None:
    from engine.config import SHUTDOWN_TIMEOUT_S

    serving = [spec for _, spec in pod_specs() if any(SERVE.search(str(one.get("args"))) for one in spec["containers"])]
    assert serving
    for spec in serving:
        assert spec["terminationGracePeriodSeconds"] > SHUTDOWN_TIMEOUT_S
    server = services(DEPLOY / "compose.yaml")["redline"]
    assert float(server["stop_grace_period"].removesuffix("s")) > SHUTDOWN_TIMEOUT_S


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_files_that_compose_mounts_exist(path: Path) -> None:
    for name, service in services(path).items():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (path.parent / source).is_file(), f"{name}: {source}"
            else:
                assert source in yaml.safe_load(path.read_text())["volumes"], f"{name}: {source}"
        if "build" in service:
            assert (path.parent / service["build"]["context"] / "Dockerfile").is_file()


def test_prometheus_reads_what_the_servers_are_called() -> None:
    config: dict[str, Any] = yaml.safe_load((MONITORING / "config" / "prometheus.yaml").read_text())
    [scrape] = config["scrape_configs"]
    assert scrape["job_name"] == "redline"  # the alert RedlineDown asks for it
    [found] = scrape["dns_sd_configs"]
    assert set(found["names"]) <= names("Service")
    server = services(DEPLOY / "compose.yaml")["redline"]
    assert set(found["names"]) <= set(server["networks"]["default"]["aliases"])
    [source] = yaml.safe_load((MONITORING / "config" / "datasources.yaml").read_text())["datasources"]
    host = source["url"].removeprefix("http://").partition(":")[0]
    assert host in names("Service")
    assert host in services(DEPLOY / "compose.yaml")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration(tmp_path: Path) -> None:
    assert PROMTOOL is not None
    text = (MONITORING / "config" / "prometheus.yaml").read_text()
    assert "/etc/redline/alerts.yaml" in text
    config = tmp_path / "prometheus.yaml"
    config.write_text(text.replace("/etc/redline", str(DASHBOARDS)))
    done = subprocess.run([PROMTOOL, "check", "config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def print_requirements(device: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEPLOY / "requirements.py"), device]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_requirements_of_images(device: str) -> None:
    done = subprocess.run(
        [sys.executable, DEPLOY / "requirements.py", device], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lines[: len(project["dependencies"])] == project["dependencies"]
    assert any(one.startswith("ray") for one in lines)
    assert any(one.startswith("triton") for one in lines) == (device == "cuda")


def test_a_device_without_image_is_refused() -> None:
    done = print_requirements("tpu")
    assert done.returncode == 1
    assert done.stderr == "DEVICE=tpu: images are for cpu or cuda\n"


def test_an_image_has_all_that_is_installed() -> None:
    """What .dockerignore lets through is what the wheel is made of."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    wanted = {name.partition(".")[0] for name in setuptools["packages"]}
    wanted |= {f"{name}.py" for name in setuptools["py-modules"]}
    wanted |= {"datasets", "pyproject.toml", "setup.py", "README.md", "LICENSE", "versions", "deploy/requirements.py"}
    assert let_through == wanted
    assert all((ROOT / name).exists() for name in let_through)
