"""Starts an engine: the EngineCores in processes of their own, while this process imports and loads the front end.

Modules of the front end are imported only once the cores have been started, so that both proceed at the same time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from engine.config import STEP_TIMEOUT_S, EngineConfig
from engine.core_process import Core
from engine.messages import Ready
from engine.model.config.file_names import CONFIG, PARAMS
from engine.model.resolve import cached_tokenizer, resolve_model, resolve_tokenizer
from engine.multimodal.feature_files import cache_bytes
from engine.phases import Phases
from engine.replicas import check_room, on_ray_nodes, start_another, start_cores, stop_all, wait_all_ready

if TYPE_CHECKING:
    from engine.frontend.connect import EngineClient, SupervisedClient
    from engine.frontend.front_end_stats import Boards
    from engine.frontend.generation_defaults import GenerationDefaults
    from engine.frontend.mm_pipeline import MMOptions
    from engine.frontend.tokenizer import Tokenizer
    from engine.frontend.transport import CoreAddress

Adapters: TypeAlias = tuple[tuple[str, str], ...]  # names and folders


@dataclass(frozen=True)
class Engine:
    """Running EngineCores, one for each replica, and what a front end needs to use them."""

    config: EngineConfig  # with model and tokenizer as folders
    cores: dict[int, Core]  # by replica; one that ended stays until another takes its place
    readies: dict[int, Ready]
    tokenizer: "Tokenizer"
    warnings: tuple[str, ...]
    generation: "GenerationDefaults"

    @property
    def ready(self) -> Ready:
        """The report of the first replica; the others have the same configuration."""
        return self.readies[0]

    @property
    def mm(self) -> "MMOptions | None":
        """How front ends prepare multimodal inputs; None if the model takes none, or if the core processes them."""
        if self.ready.mm is None or self.ready.processes_inline:
            return None
        from engine.frontend.mm_pipeline import make_mm_options

        return make_mm_options(self.config)

    def address(self, replica: int, front_end: int = 0) -> "CoreAddress":
        """The addresses at which a front end reaches a core."""
        return self.cores[replica].address(front_end, self.readies[replica])

    def connect(self) -> "EngineClient":
        """Make the client of the only front end; `open()` it inside an event loop."""
        from engine.frontend.connect import connect

        config, cores = self.config, [self.address(replica) for replica in self.readies]
        return connect(cores, self.tokenizer, seed=config.seed, routing=config.routing, mm=self.mm)

    def supervise(self, boards: "Boards") -> "SupervisedClient":
        """Make the client of a server's first front end, whose replicas may come and go."""
        from engine.frontend.connect import supervise

        config, cores = self.config, {replica: self.address(replica) for replica in self.readies}
        return supervise(cores, self.tokenizer, boards, seed=config.seed, routing=config.routing, mm=self.mm)

    def watch(self, on_death: Callable[[int, str], None]) -> None:
        """Call back from a thread, with the replica and the cause in one line, if a core exits unexpectedly."""
        for replica, core in self.cores.items():
            core.watch(partial(on_death, replica))

    def check_room(self, count: int) -> None:
        """Raise OutOfMemoryError if the machine has too little memory for `count` more replicas."""
        check_room(self.ready, self.config, count)

    def restart(self, replica: int, adapters: Adapters, on_death: Callable[[int, str], None]) -> None:
        """Replace the core of a replica, which has ended, and block until the new one is up.

        Args:
            adapters: those that it loads.
            on_death: as of `watch`.

        Raises the RedlineError of a core that can't be started.
        """
        self._take_place(replica, self.cores[replica].successor(adapters), on_death)

    def add(self, replica: int, count: int, adapters: Adapters, on_death: Callable[[int, str], None]) -> None:
        """Start the core of one more replica, of `count`, and block until it is up; it has the sizes of the first.

        Raises OutOfMemoryError if the machine has too little memory left, the RedlineError of a core that can't be
        started otherwise. Other arguments as of `restart`.
        """
        config = replace(self.config, adapters=adapters)
        self._take_place(replica, start_another(self.cores[0], self.ready, config, replica, count), on_death)

    def _take_place(self, replica: int, core: Core, on_death: Callable[[int, str], None]) -> None:
        ended = self.cores.get(replica)
        self.cores[replica] = core  # from here on, `stop` ends it
        if ended is not None:
            ended.stop()
        ready = core.wait_ready()
        if on_ray_nodes(self.config):
            from engine.ray_replicas import check_equal

            check_equal([self.ready, ready])
        self.readies[replica] = ready
        core.watch(partial(on_death, replica))

    def stop(self) -> None:
        """End all cores; safe to call twice."""
        stop_all(list(self.cores.values()))


