"""The report page as a Jinja template with inline style and script; it loads nothing."""

STYLESHEET = """
:root { --ink: #1f2937; --muted: #6b7280; --line: #e5e7eb; --soft: #f9fafb; --good: #047857; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1180px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 20px 0 8px; }
h3.workload { margin: 22px 0 8px; }
.facts, .hint { color: var(--muted); margin: 0; }
.hint { font-size: 13px; margin: 0 0 8px; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 14px; }
.answer { border: 1px solid var(--line); border-left: 5px solid; border-radius: 8px; padding: 12px 16px; }
.answer .configuration { font-weight: 600; }
.answer .what { color: var(--muted); font-size: 13px; }
.answer .note { margin-top: 4px; }
.answer .rate { font-size: 30px; font-weight: 700; line-height: 1.3; }
.answer .rate small { font-size: 15px; font-weight: 500; color: var(--muted); }
.failures { border: 1px solid #fecaca; background: #fef2f2; border-radius: 8px; padding: 10px 16px; margin: 20px 0 0; }
.failures p { margin: 4px 0; overflow-wrap: anywhere; }
figure { margin: 0 0 28px; }
figure img { width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 8px; }
.timelines { margin: 0 0 28px; }
.timelines summary { cursor: pointer; font-weight: 600; padding: 10px 16px; border: 1px solid var(--line);
  border-radius: 8px; background: var(--soft); }
.timelines figure { margin: 14px 0 0; }
.troubles { margin: 0; padding-left: 20px; font-size: 14px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--soft); font-weight: 600; vertical-align: bottom; }
th small { display: block; color: var(--muted); font-weight: 400; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
table.sortable th { cursor: pointer; user-select: none; }
table.sortable th:hover { background: #f3f4f6; }
th[aria-sort=ascending]::after { content: " ▲"; font-size: 9px; }
th[aria-sort=descending]::after { content: " ▼"; font-size: 9px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.better { color: var(--good); } .worse { color: var(--bad); }
.difference { font-size: 12px; display: block; min-height: 1.2em; }
.difference.clear { font-weight: 700; }
tr.not-sustained td, tr.invalid td, tr.undecided td { color: var(--muted); }
tr.not-sustained .dot { background: #fff !important; border: 2px solid var(--own); }
tr.invalid td { text-decoration: line-through; }
td.yes { color: var(--good); font-weight: 600; }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px; }
.settings > div { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; min-width: 0; }
.settings h3 { margin: 0 0 6px; }
.settings table td { white-space: normal; overflow-wrap: anywhere; padding: 3px 0 3px 12px; border: 0;
  vertical-align: top; }
.settings table td:first-child { padding-left: 0; color: var(--muted); }
.settings table { table-layout: fixed; }
.settings table td:first-child { width: 56%; }
.settings h4 { margin: 14px 0 6px; font-size: 13px; }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const key = row => row.cells[column].dataset.value ?? "";
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every(row => key(row) === "" || !isNaN(key(row)));
      rows.sort((a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");   // empty cells go last in both directions
        return (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
      });
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""

BODY = """
<h1>{{ title }}</h1>
<p class="facts">{{ models | join(", ") }}{% if models %} &middot; {% endif %}{{ hardware | join("; ") }}</p>
<p class="facts">{{ "Simulated" if simulated else "Measured" }} {{ finished | join(", ") }}</p>
{% for text in errors %}
<p class="facts">{{ text }}</p>
{% endfor %}

{% for workload, cards in answers %}
<h3 class="workload">{{ workload }}</h3>
<div class="answers">
{% for a in cards %}
<div class="answer" style="border-left-color: {{ a.color }}">
<div class="configuration">{{ a.configuration }}</div>
<div class="rate">{{ a.rate }}{% if a.unit %} <small>{{ a.unit }}</small>{% endif %}</div>
<div class="what">{{ a.detail }}</div>
{% if a.note %}<div class="what note">{{ a.note }}</div>{% endif %}
</div>
{% endfor %}
</div>
{% endfor %}
{% if failures %}
<div class="failures"><strong>Not measured</strong>
{% for what, cause in failures.items() %}<p><strong>{{ what }}</strong>: {{ cause }}</p>{% endfor %}
</div>
{% endif %}

