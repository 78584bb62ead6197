"""Draw the loss curve of a run, with matplotlib (the extra ``plot``)."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

LOSSES = (("train_loss", "-"), ("val_loss", "o-"))


def can_draw() -> bool:
    """True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_loss(metrics: Path, picture: Path) -> str | None:
    """Draw the losses in a ``metrics.csv`` over the step.

    Args:
        metrics: The file that ``CSVLogger`` writes.
        picture: The image file to write.

    Returns:
        The image's path; None if no loss was logged, or if matplotlib is not installed.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = [(name, style, [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]) for name, style in LOSSES]
    if not any(points for *_, points in curves) or not can_draw():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, style, points in curves:
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name)
    positive = all(value > 0 for *_, points in curves for _, value in points)
    axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
    axes.legend()
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    return str(picture)
