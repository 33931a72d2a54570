"""A start of a plain text model imports nothing that it does not need: imports are most of its time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.cpu import build
from tests.engine.worker.driver import build_model

# Builds a core as its process does.
CORE = """
import json, os, sys
from engine.config import EngineConfig
from engine.launch import Endpoints, build_core_server
from engine.socket_folder import SocketFolder
folder = SocketFolder()
built = build_core_server(
    EngineConfig(**json.loads(sys.argv[1])), Endpoints(f"ipc://{folder.path}/core", (f"ipc://{folder.path}/front",))
)
folder.remove()
print(json.dumps([built.ready.kernels, sorted(sys.modules)]), flush=True)
os._exit(0)
"""
# `redline serve` up to the start of its cores.
COMMAND = """
import json, sys
import engine.start
from cli.main import main
def start_cores(*_, **__):
    print(json.dumps(sorted(sys.modules)), flush=True)
    raise SystemExit
engine.start.start_cores = start_cores
main(["serve", sys.argv[1], "--port", "0"])
"""
# All that `redline serve` imports in its first process.
FRONT_END = "import json, sys, cli.serve, engine.api.server_run, engine.frontend.generation_defaults, engine.start\n"
FRONT_END += "print(json.dumps(sorted(sys.modules)))"

NOT_IN_CORE = {
    "accelerate", "fastapi", "llguidance", "pandas", "torch._dynamo", "torch._inductor.compile_fx",
    "torch.distributed.tensor", "PIL", "tokenizers", "transformers",
    "triton", "uvicorn",
}  # fmt: skip
NOT_BEFORE_CORES = {"engine.api.app", "fastapi", "httpx", "jinja2", "tokenizers", "torch", "transformers", "uvicorn"}
NOT_IN_FRONT_END = {"pandas", "PIL", "torch", "transformers"}


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_core_imports_no_class_that_its_kernels_replace(quantization: str | None, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    build_model("llama", tmp_path, hidden_size=64, intermediate_size=64, head_dim=16, rope_parameters=rope)
    options = {"model": str(tmp_path), "device": "cpu", "dtype": "bfloat16", "quantization": quantization}
    options |= {"max_num_seqs": 2, "kv_cache_memory_bytes": 1 << 22}
    kernels, modules = json.loads(run(CORE, json.dumps(options)))
    assert "fused stack" in kernels
    assert not NOT_IN_CORE.intersection(modules)


def test_cores_are_started_before_the_server_is_imported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").touch()
    assert not NOT_BEFORE_CORES.intersection(json.loads(run(COMMAND, str(tmp_path))))


def test_the_front_end_imports_nothing_that_plain_texts_do_not_need() -> None:
    assert not NOT_IN_FRONT_END.intersection(json.loads(run(FRONT_END)))