<h2>Figures</h2>
{% for caption, image in figures %}
<figure><img alt="{{ caption }}" src="{{ image }}"></figure>
{% endfor %}

{% if timelines %}
<details class="timelines">
<summary>Timelines of load points ({{ timelines | length }})</summary>
{% for caption, image in timelines %}
<figure><img alt="{{ caption }}" src="{{ image }}"></figure>
{% endfor %}
</details>
{% endif %}

{% if ablations %}
<h2>Effect of each part</h2>
<p class="hint">Differences are from the first row. Differences in bold are significant: the 95 % intervals do not
overlap, or the 95 % interval of the differences within the rounds excludes 0.</p>
{% for a in ablations %}
<h3>{{ a.heading }}</h3>
<div class="scroll"><table class="sortable">
<thead><tr><th scope="col">Configuration</th>
{% for m in a.metrics %}<th scope="col">{{ m.label }}<small>{{ m.unit }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for name, note, cells in a.rows %}
<tr><td data-value="{{ name }}"><span class="dot" style="background: {{ colors[name] }}"></span>{{ name }}
{% if note %}<span class="difference">{{ note }}</span>{% endif %}</td>
{% for key, value, difference, look in cells %}
<td data-value="{{ key }}">{{ value }}<span class="difference {{ look }}">{{ difference }}</span></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endif %}

<h2>Comparison</h2>
{% for c in comparisons %}
<h3>{{ c.heading }}</h3>
<div class="scroll"><table class="sortable">
<thead><tr><th scope="col">Configuration</th>
{% for m in c.metrics %}<th scope="col">{{ m.label }}<small>{{ m.unit }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in c.rows %}
<tr><td data-value="{{ name }}"><span class="dot" style="background: {{ colors[name] }}"></span>{{ name }}</td>
{% for key, value, difference, verdict in cells %}
<td data-value="{{ key }}">{{ value }}<span class="difference {{ verdict }}">{{ difference }}</span></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}

<h2>Load points</h2>
<p class="hint">All measured load points. Click a heading to sort. Hover over a row to see the reason for its verdict
and its id, which <code>redline report --timeline</code> takes.</p>
<div class="scroll"><table class="sortable">
<thead><tr>{% for label, unit, kind in point_columns %}
<th scope="col" class="{{ kind }}">{{ label }}<small>{{ unit }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for p in points %}
<tr class="{{ p.state }}" title="{{ p.reason }}" style="--own: {{ p.color }}">
{% for key, value, kind in p.cells %}
<td data-value="{{ key }}" class="{{ kind }}">
{%- if loop.first %}<span class="dot" style="background: {{ p.color }}"></span>{% endif %}{{ value }}</td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>

{% if troubles %}
<h3>Invalid, undecided and disturbed load points, failed requests</h3>
<ul class="troubles">
{% for name, cause in troubles %}
<li><strong>{{ name }}</strong> {{ cause }}</li>
{% endfor %}
</ul>
{% endif %}

<h2>Configurations</h2>
<div class="settings">
{% for name, rows, resolved in configurations %}
<div><h3><span class="dot" style="background: {{ colors[name] }}"></span>{{ name }}</h3>
<table>{% for key, value in rows %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% if resolved %}
<h4>As reported by the server</h4>
<table>{% for key, value in resolved %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table>
{% endif %}
</div>
{% endfor %}
</div>

<h2>Workloads and environment</h2>
<div class="settings">
{% for run in runs %}
{% for name, rows in run.workloads %}
<div><h3>{{ name }}</h3>
<table>{% for key, value in rows %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% endfor %}
<div><h3>Environment of {{ run.name }}</h3>
<table>{% for key, value in run.environment %}<tr><td>{{ key }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% endfor %}
</div>
"""

PAGE = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{{ title }} · Redline</title>\n'
    f"<style>{STYLESHEET}</style>\n</head>\n<body>{BODY}<script>{SCRIPT}</script>\n</body>\n</html>\n"
)
