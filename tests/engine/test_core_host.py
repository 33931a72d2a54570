"""A core behind its gateway, as on another machine: what `LLM` gets from it, images included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import start
from engine.children import Loading, Up, decode_report
from engine.config import EngineConfig
from engine.core_host import CoreHost
from engine.curve import new_secret
from engine.frontend.transport import CoreAddress
from engine.gateway import front_end_name
from engine.host import available_memory
from engine.messages import Ready
from redline import LLM, SamplingParams
from tests.engine.test_llm_media import IMAGE, OTHER, PICTURE, folder

__all__ = ("folder",)  # a fixture

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
OPTIONS: dict[str, Any] = {
    "load_format": "dummy", "dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "mm_processors": 1,
    "mm_cache_gb": 0.00002, "limit_mm_per_prompt": {"image": 2},
}  # fmt: skip


class HostedCore:
    """Implements `engine.core_process.Core`, as `engine.ray_replicas.RayCore` does, on this machine."""

    spawned = 0.0

    def __init__(self, config: EngineConfig):
        self.secret = new_secret()
        self.host = CoreHost()
        self._to_core = self.host.start("127.0.0.1", self.secret, config.describe(), 1, 0.0, available_memory(), None)

    def wait_ready(self, _loading: Callable[[int, int], None] | None = None) -> Ready:
        while isinstance(report := decode_report(self.host.next_report()), Loading):
            pass
        assert isinstance(report, Up), report
        ready: Ready = report.read(Ready)
        return ready

    def address(self, front_end: int, ready: Ready) -> CoreAddress:
        return CoreAddress(ready, self._to_core, front_end_name(front_end), self.secret)

    def watch(self, _on_death: Callable[[str], None]) -> None: ...

    def stop(self) -> None:
        self.host.close()


def test_answers_are_those_of_a_core_beside_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds one image, so that files are freed and sent again."""
    written = f"<{IMAGE}>\nWhat?\n"
    prompts: list[Any] = [
        {"prompt": written, "multi_modal_data": {"image": picture}} for picture in (PICTURE, OTHER, PICTURE)
    ]
    prompts.append({"prompt": written * 2, "multi_modal_data": {"image": [OTHER, PICTURE]}})
    with LLM(str(folder), **OPTIONS) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(prompts, GREEDY)]
    assert len(set(map(tuple, expected))) == 3, "the tokens depend on the images"
    monkeypatch.setattr(start, "start_cores", lambda config, **_: (HostedCore(config),))
    with LLM(str(folder), **OPTIONS) as llm:
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert [one.outputs[0].token_ids for one in llm.generate([prompt], GREEDY)] == [tokens]
        assert [one.outputs[0].token_ids for one in llm.generate(prompts, GREEDY)] == expected
