"""Starts an engine for a front end: the core in its process, the tokenizer here, meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.clock import MonotonicClock
from engine.config import STEP_TIMEOUT_S, EngineConfig
from engine.frontend.client import CoreClient
from engine.frontend.stats import Board
from engine.frontend.tokenizer import Tokenizer, load_tokenizer, read_json
from engine.frontend.transport import ZmqTransport
from engine.launch import CoreProcess
from engine.messages import Ready
from engine.model.names import CONFIG, PARAMS
from engine.model.resolve import resolve_model


@dataclass(frozen=True)
class Engine:
    """A core that is up, and what a front end needs beside it."""

    config: EngineConfig  # with model and tokenizer as folders
    core: CoreProcess
    ready: Ready
    tokenizer: Tokenizer
    warnings: tuple[str, ...]

    def connect(self, board: Board | None = None) -> CoreClient:
        """Make the first front end's client of the core; `open()` it inside an event loop."""
        endpoints = self.core.endpoints
        transport = ZmqTransport(endpoints.to_core, endpoints.from_core[0])
        return CoreClient(self.ready, self.tokenizer, transport, MonotonicClock(), seed=self.config.seed, board=board)


def start_engine(
    config: EngineConfig,
    *,
    progress: Callable[[str], None] | None = None,
    on_wait: Callable[[], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
    front_ends: int = 1,
    step_timeout_s: float = STEP_TIMEOUT_S,
) -> Engine:
    """Find the model, start the core and wait until it is up; after a RedlineError nothing runs.

    `progress` hears a line per phase that takes time; `loading`, from a thread, how many bytes of the weights were
    read, and how many there are.
    """
    path = resolve_model(config.model, progress, dummy=config.load_format == "dummy")
    tokenizer_path = path if config.tokenizer is None else resolve_model(config.tokenizer, progress)
    config = replace(config, model=str(path), tokenizer=str(tokenizer_path), served_model_name=config.name)
    core = CoreProcess(config, front_ends=front_ends, step_timeout_s=step_timeout_s)
    try:
        tokenizer, warnings = load_tokenizer(tokenizer_path, declared_vocab_size(path), config.tokenizer_mode)
        ready = core.wait_ready(on_wait, loading)
    except BaseException:
        core.stop()
        raise
    if tokenizer.vocab_size > ready.vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {ready.vocab_size}: texts may use unknown ids"
        )
    return Engine(config, core, ready, tokenizer, (*ready.warnings, *warnings))


def declared_vocab_size(path: Path) -> int | None:
    """The vocabulary's size as config.json or params.json says, if one does."""
    config = (read_json(path / CONFIG) or read_json(path / PARAMS)) if path.is_dir() else read_json(path)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(size) if size is not None else None
