"""Runs items of the GPU check in a process of their own, which a fault of the GPU may end."""

import argparse
import os
import sys
import traceback
from pathlib import Path

DEVICE_FAULT = 3  # exit code: the GPU's context is lost, so the items after this one need a new process


def main() -> int:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--stand-in", action="store_true")
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("items", nargs="+")
    options = arguments.parse_args()
    if options.stand_in:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    # Results have a stream of their own; what libraries print goes to the log.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return run_items(options.items, options.folder, options.stand_in, out)


def run_items(items: list[str], folder: Path, stand_in: bool, out: "object") -> int:
    from tests.gpu.environment import Environment
    from tests.gpu.items import ITEMS
    from tests.gpu.rows import Reporter, Row, SkipError, is_device_fault

    if stand_in:
        from tests.engine.kernels.triton import quick

        quick.patch()
    environment = Environment(folder, stand_in, Reporter("", out))  # type: ignore[arg-type]
    code = 0
    try:
        for name in items:
            environment.report.item = name
            kind, _, argument = name.partition(": ")
            try:
                ITEMS[kind](environment, argument) if argument else ITEMS[kind](environment)
            except SkipError as reason:
                environment.report.row("skipped", None, note=str(reason))
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                detail = traceback.format_exc().splitlines()
                environment.report.row("error", None, passed=False, note=text, detail=detail)
                if is_device_fault(error):
                    code = DEVICE_FAULT
            environment.report.send(Row(name, "", "end"))
            if code:
                break
    finally:
        for close in environment.kept.pop("close", []):
            close()
    return code


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    os._exit(exit_code)  # threads of a device that hangs would keep the process
