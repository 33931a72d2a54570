"""The pages under docs/serving and docs/troubleshooting say what the code has: flags, metrics, fields, messages."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from prometheus_client import generate_latest

import cli.serve
from cli.options import GroupedOption
from engine.api.chat_protocol import ChatRequest, TokenizeRequest
from engine.api.messages.protocol import MessagesRequest
from engine.api.openapi import ROUTES
from engine.api.prometheus import make_registry
from engine.api.protocol import CompletionRequest, DetokenizeRequest
from engine.api.responses.protocol import ResponsesRequest
from engine.config import ABLATIONS
from engine.frontend.front_end_stats import REASONS, FrontEndStats
from engine.frontend.router import Router
from engine.messages import MMSpec, Ready
from engine.model.families import FAMILIES
from engine.multimodal.families import MM_FAMILIES
from engine.stats import SpillStats, Stats

ROOT = Path(__file__).resolve().parents[2]
SERVING = ROOT / "docs" / "serving"


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of a text's tables, headers included."""
    return [[cell.strip() for cell in one.split("|")] for one in re.findall(r"^\|(.+)\|$", text, re.MULTILINE)]


def section(page: str, heading: str) -> str:
    """What stands below a heading of a page, up to the next one of its level or above."""
    text = (SERVING / page).read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    level = heading.index(" ")
    return re.split(rf"^#{{1,{level}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def visible_options() -> list[GroupedOption]:
    return [one for one in cli.serve.command.params if isinstance(one, GroupedOption) and not one.hidden]


# ------------------------------------------------------------------------------------------------------------- flags


@pytest.fixture(scope="module")
def listed_options() -> list[tuple[list[str], str]]:
    """Names and default of each of Redline's own options on the page."""
    page = (SERVING / "flags.md").read_text(encoding="utf-8").split("## vLLM's flags")[0]
    return [(spans(cells[0]), cells[1]) for cells in rows(page) if cells[0].startswith("`-")]


def test_the_flags_page_lists_exactly_the_options_of_serve(listed_options: list[tuple[list[str], str]]) -> None:
    declared = [sorted([*one.opts, *one.secondary_opts]) for one in visible_options()]
    assert sorted(sorted(names) for names, _ in listed_options) == sorted(declared)


def test_the_flags_page_has_the_groups_of_help() -> None:
    text = (SERVING / "flags.md").read_text(encoding="utf-8")
    groups = list(dict.fromkeys(one.group for one in visible_options()))
    assert [title for title in re.findall(r"^## (.+)$", text, re.MULTILINE) if title in groups] == groups


def test_the_flags_page_has_the_defaults_that_help_shows(listed_options: list[tuple[list[str], str]]) -> None:
    defaults = {name: default for names, default in listed_options for name in names}
    shown = [one for one in visible_options() if one.show_default and not one.is_flag]
    assert shown
    for one in shown:
        assert f"`{one.shown_default}`" in defaults[one.opts[0]], one.opts


def test_the_flags_page_lists_all_parts_that_can_be_ablated() -> None:
    names = {name for cells in rows(section("flags.md", "## V0 baseline")) for name in spans(cells[0])}
    assert set(ABLATIONS) <= names


# ----------------------------------------------------------------------------------------------------------- metrics


class Replicas(Router):
    """Two replicas without processes, with --kv-spill."""

    def __init__(self, ready: Ready):
        self.ready = ready
        self.alone = True
        self.routing = "prefix"
        stats = FrontEndStats()
        stats.record_core(1.0, Stats(spill=SpillStats(host_blocks=1)))
        self._two = tuple(SimpleNamespace(total_stats=stats, dead=None, replica=one) for one in range(2))

    cores = replicas = property(lambda self: self._two)

    def replica_states(self) -> list[dict[str, Any]]:
        return [{"replica": number, "status": "ok"} for number in range(2)]


async def test_the_metrics_page_lists_exactly_what_is_exported() -> None:
    ready = Ready("/m", "cpu", "float32", 300, 128, 4, 64, 16, 10, True, mm=MMSpec("m", {}, {}), role="decode")
    exported = generate_latest(make_registry(SimpleNamespace(client=Replicas(ready), model="m"))).decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", exported, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in kinds}
    for sample, given in re.findall(r"^([\w:]+)(?:\{(.*)\})? \S+$", exported, re.MULTILINE):
        name = sample if sample in kinds else re.sub(r"_(bucket|count|sum)$", "", sample)
        labels[name] |= set(re.findall(r'(\w+)="', given)) - {"le"}
    text = (SERVING / "metrics.md").read_text(encoding="utf-8")
    page = {spans(cells[0])[0]: cells for cells in rows(text) if cells[0].startswith("`")}
    assert page.keys() == kinds.keys()
    for name, (_, kind, given, *_) in page.items():
        assert kind == kinds[name], name
        assert set(spans(given)) == labels[name], name
    assert set(REASONS) <= set(spans(page["vllm:request_success_total"][3]))


# ------------------------------------------------------------------------------------------------------- api, models


def test_the_api_page_lists_all_endpoints() -> None:
    listed = {span for cells in rows(section("api.md", "## Endpoints")) for span in spans(cells[0])}
    assert listed == {f"{route.method.upper()} {route.path}" for route in ROUTES}


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest])
def test_the_api_page_lists_all_fields_of_requests(kind: type[msgspec.Struct]) -> None:
    column = 1 if kind is CompletionRequest else 2
    page = {name: cells[column] for cells in rows(section("api.md", "## Fields of a request"))
            if len(cells) == 4 for name in spans(cells[0])}  # fmt: skip
    for field in msgspec.structs.fields(kind):
        assert page.get(field.name, "–") != "–", f"{field.name} isn't on the page"


