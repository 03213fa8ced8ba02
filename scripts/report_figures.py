"""Figures of ``scripts/report.py``: one panel each, as SVG in a data URI, with a text that says what they show."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from plot import RUN_COLOURS, finish, plt
from report_runs import Series

SIZE = (4.2, 2.8)  # inches: two fit on a page, and one is readable on a phone
SHORT = 25  # values of a line that are few enough for a mark each
LEGEND = 8  # numbered layers that a legend names; more are told apart by a colour scale
NAMED = 20  # the same of lines with other names
INSIDE = 4  # entries of a legend that leave room for the lines; a longer one stands below
STYLES = ("-", "--", "-.", ":")
STRETCHES = 400  # of a long line: more than a figure has columns of pixels
FAR = 20  # the largest value by the smallest, from where on a scale is logarithmic


@dataclass(frozen=True)
class Line:
    """One run, kind or layer."""

    label: str
    data: Series
    colour: str | None = None
    style: str = ""


@dataclass(frozen=True)
class Figure:
    """An image and what stands below it."""

    title: str
    source: str
    """A data URI."""
    alt: str
    notes: tuple[str, ...] = ()


def plain(text: str, most: int = 30) -> str:
    """A label for a figure: not too long, without control characters (they break SVG) and leading ``_`` (it hides)."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
    return f" {text}" if text.startswith("_") else text


def colours(number: int) -> list[tuple[str, str]]:
    """Colour and line style of each of so many runs; the styles tell equal lines apart."""
    return [(RUN_COLOURS[i % len(RUN_COLOURS)], STYLES[i % len(STYLES)]) for i in range(number)]


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    ylabel: str,
    target: tuple[float, str] | None = None,
    beside: Sequence[Line] = (),
    scale: str = "",
) -> Figure | None:
    """Lines over steps; None where nothing can be drawn.

    Args:
        title: above the figure.
        lines: in the order of the legend.
        ylabel: with the unit.
        target: a dotted horizontal line, and its name.
        beside: lines of figures that this one is compared with: all get the same scale.
        scale: ``linear``, or ``zero`` for one that begins there; default: logarithmic where values are far apart.
    """
    drawn = [line for line in lines if line.data]
    if not drawn:
        return None
    values = [v for line in (*drawn, *beside) for _, v in line.data.finite()] + ([target[0]] if target else [])
    # Mathematics in labels is off: a $ in a folder's name is a dollar.
    options = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "hf_muon", "font.size": 9}
    with rc_context(options), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that matplotlib's font lacks are drawn by the browser's
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        _draw(axes, drawn)
        if target:
            axes.axhline(target[0], color="black", linestyle=":", linewidth=1.2, label=target[1])
        _scale(axes, values, scale)
        finish(axes, xlabel="step", ylabel=ylabel, title="")
        handles, labels = axes.get_legend_handles_labels()
        if len(handles) > INSIDE:
            axes.get_legend().remove()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return Figure(title, data_uri(out.getvalue(), "image/svg+xml"), _alt(title, drawn), tuple(_notes(lines)))


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    many = _on_a_scale(lines)
    for i, line in enumerate(lines):
        colour = line.colour or (colormaps["viridis"](i / len(lines)) if many else RUN_COLOURS[i % len(RUN_COLOURS)])
        data = _thinned(line.data)
        numbers = data.values
        marks = list(range(len(numbers))) if len(numbers) <= SHORT else _alone(numbers)
        dashes = line.style or STYLES[0 if many else i // len(RUN_COLOURS) % len(STYLES)]
        style = {"linestyle": dashes, "linewidth": 1.4, "color": colour}
        if marks:
            style |= {"marker": "o", "markersize": 3, "markevery": marks}
        named = not many or i in (0, len(lines) // 2, len(lines) - 1)
        axes.plot(data.steps, numbers, label=plain(line.label) if named else "_", **style)


def _on_a_scale(lines: Sequence[Line]) -> bool:
    """Layers in their order are shown by a scale of colours, for which other names have no order."""
    numbered = all(line.label.isdigit() for line in lines if line.colour is None)
    return len(lines) > (LEGEND if numbered else NAMED)


def _thinned(data: Series) -> Series:
    """Of each stretch of a long line the smallest and the largest value and a gap: no spike is lost."""
    n = len(data.values)
    if n <= 3 * STRETCHES:
        return data
    kept: set[int] = set()
    for i in range(STRETCHES):
        stretch = range(i * n // STRETCHES, (i + 1) * n // STRETCHES)
        finite = [j for j in stretch if math.isfinite(data.values[j])]
        kept |= {f(finite, key=data.values.__getitem__) for f in (min, max) if finite}
        kept |= set([j for j in stretch if not math.isfinite(data.values[j])][:1])
    return Series([data.steps[j] for j in sorted(kept)], [data.values[j] for j in sorted(kept)])


def _scale(axes: Axes, values: list[float], scale: str) -> None:
    low, high = min(values), max(values)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if not scale and low > 0 and high > FAR * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
        return
    if scale == "zero":
        low = min(low, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low if scale == "zero" and low == 0 else low - room, high + room)


def data_uri(content: bytes, kind: str) -> str:
    """A file as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _alone(values: list[float]) -> list[int]:
    """Values between two gaps, which a line does not show."""
    padded = [math.nan, *values, math.nan]
    return [i for i, v in enumerate(values) if v == v and padded[i] != padded[i] and padded[i + 2] != padded[i + 2]]


def _alt(title: str, lines: Sequence[Line]) -> str:
    parts = []
    for line in lines[:LEGEND]:
        (first, start), (last, end) = line.data.finite()[0], line.data.finite()[-1]
        change = f"{start:.4g} at step {first}" + (f", {end:.4g} at step {last}" if last != first else "")
        parts.append(f"{line.label} {change}")
    more = f"; and {len(lines) - LEGEND} more" if len(lines) > LEGEND else ""
    return f"{title}: {'; '.join(parts)}{more}."


def _notes(lines: Sequence[Line]) -> list[str]:
    notes = []
    if _on_a_scale([line for line in lines if line.data]):
        notes.append("Colours from dark to light in the order of the lines; the legend names some.")
    if longest := max((n for line in lines if (n := len(line.data.values)) > 3 * STRETCHES), default=0):
        notes.append(f"Drawn: the smallest and the largest of every {longest // STRETCHES} values.")
    for line in lines:
        if gaps := line.data.gaps():
            where = f"step {gaps[0]}" if len(gaps) == 1 else f"between steps {gaps[0]} and {gaps[-1]}"
            is_gap = "is not finite: a gap" if len(gaps) == 1 else "are not finite: gaps"
            notes.append(f"{line.label}: {len(gaps)} of {len(line.data.values)} values {is_gap} ({where}).")
    return notes