def start_engine(
    config: EngineConfig,
    *,
    progress: Callable[[str], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    front_ends: int = 1,
    step_timeout_s: float = STEP_TIMEOUT_S,
    phases: Phases | None = None,
) -> Engine:
    """Find the model, start the EngineCores, and wait until all are up. After an error no process is left.

    Args:
        progress: called with a line for each phase that takes time.
        loading: called, possibly from another thread, with the bytes of weights read so far and in total.
        meanwhile: called while the cores start.
        phases: of the start so far.
    """
    phases = Phases() if phases is None else phases
    simulated = bool(config.simulated)
    path = resolve_model(config.model, progress, dummy=config.load_format == "dummy" or simulated)
    if config.tokenizer is not None:
        tokenizer_path = resolve_tokenizer(config.tokenizer, progress, weights=not simulated)
    else:  # a config that ships has none beside it
        tokenizer_path = (cached_tokenizer(config.model) if path.is_file() else None) or path
    cache_bytes(config.mm_cache_gb)  # its error needs no model
    given = config
    config = replace(config, model=str(path), tokenizer=str(tokenizer_path), served_model_name=config.names)
    cores = start_cores(config, front_ends=front_ends, step_timeout_s=step_timeout_s)
    try:
        tokenizer, generation, warnings = _load_front_end(given, path, tokenizer_path)
        meanwhile()
        readies = wait_all_ready(cores, progress, loading)
        if on_ray_nodes(config):
            from engine.ray_replicas import check_equal

            check_equal(readies)
    except BaseException:
        stop_all(cores)
        raise
    slowest, ready = max(zip(cores, readies, strict=True), key=lambda pair: pair[0].spawned + total_of(pair[1]))
    phases.end("find the model", slowest.spawned - phases.began)
    phases.add(dict(ready.seconds), "load the front end")  # which is loaded meanwhile
    if tokenizer.vocab_size > ready.prompt_vocab_size:
        warnings.append(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {ready.prompt_vocab_size}: "
            "texts may contain tokens that the model does not have"
        )
    generation.add_eos_ids(tokenizer, ready.vocab_size)
    core_warnings = dict.fromkeys(warning for ready in readies for warning in ready.warnings)
    return Engine(
        config, dict(enumerate(cores)), dict(enumerate(readies)), tokenizer, (*core_warnings, *warnings), generation
    )


def _load_front_end(
    config: EngineConfig, path: Path, tokenizer_path: Path
) -> "tuple[Tokenizer, GenerationDefaults, list[str]]":
    """The tokenizer, the sampling defaults, and warnings. `config` is as the user gave it."""
    from engine.frontend.generation_defaults import read_generation
    from engine.frontend.tokenizer import load_tokenizer

    generation = read_generation(config.generation_config, path, config.override_generation_config)
    # A stand-in replaces a model's missing tokenizer, but never one that was given by --tokenizer.
    stand_in = declared_vocab_size(path) if config.tokenizer is None else None
    tokenizer, warnings = load_tokenizer(tokenizer_path, stand_in, config.tokenizer_mode, config.chat_template)
    return tokenizer, generation, warnings


def total_of(ready: Ready) -> float:
    """Seconds from the start of a core's process until it was up."""
    return sum(seconds for _, seconds in ready.seconds)


def declared_vocab_size(path: Path) -> int | None:
    """The vocabulary size in config.json or params.json, if there is one. The core reports errors in these files."""
    from engine.frontend.tokenizer import read_json, text_config

    config = (read_json(path / CONFIG) or read_json(path / PARAMS)) if path.is_dir() else read_json(path)
    size = config.get("vocab_size") or text_config(config).get("vocab_size")
    return int(size) if isinstance(size, int | float) and math.isfinite(size) else None
