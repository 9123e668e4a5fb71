"""Tables and CSV files from made-up rows, cell by cell."""
import math

from support import tables


def test_csv_has_every_column_of_every_row_and_goes_where_there_are_no_rows(tmp_path):
    file = tmp_path / "t.csv"
    tables.write_csv(file, [{"a": 1, "β": 'x, "y"'}, {"a": 2.5, "c": 3}])
    assert tables.read_csv(file) == [{"a": "1", "β": 'x, "y"', "c": ""},
                                     {"a": "2.5", "β": "", "c": "3"}]
    tables.write_csv(file, [])
    assert not file.exists()
    tables.write_csv(file, [])  # also where there was none


def test_summary_table_has_a_dash_where_nothing_was_measured_and_a_bound_for_best_of_n():
    lines = tables.summary_table({
        "A": {"gold": (0.1234, 0.01, 9), "path_kl": (2.0, 0.5, 9)},
        "best of 3": {"gold": (1.0, 0.25, 4), "path_kl": (0.432, 0.0, 4), "late": (7.0, 1.0, 2)}})
    assert lines == [
        "| Model | gold (N = 4/9) | path_kl (N = 4/9) | late (N = 2) |",
        "| --- | --- | --- | --- |", "| A | 0.123 ± 0.010 | 2.000 ± 0.500 | – |",
        "| best of 3 | 1.000 ± 0.250 | ≤ 0.432 | 7.000 ± 1.000 |"]


def test_a_number_has_as_many_digits_as_its_error_knows():
    def decimals(*errors):
        return tables.decimals({f"{e}": {"m": (1.0, e, 9)} for e in errors}, "m")

    assert [decimals(0.04), decimals(0.2, 0.013), decimals(3.0, 20.0)] == [2, 2, 0]
    assert [decimals(1.1, 1e-7, 0.2), decimals(1e-5)] == [1, 3]
    assert [decimals(0.0), decimals(math.nan)] == [3, 3]
    assert tables.cell("A", "m", {"m": (0.126, 0.04, 9)}, 2) == "0.13 ± 0.04"
    assert tables.cell("best of 3", "path_kl", {"path_kl": (0.432, 0.0, 9)}, 1) == "≤ 0.43"


def test_claim_lines_say_who_in_what_and_by_how_much():
    claim = dict(claim="A wins", a="A", b="B", metric="gold", split="seen", mean=0.5, low=-0.25,
                 high=1.25, p=0.04, holm=0.48, verdict="cannot be told", seeds=5, prompts=3,
                 pictures=7)
    assert tables.claim_lines([claim]) == [
        "A wins: cannot be told (A − B, gold on seen prompts: +0.500, 95 % interval -0.250 to "
        "+1.250, p = 0.48 by Holm; 5 seeds, 3 prompts, 7 pictures of each)."]
