"""The picture in README: time and memory of a training step, ours and PEFT's, from the tables of measured steps.

python benchmarks/picture.py   # reads benchmarks/README.md and benchmarks/records, writes docs/_static/step.svg
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "_static" / "step.svg"
OURS, PEFT, INK = "#0f6f7f", "#c4c9cf", "#30343a"


class Setting(NamedTuple):
    """Rows of one table.

    Attributes:
        label: what was trained, and how.
        file: the file that has the table.
        head: how the table's first line begins.
        rows: the first cells of the frozen model's row, ours and PEFT's; None: it was not run.
    """

    label: str
    file: str
    head: str
    rows: tuple[str, str, str | None]


SETTINGS = [
    Setting(
        "1B, nothing set: eager, autocast",
        "README.md",
        "| mode | ms | x floor | x alike | GiB | x floor |",
        ("frozen, eager", "ours, nothing set", "PEFT, eager; with dropout 0.1"),
    ),
    Setting(
        "30B-A3B in 16 layers, all experts",
        "records/2026-11-moe-unsloth.log",
        "| 30b-a3b, 16 layers, 4 x 2048, r=16 |",
        ("frozen", "ours", "peft"),
    ),
    Setting(
        "8B, r=64, blocks compiled",
        "records/2026-11-ranks.log",
        "| 8b, 4 x 2048, r=16 |",
        ("floor", "ours-layer-chunk-r64", "peft-layer-chunk-r64"),
    ),
    Setting(
        "8B, r=64, FP8 base",
        "records/2026-11-ranks.log",
        "| 8b, 4 x 2048, r=16 |",
        ("floor", "ours-fp8-layer-chunk-r64", None),
    ),
]


def measured(setting: Setting, row: str) -> tuple[float, float]:
    """Return milliseconds and GiB of a row. Where a cell has several modes, they are the first's."""
    lines = (HERE / setting.file).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(setting.head))
    table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[first:]]
    cells = next(cells for cells in table if cells[0] == row)
    return tuple(float(cells[table[0].index(column)].partition(";")[0]) for column in ("ms", "GiB"))  # type: ignore[return-value]


def bars() -> list[tuple[str, list[float | None], list[float | None]]]:
    """Return for each setting its label, the steps' times divided by the frozen model's, and GiB: ours, then PEFT's."""
    found = []
    for setting in SETTINGS:
        frozen = measured(setting, setting.rows[0])[0]
        pairs = [measured(setting, row) if row else (None, None) for row in setting.rows[1:]]
        found.append((setting.label, [ms and round(ms / frozen, 2) for ms, _ in pairs], [gib for _, gib in pairs]))
    return found


def main() -> None:
    """Draw the picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "lightning-lora", "svg.fonttype": "none", "font.size": 10, "text.color": INK}
    from matplotlib import pyplot

    rows = bars()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, column, title in zip(axes, (1, 2), ("time of a step ÷ the frozen bf16 model's", "memory, GiB"), strict=True):
        for number, row in enumerate(rows):
            for shift, value, colour in zip((-0.19, 0.19), row[column], (OURS, PEFT), strict=True):
                if value is not None:
                    axis.barh(number + shift, value, 0.36, color=colour)
                text = "not run" if value is None else f"{value:.2f}" if column == 1 else f"{value:.1f}"
                axis.annotate(text, (value or 0, number + shift), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="x", bottom=False, labelbottom=False)
        axis.set_xlim(0, 1.15 * max(value for row in rows for value in row[column] if value is not None))
    axes[0].axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes[0].set_yticks(range(len(rows)), [row[0] for row in rows])
    axes[0].tick_params(axis="y", length=0)
    axes[1].tick_params(axis="y", length=0)
    axes[0].set_ylim(len(rows) - 0.45, -0.55)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in (OURS, PEFT)]
    figure.legend(handles, ["lightning-lora", "PEFT"], loc="lower right", ncols=2, frameon=False)
    figure.text(0.01, 0.03, "one H200, bf16, adapters on all linears and experts, 4 × 2048 tokens; less is better", fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(PICTURE, metadata={"Date": None})
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
