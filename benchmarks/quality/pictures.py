"""The pictures of the report: points are means over seeds, bars one standard deviation, every seed a small dot where there is room.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; shapes differ too. Text in the SVG files is text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, cycle
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.quality.records import Row, mean, spread, tested, varied
from benchmarks.quality.tables import better_last, label, named

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "evidence",  # the same records make the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.constrained_layout.use": True,
}


def save(figure: Any, file: Path) -> str:
    """Write a figure, and return its name relative to the report."""
    import matplotlib.pyplot as plt

    file.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return f"images/{file.name}"


def panels(count: int, width: float = 3.6, height: float = 3.0, most: int = 3) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, in rows of at most `most`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(count, most)
    lines = -(-count // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    return figure, flat[:count]


def scaled(values: Sequence[float], metric: str) -> list[float]:
    """Return accuracies in percent, others as they are."""
    return [100 * value for value in values] if metric == "accuracy" else list(values)


def unit(metric: str, split: str = "test") -> str:
    """Return the label of an axis."""
    rows = {"val": "validation"}.get(split, split)
    return f"{rows} " + {"accuracy": "accuracy, %", "bleu": "BLEU"}.get(metric, metric)


def places(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the pairs of task and base, in order."""
    return list(dict.fromkeys((row.task, row.base) for row in rows))


def dots(rows: Sequence[Row], name: Callable[[Row], str], file: Path, *, groups: Callable[[Row], str] | None = None) -> str:
    """Draw one line a row: its seeds, mean and spread. Panels are tasks and bases. With groups, the best row is at the top."""
    rows = [row for row in rows if tested(row.records)]
    where = places(rows)
    height = 0.24 * max(sum((row.task, row.base) == place for row in rows) for place in where) + 0.9
    figure, axes = panels(len(where), 7.2 if len(where) == 1 else 3.9, height)
    kinds = list(dict.fromkeys(map(groups, rows))) if groups else []
    for axis, place in zip(axes, where, strict=True):
        here = [row for row in rows if (row.task, row.base) == place]
        here = sorted(here, key=lambda row: better_last(mean(row.values()), row.metric)) if groups else here[::-1]
        for height_at, row in enumerate(here):
            index = kinds.index(groups(row)) if groups else 0
            values, colour = scaled(row.values(), row.metric), COLOURS[index % len(COLOURS)]
            axis.plot(values, [height_at] * len(values), ".", color=colour, alpha=0.4, markersize=4)
            axis.errorbar(
                mean(values), height_at, xerr=spread(values), fmt=SHAPES[index % len(SHAPES)], color=colour, capsize=2, markersize=4.5
            )
        axis.set_yticks(range(len(here)), [name(row) for row in here])
        axis.set_xlabel(unit(here[0].metric))
        axis.set_title(", ".join(place), fontsize=9)
    if groups:
        marks = [axes[0].plot([], [], SHAPES[i % 7], color=COLOURS[i % 7], markersize=4.5, label=kind)[0] for i, kind in enumerate(kinds)]
        axes[0].legend(handles=marks, fontsize=8, loc="lower right")
    return save(figure, file)


def lines(rows: Sequence[Row], x: str, series: str, file: Path, *, metric: str | None = None, split: str | None = None) -> str:
    """Draw a metric over a field of the config, one line for each value of another field, a panel for each task and base.

    Args:
        rows: of one study.
        x: field of the config, of numbers.
        series: field of the config, or "method".
        file: the picture.
        metric, split: other than those that the rows are judged by.
    """
    figure, axes = panels(len(places(rows)), 4.4, 3.2)
    for axis, place in zip(axes, places(rows), strict=True):
        here = [row for row in rows if (row.task, row.base) == place]
        name, on, ticks = metric or here[0].metric, split or here[0].split, sorted({row.config[x] for row in here})
        for value, style in zip(dict.fromkeys(str(row.get(series)) for row in here), styles(), strict=False):
            line = sorted((row for row in here if str(row.get(series)) == value), key=lambda row: row.config[x])
            found = [scaled(row.values(name, on), name) for row in line]
            curve(axis, [row.config[x] for row in line], found, style, named(series, line[0].get(series)))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        finish(axis, x.rpartition(".")[2].replace("_", " "), unit(name, on), ", ".join(place), log=name == "loss")
    return save(figure, file)


def rates(rows: Sequence[Row], file: Path) -> str:
    """Draw the loss on the validation rows over the learning rate, one line a way to train, a panel for each task and base."""
    fields, (figure, axes) = varied(rows), panels(len(places(rows)), 6, 3.4, 2)
    for axis, place in zip(axes, places(rows), strict=True):
        for row, style in zip([row for row in rows if (row.task, row.base) == place], styles(), strict=False):
            losses = {rate: [r["val"]["loss"] for r in records if r["val"]["loss"] is not None] for rate, records in row.rates.items()}
            losses = {rate: found for rate, found in losses.items() if found}
            curve(axis, list(losses), list(losses.values()), style, label(row, fields))
        axis.set_xscale("log")
        finish(axis, "learning rate", "validation loss", ", ".join(place), log=True, outside=True)
    return save(figure, file)


TICKS = (1, 1.5, 2, 3, 5, 7)  # of a decade


def finish(axis: Any, x: str, y: str, title: str, *, log: bool, outside: bool = False, ticks: Sequence[float] = TICKS) -> None:
    """Label an axis; a logarithmic one has plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=ticks))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=8, **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if outside else {}))


def styles() -> Any:
    """Return pairs of colour and shape, again and again."""
    return zip(cycle(COLOURS), cycle(SHAPES), strict=False)


def curve(axis: Any, x: Sequence[Any], found: Sequence[Sequence[float]], style: tuple[str, str], name: str) -> None:
    """Draw means over seeds with their spread, joined by a line."""
    colour, shape = style
    y, deviations = [mean(each) for each in found], [spread(each) for each in found]
    axis.errorbar(x, y, yerr=deviations, fmt=f"{shape}-", color=colour, capsize=2, markersize=4.5, linewidth=1.1, label=name)


def trade(rows: Sequence[Row], before: float, file: Path, most: float = 10_000) -> str:
    """Draw what is forgotten over what is learned: perplexity over validation accuracy, a point a seed, a line through the rates' medians.

    What lies above `most` is drawn there.
    """
    figure, (axis,) = panels(1, 6.4, 4.0)
    fields = varied(rows)
    for row, (colour, shape) in zip(rows, styles(), strict=False):
        x = [[100 * record["val"]["accuracy"] for record in records] for records in row.rates.values()]
        y = [[min(record["measures"]["perplexity"], most) for record in records] for records in row.rates.values()]
        axis.plot([*chain(*x)], [*chain(*y)], shape, color=colour, alpha=0.4, markersize=4)
        middle = [[median(each) for each in values] for values in (x, y)]
        axis.plot(*middle, f"{shape}-", color=colour, linewidth=1.1, label=label(row, fields))
    axis.axhline(before, color="#777777", linewidth=1, linestyle="--", label="before training")
    finish(axis, "validation accuracy, %", "perplexity on other text", ", ".join(places(rows)[0]), log=True, ticks=(1, 2, 5))
    return save(figure, file)
