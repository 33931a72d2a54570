"""What an interrupted sweep continues from, besides its summary and its load points."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.errors import BenchError
from bench.results import FLAG
from bench.results.writing import replace_file, writing

STATE_FILE = "sweep.json"


@dataclass(slots=True)
class SweepState:
    """The content of sweep.json."""

    plan: str  # a hash of the sweep file, since the file itself may contain keys
    ladder_rates: dict[str, list[float]] = field(default_factory=dict)  # workload -> requests/s
    ladders: list[list[str]] = field(default_factory=list)  # [configuration, workload] for each finished round
    searched_s: dict[str, float] = field(default_factory=dict)  # "configuration / workload" -> seconds of its search

    @classmethod
    def read(cls, folder: Path) -> "SweepState | None":
        """The state of the sweep in a folder; None if there is none. Raises BenchError."""
        path = folder / STATE_FILE
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise BenchError(f"{path} cannot be read ({error}): start over with --fresh") from None

    @classmethod
    def joined(cls, states: Sequence["SweepState"]) -> "SweepState":
        """One state of those of the parts of a sweep."""
        return cls(
            states[0].plan,
            {name: rates for state in states for name, rates in state.ladder_rates.items()},
            [done for state in states for done in state.ladders],
            {what: seconds for state in states for what, seconds in state.searched_s.items()},
        )

    def write(self, folder: Path) -> None:
        """Raises CannotWriteError."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        with writing(folder / STATE_FILE, FLAG):
            replace_file(folder / STATE_FILE, lambda part: part.write_text(text))
