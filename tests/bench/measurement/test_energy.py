"""Energy of a window: the arithmetic on recorded readings, and a meter that is read during real load points."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.measurement.closed_loop import ClosedPoint, measure_closed_loop
from bench.measurement.energy import EnergyError, EnergyReader, GpuReading, Reading, record_energy, window_energy
from bench.measurement.load_point import LoadPoint, PointPlan
from bench.measurement.server import HttpServer
from bench.results import RunFiles
from bench.search.windows import TimeBudget, Timing
from bench.target import Target
from bench.target.metrics import MetricsReader
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from bench.workloads.arrivals import Arrivals
from tests.bench.quiet_progress import QuietProgress
from tests.bench.records import plain_point


def counted(times: list[float], *gpus: Callable[[float], float]) -> list[Reading]:
    return [Reading(t, tuple(GpuReading(energy_j=gpu(t)) for gpu in gpus)) for t in times]


def powered(times: list[float], watts: Callable[[float], float]) -> list[Reading]:
    return [Reading(t, (GpuReading(power_w=watts(t)),)) for t in times]


EVERY_SECOND = [float(second) for second in range(11)]


def test_counters_of_all_gpus_are_added_between_the_windows_ends() -> None:
    readings = counted(EVERY_SECOND, lambda t: 5000 + 100 * t, lambda t: 40 * t)
    assert window_energy(readings, 2.0, 7.0) == pytest.approx(700)
    assert window_energy(readings, 2.25, 7.5) == pytest.approx(140 * 5.25)
    assert window_energy(readings, 3.2, 3.4) == pytest.approx(28)
    assert window_energy(readings, 0.0, 10.0) == pytest.approx(1400)


def test_what_is_used_outside_the_window_does_not_count() -> None:
    readings = counted(EVERY_SECOND, lambda t: 0.0 if t < 2 else 300.0 if t < 8 else 900.0)
    assert window_energy(readings, 2.0, 7.0) == 0
    assert window_energy(readings, 1.0, 8.0) == pytest.approx(900)


def test_power_is_integrated_exactly_between_readings() -> None:
    readings = powered(EVERY_SECOND, lambda t: 100 + 20 * t)
    assert window_energy(readings, 2.0, 7.0) == pytest.approx(100 * 5 + 10 * (49 - 4))
    assert window_energy(readings, 2.25, 2.75) == pytest.approx(50 + 10 * (2.75**2 - 2.25**2))
    assert window_energy(readings, 2.5, 6.5) == pytest.approx(400 + 10 * (6.5**2 - 2.5**2))


def test_a_gpu_with_a_counter_beside_one_without() -> None:
    readings = [Reading(t, (GpuReading(energy_j=50 * t), GpuReading(power_w=70.0))) for t in EVERY_SECOND]
    assert window_energy(readings, 1.0, 5.0) == pytest.approx(4 * 120)


@pytest.mark.parametrize(
    ("readings", "start_s", "end_s"),
    [
        ([], 0.0, 1.0),
        ([Reading(0.0, ()), Reading(2.0, ())], 0.0, 1.0),  # no GPU
        (counted(EVERY_SECOND, lambda t: t), -0.5, 5.0),  # began before the first reading
        (counted(EVERY_SECOND, lambda t: t), 5.0, 10.5),  # ended after the last one
        (counted(EVERY_SECOND, lambda t: t), 5.0, 5.0),  # a warm-up that was cut
        (counted(EVERY_SECOND, lambda t: t % 4), 2.0, 7.0),  # the counter began again
        (counted([0.0, 3.0, 4.0, 5.0], lambda t: t), 1.0, 4.5),  # the window began in a gap
        (powered([0.0, 1.0, 4.0, 5.0], lambda t: t), 0.5, 4.5),  # power is not known in a gap
        ([Reading(0.0, (GpuReading(power_w=1.0),)), Reading(1.0, (GpuReading(energy_j=1.0),))], 0.2, 0.8),
    ],
)
def test_energy_that_is_not_known(readings: list[Reading], start_s: float, end_s: float) -> None:
    assert window_energy(readings, start_s, end_s) is None


def test_a_counter_loses_nothing_in_a_gap_within_the_window() -> None:
    assert window_energy(counted([0.0, 1.0, 6.0, 7.0], lambda t: 10 * t), 0.5, 6.5) == pytest.approx(60)


def test_columns() -> None:
    point = plain_point(window_s=100.0, output_tok_s=50.0)
    record_energy(point, 20_000.0, 100.0)
    assert (point.mean_power_w, point.joules_per_output_token) == (pytest.approx(200), pytest.approx(4))
    silent = plain_point(output_tok_s=0.0)
    record_energy(silent, 500.0, 100.0)
    early = plain_point(window_s=100.0, output_tok_s=50.0)  # the last response came before the end of the window
    record_energy(early, 18_000.0, 90.0)
    assert (early.mean_power_w, early.joules_per_output_token) == (pytest.approx(200), pytest.approx(3.6))
    assert (silent.mean_power_w, silent.joules_per_output_token) == (5.0, None)
    unknown = plain_point()
    record_energy(unknown, None, 100.0)
    assert (unknown.mean_power_w, unknown.joules_per_output_token) == (None, None)


class Constant:
    """A meter of GPUs that always take so much power; with `failing`, every reading after the first fails."""

    def __init__(self, watts: float, failing: bool = False):
        self.began = time.monotonic()
        self.watts = watts
        self.failing = failing
        self.read_count = 0

    def read(self) -> tuple[GpuReading, ...]:
        self.read_count += 1
        if self.failing and self.read_count > 1:
            raise EnergyError("NVML: GPU is lost")
        return (GpuReading(energy_j=self.watts * (time.monotonic() - self.began)),)


PLAN = PointPlan(20.0, "fixed", 0, Timing(0.3, 1.5, 5.0), 0.1, cut_overload=False)


def measured(server: ServerProcess, energy: EnergyReader) -> LoadPoint:
    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    target, reader = Target(server.base_url, "stub"), MetricsReader(server.base_url)
    return LoadPoint(HttpServer(target), workload, "c", reader, 0, 0.2, lambda: 60.0, energy=energy)


def test_the_window_of_a_real_load_point(queue_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    meter = Constant(250.0)
    with EnergyReader(meter, every_s=0.05) as energy:
        point = measured(queue_server("--slots", "4", "--service", "0.1"), energy).run(PLAN, lambda _: None).point
    assert meter.read_count > 10
    assert point.mean_power_w == pytest.approx(250, rel=0.02)
    assert point.joules_per_output_token == pytest.approx(250 / point.output_tok_s, rel=0.1)
    RunFiles(tmp_path).write_points([point])
    (read,) = RunFiles(tmp_path).read_points()
    assert read.mean_power_w == pytest.approx(point.mean_power_w, rel=1e-5)


def test_a_load_that_ends_before_its_window(queue_server: Callable[..., ServerProcess]) -> None:
    with EnergyReader(Constant(100.0), every_s=0.05) as energy:
        point = replace(measured(queue_server(), energy), arrivals=Arrivals("constant"))
        plan = PointPlan(1.0, "fixed", 0, Timing(0.2, 1.9, 0.0), 0.1, cut_overload=False)
        record, *_ = point.run(plan, lambda _: None)
    assert record.requests >= 1
    assert record.mean_power_w == pytest.approx(100, rel=0.02)


def test_readings_that_fail_leave_the_cells_empty(queue_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    with EnergyReader(Constant(250.0, failing=True), every_s=0.05) as energy:
        point = measured(queue_server(), energy).run(PLAN, lambda _: None).point
        assert energy.problem == "NVML: GPU is lost"
    assert (point.valid, point.mean_power_w) == (True, None), point.reason
    RunFiles(tmp_path).write_points([point])
    header, cells = ((tmp_path / "points.csv").read_text().splitlines()[i].split(",") for i in (0, -1))
    assert cells[header.index("joules_per_output_token")] == ""


def test_a_closed_loop(queue_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server, budget = queue_server("--slots", "8", "--service", "0.1"), TimeBudget(60.0)
    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    point = ClosedPoint(
        HttpServer(Target(server.base_url, "stub")), workload, "c", MetricsReader(server.base_url), 0, 0.1,
        budget.left_s,
        energy=EnergyReader(Constant(80.0), every_s=0.05),
    )  # fmt: skip
    record, _ = measure_closed_loop(point, RunFiles(tmp_path), QuietProgress(), 4, 24, budget)
    assert record.mean_power_w == pytest.approx(80, rel=0.02)
    assert [p.mean_power_w for p in RunFiles(tmp_path).read_points()] == [None, pytest.approx(80, rel=0.02)]


def test_readings_of_several_threads_are_in_order() -> None:
    class Slow:
        def __init__(self) -> None:
            self.energy_j = 0.0

        def read(self) -> tuple[GpuReading, ...]:
            self.energy_j += 1
            taken = self.energy_j
            time.sleep(0.002 * (taken % 3))  # another thread would overtake this one
            return (GpuReading(energy_j=taken),)

    energy = EnergyReader(Slow())
    began = time.monotonic()
    energy.read()
    threads = [threading.Thread(target=lambda: [energy.read() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readings = energy._readings
    assert [reading.gpus[0].energy_j for reading in readings] == [float(i) for i in range(1, 82)]
    assert [reading.at_s for reading in readings] == sorted(reading.at_s for reading in readings)
    assert readings[0].at_s >= began
    assert energy.joules(readings[0].at_s, readings[-1].at_s) == pytest.approx(80)


def test_without_a_meter_there_is_no_thread_and_no_energy() -> None:
    with EnergyReader() as energy:
        energy.clear()
        energy.read()
        assert energy._thread is None
        assert energy.joules(0.0, 1.0) is None
