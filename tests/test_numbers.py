"""Tables and quoted numbers are those of the CSV files in experiments/."""
import re
from importlib import import_module

import numpy as np
import pytest
from scipy import stats

from tests.test_house import FILES, ROOT

README = ROOT / "experiments" / "README.md"
TABLES = [file for file in FILES if file.suffix == ".csv" and file.parent in
          (README.parent, README.parent / "before")]


def test_the_page_shows_the_tables_of_the_csv_files_as_they_are(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    import_module("experiments.results").render(copy, tables_in=README.parent)
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


@pytest.mark.parametrize("file", TABLES, ids=lambda file: file.name)
def test_a_table_says_what_made_it_and_is_on_the_page(file):
    head, rows = import_module("experiments.results").read(file)
    assert {"title", "command", "seeds", "device", "date"} <= set(head)
    assert rows and not any(None in row or None in row.values() for row in rows)
    mark = f"<!-- {file.relative_to(README.parent).as_posix()} -->"
    assert mark in README.read_text(encoding="utf-8")


def test_the_settings_are_those_that_tuning_has_chosen():
    def chosen(name):
        _, rows = import_module("experiments.results").read(README.parent / name)
        return {row["method"]: row["setting"] for row in rows if row["chosen"]}

    methods = import_module("05_eval").METHODS
    assert chosen("tuning.csv") == {method: tuned for method, (_, tuned) in methods.items()}
    ddpo = import_module("experiments.ddpo_rewards")
    places = ddpo.CHOSEN.items()
    assert chosen("ddpo_rewards_tuning.csv") == {m: ddpo.SETTINGS[m][k] for m, k in places}


@pytest.mark.parametrize("raw, claims", [
    ("eval_seeds_readings", "eval_claims"), ("ddpo_rewards_queries", "ddpo_rewards_claims")])
def test_verdicts_follow_from_the_raw_readings(raw, claims):
    """The last readings' paired t over seeds, by scipy; Holm's correction by its definition."""
    read = import_module("experiments.results").read
    _, lines = read(README.parent / "raw" / f"{raw}.csv")
    _, rows = read(README.parent / f"{claims}.csv")
    known, p = {line["prompt"] for line in lines}, []
    for row in rows:
        asked = known & {row["claim"].split()[-1]} or known  # a claim on one reward, or on all
        ends = {}  # the last reading is what stays
        for line in lines:
            if line["prompt"] in asked:
                ends[line["model"], line["prompt"], line["seed"]] = float(line[row["column"]])
        of_seed = {model: {} for model in (row["a"], row["b"])}
        for (model, _, seed), value in ends.items():
            if model in of_seed:
                of_seed[model].setdefault(seed, []).append(value)
        a, b = ([np.mean(values) for values in of_seed[model].values()] for model in of_seed)
        test = stats.ttest_rel(a, b)
        p.append(float(row["p"]))
        if row["at"] == "the end":
            low, high = test.confidence_interval()
            want = [np.mean(a) - np.mean(b), low, high, test.pvalue]
            assert [float(row[name]) for name in ("mean", "low", "high", "p")] == pytest.approx(
                want, rel=2e-3)
    for row, own in zip(rows, p):
        steps = [(sum(other >= q for other in p)) * q for q in p if q <= own]
        holm = min(1, max(steps))
        told = "holds" if float(row["mean"]) > 0 else "fails"
        assert float(row["holm"]) == pytest.approx(holm, rel=2e-3)
        assert row["verdict"] == (told if holm <= 0.05 else "cannot be told")


@pytest.mark.parametrize("chapter", sorted(ROOT.glob("0*.py")), ids=lambda file: file.name)
def test_a_number_that_a_chapter_expects_was_measured(chapter):
    """A decimal behind EXPECT, rounded as it is there, stands in some CSV file."""
    found = re.search(r"EXPECT\b(.*?)(?=\b[A-Z]{3,}\b|$)", chapter.read_text(encoding="utf-8"),
                      re.DOTALL)
    cells = "\n".join(table.read_text(encoding="utf-8") for table in TABLES)
    measured = [float(cell) for cell in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", cells)]
    for word in re.findall(r"\d+\.\d+", found.group(1) if found else ""):
        digits = len(word.partition(".")[2])
        assert float(word) in [round(number, digits) for number in measured], word
