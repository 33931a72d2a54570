from bench.measurement.load_point import PointPlan, PointState
from bench.results import PointRecord


class QuietProgress:
    """Keeps messages and prints nothing."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def point_started(self, plan: PointPlan) -> None:
        pass

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        pass

    def point_finished(self, record: PointRecord) -> None:
        pass

    def point_dropped(self) -> None:
        pass

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        pass
