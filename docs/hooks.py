"""Hooks of the documentation site: pages that show a file of the repository's root, links that leave `docs/`, and line
breaks within long names.

A page shows a file, or a section of it, between these two lines; what stands between them is for readers of the folder:

    <!-- include: README.md status -->
    <!-- /include -->

A section of a file lies between `<!-- status -->` and `<!-- /status -->`. Links to files that are not on the site,
such as sources, become plain text. Names in inline code may break after `/` and `_`, which narrow
screens need, but not after the `--` of a flag.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

FOLDER = "docs"
SHOWN = {"README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CONTRIBUTING.md": "contributing.md"}

INCLUDE = re.compile(r"<!-- include: (\S+)(?: (\S+))? -->.*?<!-- /include -->", re.DOTALL)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
PRE = re.compile(r"(<pre\b.*?</pre>)", re.DOTALL)
BREAK = re.compile(r"(?<=\w[/_])(?=[a-zA-Z]{2})")
FLAG, NO_BREAK = re.compile(r"--\w+"), r'<span style="white-space: nowrap">\g<0></span>'
INLINE_CODE = re.compile(r"<code>([^<]*)</code>")
FENCE = re.compile(r"(^ *```.*?^ *```[^\S\n]*$)", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Expand includes and point links at pages of the site."""
    root = Path(config.config_file_path).parent
    source: str = page.file.src_uri
    expanded = INCLUDE.sub(lambda found: _included(root, source, *found.groups()), markdown)
    return _relink(root, expanded, posixpath.join(FOLDER, posixpath.dirname(source)), source)


def on_page_content(html: str, **_: Any) -> str:
    """Allow line breaks within the names of inline code."""
    parts = PRE.split(html)
    parts[::2] = [INLINE_CODE.sub(_breakable, part) for part in parts[::2]]
    return "".join(parts)


def _breakable(found: re.Match[str]) -> str:
    return f"<code>{FLAG.sub(NO_BREAK, BREAK.sub('<wbr>', found[1]))}</code>"


def _included(root: Path, page: str, name: str, section: str | None) -> str:
    text = (root / name).read_text(encoding="utf-8")
    if section is not None:
        found = re.search(rf"<!-- {section} -->\n(.*?)<!-- /{section} -->", text, re.DOTALL)
        if found is None:
            raise ValueError(f"{FOLDER}/{page}: {name} has no section {section}")
        text = found[1]
    return _relink(root, text, posixpath.dirname(name), page)


def _relink(root: Path, text: str, folder: str, page: str) -> str:
    """The text with its links, which are relative to `folder` of the repository, made relative to the page."""

    def replace(found: re.Match[str]) -> str:
        image, words, link = found.groups()
        path, _, anchor = link.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return found[0]
        target = posixpath.normpath(posixpath.join(folder, path))
        inside = SHOWN.get(target) or (target.removeprefix(f"{FOLDER}/") if target.startswith(f"{FOLDER}/") else "")
        if not inside:
            return found[0] if image or not (root / target).exists() else words
        relative = posixpath.relpath(inside, posixpath.dirname(page) or ".")
        return f"{image}[{words}]({relative}{'#' * bool(anchor)}{anchor})"

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(replace, part) for part in parts[::2]]
    return "".join(parts)
