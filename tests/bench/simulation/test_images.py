"""Images of requests to simulated servers: their tokens, their processing, and what caches save."""

import math

import pytest

from bench.errors import BenchError
from bench.measurement.offline import Finished, ServedOffline
from bench.simulation import SimulatedServer
from bench.simulation.prompts import images_of
from bench.workloads import make_workload
from bench.workloads.base import RequestSpec
from cli.simulated import make_engine

PIXTRAL = "mistralai/Pixtral-12B-2409"
FLAGS = ["--device", "sim:h100", "--max-model-len", "4096"]


def served(model: str, flags: list[str], count: int = 30, **fields: object) -> tuple[float, list[Finished]]:
    engine = make_engine(model, [*FLAGS, *flags])
    spec = {"kind": "images", "image_size": "512x384", "input": 16, "output": 4, **fields}
    offline = ServedOffline(SimulatedServer(engine.simulation, engine.title))
    finished = offline.run(make_workload(spec, engine.vocab_size).requests(count, 1), lambda: None)
    return offline.now(), finished


def test_images_are_read_from_requests() -> None:
    spec = make_workload({"kind": "images", "images": 2, "image_size": "64x48"}, 1000).requests(2, 1)
    first, second = images_of(spec[0])
    assert (first.width, first.height) == (64, 48)
    assert len({one.content for request in spec for one in images_of(request)}) == 4
    assert second.content != first.content
    sound = RequestSpec(1, 1, messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}])
    with pytest.raises(BenchError, match="input_audio, which simulated hardware does not compute"):
        images_of(sound)


def test_prompts_have_the_tokens_of_their_images() -> None:
    _, finished = served(PIXTRAL, [], count=2)
    rows, columns = 384 // 16, 512 // 16  # a token ends each row
    assert min(one.prompt_tokens for one in finished) > rows * (columns + 1)


def test_images_cost_time_and_caches_save_it() -> None:
    without = ["--no-enable-prefix-caching", "--mm-cache-gb", "0", "--ablate", "no-encoder-cache"]
    unique_s, _ = served(PIXTRAL, without)
    repeated_s, _ = served(PIXTRAL, without, repeat=90)
    cached_s, finished = served(PIXTRAL, [], repeat=90)
    assert math.isclose(unique_s, repeated_s, rel_tol=0.02)
    assert cached_s < 0.8 * repeated_s
    assert sum(one.cached_tokens for one in finished) > 0
    v0_s, _ = served(PIXTRAL, ["--engine", "v0"])
    assert v0_s > 1.1 * unique_s


def test_a_model_of_texts_refuses_images() -> None:
    with pytest.raises(BenchError, match="takes no images"):
        served("meta-llama/Meta-Llama-3.1-8B-Instruct", [], count=1)
