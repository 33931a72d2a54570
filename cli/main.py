"""The `redline` command: runs the subcommand and turns every known error into one line and an exit code."""

import errno
import importlib
import os
import signal
import sys
from importlib import metadata
from typing import Any

import click

from cli.exit_codes import INTERRUPTED
from engine.signals import EndSignal, exit_code_of

COMMANDS = {
    "serve": "Serve a model over an OpenAI-compatible HTTP API.",
    "scale": "Add replicas to a running server, or drain some.",
    "bench": "Find the highest request rate that a server sustains.",
    "generate": "Generate load for redline bench on other hosts.",
    "sweep": "Measure several configurations on several workloads.",
    "plan": "Find out how many of which GPU serve a load, by simulation.",
    "profile": "Measure this machine, so that it can be simulated; or tune its GPU.",
    "report": "Draw figures, tables and the HTML report from result files.",
}

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class LazyGroup(click.Group):
    """Imports a subcommand's module only when that subcommand is used: `redline --help` must not load pandas."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.{cmd_name}").command
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def underscores_equal_hyphens(name: str) -> str:
    return name.replace("_", "-")


def print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"redline {metadata.version('redline-llm')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": underscores_equal_hyphens,
        "max_content_width": 110,
    },
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the version and exit.",
)
def redline() -> None:
    """Serve language models, and find the highest request rate a deployment sustains."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    program = "tool" if os.path.basename(sys.argv[0]) == "tool" else "redline"
    try:
        result: Any = redline.main(args=arguments, prog_name=program, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else str(error))
        return error.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else None
        message = error.format_message().rstrip(".") + (f" (see {where} --help)" if where else "")
        return complain(program, message, error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        return interrupted_code(error)
    except BrokenPipeError:
        discard_output()  # the reader of the output left (`redline report | head`)
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            discard_output()
            where = error.filename or "the output"
            return complain(program, f"{where} can't be written: {error.strerror}", 1)
        if not is_known(error):
            raise
        return complain(program, str(error), getattr(error, "exit_code", 1))


def interrupted_code(error: BaseException) -> int:
    """The exit code after a signal; click turns a KeyboardInterrupt into an Abort, whose cause it is."""
    received = next((one for one in (error, error.__cause__) if isinstance(one, EndSignal)), None)
    if received is None:
        return INTERRUPTED
    # Python's finalization takes handlers away: a signal of the same request would end the process without this code.
    signal.signal(received.number, signal.SIG_IGN)
    return exit_code_of(received.number)


def discard_output() -> None:
    """Drop what stdout still buffers, so that Python does not try to write it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_known(error: Exception) -> bool:
    """Whether the error is meant for the user; looks into `sys.modules` so that an error path imports nothing."""
    known = [("engine.errors", "RedlineError"), ("bench.errors", "BenchError")]
    kinds = tuple(getattr(sys.modules[module], name) for module, name in known if module in sys.modules)
    return isinstance(error, kinds)


def complain(program: str, message: str, exit_code: int) -> int:
    click.echo(f"{program}: error: {' '.join(message.split())}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
