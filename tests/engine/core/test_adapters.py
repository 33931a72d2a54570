"""Adapters of a core: names and keys, users, loads and unloads that meet requests on their way."""

from concurrent.futures import Future
from typing import Any

import pytest

from engine.clock import FakeClock
from engine.core.adapters import HOLD_S, AdapterRegistry
from engine.errors import ModelError, RequestError
from engine.messages import (
    Abort,
    FinishReason,
    Shutdown,
    StepMessage,
    StepReports,
    StepResult,
    Utility,
    UtilityResult,
    encode,
)
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import FakeExecutor, expected_tokens


class Strict(FakeExecutor):
    """Knows the keys that it was given and no others; loads end when the test says."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.keys = {""}
        self.loading: list[tuple[str, Future[Any]]] = []
        self.slow = False

    def call(self, method: str, arguments: dict[str, Any]) -> Future[Any]:
        done = super().call(method, arguments) if not self.slow or method != "load_adapter" else Future()
        if method == "unload_adapter":
            self.keys.remove(arguments["key"])
        elif self.slow:
            self.loading.append((arguments["key"], done))
        else:
            self.keys.add(arguments["key"])
        return done

    def finish_load(self, error: Exception | None = None) -> None:
        key, done = self.loading.pop(0)
        if error is not None:
            done.set_exception(error)
            return
        self.keys.add(key)
        done.set_result(1)

    def _apply(self, message: StepMessage) -> None:
        for added in message.assigned_slots:
            if added.adapter not in self.keys:
                raise KeyError(added.adapter)  # what ended the engine
        super()._apply(message)


def make() -> tuple[Driver, Strict]:
    driver = Driver(make_worker=Strict)
    worker = driver.worker
    assert isinstance(worker, Strict)
    return driver, worker


def call(driver: Driver, number: int, method: str, **arguments: str) -> None:
    driver.core.receive(encode(Utility(0, number, method, arguments)))


def answers(driver: Driver) -> dict[int, UtilityResult]:
    return {one.call: one for one in driver.messages if isinstance(one, UtilityResult)}


def test_a_request_behind_an_unload_in_the_inbox_is_refused_and_the_engine_goes_on():
    driver, _ = make()
    driver.core.load_adapter("french", "one")
    call(driver, 1, "unload_adapter", name="french")
    late = driver.add([1, 2, 3], adapter="french")  # its name is resolved before the loop sees the unload
    other = driver.add([1, 2, 3], max_tokens=4)
    driver.run()
    assert driver.finished[late].reason == FinishReason.NOT_SERVED
    assert driver.finished[late].error == "no adapter called 'french' is served"
    assert driver.tokens[other] == expected_tokens([1, 2, 3], 4)
    assert answers(driver)[1].error == ""


def test_a_request_before_an_unload_in_the_inbox_is_served_and_the_unload_refused():
    driver, worker = make()
    driver.core.load_adapter("french", "one")
    early = driver.add([1, 2, 3], max_tokens=4, adapter="french")
    call(driver, 1, "unload_adapter", name="french")
    driver.run()
    assert driver.tokens[early] == expected_tokens([1, 2, 3], 4)
    assert "1 request(s) still use 'french'" in answers(driver)[1].error
    assert worker.keys == {"", "french#1"}


def test_a_request_between_an_unload_and_a_load_of_its_name_gets_the_new_one():
    driver, worker = make()
    driver.core.load_adapter("french", "one")
    driver.add([1] * 12, max_tokens=1, adapter="french")
    driver.run()
    call(driver, 1, "unload_adapter", name="french")
    call(driver, 2, "load_adapter", name="french", path="two")
    late = driver.add([1] * 12, max_tokens=1, adapter="french")
    driver.run()
    assert driver.finished[late].reason == FinishReason.LENGTH
    assert worker.keys == {"", "french#2"}
    assert driver.cached[late] == 0, "nothing of the old adapter's cache is found"


@pytest.mark.parametrize("ends", [None, ModelError("no such folder")])
def test_one_of_two_loads_of_a_name_at_once_is_refused(ends: Exception | None):
    driver, worker = make()
    worker.slow = True
    call(driver, 1, "load_adapter", name="french", path="one")
    call(driver, 2, "load_adapter", name="french", path="two")
    call(driver, 3, "unload_adapter", name="french")
    driver.turn()
    assert answers(driver)[2].error == "an adapter called 'french' is being loaded already"
    assert "still being loaded" in answers(driver)[3].error
    assert 1 not in answers(driver)
    worker.finish_load(ends)
    assert answers(driver)[1].error == ("" if ends is None else "no such folder")
    assert driver.core._adapters.names() == ({"french": "one"} if ends is None else {})
    call(driver, 4, "load_adapter", name="french", path="three")
    driver.turn()
    if ends is None:
        assert "served already, from one" in answers(driver)[4].error
    else:
        worker.finish_load()
        assert driver.core._adapters.names() == {"french": "three"}


def test_a_load_that_can_not_be_handed_over_leaves_the_name_free():
    driver, worker = make()

    def broken(method: str, arguments: dict[str, Any]) -> Future[Any]:
        raise RuntimeError("cannot schedule new futures after shutdown")

    worker.call = broken  # type: ignore[method-assign]
    call(driver, 1, "load_adapter", name="french", path="one")
    driver.turn()
    assert "cannot schedule" in answers(driver)[1].error
    del worker.call  # type: ignore[method-assign]
    call(driver, 2, "load_adapter", name="french", path="one")
    driver.turn()
    assert answers(driver)[2].error == ""


class Refusing(FakeExecutor):
    """Has no adapters, and says so as a worker does."""

    def submit(self, step: bytes) -> Future[None]:
        done = super().submit(step)
        message = self.steps[-1]
        pairs = [(one.slot, one.generation) for one in message.assigned_slots if one.adapter]
        if pairs:
            from engine.columns import column
            from engine.messages import decode_result

            result = decode_result(self._sampled[message.step])
            changed = StepResult(result.step, result.tokens, result.counts, reports=StepReports(column(pairs)))
            self._sampled[message.step] = encode(changed)
        return done


@pytest.mark.parametrize("changes", [{}, {"ablate": ("full-state",)}, {"max_num_batched_tokens": 4}])
def test_a_request_that_workers_refuse_ends_alone(changes: dict[str, Any]):
    ablations = changes.pop("ablate", ())
    driver = Driver(resolved(ablations=frozenset(ablations), **changes), make_worker=Refusing)
    driver.core.load_adapter("french", "one")
    wrong, right = driver.add([1] * 6, adapter="french"), driver.add([2] * 6, max_tokens=5)
    driver.run()
    assert driver.finished[wrong].reason == FinishReason.FAILED
    assert driver.finished[wrong].error == "the workers don't have the adapter french#1"
    assert driver.tokens[wrong] == []
    assert driver.tokens[right] == expected_tokens([2] * 6, 5)
    assert driver.core.scheduler.pool.num_free == 64


# ---------------------------------------------------------------------------------------------------- held back


def held() -> Driver:
    driver, _ = make()
    driver.core.load_adapter("french", "one")
    call(driver, 1, "hold_adapter", name="french")
    driver.turn()
    assert answers(driver)[1].error == ""
    return driver


def test_requests_for_an_adapter_that_is_held_wait_and_are_served_if_it_stays():
    driver = held()
    waiting = driver.add([1, 2, 3], max_tokens=4, adapter="french")
    other = driver.add([4, 5], max_tokens=2)
    while driver.core.scheduler.has_work or driver.turn():
        driver.turn()
        driver.advance()
        if other in driver.finished:
            break
    assert waiting not in driver.finished
    call(driver, 2, "keep_adapter", name="french")
    driver.run()
    assert driver.tokens[waiting] == expected_tokens([1, 2, 3], 4)


def test_requests_for_an_adapter_that_was_held_are_refused_if_it_goes():
    driver = held()
    waiting = driver.add([1, 2, 3], adapter="french")
    driver.turn()
    call(driver, 2, "unload_adapter", name="french")
    driver.run()
    assert driver.finished[waiting].error == "no adapter called 'french' is served"


def test_an_adapter_in_use_or_held_already_is_not_held():
    driver = held()
    call(driver, 2, "hold_adapter", name="french")
    driver.turn()
    assert "being unloaded already" in answers(driver)[2].error
    call(driver, 3, "keep_adapter", name="french")
    driver.add([1], max_tokens=9, adapter="french")
    driver.turn()
    driver.turn()
    call(driver, 4, "hold_adapter", name="french")
    driver.turn()
    assert "1 request(s) still use 'french'" in answers(driver)[4].error


def test_nothing_is_held_longer_than_a_front_end_that_lives_needs():
    driver = held()
    waiting = driver.add([1, 2, 3], max_tokens=4, adapter="french")
    driver.turn()
    assert isinstance(driver.clock, FakeClock)
    assert driver.core.next_deadline(driver.clock.now()) == HOLD_S
    driver.run()
    assert driver.clock.now() >= HOLD_S
    assert driver.tokens[waiting] == expected_tokens([1, 2, 3], 4)


@pytest.mark.parametrize("how", ["abort", "shutdown"])
def test_a_request_that_waits_for_an_adapter_can_be_ended(how: str):
    driver = held()
    waiting = driver.add([1, 2, 3], adapter="french")
    driver.turn()
    driver.core.receive(encode(Abort((waiting,)) if how == "abort" else Shutdown()))
    driver.turn()
    driver.turn()
    assert driver.finished[waiting].reason == FinishReason.ABORT
    assert not driver.core.has_work


def test_unloading_what_is_not_served_is_refused():
    driver, _ = make()
    with pytest.raises(RequestError, match="no adapter called 'x' is served"):
        driver.core._adapters.unload("x")


class LateCallbacks(Future[Any]):
    """A future whose waiters continue before its callbacks run, as they may with threads."""

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: list[Any] = []

    def add_done_callback(self, fn: Any) -> None:
        self.callbacks.append(fn)


def test_a_load_is_done_only_when_the_adapter_is_served():
    loading = LateCallbacks()
    _, worker = make()
    registry = AdapterRegistry(worker, {}, FakeClock().now)
    worker.call = lambda method, arguments: loading  # type: ignore[method-assign]
    served = registry.load("french", "one")
    loading.set_result(1)
    assert not served.done()
    for callback in loading.callbacks:
        callback(loading)
    assert served.result() == 1
    assert registry.key("french") is not None
