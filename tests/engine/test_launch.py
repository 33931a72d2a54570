"""The EngineCore's process as its parent starts it."""

import json
from pathlib import Path

import psutil

from engine.config import EngineConfig
from engine.core_process import CoreProcess
from tests.engine.worker.driver import BASE


def test_the_environment_of_a_core_is_that_of_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    config = EngineConfig(
        model=str(tmp_path), device="cpu", kernels="torch", load_format="dummy", tensor_parallel_size=2,
        max_num_seqs=2, kv_cache_memory_bytes=1 << 22,
    )  # fmt: skip
    core = CoreProcess(config, environment={"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"})
    try:
        ready = core.wait_ready()
        ranks = psutil.Process(ready.process_id).children()
        assert [rank.environ().get("CUDA_VISIBLE_DEVICES") for rank in ranks] == ["GPU-1,GPU-2"] * 2
    finally:
        core.stop()
