"""The page in a real browser, where one is installed."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from plots.report import write_report
from tests.plots.made import edited

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no browser is installed")

CLICKS = """<script>
const said = [];
const table = [...document.querySelectorAll("table.sortable")].at(-1);
const heads = [...table.tHead.rows[0].cells];
for (const name of ["Rate", "TTFT P99", "Configuration", "Goodput"]) {
  const column = heads.findIndex(head => head.textContent.startsWith(name));
  for (let click = 0; click < 2; click++) {
    heads[column].click();
    const cells = [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim());
    said.push([name, heads[column].getAttribute("aria-sort"), ...cells].join("|"));
  }
}
heads[0].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
said.push("sorted|" + heads.filter(head => head.hasAttribute("aria-sort")).map(head => head.textContent).join());
document.body.innerHTML = "<pre></pre>";
document.querySelector("pre").textContent = said.join("\\n");
</script></body>"""


def test_a_click_on_a_heading_sorts(make_run: Callable[..., Path], tmp_path: Path) -> None:
    demo = make_run("demo")
    edited(demo, lambda p: replace(p, goodput=p.rate / 3 if p.phase == "ladder" else None))
    page = tmp_path / "clicked.html"
    page.write_text(write_report([demo]).page.read_text().replace("</body>", CLICKS))
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.partition("<pre>")[2].partition("</pre>")[0].splitlines()
    for line in lines[:-1]:
        name, order, *cells = line.split("|")
        assert len(cells) == 18
        known = [cell for cell in cells if cell != "–"]
        assert cells[len(known) :] == ["–"] * (18 - len(known)), "what was not measured goes last, both ways"
        key = (lambda cell: cell) if name == "Configuration" else lambda cell: float(cell.replace(",", ""))
        assert [key(c) for c in known] == sorted(map(key, known), reverse=order == "descending")
    assert [line.split("|")[1] for line in lines[:4]] == ["ascending", "descending"] * 2
    assert lines[-1] == "sorted|Configuration"
