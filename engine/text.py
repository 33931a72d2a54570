"""Short texts for messages."""


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
