"""The page of evidence, from records that never ran: what is computed is right, and nothing is left out silently."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks.quality import records as reading
from benchmarks.quality import tables
from benchmarks.quality.family import MEMBERS
from benchmarks.quality.report import FINDINGS, PUBLISHED, SECTIONS, by_heading, main
from benchmarks.quality.run import STUDIES, plan_of
from tests.quality.made_up import before, chosen, everything, forgetting, record

ABLATION = [({"lora": {"rank": rank, "target_modules": on}}, 0.7 + 0.01 * rank) for rank in (1, 8) for on in ("qv", "all")]


def write(folder: Path, records: list[dict]) -> Path:
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in records))
    return file


def test_the_page_has_every_study_with_its_pictures(tmp_path: Path) -> None:
    records = everything()
    said = tmp_path / "findings.md"
    said.write_text("A remark.\n\n## evidence\n\nAll of it.\n\n## family\n\nThey are alike.\n")
    page = main([str(write(tmp_path, records)), "--out", str(tmp_path), "--findings", str(said)]).read_text()
    assert "All of it." in page and "They are alike." in page and "A remark." not in page
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == [section.title for section in SECTIONS]
    assert page.count("Not run here.") == 1 and "**Not finished**" not in page  # compression is no study of `run`
    named = re.findall(r"!\[.+?\]\((images/evidence-\w+\.svg)\)", page)
    assert {tmp_path / name for name in named} == {*(tmp_path / "images").iterdir()} and len(named) >= 6
    for picture in named:
        assert ET.parse(tmp_path / picture).getroot().tag.endswith("svg")
    for study in {each["study"] for each in records} - {"alpha-fixed"}:
        assert f"{sum(each['study'].removesuffix('-fixed') == study for each in records)} trials; a device; torch 9; commit abc" in page
    assert all(f"| {member.name} | 1,234 |" in page for member in MEMBERS)
    assert "nan" not in page and "inf" not in page.replace("information", "")


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    """Rows whose trials only chose a rate are left out and named; if all are such, they are shown as what they are."""
    untested = chosen("retention", "full", {}, 0.8)[:3]
    page = main([str(write(tmp_path, untested + chosen("retention", "lora", {}, 0.8))), "--out", str(tmp_path)]).read_text()
    assert "left out, because they have a learning rate but no test results: full fine-tuning on questions (encoder)." in page
    assert "| questions | encoder | LoRA | 1,234 | 0.001 | 3 | 81.0 ± 1.0 % | – | 3 |" in page
    assert page.count("Not run here.") == len(SECTIONS) - 1
    page = main([str(write(tmp_path, chosen("dropout", "lora", {"lora": {"dropout": 0.1}}, 0.8)[:3])), "--out", str(tmp_path)]).read_text()
    assert "only the trials that choose learning rates were run" in page
    assert "| questions | encoder | LoRA | 0.001 | 3 | 1,234 | 80.0 % | 0.200 | 1 |" in page and "| validation |" in page


def test_forgetting_is_read_off_other_trials_until_its_own_are_run(tmp_path: Path) -> None:
    measured = [each | {"measures": {"perplexity": 30.0 + each["seed"]}} for each in chosen("retention", "full", {}, 0.8)]
    page = main([str(write(tmp_path, [before(), *measured])), "--out", str(tmp_path)]).read_text()
    assert "| – | before training | – | – | 20.0 |" in page
    assert "| questions | full fine-tuning | 0.001 | 81.0 ± 1.0 % | 30, 31, 32 |" in page
    with pytest.raises(ValueError, match="the model before training is in no record"):
        main([str(write(tmp_path, forgetting()[1:])), "--out", str(tmp_path)])


def test_full_fine_tuning_is_what_is_retained() -> None:
    rows = reading.rows_of(chosen("retention", "lora", {}, 0.8) + chosen("retention", "full", {}, 0.79), "retention")
    lora = tables.retention(rows).splitlines()[2]
    assert lora == "| questions | encoder | LoRA | 1,234 | 0.001 | 3 | 81.0 ± 1.0 % | 101.2% | 3 |"


def test_a_study_has_a_section_and_a_section_a_study() -> None:
    named = {trial.study for study in STUDIES for trial in plan_of([study])({})}
    assert {study for section in SECTIONS for study in (section.study, section.also) if study} == {*named, "compression"}
    assert {section.name or section.study for section in SECTIONS if not section.command} == STUDIES.keys()
    assert by_heading(PUBLISHED).keys() <= {section.study for section in SECTIONS}
    assert by_heading(FINDINGS).keys() <= {"evidence", *(section.study for section in SECTIONS)}


def test_the_rate_is_chosen_on_validation_rows() -> None:
    """The tested rate that is best on the validation rows counts, even if another is better on the test rows."""
    tried = chosen("retention", "lora", {}, 0.8)
    better = [{**each, "lr": 5e-3, "val": {"accuracy": 0.1, "loss": 0.9}, "test": {"accuracy": 1.0, "loss": 0.0}} for each in tried[3:]]
    (row,) = reading.rows_of(tried + better, "retention")
    assert row.lr == 1e-3 and row.values() == pytest.approx([0.80, 0.81, 0.82]) and len(row.rates) == 4
    assert tables.amount(row.values(), row.metric) == "81.0 ± 1.0 %"


def test_trials_that_failed_are_left_out_of_rows_and_counted(tmp_path: Path) -> None:
    tried = chosen("retention", "full", {}, 0.8)
    tried[0] |= {"val": None, "error": "ValueError: no"}
    (row,) = reading.rows_of(tried, "retention")
    assert len(row.records) == 5
    page = main([str(write(tmp_path, tried)), "--out", str(tmp_path)]).read_text()
    assert "6 trials; 1 failed" in page


def test_a_seed_that_diverged_is_not_left_out() -> None:
    assert reading.mean([0.5, None]) == reading.spread([0.5, None]) == float("inf")  # type: ignore[list-item]
    assert tables.amount([0.5, None], "loss") == "inf ± inf"  # type: ignore[list-item]


def test_forgetting_is_shown_at_every_rate_and_seed() -> None:
    (_, *rows) = reading.rows_of(forgetting(), "forgetting")
    lines = tables.forgetting(rows, 20.0).splitlines()[2:]
    assert lines[0] == "| before training | – | – | – | – | 20.0 |" and len(lines) == 1 + sum(len(row.rates) for row in rows)
    assert sum("**" in line for line in lines) == len(rows)  # the chosen ones
    assert lines[1] == "| LoRA, rank 8 | 1,234 | 0.0004 | 66.0 ± 1.0 % | 67.0 ± 1.0 % | 20, 21, 22 |"


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"study": "family"}\n{"stu')
    with pytest.raises(ValueError, match=r"a\.jsonl:2 is no JSON"):
        reading.read_records([file])
    file.write_text('["study"]')
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is no record"):
        reading.read_records([file])


def test_fields_that_vary_are_the_columns() -> None:
    rows = reading.rows_of([each for config, best in ABLATION for each in chosen("ablation", "lora", config, best)], "ablation")
    assert reading.varied(rows) == ["lora.rank", "lora.target_modules"]
    assert tables.grid(rows, "lora.rank", "lora.target_modules").splitlines()[2:] == [
        "| rank ↓, targets → | q, v | all linears |",
        "| --- | --- | --- |",
        "| 1 | 72.0 ± 1.0 % | 72.0 ± 1.0 % |",
        "| 8 | 79.0 ± 1.0 % | 79.0 ± 1.0 % |",
    ]


def test_the_same_records_make_the_same_bytes(tmp_path: Path) -> None:
    file = write(tmp_path, forgetting())
    pages = [main([str(file), "--out", str(tmp_path / name)]) for name in "ab"]
    assert len({page.read_bytes() for page in pages}) == 1
    assert len({(page.parent / "images" / "evidence-forgetting.svg").read_bytes() for page in pages}) == 1


def test_made_up_records_have_the_fields_of_real_ones() -> None:
    from benchmarks.quality.trial import surroundings

    assert surroundings().keys() <= record(MEMBERS[0].cell.trial(seed=0, lr=1.0), 0.5).keys()


def test_the_page_of_the_documentation_is_what_its_records_make(tmp_path: Path) -> None:
    """If not: ``python -m benchmarks.quality.report benchmarks/records/quality/*.jsonl --out docs``. Bytes of pictures are matplotlib's."""
    root = Path(__file__).parents[2]
    page = main([*map(str, sorted((root / "benchmarks" / "records" / "quality").glob("*.jsonl"))), "--out", str(tmp_path)])
    assert page.read_text() == (root / "docs" / "evidence.md").read_text()
    assert {file.name for file in (tmp_path / "images").iterdir()} == {
        file.name for file in (root / "docs" / "images").glob("evidence-*.svg")
    }
