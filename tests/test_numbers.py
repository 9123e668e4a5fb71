"""Every number in one place: what docstrings and README quote stands in experiments' CSV files."""
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("0*.py")) + sorted(ROOT.glob("experiments/*.py"))
NUMBER = r"(?<![\w.:/-])[-+−]?(?:\d+\.\d+|\d{3,})(?![\w.]*\d)"  # 0.28, −1.8, 3840; not 2, not v1.5


def quoted(text):
    """Numbers of a text that claim a result: decimals, and whole ones of three digits or more."""
    text = re.sub(r"`[^`]*`|\(http[^)]*\)", "", text)  # commands and links claim nothing
    return [word.replace("−", "-") for word in re.findall(NUMBER, text)]


def expectation(file):
    """What a docstring says after EXPECT, up to its next heading."""
    docstring = file.read_text(encoding="utf-8").split('"""')[1]
    found = re.search(r"EXPECT\b(.*?)(?=\b[A-Z]{3,}\b|$)", docstring, re.DOTALL)
    return found.group(1) if found else ""


def findings():
    """README's findings."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("## Three findings")[1].split("\n## ")[0]


def measured():
    """All numbers in the CSV files."""
    numbers = []
    for file in ROOT.glob("experiments/**/*.csv"):
        cells = file.read_text(encoding="utf-8")
        numbers += [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", cells)]
    return numbers


def stands_in(word, numbers):
    """Whether some number, rounded as the quoted one is, equals it."""
    digits = len(word.partition(".")[2])
    return any(round(number, digits) == float(word) for number in numbers)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_docstring_quotes_one_number_at_most_and_it_was_measured(file):
    words = quoted(expectation(file))
    assert len(words) <= 1, words
    assert all(stands_in(word, measured()) for word in words), words


def test_numbers_in_readmes_findings_were_measured():
    words = quoted(findings())
    assert words, "no number found: has the heading changed?"
    assert [word for word in words if not stands_in(word, measured())] == []


def test_an_invented_number_is_found():
    assert quoted("a gain of 0.2801, `--beta 0.1`, v1.5, −1.23 and 3841 (https://x.y/123)") == [
        "0.2801", "-1.23", "3841"]
    assert not stands_in("0.123456", measured())


def test_the_tables_are_those_of_the_csv_files(tmp_path):
    results = import_module("experiments.results")
    readme = ROOT / "experiments" / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    results.render(copy, tables_in=readme.parent)
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")
    for file in readme.parent.glob("**/*.csv"):
        assert f"<!-- {file.relative_to(readme.parent)} -->" in copy.read_text(encoding="utf-8")
        head, _ = results.read(file)
        assert {"title", "command", "seeds", "device", "date"} <= set(head), file
