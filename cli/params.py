"""Types of option values of `redline bench`: lengths, lists of rates, shares, latency limits, GPUs."""

import re
from typing import Any

import click

from bench.measurement.nvml import Gpus, parse_gpus
from bench.workloads.arrivals import MOST_RATE
from bench.workloads.fields import MOST_TOKENS

_METRICS = ("ttft", "itl", "tpot", "e2e")


class LengthType(click.ParamType):
    """N, or LOW:HIGH -> [low, high]; tokens."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | list[int]:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", value.strip())
        if match is None or int(match[1]) < 1 or int(match[2] or match[1]) > MOST_TOKENS:
            usage = f"use N or LOW:HIGH, from 1 to {MOST_TOKENS}"
            self.fail(f"{value!r} is not a valid token count: {usage}", param, ctx)
        if match[2] is None:
            return int(match[1])
        if int(match[2]) < int(match[1]):
            self.fail(f"{value!r}: HIGH is below LOW", param, ctx)
        return [int(match[1]), int(match[2])]


class RatesType(click.ParamType):
    """A,B,C in requests/s."""

    name = "a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if not isinstance(value, str):
            return value
        try:
            rates = [float(part) for part in value.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(0 < r <= MOST_RATE for r in rates):
            usage = f"use comma-separated numbers above 0, at most {MOST_RATE:g}"
            self.fail(f"{value!r} is not a list of rates: {usage}", param, ctx)
        return rates


class RepeatsType(click.ParamType):
    """25 -> 25; 0,25,50 -> [0, 25, 50]; percentages."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | list[int]:
        if not isinstance(value, str):
            return value
        parts = [part.strip().removesuffix("%") for part in value.split(",")]
        if not all(re.fullmatch("[0-9]{1,3}", part) and int(part) <= 100 for part in parts):
            self.fail(f"{value!r} is not a percentage from 0 to 100, or a list of them", param, ctx)
        return int(parts[0]) if len(parts) == 1 else list(dict.fromkeys(map(int, parts)))


class ShareType(click.ParamType):
    """5% or 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if not isinstance(value, str):
            return value
        try:
            share = float(value.rstrip("% ")) / (100 if value.strip().endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0.005 <= share <= 1:
            self.fail(f"{value!r} is not a valid precision: use a value from 0.5% to 100%", param, ctx)
        return share


class LimitType(click.ParamType):
    """ttft_p99=2s -> ("ttft_p99_ms", 2000.0)."""

    name = "metric=limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if not isinstance(value, str):
            return value
        number = r"([0-9]{1,9}(?:\.[0-9]*)?)"
        match = re.fullmatch(rf"({'|'.join(_METRICS)})_p(50|99)={number}(ms|s)", value.strip().lower())
        if match is None:
            usage = f"use METRIC_PERCENTILE=VALUE such as ttft_p99=2s (metrics {', '.join(_METRICS)}; p50, p99; ms, s)"
            self.fail(f"{value!r} is not a valid limit: {usage}", param, ctx)
        return f"{match[1]}_p{match[2]}_ms", float(match[3]) * (1000 if match[4] == "s" else 1)


class GpusType(click.ParamType):
    """0,1 -> (0, 1); all; none -> ()."""

    name = "gpus"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Gpus:
        if not isinstance(value, str):
            return value
        try:
            return parse_gpus(value)
        except ValueError:
            self.fail(f"{value!r} names no GPUs: use all, none, or numbers such as 0,1", param, ctx)


LENGTH, RATES, REPEATS = LengthType(), RatesType(), RepeatsType()
SHARE, LIMIT, GPUS = ShareType(), LimitType(), GpusType()
