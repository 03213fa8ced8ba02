"""One or several training runs as one HTML page that needs no network: to read, to send, to print.

    python scripts/report.py runs/offline/sft-muon runs/offline/sft-adamw --out report.html
    python scripts/report.py runs/muon runs/adamw --spectra results/spectra --engine zero1 --dp 8 --dp 64

RUN is the output folder of a Trainer, finished or not. The page shows what the run's own files hold: the log in
trainer_state.json, config.json, the optimizer groups in optimizer.pt (no tensors are read), the model card README.md.
What was not logged is named at the end, with the option that logs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cells import exit_with
from jinja2 import Environment, StrictUndefined
from plot import default_label
from report_figures import colours
from report_model import model_sections, recorded
from report_runs import Run, read_run
from report_sections import Section, logged, losses, spectra, summary

import hf_muon
from hf_muon.plan import ENGINES, MAX_RANKS

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; padding-top: .75rem; border-top: 1px solid #ccc; }
h3 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .25rem; }
p { margin: .25rem 0; }
.quiet { color: #555; font-size: .9rem; }
nav a { display: inline-block; margin: 0 .75rem .25rem 0; padding: .2rem 0; color: #005a8f; }
.runs span { display: inline-block; margin-right: 1.25rem; }
.swatch { width: 2rem; height: .6rem; vertical-align: middle; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: .75rem 0 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; max-width: none; }
figcaption { font-weight: 600; font-size: .95rem; }
figcaption small { display: block; font-weight: 400; color: #555; }
img { display: block; width: 100%; height: auto; }
.wide img { width: auto; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid #e2e2e2;
  overflow-wrap: normal; max-width: 24rem; }
td { overflow-wrap: break-word; min-width: 4rem; }
tbody th { min-width: 6rem; }
thead th { border-bottom: 1px solid #888; }
@media (min-width: 68rem) {
  main { display: grid; grid-template-columns: repeat(3, 1fr); gap: 0 1.5rem; }
  section { grid-column: 1 / -1; min-width: 0; }
  section.small { grid-column: auto; }
  section.medium { grid-column: span 2; }
}
@media print {
  main { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem; }
  section { grid-column: 1 / -1; min-width: 0; }
  section.small { grid-column: auto; break-inside: avoid; }
  section.small .figures { grid-template-columns: 1fr; }
  body { max-width: none; padding: 0; font-size: 9pt; }
  nav { display: none; }
  .figures { grid-template-columns: 1fr 1fr; }
  figure, tr { break-inside: avoid; }
  h2, h2 + p, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  h1 { font-size: 16pt; }
  h2 { font-size: 12pt; margin-top: 1rem; }
  h3, p, figcaption, .quiet { font-size: 9pt; }
  .wide img { max-height: 12cm; }
  table { font-size: 6.5pt; }
  th, td, tbody th { padding-right: .4rem; overflow-wrap: break-word; min-width: 0; }
}
@page { margin: 15mm; }
"""

# The policy lets the browser load nothing but what the page carries, and run no script.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {{ runs | map(attribute="label") | join(", ") }}</title>
<style>{{ style }}</style>
</head>
<body>
{%- macro table(t) %}
{%- if t.title %}<h3>{{ t.title }}</h3>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ t.title or 'table' }}"><table>
<thead><tr>{% for cell in t.rows[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in t.rows[1:] %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{%- endmacro %}
<header>
<h1>Training report</h1>
<p class="runs">{% for run, (colour, _) in looks %}<span><svg class="swatch" viewBox="0 0 4 1"
 preserveAspectRatio="none" aria-hidden="true"><rect width="4" height="1" fill="{{ colour }}"/></svg>
 {{ run.label }}</span>{% endfor %}</p>
<p class="quiet">Made {{ made }} by hf_muon {{ version }} from the files of the runs.</p>
<nav aria-label="Sections">
{%- for s in full %}<a href="#{{ s.name }}">{{ s.title }}</a>{% endfor %}
{%- if empty %}<a href="#missing">Not in this report</a>{% endif %}</nav>
</header>
<main>
<section id="summary"><h2>Summary</h2>{{ table(summary) }}
{%- for run in runs %}{% for note in run.notes %}
<p class="quiet">{{ run.label }}: {{ note }}.</p>{% endfor %}{% endfor %}
</section>
{%- for s in full %}
<section id="{{ s.name }}" class="{{ s.size }}"><h2>{{ s.title }}</h2>
{%- if s.lead %}<p class="quiet">{{ s.lead }}</p>{% endif %}
{%- for t in s.tables %}{{ table(t) }}{% endfor %}
{%- if s.figures %}<div class="figures">
{%- for f in s.figures %}
<figure{% if f.source.startswith("data:image/png") %} class="wide"{% endif %}><figcaption>{{ f.title }}
{%- for note in f.notes %}<small>{{ note }}</small>{% endfor %}</figcaption>
<img src="{{ f.source }}" alt="{{ f.alt }}"></figure>{% endfor %}</div>{% endif %}
{%- for note in s.notes %}<p class="quiet">{{ note }}</p>{% endfor %}
</section>
{%- endfor %}
{%- if empty %}
<section id="missing"><h2>Not in this report</h2>
<ul>{% for s in empty %}
<li><b>{{ s.title }}</b>: {{ s.missing }}{% for note in s.notes %} {{ note }}{% endfor %}</li>{% endfor %}</ul>
</section>{% endif %}
</main>
</body>
</html>
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--labels", nargs="+", help="names of the runs (default: from the folders)")
    parser.add_argument("--spectra", type=Path, metavar="DIR", help="what scripts/spectra.py wrote")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="of the plan; may be repeated")
    parser.add_argument("--dp", action="append", type=int, help="data-parallel ranks of the plan; may be repeated")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Read everything, then write the page."""
    options = make_parser().parse_args(argv)
    engines, ranks = options.engine or ["ddp", "zero1", "zero3", "fsdp2"], options.dp or [8, 64]
    if wrong := [n for n in ranks if not 1 <= n <= MAX_RANKS]:
        raise ValueError(f"--dp must be in [1, {MAX_RANKS}], got {wrong[0]}")
    if options.labels and len(options.labels) != len(options.runs):
        raise ValueError(f"{len(options.runs)} runs but {len(options.labels)} labels")
    labels = options.labels or [default_label(run) for run in options.runs]
    runs = [read_run(run, label) for run, label in zip(options.runs, distinct(labels), strict=True)]
    sections = [losses(runs), *logged(runs), spectra(runs, options.spectra)]
    sections += [*model_sections(runs, engines, ranks), *recorded(runs)]
    page = render(runs, sections)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8", errors="replace")
    print(f"report: {options.out} ({len(page) / 1024:.0f} KiB, {sum(map(bool, sections))} of {len(sections)} sections)")
    return 0


def distinct(labels: Sequence[str]) -> list[str]:
    """The second of a name becomes ``name (2)``: runs must be told apart in a legend."""
    out: list[str] = []
    for label in labels:
        free = (text for n in range(1, len(labels) + 1) if (text := label if n == 1 else f"{label} ({n})") not in out)
        out.append(next(free))
    return out


def render(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    """The page; whatever comes from a run is escaped."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(
        runs=runs,
        looks=list(zip(runs, colours(len(runs)), strict=True)),
        summary=summary(runs),
        full=[section for section in sections if section],
        empty=[section for section in sections if not section],
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=hf_muon.__version__,
        style=STYLE,
    )


if __name__ == "__main__":
    exit_with(main, "report")
