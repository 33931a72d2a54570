"""Images of simulated requests: as many tokens as processors make, and the real core decides what is encoded."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.hardware.description import Processing, read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.images import ImageProcessing, SimulatedImage, image_tokens, with_images
from engine.hardware.simulation import ImageInputs, Simulation
from engine.hardware.start import simulated_executor
from engine.hardware.step_time import DecoderShape, StepTime
from engine.hardware.towers import TowerTime, tower_shape
from engine.hardware.virtual_engine import VirtualClock, VirtualEngine
from engine.messages import AddRequest, Outputs, Sampling, decode_from_core, encode
from engine.model.declared import read_declared
from engine.multimodal.processors.crops import CropSettings, kept_cells, select_tiling
from engine.resolved_config import ResolvedConfig
from tests.engine.hardware.model_configs import CONFIGS, LLAVA
from tests.simulated_server import run_engine

H100 = read_hardware("h100")
QWEN = CONFIGS["qwen2-vl-7b"]
SHAPE = DecoderShape(28, 3584, 18944, 28, 4, 128, 152064)
TOWER = tower_shape(QWEN)
sides = st.integers(120, 4000)


@given(width=sides, height=sides)
def test_tokens_are_those_of_the_processors(width: int, height: int) -> None:
    rows, columns = (side // 28 for side in smart_resize(height, width, 28, 4 * 28**2, 1280 * 28**2))
    assert image_tokens(QWEN, width, height) == rows * columns
    settings = CropSettings(336, 14, 4, 4)
    cells = kept_cells(select_tiling(height, width, settings, 12), 12, 2, 2)
    molmo = 2 + 12 * 13 + 2 + cells.shape[0] * (cells.shape[1] + 1)
    assert image_tokens(CONFIGS["molmo-72b"], width, height) == molmo
    pixels = np.broadcast_to(np.uint8(0), (3, height, width))
    high, wide = (side // 16 for side in get_resize_output_image_size(pixels, (1024, 1024), (16, 16)))
    assert image_tokens(CONFIGS["pixtral-12b"], width, height) == high * (wide + 1)


def test_images_of_other_models_are_refused() -> None:
    assert image_tokens(LLAVA, 10, 5000) == 576
    with pytest.raises(ConfigError, match="how many tokens an image of gemma3 has"):
        image_tokens({"model_type": "gemma3"}, 100, 100)


def test_images_wait_for_a_process_and_repeated_ones_do_not() -> None:
    processing = ImageProcessing(Processing("", 50), processes=2)
    images = [SimulatedImage(1000, 1000, bytes([number])) for number in range(3)]
    assert processing.end(1.0, images[:2]) == pytest.approx(1.05)
    assert processing.end(1.01, images[1:]) == pytest.approx(1.10)
    assert processing.end(1.02, images) == 1.02
    assert ImageProcessing(Processing("", 50), 1, cached=False).seconds([images[0]] * 2) == pytest.approx(0.1)


class Served:
    """One engine with a tower: when each request had its first token."""

    def __init__(self, **options: Any):
        self.clock = VirtualClock()
        step_time = StepTime(H100, SHAPE, tower=TOWER)
        host = SimulatedHost(H100.host.v1, 1, overlaps=True)
        self.executor = SimulatedExecutor(self.clock, step_time, host, 8, SHAPE.vocab_size)
        config = ResolvedConfig(
            max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=4096, block_size=16, num_blocks=2000, **options
        )
        self.engine = VirtualEngine(config, self.executor, self.clock, self._receive)
        self.first: dict[int, float] = {}
        self.cached: dict[int, int] = {}

    def ttft(self, handle: int, images: list[SimulatedImage], text: int) -> float:
        """Serve a request alone, whose text is its own."""
        tokens = np.random.default_rng(text).integers(0, 1000, 50, dtype=np.int32)
        prompt, inputs = with_images(QWEN, tokens, images, QWEN["image_token_id"])
        sent = self.clock.now()
        self.engine.core.receive(encode(AddRequest(handle, prompt.tobytes(), 3, Sampling(), mm_inputs=inputs)))
        run_engine(self.engine, self.clock, sent)
        while (event := self.engine.next_event) is not None:
            run_engine(self.engine, self.clock, event)
        return self.first[handle] - sent

    def _receive(self, _: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert isinstance(message, Outputs)
        for handle in np.frombuffer(message.handles, np.int64).tolist():
            self.first.setdefault(handle, message.at)
        for one in message.admitted:
            self.cached[one.handle] = one.cached_tokens


CAT, DOG = SimulatedImage(1000, 800, b"cat"), SimulatedImage(1000, 800, b"dog")


def tower_seconds(image: SimulatedImage) -> float:
    assert TOWER is not None
    return TowerTime(H100, TOWER).seconds(image_tokens(QWEN, image.width, image.height))


def test_a_image_is_encoded_once_while_the_encoder_cache_has_it() -> None:
    served = Served(enable_prefix_caching=False)
    new, again = served.ttft(0, [CAT], text=1), served.ttft(1, [CAT], text=2)
    assert new - again == pytest.approx(tower_seconds(CAT))
    assert served.ttft(2, [DOG, CAT], text=3) > tower_seconds(DOG) + again
    assert served.engine.core.scheduler.encoder_cache.hits == 2


def test_without_the_encoder_cache_each_request_encodes() -> None:
    served = Served(enable_prefix_caching=False, ablations=frozenset({"no-encoder-cache"}))
    assert served.ttft(0, [CAT], text=1) == pytest.approx(served.ttft(1, [CAT], text=2))


def test_the_prefix_cache_tells_images_by_their_content() -> None:
    served = Served(enable_prefix_caching=True)
    tokens = image_tokens(QWEN, CAT.width, CAT.height)
    new = served.ttft(0, [CAT], text=1)
    other = served.ttft(1, [DOG], text=1)
    assert served.cached == {0: 0, 1: 0}
    assert other == pytest.approx(new)
    repeated = served.ttft(2, [CAT], text=1)
    assert served.cached[2] >= tokens
    assert repeated < new - tower_seconds(CAT)


def test_a_loop_that_processes_a_image_delays_the_next_step() -> None:
    served = Served(enable_prefix_caching=False)
    alone = served.ttft(0, [CAT], text=1)
    served.executor.occupy(0.2)
    assert served.ttft(1, [DOG], text=2) == pytest.approx(alone + 0.2)


def test_a_configuration_of_a_model_with_images_has_its_tower() -> None:
    config = EngineConfig(model="qwen2-vl-7b", device="sim:h100", max_model_len=4096)
    resolved = ResolvedConfig(
        max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=4096, block_size=16, num_blocks=2000,
        enable_prefix_caching=False,
    )  # fmt: skip
    clock, times = VirtualClock(), list[float]()
    executor = simulated_executor(config, resolved, read_declared(config), clock)
    engine = VirtualEngine(resolved, executor, clock, lambda _, data: times.append(arrival(data)))
    prompt, inputs = with_images(QWEN, [1, 2, 3], [CAT], QWEN["image_token_id"])
    engine.core.receive(encode(AddRequest(0, prompt.tobytes(), 1, Sampling(), mm_inputs=inputs)))
    run_engine(engine, clock, 1.0)
    assert max(times) > tower_seconds(CAT)


def arrival(data: bytes) -> float:
    message = decode_from_core(data)
    assert isinstance(message, Outputs)
    return message.at


def test_replicas_tell_images_of_one_size_apart() -> None:
    config = ResolvedConfig(
        max_model_len=4096, max_num_seqs=8, max_num_batched_tokens=4096, block_size=16, num_blocks=2000,
        enable_prefix_caching=True,
    )  # fmt: skip
    host, step_time = SimulatedHost(H100.host.v1, 1, overlaps=True), StepTime(H100, SHAPE, tower=TOWER)
    server = Simulation(
        config,
        lambda clock: SimulatedExecutor(clock, step_time, host, 8, SHAPE.vocab_size),
        replicas=2,
        images=ImageInputs(QWEN, QWEN["image_token_id"], ImageProcessing(Processing("", 0), 1)),
    )
    first = [server.submit([number], 5, [image]) for number, image in enumerate((CAT, DOG))]
    while not all(reply.ended for reply in first):
        server.run_until(server.now() + 1)
    tokens = image_tokens(QWEN, CAT.width, CAT.height)
    assert [stats.prompt_tokens for stats in server.stats()] == [tokens + 1] * 2
    again = [server.submit([number], 5, [image]) for number, image in enumerate((DOG, CAT))]
    while not all(reply.ended for reply in again):
        server.run_until(server.now() + 1)
    assert [reply.cached_tokens for reply in again] == [tokens // 16 * 16] * 2
