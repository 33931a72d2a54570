"""Marks of simulated results: in titles, legends and captions, so that nobody takes them for measurements."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.results import Summary

SIMULATED = "simulated"  # the field of a configuration in summary.json, and the word of the marks
_METRICS = (("tpot", "TPOT"), ("ttft", "TTFT"))


def marks(summaries: Iterable[Summary]) -> list[dict[str, Any]]:
    """The hardware and the engine of all simulated configurations, each pair once."""
    found: dict[str, dict[str, Any]] = {}
    for summary in summaries:
        for _, mark in _marked(summary):
            if mark is not None:
                found.setdefault(f"{mark['title']} {mark['description']} {mark.get('engine')}", mark)
    return list(found.values())


def all_simulated(summaries: Iterable[Summary]) -> bool:
    """Whether nothing was measured."""
    every = [mark for summary in summaries for _, mark in _marked(summary)]
    return bool(every) and None not in every


def marked_title(title: str, summaries: Sequence[Summary]) -> str:
    """The title of results, with the simulated hardware: "V1 and V0, simulated NVIDIA H100 SXM 80 GB"."""
    names = " and ".join(dict.fromkeys(str(mark["title"]) for mark in marks(summaries)))
    if not names:
        return title
    return f"{title}, {'' if all_simulated(summaries) else 'partly '}{SIMULATED} {names}"


def label_marks(summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """What follows the name of each configuration in legends and tables, by summary.

    Nothing if the title says all: everything is simulated on one hardware, or nothing is.
    """
    titles = {str(mark["title"]) for mark in marks(summaries)}
    if not titles or (all_simulated(summaries) and len(titles) == 1):
        return [{} for _ in summaries]
    several = len(titles) > 1
    return [
        {
            name: f" ({SIMULATED} {mark['hardware']})" if several else f" ({SIMULATED})"
            for name, mark in _marked(summary)
            if mark is not None
        }
        for summary in summaries
    ]


def hardware_texts(summary: Summary) -> list[str]:
    """The simulated hardware of a run, with the version of its description."""
    texts = (f"{SIMULATED} {mark['title']} (description {mark['description']})" for mark in marks([summary]))
    return list(dict.fromkeys(texts))


def error_texts(summaries: Iterable[Summary]) -> list[str]:
    """What is known about the errors of the simulated latencies, one text per hardware and engine."""
    return [error_text(mark) for mark in marks(summaries)]


def error_text(mark: dict[str, Any]) -> str:
    """What is known about the errors of an engine on the hardware of a mark, and what was not validated."""
    known = mark.get("errors") or {}
    parts = [
        f"{label} {known[key]['median']:.1%} (median), {known[key]['p90']:.0%} (P90)"
        for key, label in _METRICS
        if key in known
    ]
    # Results of earlier versions name no engine; their errors are those of all engines and loads.
    engine = f", {str(mark['engine']).upper()}" if "engine" in mark else ""
    loads = " in closed loops" if engine and parts else ""
    note = f"; {mark['note']}" if mark.get("note") else ""
    found = ", ".join(parts) or "not known"
    return f"Errors of simulated latencies on {mark['title']}{engine}{loads}: {found}{note}"


def _marked(summary: Summary) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The configurations with their marks; None: it was measured. Simulated ones that never ran are left out."""
    for name, details in summary.configurations.items():
        serve, mark = details.get("serve"), details.get(SIMULATED)
        if mark is None and isinstance(serve, dict) and str(serve.get("device")).startswith("sim:"):
            continue
        yield name, mark
