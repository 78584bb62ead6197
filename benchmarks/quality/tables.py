"""The tables of the report, in Markdown, from rows of records: every number with its spread, its learning rate and its number of seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.quality.family import MEMBERS
from benchmarks.quality.records import LESS_IS_BETTER, Record, Row, mean, spread, tested, varied

WORDS = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "galore": "GaLore",
    "adalora": "AdaLoRA",
    "probe": "linear probe",
    "prefix": "prefix tuning",
    "prompt": "prompt tuning",
}
TARGETS = {"qv": "q, v", "attention": "q, k, v, o", "mlp": "MLP", "all": "all linears", "all-linear": "all linears"}
Cells = Sequence[Any]


def table(header: Cells, rows: Iterable[Cells]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def amount(values: Sequence[float], metric: str) -> str:
    """Return mean ± standard deviation in the metric's usual form: percent for accuracies, the number for others."""
    if not values:
        return "–"
    scale, digits = (100, 1) if metric == "accuracy" else (1, 1) if metric in ("bleu", "chrf") else (1, 3)
    text = f"{scale * mean(values):.{digits}f}"
    return text + (f" ± {scale * spread(values):.{digits}f}" if len(values) > 1 else "") + (" %" if metric == "accuracy" else "")


def order(value: Any) -> tuple[int, float, str]:
    """Return a key that sorts what a field of a config may be: nothing, numbers, then texts."""
    if isinstance(value, (int, float)):
        return 1, value, ""
    return (0, 0.0, "") if value is None else (2, 0.0, str(value))


def named(field: str, value: Any) -> str:
    """Return a value of a config, or of "method", in words."""
    if field == "method":
        return WORDS.get(value, value)
    if value is not None and field.endswith("target_modules"):
        return TARGETS.get(value, str(value)) if isinstance(value, str) else ", ".join(value)
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def label(row: Row, fields: Sequence[str]) -> str:
    """Return a row's method with the fields that tell it from others."""
    parts = [
        f"{field.rpartition('.')[2].replace('target_modules', 'on')} {named(field, row.config[field])}"
        for field in fields
        if row.config.get(field) is not None
    ]
    return ", ".join([WORDS.get(row.method, row.method), *parts])


def of_study(rows: Sequence[Row]) -> str:
    """Return the table of any study: task, base, method, the fields that vary, then rate, size and results."""
    fields, on = varied(rows), {"val": "validation"}.get(rows[0].split, rows[0].split)
    names = [field.rpartition(".")[2].replace("target_modules", "targets").replace("_", " ") for field in fields]
    header = ["task", "base", "method", *names, "learning rate", "rates tried", "trained", on, f"{on} loss", "seeds"]
    lines = [
        [
            row.task,
            row.base,
            WORDS.get(row.method, row.method),
            *(named(field, row.get(field)) for field in fields),
            rate_of(row),
            len(row.rates),
            f"{row.records[0]['trainable']:,}",
            amount(row.values(), row.metric),
            amount(row.values("loss"), "loss"),
            len(row.chosen),
        ]
        for row in sorted(rows, key=lambda row: [order(row.get(field)) for field in ("method", *fields)])
    ]
    return table(header, lines)


def rate_of(row: Row) -> str:
    """Return the chosen rate; for the package's own advice also the number that it came to."""
    rate = row.chosen[0].get("rate") if row.chosen else None
    return f"auto: {rate:.2g}" if row.lr == "auto" and rate else f"{row.lr:g}" if not isinstance(row.lr, str) else row.lr


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Return rows by task and base, in the order of their records, and in them by method, in the order of `WORDS`."""
    places, methods = list(dict.fromkeys((row.task, row.base) for row in rows)), [*WORDS]
    return sorted(rows, key=lambda row: (places.index((row.task, row.base)), methods.index(row.method)))


def retention(rows: Sequence[Row]) -> str:
    """Return how much of full fine-tuning's result each way keeps, a task and base at a time."""
    fields, lines = varied(rows), []
    for row in in_order(rows):
        full = [other for other in rows if (other.task, other.base, other.method) == (row.task, row.base, "full")]
        if row.split == "test":
            kept = f"{mean(row.values()) / mean(full[0].values()):.1%}" if full and full[0].chosen else "–"
            way = label(row, fields)
            size = f"{row.records[0]['trainable']:,}"
            result = amount(row.values(), row.metric)
            lines.append([row.task, row.base, way, size, rate_of(row), len(row.rates), result, kept, len(row.chosen)])
    header = ["task", "base", "method", "trained", "learning rate", "rates tried", "test", "of full fine-tuning", "seeds"]
    return table(header, lines)


def grid(rows: Sequence[Row], down: str, across: str) -> str:
    """Return one table a task and base: one field down, another across, test results in the cells."""
    parts = []
    for task, base in dict.fromkeys((row.task, row.base) for row in rows):
        here = {(row.get(down), str(row.get(across))): row for row in rows if (row.task, row.base) == (task, base)}
        columns = list(dict.fromkeys(key[1] for key in here))
        lines = [
            [named(down, value)] + [amount(here[value, c].values(), here[value, c].metric) if (value, c) in here else "–" for c in columns]
            for value in sorted({key[0] for key in here})
        ]
        title = f"{down.rpartition('.')[2]} ↓, {across.rpartition('.')[2].replace('target_modules', 'targets')} →"
        parts.append(f"*{task}, {base}*\n\n{table([title, *(named(across, column) for column in columns)], lines)}")
    return "\n\n".join(parts)


