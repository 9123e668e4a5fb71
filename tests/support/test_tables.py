"""Tables and CSV files from made-up rows, cell by cell."""
from types import SimpleNamespace

import pytest

from support import tables
from support.prompts import TASKS


def test_markdown_is_head_line_and_rows():
    assert tables.markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == [
        "| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]


def test_csv_has_every_column_of_every_row_and_goes_where_there_are_no_rows(tmp_path):
    file = tmp_path / "t.csv"
    tables.write_csv(file, [{"a": 1, "β": 'x, "y"'}, {"a": 2.5, "c": 3}])
    assert tables.read_csv(file) == [{"a": "1", "β": 'x, "y"', "c": ""},
                                     {"a": "2.5", "β": "", "c": "3"}]
    tables.write_csv(file, [])
    assert not file.exists()
    tables.write_csv(file, [])  # also where there was none


def test_summary_is_of_seen_pictures_but_for_gold_unseen():
    config = SimpleNamespace(prompts="tasks", others=("other",))
    rows, families = [], [*TASKS, *TASKS]
    for i, family in enumerate(families):
        rows.append({"picture": i, "split": "seen", "family": family, "reward": i, "gold": 10 + i,
                     "other": 20 + i, "path_kl": 30 + i, "diversity": 40 + i})
    rows.append(dict(rows[0], picture=10, split="unseen", gold=99, reward=77))
    error = (55 / 6) ** 0.5 / 10**0.5  # of 0 to 9, whose variance is 55/6
    expected = {"reward": (4.5, error, 10), "gold": (14.5, error, 10)}
    for k, family in enumerate(TASKS):  # pictures k and k + 5
        expected[f"gold {family}"] = (12.5 + k, 2.5, 2)
    expected |= {"other": (24.5, error, 10), "path_kl": (34.5, error, 10),
                 "diversity": (44.5, error, 10)}
    found = tables.summarize(rows, config)
    mean, _, N = found.pop("gold unseen")
    assert (mean, N) == (99, 1)
    assert found == {name: pytest.approx(values) for name, values in expected.items()}
    assert "gold unseen" not in tables.summarize(rows[:10], config)


def test_summary_table_has_a_dash_where_nothing_was_measured_and_a_bound_for_best_of_n():
    lines = tables.summary_table({
        "A": {"gold": (0.1234, 0.01, 9), "path_kl": (2.0, 0.5, 9)},
        "best of 3": {"gold": (1.0, 0.25, 4), "path_kl": (0.432, 0.0, 4), "late": (7.0, 1.0, 2)}})
    assert lines == [
        "| Model | gold (N = 4/9) | path_kl (N = 4/9) | late (N = 2) |",
        "| --- | --- | --- | --- |",
        "| A | 0.123 ± 0.010 | 2.000 ± 0.500 | – |",
        "| best of 3 | 1.000 ± 0.250 | ≤ 0.432 | 7.000 ± 1.000 |"]


def test_claim_lines_say_who_in_what_and_by_how_much():
    claim = dict(claim="A wins", a="A", b="B", metric="gold", split="seen", mean=0.5, low=-0.25,
                 high=1.25, verdict="cannot be told from chance", pairs=7)
    assert tables.claim_lines([claim]) == [
        "A wins: cannot be told from chance (A − B, gold on seen prompts: +0.500, 95 % interval "
        "-0.250 to +1.250, 7 pairs)."]
