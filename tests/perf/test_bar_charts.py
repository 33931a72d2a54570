"""Figures of benchmarks are drawn from their files."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from plots.data import ReportError
from tests.perf import test_ranks_figure, test_share_figure
from tests.perf.bar_charts import save_figure
from tests.perf.ranks_figure import ranks_figure
from tests.perf.share_figure import share_figure


@pytest.mark.parametrize(
    ("draw", "records"),
    [(ranks_figure, test_ranks_figure.rows), (share_figure, test_share_figure.rows)],
    ids=["ranks", "share"],
)
def test_figures_are_drawn_from_their_files(draw, records, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "records.json"
    source.write_text(json.dumps(records()))
    png, svg = save_figure(draw, source, tmp_path / "figures" / "figure.png")
    assert imread(png).shape[1] == 2000
    assert svg.exists()
    source.write_text("[]")
    with pytest.raises(ReportError, match="has no records"):
        save_figure(draw, source, png)
    with pytest.raises(ReportError, match="cannot be read"):
        save_figure(draw, tmp_path / "none.json", png)
