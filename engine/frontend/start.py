"""Starts an engine for a front end: the core in its process, the tokenizer here, meanwhile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engine.clock import MonotonicClock
from engine.config import EngineConfig
from engine.frontend.client import CoreClient
from engine.frontend.tokenizer import Tokenizer, load_tokenizer, read_json
from engine.frontend.transport import ZmqTransport
from engine.launch import CoreProcess
from engine.messages import Ready
from engine.model.resolve import resolve_model


@dataclass(frozen=True)
class Engine:
    """A core that is up, and what a front end needs beside it."""

    config: EngineConfig
    core: CoreProcess
    ready: Ready
    tokenizer: Tokenizer
    warnings: tuple[str, ...]

    def connect(self, front_end: int = 0) -> CoreClient:
        """Make a client of the core; `open()` it inside an event loop."""
        endpoints = self.core.endpoints
        transport = ZmqTransport(endpoints.to_core, endpoints.from_core[front_end])
        return CoreClient(
            self.ready, self.tokenizer, transport, MonotonicClock(), front_end=front_end, seed=self.config.seed
        )


def start_engine(
    config: EngineConfig,
    *,
    progress: Callable[[str], None] | None = None,
    on_wait: Callable[[], None] | None = None,
) -> Engine:
    """Find the model, start the core and wait until it is up; after a RedlineError nothing runs."""
    path = resolve_model(config.model, progress)
    config = replace(config, model=str(path), served_model_name=config.name)
    tokenizer_path = path if config.tokenizer is None else resolve_model(config.tokenizer, progress)
    core = CoreProcess(config)
    try:
        tokenizer, warnings = load_tokenizer(tokenizer_path, declared_vocab_size(path))
        ready = core.wait_ready(on_wait)
    except BaseException:
        core.stop()
        raise
    if tokenizer.vocab_size > ready.vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {ready.vocab_size}: texts may use unknown ids"
        )
    return Engine(config, core, ready, tokenizer, (*ready.warnings, *warnings))


def declared_vocab_size(path: Path) -> int | None:
    """The vocabulary's size as config.json says, if it does."""
    config = read_json(path / "config.json" if path.is_dir() else path)
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return int(size) if size is not None else None
