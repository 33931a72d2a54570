"""What the subcommands share: options in groups, and types of option values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from engine.config import AUTO_LENGTH
from engine.text import parse_size

RESULTS_ROOT = Path("results")  # of the folders that bench and sweep write


class GroupedOption(click.Option):
    """An option that `--help` shows under a heading of its own, with its default at the end of the text."""

    def __init__(
        self, *args: Any, group: str = "Options", several: bool = False, default_text: str = "", **kwargs: Any
    ):
        """An option of `click`, with three settings more.

        Args:
            group: the heading.
            several: the option takes all values that follow it in a `SpreadCommand`; it must be `multiple` too.
            default_text: the default as `--help` shows it; empty: the declared one, if there is one.
        """
        shown = {"show_default": kwargs.get("default") not in (None, "")}
        super().__init__(*args, **kwargs | shown)
        self.group = group
        self.several = several
        self._default_text = default_text

    @property
    def shown_default(self) -> str:
        """The default as `--help` shows it; empty if there is none."""
        if self._default_text or not self.show_default:
            return self._default_text
        if self.is_flag:
            return "on" if self.default else "off"
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Names and text. Bounds of numbers are left to the text and to error messages."""
        record = super().get_help_record(ctx)
        if record is None:
            return None
        notes = [f"env var: {self.envvar}"] if self.envvar else []
        notes += [f"default: {self.shown_default}"] if self.shown_default else []
        return record[0], f"{self.help or ''}  [{'; '.join(notes)}]" if notes else self.help or ""


def option(group: str, *names: str, **settings: Any) -> Callable[[Any], Any]:
    """A decorator that adds an option shown under the heading `group`; arguments as of `click.option`."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


Decorated = TypeVar("Decorated")


def with_options(*options: Callable[[Any], Any]) -> Callable[[Decorated], Decorated]:
    """A decorator that adds several options, in the order in which `--help` lists them."""

    def add(command: Decorated) -> Decorated:
        for one in reversed(options):
            command = one(command)
        return command

    return add


# Stand for a hyphen and a space while a text is wrapped, so that no line breaks within a flag or before a default.
_HYPHEN, _SPACE = "\N{NON-BREAKING HYPHEN}", "\N{NO-BREAK SPACE}"


def _unbroken(text: str) -> str:
    return text.replace("-", _HYPHEN).replace("default: ", f"default:{_SPACE}")


class GroupedCommand(click.Command):
    """A command whose `--help` lists its options by group, each short enough for a screen."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                only = next(iter(groups), "Options") if len(groups) < 2 else "Other"  # --help, which click adds last
                groups.setdefault(getattr(parameter, "group", only), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl([(names, _unbroken(text)) for names, text in records])
        formatter.buffer = [text.replace(_HYPHEN, "-").replace(_SPACE, " ") for text in formatter.buffer]


class SpreadCommand(GroupedCommand):
    """A command with options that take all values that follow them, `--name a b`, as vLLM's do.

    If such an option leaves no value for the command's argument, its last value becomes the argument.
    """

    in_place_of_argument = ""  # name of the parameter that may replace the argument

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread, last = self._spread(ctx, args)
        if last is not None:
            found, _, _ = self.make_parser(ctx).parse_args(list(spread))
            arguments = [one.name for one in self.params if isinstance(one, click.Argument)]
            if not any(isinstance(found.get(name), str) for name in (*arguments, self.in_place_of_argument)):
                del spread[last]  # remove the option's name before the last value
        return super().parse_args(ctx, spread)

    def _spread(self, ctx: click.Context, args: list[str]) -> tuple[list[str], int | None]:
        """The arguments with the option's name before each value, and the index of the last inserted name."""
        normalize = ctx.token_normalize_func or str
        options = [one for one in self.params if isinstance(one, GroupedOption) and one.several]
        names = {normalize(name) for one in options for name in one.opts}
        spread: list[str] = []
        last, name, values = None, "", 0
        for i, argument in enumerate(args):
            if argument == "--":
                return [*spread, *args[i:]], last
            if argument.startswith("-") and len(argument) > 1:
                name, values = argument if normalize(argument) in names else "", 0
                spread.append(argument)
                continue
            if name and values:
                last = len(spread)
                spread.append(name)
            values += 1
            spread.append(argument)
        return spread, last


class Finite(click.FloatRange):
    """A number within bounds. Infinity and NaN, which would pass click's bounds, are rejected."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


class Size(click.ParamType):
    """An integer with an optional unit: 8k is 8,000 and 8K is 8,192; the same for m/M and g/G, and KiB, GB, …"""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class JsonObject(click.ParamType):
    """A JSON object."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = value if isinstance(value, dict) else json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value[:80]!r} is not valid JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value[:80]!r} is not a JSON object such as '{{\"a\": 1}}'", param, ctx)
        return found


class Length(Size):
    """A length in tokens, or auto (as many as memory allows), which vLLM also writes as -1."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return AUTO_LENGTH if str(value).strip().lower() in ("auto", "-1") else super().convert(value, param, ctx)


SIZE, LENGTH = Size(), Length()
