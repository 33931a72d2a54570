"""The console of all commands: what it prints comes from users and servers, and is shown as it is."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def verbatim_console(file_width: int | None = None, **options: Any) -> "Console":
    """A console for which brackets are no styles and colons no pictures, in tables neither.

    file_width: columns where the output is no terminal, None: rich's own choice; options: of rich's Console.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False, **options)
    if file_width is None or console.is_terminal:
        return console
    return Console(markup=False, emoji=False, width=file_width, **options)
