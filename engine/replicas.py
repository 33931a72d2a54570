"""Starts and ends the EngineCores of an engine together: one for each replica (`--dp`)."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

from engine.config import EngineConfig
from engine.core_process import Core, CoreProcess, check_memory
from engine.executor_backend import RAY
from engine.host import available_memory
from engine.messages import Ready

PROCESS_BYTES = 192 << 20  # of PyTorch and the other libraries in each process, which the lines of a plan do not have


def start_cores(config: EngineConfig, *, front_ends: int, step_timeout_s: float) -> tuple[Core, ...]:
    """Start all cores at the same time; `wait_all_ready` waits for them."""
    count = config.data_parallel_size
    if on_ray_nodes(config):
        from engine.ray_replicas import start_ray_cores

        return tuple(start_ray_cores(config, front_ends, step_timeout_s))
    if count == 1:
        return (CoreProcess(config, front_ends=front_ends, step_timeout_s=step_timeout_s),)
    from engine.devices import machine_for

    machine = machine_for(config)
    environments = [machine.environment(number) for number in range(count)]
    # Of a machine that they share, measured once: each core would see less once others have allocated.
    memory = None if any(environments) else machine.available_memory()
    started: list[CoreProcess] = []
    try:
        for number, environment in enumerate(environments):
            one = replace(config, replica=number)
            started.append(
                CoreProcess(
                    one,
                    front_ends=front_ends,
                    step_timeout_s=step_timeout_s,
                    memory=memory,
                    environment=environment,
                )
            )
    except BaseException:
        stop_all(started)
        raise
    return tuple(started)


def on_ray_nodes(config: EngineConfig) -> bool:
    """Whether the replicas run on the nodes of a Ray cluster."""
    return config.distributed_executor_backend == RAY and config.data_parallel_size > 1


def check_room(ready: Ready, config: EngineConfig, count: int) -> None:
    """Raise OutOfMemoryError if `count` more replicas, which start together, don't fit into the memory that all share.

    `start_another` looks at one of them only. `ready` is the report of a replica that serves. Replicas on GPUs, on
    other machines or on simulated hardware share no memory.
    """
    if on_ray_nodes(config) or ready.simulated or not ready.device.startswith("cpu"):
        return
    processes = 1 + (config.num_ranks if config.num_ranks > 1 else 0)
    needed = count * (sum(line.bytes for line in ready.memory) + processes * PROCESS_BYTES)
    check_memory(f"{count} more replicas need" if count > 1 else "one more replica needs", needed, available_memory())


def start_another(first: Core, ready: Ready, config: EngineConfig, number: int, count: int) -> Core:
    """Start the core of a replica that is added while others serve; it has the sizes of the first.

    Args:
        first: the core of replica 0, which may have ended.
        ready: its report.
        config: of the engine.
        number: of the new replica.
        count: replicas that there will be.

    Raises OutOfMemoryError if the memory that they share is too small, ConfigError if there are too few devices, or too
    few CPUs of a Ray cluster.
    """
    from engine.memory import KV_CACHE

    prefill = config.prefill_replicas
    count = max(count, number + 1, prefill + 1 if prefill else 1, 2 if on_ray_nodes(config) else 1)
    kv_bytes = sum(line.bytes for line in ready.memory if line.what == KV_CACHE)
    one = replace(
        config,
        data_parallel_size=count,
        decode_replicas=count - prefill if prefill else 0,
        replica=number,
        max_model_len=ready.max_model_len,
        max_num_seqs=ready.max_num_seqs,
        max_num_batched_tokens=ready.max_num_batched_tokens,
        block_size=ready.block_size,
        kv_cache_memory_bytes=kv_bytes * count or None,
    )
    return first.sibling(one, sum(line.bytes for line in ready.memory))


def wait_all_ready(
    cores: Sequence[Core],
    progress: Callable[[str], None] | None = None,
    loading: Callable[[int, int], None] | None = None,
) -> tuple[Ready, ...]:
    """Block until all cores are up. If one fails, its error is raised, and the caller must stop the others.

    Arguments as of `start_engine`; bytes read are summed over replicas.
    """
    if len(cores) == 1:
        return (cores[0].wait_ready(loading),)
    loaded = [(0, 0)] * len(cores)

    def start(number: int) -> Ready:
        def on_loaded(done: int, total: int) -> None:
            loaded[number] = done, total
            if loading is not None:
                loading(sum(done for done, _ in loaded), max(total for _, total in loaded) * len(cores))

        return cores[number].wait_ready(on_loaded)

    # If this is interrupted, the caller stops the cores, which ends these threads.
    pool = ThreadPoolExecutor(len(cores), thread_name_prefix="start")
    try:
        waiting = [pool.submit(start, number) for number in range(len(cores))]
        for up, future in enumerate(as_completed(waiting), start=1):
            future.result()
            if progress is not None and up < len(cores):
                progress(f"{up} of {len(cores)} replicas are up")
        return tuple(future.result() for future in waiting)
    finally:
        pool.shutdown(wait=False)


def stop_all(cores: Sequence[Core]) -> None:
    """End all cores at the same time; safe to call twice."""
    if len(cores) == 1:
        cores[0].stop()
        return
    with ThreadPoolExecutor(max(1, len(cores))) as pool:
        for ending in [pool.submit(core.stop) for core in cores]:
            ending.result()
