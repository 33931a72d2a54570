"""Short texts for messages, and sizes as users write them."""

import re


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def human_bytes(count: int) -> str:
    """A number of bytes with its unit, e.g. 512 B or 16.0 MiB."""
    value, unit = float(count), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    while value >= 1024 and unit < len(units) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {units[unit]}" if unit == 0 else f"{value:.1f} {units[unit]}"


_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)(i?[bB])?")


def parse_size(text: str) -> int:
    """An integer with an optional unit: 8k is 8,000 and 8K is 8,192; the same for m/M and g/G, and KiB, GB, …

    Raises ValueError with what is wrong.
    """
    match = _SIZE.fullmatch(text.replace(",", "").strip())
    if match is None:
        raise ValueError(f"{text!r} is not a valid size: use a number such as 4096, 4k or 2GiB")
    number, unit, suffix = match.groups()
    binary = suffix in ("iB", "ib") or (unit.isupper() and not suffix)
    size = float(number) * (1024 if binary else 1000) ** ("", "k", "m", "g", "t").index(unit.lower())
    if not size < 2**63:
        raise ValueError(f"{text!r} is too large")
    if size != int(size):
        raise ValueError(f"{text!r} is not an integer")
    return int(size)
