"""Reads YAML files, and the workload presets in datasets/."""

from pathlib import Path
from typing import Any

import yaml

from bench.errors import BenchError
from bench.workloads.datafile import read_text
from engine.data import datasets_folder


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys; YAML's own loader silently keeps the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    duplicate = f"key {key.value!r} is duplicated"
                    raise yaml.constructor.ConstructorError(None, None, duplicate, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file; raises BenchError if it cannot be read."""
    text = read_text(path)
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: impossible dates
        raise BenchError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def workload_presets() -> dict[str, Path]:
    """The workload presets by name."""
    return {path.stem: path for path in sorted((datasets_folder() / "workloads").glob("*.yaml"))}


def read_workload(name: str) -> dict[str, Any]:
    """The description in a workload preset or a YAML file, for make_workload().

    A relative path of a data set or trace in the file is looked up next to the file first.
    """
    known = workload_presets()
    path = known.get(name, Path(name).expanduser())
    if not path.is_file():
        raise BenchError(f"unknown workload {name!r}: use one of {', '.join(known)}, or a YAML file (--workload)")
    try:
        spec = read_yaml(path)
    except BenchError as error:
        raise BenchError(f"{error} (--workload)") from None
    if not isinstance(spec, dict) or "kind" not in spec:
        raise BenchError(f"{path}: a workload must have fields such as kind, input and output (--workload)")
    spec.pop("description", None)
    for field in ("dataset", "trace"):
        if isinstance(spec.get(field), str) and (path.parent / spec[field]).exists():
            spec[field] = str(path.parent / spec[field])
    return spec