def rates(rows: Sequence[Row]) -> str:
    """Return the best rate of each way on the validation rows, beside full fine-tuning's."""
    fields, lines = varied(rows), []
    for row in rows:
        full = next((other.lr for other in rows if (other.task, other.base, other.method) == (row.task, row.base, "full")), None)
        way, losses = label(row, fields), row.values("loss", "val")
        times = f"{row.lr / full:.2g}×" if full else "–"
        results = [amount(losses, "loss"), amount(row.values(split="val"), row.metric), len(row.chosen)]
        lines.append([row.task, row.base, way, f"{row.lr:g}", times, *results])
    return table(["task", "base", "method", "best rate", "of full fine-tuning's", "validation loss", "validation", "seeds"], lines)


def advised(rows: Sequence[Row]) -> str:
    """Return each way at the best rate of its sweep, and at the rate that the package advises."""
    fields, lines = varied(rows), []
    for row in rows:
        if not (advice := tested(row.rates.get("auto", []))):
            continue
        swept = Row(row.task, row.base, row.method, row.config, [record for record in row.records if record["lr"] != "auto"])
        losses, results = ([record[split][name] for record in advice] for split, name in (("val", "loss"), ("test", row.metric)))
        cells = [label(row, fields), f"{swept.lr:g}", f"{advice[0]['rate']:.2g}", amount(swept.values("loss", "val"), "loss")]
        lines.append([*cells, amount(losses, "loss"), amount(results, row.metric), f"{len(swept.chosen)}, {len(advice)}"])
    header = ["way", "swept rate", "advised rate", "validation loss, swept", "validation loss, advised", "test, advised", "seeds of both"]
    return table(header, lines)


def family(rows: Sequence[Row]) -> str:
    """Return the family in the order of its test results, beside PEFT's public comparison."""
    peft = {member.name: member.peft for member in MEMBERS}
    ranked = sorted((row for row in rows if tested(row.records)), key=lambda row: better_last(mean(row.values()), row.metric), reverse=True)
    lines = []
    for row in ranked:
        theirs = peft.get(row.config["member"])
        cells = [row.config["member"], f"{row.records[0]['trainable']:,}", rate_of(row)]
        cells += [amount(row.values(), row.metric), amount(row.values("loss"), "loss"), str(len(row.chosen))]
        lines.append([*cells, f"{theirs:.1f} %" if theirs else "–"])
    return table(["member", "trained", "learning rate", "test", "test loss", "seeds", "PEFT"], lines)


def better_last(value: float, metric: str) -> float:
    """Return a number that grows with quality."""
    return -value if metric in LESS_IS_BETTER else value


def after_training(rows: Sequence[Row], before: float) -> str:
    """Return the perplexity on the prose after each seed's training, at the chosen rate."""
    lines = [["–", "before training", "–", "–", f"{before:.1f}"]]
    for row in rows:
        after = [f"{record['measures']['perplexity']:,.0f}" for record in row.chosen]
        lines.append([row.task, WORDS[row.method], rate_of(row), amount(row.values(), row.metric), ", ".join(after)])
    return table(["task", "method", "learning rate", "test", "perplexity on other text, each seed"], lines)


def forgetting(rows: Sequence[Row], before: float) -> str:
    """Return what each way learned and forgot at every rate; the one with the least validation loss is bold.

    The perplexity on the prose is each seed's: one that ends far from the others would be the mean.
    """
    fields, lines = varied(rows), [["before training", "–", "–", "–", "–", f"{before:.1f}"]]
    for row in rows:
        for rate, records in row.rates.items():
            records = sorted(records, key=lambda record: record["seed"])
            results = [amount([record[split][row.metric] for record in records], row.metric) for split in ("val", "test")]
            after = ", ".join(f"{record['measures']['perplexity']:,.0f}" for record in records)
            shown = f"**{rate:g}**" if rate == row.lr else f"{rate:g}"
            lines.append([label(row, fields), f"{records[0]['trainable']:,}", shown, *results, after])
    return table(["method", "trained", "learning rate", "validation", "test", "perplexity on other text, each seed"], lines)


def compression(records: Sequence[Record]) -> str:
    """Return sizes of adapters and checkpoints beside the model's: counted, and measured on files."""
    lines = []
    for record in records:
        sizes, config = record["bytes"], record["config"]
        what = f"r={config['rank']} on {named('target_modules', config['target_modules']).replace('_proj', '')}"
        checkpoint = f"{sizes['checkpoint'] / 1e6:,.1f} MB" if "checkpoint" in sizes else "–"
        fewer, adapter = record["total"] / record["trainable"], (sizes["adapter_computed"] / 1e6, sizes["adapter"] / 1e6)
        cells = [record["base"], what, f"{record['trainable']:,}", f"{fewer:,.0f}×", *(f"{size:,.1f} MB" for size in adapter), checkpoint]
        lines.append([*cells, f"{sizes['full_bf16'] / 1e9:.1f} GB", f"{sizes['full_checkpoint'] / 1e9:.1f} GB"])
    head = ["model", "LoRA", "trained", "fewer than the model", "adapter, computed (fp32)", "adapter folder, on disk"]
    return table([*head, "training checkpoint, on disk", "model in bf16", "full checkpoint, computed"], lines)