def test_the_responses_page_lists_exactly_the_fields() -> None:
    listed = {span for cells in rows(section("responses.md", "## Fields"))[2:] for span in spans(cells[0])}
    assert listed == {field.name for field in msgspec.structs.fields(ResponsesRequest)}


def test_the_messages_page_lists_exactly_the_fields() -> None:
    listed = {span for cells in rows(section("messages.md", "## Fields"))[2:] for span in spans(cells[0])}
    assert listed == {field.name for field in msgspec.structs.fields(MessagesRequest)}


@pytest.mark.parametrize(("kind", "path"), [(TokenizeRequest, "/tokenize"), (DetokenizeRequest, "/detokenize")])
def test_the_api_page_lists_all_fields_of_tokenizing(kind: type[msgspec.Struct], path: str) -> None:
    page = {spans(cells[0])[0]: cells[1] for cells in rows(section("api.md", "### `/tokenize` and `/detokenize`"))[2:]}
    assert {field.name for field in msgspec.structs.fields(kind)} <= set(spans(page[path]))


def test_the_models_page_lists_exactly_the_families() -> None:
    listed = {spans(cells[0])[0]: cells[2] for cells in rows(section("models.md", "## Families")) if spans(cells[0])}
    listed.pop("model_type")
    assert listed.keys() == FAMILIES.keys()
    assert {name for name, way in listed.items() if way == "fused"} == {n for n, one in FAMILIES.items() if one.fused}


def test_the_multimodal_page_lists_exactly_the_families_and_what_they_take() -> None:
    cells = [cells for cells in rows(section("multimodal.md", "## Families")) if spans(cells[0])]
    listed = {spans(row[0])[0]: row[2].split(", ") for row in cells if spans(row[0])[0] != "model_type"}
    assert listed == {name: family.kinds for name, family in MM_FAMILIES.items()}


# ---------------------------------------------------------------------------------------------------------- messages


MESSAGE_COLUMNS = ("message", "warning", "reason", "in the answer", "REASON")
FILLED_IN = re.compile(r"'…'|\[…\]|adapter_config\.json|adapter_model\.safetensors")


@pytest.fixture(scope="module")
def sources() -> str:
    """All texts of the code, one a line, with … for what is filled in."""
    found: list[str] = []
    for folder in ("cli", "engine", "bench", "plots"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(one.value if isinstance(one, ast.Constant) else "…" for one in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
                    found.append(node.value if isinstance(node.value, str) else node.value.decode("latin-1"))
    return "\n".join(found)


def quoted_messages(page: Path) -> list[str]:
    """The code spans in all columns of messages."""
    found: list[str] = []
    column: int | None = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            column = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if column is None:
            column = next((at for at, cell in enumerate(cells) if cell in MESSAGE_COLUMNS), len(cells))
        elif column < len(cells):
            found += spans(cells[column])
    return found


def missing_pieces(message: str, sources: str) -> list[str]:
    """What a message has between its placeholders and no text of the code has; the code may join texts at , ; and :."""
    missing = []
    for piece in FILLED_IN.sub("…", message).removeprefix("warning: ").split("…"):
        if piece.strip() in sources:
            continue
        parts = (part.strip(" ,;:()") for part in re.split(r"[,;:] ", piece))
        missing += [part for part in parts if len(part) > 3 and part.removeprefix("it ") not in sources]
    return missing


@pytest.mark.parametrize(
    "page",
    [
        "troubleshooting/serving.md",
        "troubleshooting/requests.md",
        "troubleshooting/measuring.md",
        "serving/adapters.md",
        "serving/models.md",
    ],
)
def test_quoted_messages_are_those_of_the_code(page: str, sources: str) -> None:
    messages = quoted_messages(ROOT / "docs" / page)
    assert len(messages) >= 10
    wrong = {message: missing for message in messages if (missing := missing_pieces(message, sources))}
    assert not wrong
