"""Result files: their records, and reading and writing them. `plots` imports only this and the statistics of bench."""

from bench.results.environment import utc_now
from bench.results.files import (
    FLAG,
    GENERATORS_FILE,
    METRICS_FOLDER,
    POINTS_FILE,
    REQUESTS_FOLDER,
    SUMMARY_FILE,
    RunFiles,
    slug,
)
from bench.results.records import (
    DISTURBED_SHARE,
    Answer,
    GeneratorRecord,
    Phase,
    PointRecord,
    RequestRecord,
    ServerState,
    Summary,
)

__all__ = [
    "DISTURBED_SHARE", "FLAG", "GENERATORS_FILE", "METRICS_FOLDER", "POINTS_FILE", "REQUESTS_FOLDER", "SUMMARY_FILE",
    "Answer", "GeneratorRecord", "Phase", "PointRecord", "RequestRecord", "RunFiles", "ServerState", "Summary", "slug",
    "utc_now",
]  # fmt: skip
