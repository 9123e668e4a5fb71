"""Tables and quoted numbers are those of the CSV files in experiments/."""
import re
from importlib import import_module

import pytest

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


def test_chapter_5_has_the_settings_that_tuning_has_chosen():
    _, rows = import_module("experiments.results").read(README.parent / "tuning.csv")
    chosen = {row["method"]: row["setting"] for row in rows if row["chosen"]}
    methods = import_module("05_eval").METHODS
    assert chosen == {method: tuned for method, (_, tuned) in methods.items()}


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
