"""Families of tiny models on the GPU: the tokens and log-probabilities of plain transformers on the CPU.

Fused and generic; in chunks, with prefix hits, preempted; then by a core that runs ahead, with and without graphs.
"""

from tests.engine.worker.device_driver import CoreDriver, make_device_driver, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.parity import Reference, compare, serve
from tests.engine.worker.test_device_runner import SAMPLINGS, mixed_requests
from tests.gpu.environment import Environment
from tests.gpu.step_driver import wait_for_graphs

CASES = ("chunked", "prefix hit", "preempted")
NO_ROTARY = {"no_rope_layer_interval": 2, "no_rope_layers": None}  # for smollm3: every second layer has none


def parity(env: Environment, kind: str) -> None:
    folder = env.folder / kind
    layers = 3 if kind == "mistral" else 2  # windows of three layers reach the token that `compare` changes
    more = NO_ROTARY if kind == "smollm3" else {}
    reference = Reference(build_model(kind, folder, num_hidden_layers=layers, **more))
    for case in CASES[:1] if env.stand_in else CASES:
        driver = make_device_driver(env.new_device(), folder, use_triton=True)
        try:
            row = compare(kind, case, serve(driver, case), reference)
        finally:
            driver.executor.shutdown()
        note = f"{driver.executor.kernels} {row.note}".strip()
        env.report.row(case, row.max_logit_difference, "log-probability", passed=row.passed, note=note)
    _run_ahead(env, kind)


def _run_ahead(env: Environment, kind: str) -> None:
    """Sampled tokens of a core that keeps two steps in flight, eager and with graphs, are the CPU's."""
    count, new = (2, 2) if env.stand_in else (10, 20)
    requests, options = mixed_requests(SAMPLINGS, count), {"max_model_len": 128}
    executor, resolved = start_executor(None, env.folder / kind, kernels="torch", **options)
    try:
        expected = CoreDriver(executor, resolved).run(requests, new)
    finally:
        executor.shutdown()
    for name, eager in (("eager", True), ("graphs", False)):
        executor, resolved = start_executor(
            env.new_device(), env.folder / kind, use_triton=True, **options, enforce_eager=eager
        )
        try:
            driver = CoreDriver(executor, resolved)
            captured = wait_for_graphs(executor) or 0
            found = driver.run(requests, new)
        finally:
            executor.shutdown()
        wrong = sum(one != other for one, other in zip(found, expected, strict=True))
        note = f"{captured} sizes captured" + (f"; {wrong} of {len(requests)} requests differ" if wrong else "")
        # Some classes of transformers can't be captured; the stack always can.
        must_capture = not (eager or env.stand_in) and "fused" in executor.kernels
        passed = not wrong and (captured > 0 or not must_capture)
        words = "the CPU's tokens" if not wrong else "other tokens"
        env.report.row(f"run-ahead, {name}", words, passed=passed, note=note)
