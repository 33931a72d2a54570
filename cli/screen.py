"""The console of all commands. It prints text from users and servers, so markup is off."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def verbatim_console(file_width: int | None = None, **options: Any) -> "Console":
    """A console without markup and emoji, also in tables.

    Args:
        file_width: columns if the output is not a terminal; None: rich's default.
        options: of rich's Console.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False, **options)
    if file_width is None or console.is_terminal:
        return console
    return Console(markup=False, emoji=False, width=file_width, **options)
