"""Write the report of a run: ``report.html`` with pictures, ``layers.csv`` and ``ranks.yaml``."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path

from lightning_lora.callbacks.monitor_hints import Findings, LayerRow, hints
from lightning_lora.callbacks.monitor_pictures import colour, heat_map, line_chart
from lightning_lora.storage.atomic_files import write_atomic
from lightning_lora.utils.messages import counted

RANKS = "ranks.yaml"  # its name in the folder
_COLUMNS = (
    "layer",
    "rank_before",
    "rank",
    "update_norm",
    "weight_norm",
    "update_ratio",
    "stable_rank",
    "effective_rank",
    "suggested_rank",
    "changed",
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}td:last-child{white-space:nowrap}"
    ".look{border-left:4px solid #b5530a}.fine{border-left:4px solid #888}"
    ".hint{padding:2px 12px;margin:8px 0}pre{background:#f4f4f4;padding:1em;overflow:auto}"
    "svg{max-width:100%;height:auto}.wide{overflow:auto}"
)


def write_report(folder: Path, found: Findings, energy: float) -> Path:
    """Write the three files. Return the path of the HTML file.

    Args:
        folder: created if it is not there; files of an earlier report are replaced.
        found: what the run showed.
        energy: share of ``‖ΔW‖²`` that the suggested ranks keep.

    Raises:
        OSError: a file cannot be written; the others stay whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "layers.csv", _table(found).encode())
    write_atomic(folder / RANKS, yaml_of(found.patterns).encode())
    write_atomic(folder / "report.html", _page(found, energy).encode())
    return folder / "report.html"


def yaml_of(patterns: Mapping[str, Mapping[str, float]]) -> str:
    """Return the patterns as YAML, as ``--lora.config`` and run files take them. Names are quoted, because some are regexes."""
    lines = []
    for field, entries in patterns.items():
        lines.append(f"{field}:" if entries else f"{field}: {{}}")
        lines += [f"  '{name}': {value:.9g}" for name, value in entries.items()]
    return "\n".join(lines) + "\n"


def _cells(row: LayerRow) -> list[str]:
    numbers = (row.update_norm, row.weight_norm, row.ratio, row.stable_rank, row.effective_rank)
    shown = ["" if math.isnan(value) else f"{value:.4g}" for value in numbers]
    before = "" if row.rank_before is None else str(row.rank_before)
    return [row.name, before, str(row.rank), *shown, "" if row.suggested is None else str(row.suggested), " ".join(row.moved)]


def _table(found: Findings) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_cells(row) for row in found.rows)
    return text.getvalue()


def _applied(found: Findings) -> list[str]:
    if found.applied_at is None:
        return []
    rows = [(row.name, str(row.rank_before), str(row.rank)) for row in found.rows if row.rank_before is not None]
    text = "<tr><th>layer</th><th>before</th><th>now</th></tr>" + "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows
    )
    others = len(found.rows) - len(rows)
    return [
        "<h2>Ranks that were applied</h2>",
        f"<p>The ranks suggested then were applied after step {found.applied_at}; {counted(others, 'layer')} kept theirs.</p>",
        f'<div class="wide"><table>{text}</table></div>' if rows else "",
    ]


def _page(found: Findings, energy: float) -> str:
    history, names = found.history, [row.name for row in found.rows]
    ratios, ranks = history.of("update_ratio"), history.of("effective_rank")
    notes = [
        f'<div class="hint {"look" if hint.look else "fine"}"><b>{html.escape(hint.title)}{": look here" if hint.look else ""}.</b>'
        f" {html.escape(hint.text)}</div>"
        for hint in hints(found)
    ]
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in found.rows]
    head = "<tr>" + "".join(f"<th>{name.replace('_', ' ')}</th>" for name in _COLUMNS) + "</tr>"
    left = f"<p>Not measured, because they have no factors: {html.escape(', '.join(found.unmeasured))}.</p>" if found.unmeasured else ""
    depth = max(len(names) - 1, 1)
    spectra = [
        (row.name, colour(0.25 + 0.75 * i / depth), [(k + 1, value) for k, value in enumerate(row.spectrum)])
        for i, row in enumerate(found.rows)
    ]
    gradients = [
        (label, stroke, list(zip(map(float, history.steps), history.of(part).nanmedian(1).values.tolist(), strict=True)))
        for label, part, stroke in (("A", "grad_A", "#2171b5"), ("B", "grad_B", "#b5530a"))
    ]
    parts = [
        "<h1>What the adapters did</h1>",
        f"<p>Optimizer steps: {found.steps}. Layers: {len(names)}. Measurements: {len(history.steps)}. Processes: {found.processes},"
        f" under {html.escape(found.strategy)}.</p>",
        "<h2>Seven common mistakes</h2>",
        *notes,
        "<h2>Size of the update, ‖ΔW‖/‖W‖</h2>",
        "<p>Layers × time, shaded by the logarithm; beige: no update yet, or not measured.</p>",
        heat_map(names, history.steps, ratios.tolist(), log=True, unit="‖ΔW‖/‖W‖"),
        "<h2>Effective rank</h2>",
        heat_map(names, history.steps, ranks.tolist(), log=False, unit="effective rank"),
        "<h2>Singular values at the end</h2>",
        "<p>One line a layer; later layers are darker.</p>",
        line_chart(spectra, across="number of the singular value", up="singular value of ΔW"),
        "<h2>Gradients</h2>",
        '<p>The middle layer\'s norm: <span style="color:#2171b5">A</span>, <span style="color:#b5530a">B</span>.</p>',
        line_chart(gradients, across="step", up="norm of the gradient"),
        *_applied(found),
        "<h2>Suggested ranks</h2>",
        f"<p>Enough for {energy:.0%} of ‖ΔW‖², and twice the rank where all of it is used. A rule of thumb from this run;"
        " alphas keep each layer's scaling.</p>",
        f"<pre>{html.escape(yaml_of(found.patterns))}</pre>",
        "<h2>Layers</h2>",
        left,
        f'<div class="wide"><table>{head}{"".join(rows)}</table></div>',
    ]
    title = "<title>LoRA report</title>"
    return f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{title}<style>{_STYLE}</style></head><body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )
