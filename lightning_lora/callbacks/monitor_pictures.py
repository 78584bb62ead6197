"""Pictures as inline SVG, drawn by hand: a heat map and a line chart. No script, no network, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

# Sequential, from pale to dark, readable by colour-blind people.
_STOPS = ((247, 251, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))
_GAP = "#e4ddd0"  # no value
_COLUMNS = 60  # at most; evenly chosen
_WIDE, _LEFT, _RIGHT, _TOP, _FOOT = 900, 250, 90, 8, 34


def colour(share: float) -> str:
    """Return the colour of a number in [0, 1]."""
    place = min(max(share, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def heat_map(names: Sequence[str], steps: Sequence[int], values: Sequence[Sequence[float]], *, log: bool, unit: str) -> str:
    """Return an SVG of layers × time.

    Args:
        names: of the rows.
        steps: of the columns.
        values: ``values[column][row]``; NaN for none.
        log: shade by the logarithm; zeros count as none.
        unit: what is shown, for tooltips and the legend.
    """
    if len(steps) > _COLUMNS:
        kept = sorted({round(k * (len(steps) - 1) / (_COLUMNS - 1)) for k in range(_COLUMNS)})
        steps, values = [steps[j] for j in kept], [values[j] for j in kept]
    known = [v for column in values for v in column if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    tall = max(3.0, min(16.0, 900 / max(len(names), 1)))
    wide, height = (_WIDE - _LEFT - _RIGHT) / max(len(steps), 1), tall * len(names)

    def share(v: float) -> float:
        if low == high:
            return 1.0
        return math.log(v / low) / math.log(high / low) if log else (v - low) / (high - low)

    parts = []
    for j, column in enumerate(values):
        for i, v in enumerate(column):
            shown = math.isfinite(v) and (v > 0 or not log)
            tip = html.escape(f"{names[i]}, step {steps[j]}: {v:.3g}")
            box = f'x="{_LEFT + j * wide:.1f}" y="{_TOP + i * tall:.1f}" width="{wide + 0.3:.1f}" height="{tall + 0.3:.1f}"'
            parts.append(f'<rect {box} fill="{colour(share(v)) if shown else _GAP}"><title>{tip}</title></rect>')
    every = max(1, math.ceil(11 / tall))
    for i in range(0, len(names), every):
        parts.append(_text(_LEFT - 6, _TOP + i * tall + tall / 2 + 3, _short(names[i]), "end"))
    for j in sorted({0, len(steps) // 2, len(steps) - 1} if steps else ()):
        parts.append(_text(_LEFT + (j + 0.5) * wide, _TOP + height + 14, f"step {steps[j]}", "middle"))
    for k in range(11):
        at = _TOP + 10 * (10 - k)
        parts.append(f'<rect x="{_WIDE - _RIGHT + 12}" y="{at}" width="12" height="10" fill="{colour(k / 10)}"/>')
    parts += [_text(_WIDE - _RIGHT + 28, _TOP + 9, f"{high:.2g}"), _text(_WIDE - _RIGHT + 28, _TOP + 109, f"{low:.2g}")]
    return _svg(parts, max(height, 110) + _TOP + _FOOT, unit)


def line_chart(lines: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], *, across: str, up: str) -> str:
    """Return an SVG of lines with a logarithmic ordinate; points that are not positive are left out.

    Args:
        lines: label, colour and points of each.
        across, up: what the axes show.
    """
    points = [p for *_, line in lines for p in line if math.isfinite(p[1]) and p[1] > 0]
    left, right = (min(p[0] for p in points), max(p[0] for p in points)) if points else (0.0, 1.0)
    low, high = (max(min(p[1] for p in points), 1e-9 * max(p[1] for p in points)), max(p[1] for p in points)) if points else (0.1, 1.0)
    first, last = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
    height, start, width = 260, 60, _WIDE - 60 - _RIGHT

    def place(p: tuple[float, float]) -> tuple[float, float]:
        x = start + width * ((p[0] - left) / (right - left) if right > left else 0.5)
        return x, _TOP + height * (1 - (math.log10(p[1]) - first) / (last - first))

    parts = []
    for power in range(first, last + 1, max(1, (last - first) // 6)):
        _, y = place((left, 10.0**power))
        parts.append(f'<line x1="{start}" x2="{start + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(start - 6, y + 3, f"1e{power}", "end"))
    for label, stroke, line in lines:
        drawn = [place(p) for p in line if math.isfinite(p[1]) and p[1] >= low]
        tip = f"<title>{html.escape(label)}</title>"
        if len(drawn) == 1:
            parts.append(f'<circle cx="{drawn[0][0]:.1f}" cy="{drawn[0][1]:.1f}" r="3" fill="{stroke}">{tip}</circle>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="1.5">{tip}</polyline>')
    parts += [_text(start, _TOP + height + 16, f"{left:g}"), _text(start + width, _TOP + height + 16, f"{right:g}", "end")]
    parts.append(_text(start + width / 2, _TOP + height + 28, across, "middle"))
    return _svg(parts, height + _TOP + _FOOT, up)


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    head = f'<svg viewBox="0 0 {_WIDE} {height:.0f}" width="{_WIDE}" role="img" aria-label="{html.escape(label, quote=True)}"'
    return f'{head} xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(parts) + "\n</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="#333">{html.escape(text)}</text>'


def _short(name: str) -> str:
    return name if len(name) <= 38 else "…" + name[-37:]
