"""The texts of `--help`: complete sentences, one style of defaults, groups that fit a screen."""

import re

import click
import pytest

from cli.main import COMMANDS, redline
from cli.options import GroupedOption
from engine.devices.cpu import MAX_STEP_TOKENS, CpuMachine

SCREEN_LINES = 40


def find_command(name: str) -> click.Command:
    command = redline.get_command(click.Context(redline), name)
    assert command is not None
    return command


def help_of(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with click.Context(redline, info_name="redline", **redline.context_settings) as parent:
        command = find_command(name)
        with command.make_context(name, [], parent=parent, resilient_parsing=True) as context:
            return command.get_help(context)


def visible_options(name: str) -> list[click.Option]:
    return [one for one in find_command(name).params if isinstance(one, click.Option) and not one.hidden]


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_each_group_fits_a_screen(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = help_of(name, columns, monkeypatch)
    assert max(map(len, shown.splitlines())) <= columns
    groups = re.split(r"\n\n(?=\S)", shown)  # headings are not indented
    assert len(groups) >= 2
    for group in groups:
        assert len(group.splitlines()) <= SCREEN_LINES, group


@pytest.mark.parametrize("name", COMMANDS)
def test_each_text_is_of_whole_sentences(name: str) -> None:
    for one in visible_options(name):
        assert one.help, one.name
        assert re.match(r"[A-Z]", one.help), f"{one.name}: {one.help}"
        assert one.help.endswith("."), f"{one.name}: {one.help}"


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_in_brackets_only(name: str) -> None:
    for one in visible_options(name):
        assert isinstance(one, GroupedOption), one.name
        assert "[" not in (one.help or ""), f"{one.name}: {one.help}"
        assert "by default" not in (one.help or "").replace("sent by default", ""), f"{one.name}: {one.help}"


@pytest.mark.parametrize("name", COMMANDS)
def test_values_have_telling_names(name: str) -> None:
    """Not click's: TEXT, INTEGER RANGE, …"""
    for one in visible_options(name):
        if not one.is_flag and not isinstance(one.type, click.Choice):
            assert one.metavar, one.name


def test_defaults_of_the_device_are_those_of_the_help() -> None:
    shown = {one.name: one.shown_default for one in visible_options("serve") if isinstance(one, GroupedOption)}
    known = CpuMachine.defaults
    assert shown["max_num_seqs"].startswith(f"{known.max_num_seqs},")
    assert (
        shown["max_num_batched_tokens"]
        == f"--max-num-seqs + {known.min_chunk}, at least {known.max_num_batched_tokens}; on AMX tiles up to "
        f"{MAX_STEP_TOKENS}"
    )
    assert shown["block_size"] == str(known.block_size)
    assert shown["gpu_memory_utilization"] == str(known.memory_utilization)


def test_presets_of_workloads_are_named() -> None:
    from bench.workloads.presets import workload_presets

    text = next(one.help for one in visible_options("bench") if one.name == "workload")
    assert set(workload_presets()) <= set(re.findall(r"[\w-]+", text or ""))
