"""Every number in one place: what docstrings and README quote stands in experiments' CSV files."""
import json
import re
import statistics
from importlib import import_module

import pytest

from tests.test_house import ROOT, read

SCRIPTS = sorted(ROOT.glob("0*.py")) + sorted(ROOT.glob("experiments/*.py"))
NUMBER = r"(?<![\w.:/-])[-+−]?(?:\d+\.\d+|\d{3,})(?![\w.]*\d)"  # 0.28, −1.8, 3840; not 2, not v1.5


def quoted(text):
    """Numbers of a text that claim a result: decimals, and whole ones of three digits or more."""
    text = re.sub(r"`[^`]*`|\(http[^)]*\)", "", text)  # commands and links claim nothing
    return [word.replace("−", "-") for word in re.findall(NUMBER, text)]


def is_measured(word):
    """Whether some number in the CSV files, rounded as the quoted one is, equals it."""
    digits = len(word.partition(".")[2])
    cells = "\n".join(map(read, ROOT.glob("experiments/**/*.csv")))
    numbers = map(float, re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", cells))
    return any(round(number, digits) == float(word) for number in numbers)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_docstring_quotes_one_number_at_most_and_it_was_measured(file):
    found = re.search(r"EXPECT\b(.*?)(?=\b[A-Z]{3,}\b|$)", read(file).split('"""')[1], re.DOTALL)
    words = quoted(found.group(1)) if found else []
    assert len(words) <= 1 and all(map(is_measured, words)), words


def test_numbers_in_readmes_findings_were_measured_and_an_invented_one_is_found():
    words = quoted(read(ROOT / "README.md").split("## Four findings")[1].split("\n## ")[0])
    assert words and [word for word in words if not is_measured(word)] == []
    assert quoted("a gain of 0.2801, `--beta 0.1`, v1.5, −1.23 and 3841 (https://x.y/123)") == [
        "0.2801", "-1.23", "3841"]
    assert not is_measured("0.123456")


def test_the_tables_are_those_of_the_csv_files(tmp_path):
    results = import_module("experiments.results")
    readme = ROOT / "experiments" / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(read(readme), encoding="utf-8")
    results.render(copy, tables_in=readme.parent)
    assert read(copy) == read(readme)
    for file in set(readme.parent.glob("**/*.csv")) - set(readme.parent.glob("raw/*")):
        assert f"<!-- {file.relative_to(readme.parent)} -->" in read(copy)
        head, _ = results.read(file)
        assert {"title", "command", "seeds", "device", "date"} <= set(head), file


def test_each_row_of_a_csv_file_is_of_its_own_run(tmp_path, monkeypatch):
    results = import_module("experiments.results")
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results.commands, "train_missing", lambda wanted, out: None)
    for seed in results.SEEDS:
        (tmp_path / f"dpok_defaults_seed{seed}").mkdir()
        reward = {"before": seed, "after": 10 + seed, "gain": 10, "gain_se": seed / 2}
        (tmp_path / f"dpok_defaults_seed{seed}" / "evaluation.json").write_text(
            json.dumps({"queries": 7, "seconds": 3.4, "reward": reward}))
    results.measure_chapter("dpok_defaults", "04_dpok.py", tmp_path)
    _, (names, *rows) = results.read(tmp_path / "dpok_defaults.csv")
    assert [dict(zip(names, map(float, row))) for row in rows] == [
        {"seed": seed, "queries": 7, "seconds": 3, "reward before": seed, "reward after": 10 + seed,
         "reward gain": 10, "reward gain_se": seed / 2} for seed in results.SEEDS]


def test_a_runs_row_has_its_ends_and_what_it_gained(tmp_path):
    results = import_module("experiments.results")
    gold = {"before": 0.5, "after": 0.75, "after_se": 0.1, "gain": 0.25, "gain_se": 0.01}
    (tmp_path / "evaluation.json").write_text(json.dumps({"queries": 7, "gold": gold}))
    assert results.row_of_run(tmp_path) == {
        "run": tmp_path.name, "queries": 7, "gold before": 0.5, "gold after": 0.75,
        "gold gain": 0.25, "gold gain_se": 0.01}


def test_an_evaluations_rows_are_of_its_own_models_and_columns(tmp_path, monkeypatch):
    results = import_module("experiments.results")
    monkeypatch.setattr(results, "HERE", tmp_path)
    (tmp_path / "eval_quick").mkdir()
    cells = [{"model": model, "column": column, "mean": k + 0.5, "standard_error": k / 8}
             for k, (model, column) in enumerate([("A", "reward"), ("A", "aesthetic"),
                                                  ("B", "gold"), ("B", "reward")])]
    results.tables.write_csv(tmp_path / "eval_quick" / "table.csv", cells)
    results.measure_evaluation(tmp_path, "eval_quick", ["05_eval.py", "--quick"])
    head, lines = results.read(tmp_path / "eval_quick.csv")
    assert head["command"] == "python 05_eval.py --quick"
    assert lines == [["model", "reward", "reward error", "gold", "gold error"],
                     ["A", "0.5", "0.0", "", ""], ["B", "3.5", "0.375", "2.5", "0.25"]]


def test_verdicts_follow_from_the_csv_files_alone():
    """Every claim's interval, of which three also by hand: the mean over seeds, and Student's t."""
    folder = ROOT / "experiments"
    results, tables = import_module("experiments.results"), import_module("support.tables")
    rows = {}
    for row in tables.read_csv(folder / "raw" / "eval_seeds.csv"):
        rows.setdefault(row["model"], []).append(row | {"seed": row["seed"] or "0"})
    found = import_module("05_eval").claims(rows)
    _, (names, *lines) = results.read(folder / "eval_claims.csv")
    claims = [dict(zip(names, line)) for line in lines]
    assert len(claims) == len(found) == 12
    for claim, again in zip(claims, found):
        assert claim["verdict"] == again["verdict"] and claim["claim"] == again["claim"]
        for name in ("mean", "low", "high"):
            assert float(claim[name]) == pytest.approx(again[name], abs=1e-3), claim
    for claim in (claims[0], claims[5], claims[6]):
        of_seeds = []
        for seed in "01234":
            x, y = (statistics.mean(float(row[claim["metric"]]) for row in rows[claim[side]]
                                    if row["seed"] == seed and row["split"] == "seen")
                    for side in "ab")
            of_seeds.append(x - y)
        assert float(claim["mean"]) == pytest.approx(statistics.mean(of_seeds), abs=1e-3)
        error = statistics.stdev(of_seeds) / 5**0.5  # pictures can only add to it
        assert float(claim["high"]) - float(claim["low"]) > 2 * 1.9 * error


def test_each_method_has_the_setting_that_was_best_among_equally_many():
    results, ev = import_module("experiments.results"), import_module("05_eval")
    _, (names, *lines) = results.read(ROOT / "experiments" / "tuning.csv")
    best, counts = {}, {}
    for row in (dict(zip(names, line)) for line in lines):
        setting = float(row["learning rate"]), int(row["updates per round"])
        best.setdefault(row["method"], []).append((float(row["reward after"]), setting))
        counts.setdefault(row["method"], set()).add(setting)
    assert {method: max(found)[1] for method, found in best.items()} | {
        "DPOK_no_KL": ev.TUNED["DPOK"]} == ev.TUNED
    assert {len(settings) for settings in counts.values()} == {10}


def test_a_methods_line_on_stopping_is_the_mean_of_its_seeds_under_each_bound():
    """Two seeds, three rounds: labels are best in round 1, gold in round 2, beyond 100 nats."""
    results, lines = import_module("experiments.results"), []
    for seed, end in ((0, 0.5), (1, 0.9)):
        for n, labels, kl, gold in ((0, 0.1, 0, 0.3), (10, 0.6, 50, 0.4), (20, 0.2, 500, end)):
            lines.append({"run": f"DPOK_no_KL_seed{seed}", "round": n, "queries": 80 * n,
                          "labels_mean": labels, "path_kl": kl, "gold": gold})
    lines[4]["labels_mean"] = 0.05  # the second seed's labels like the pretrained model most
    (row,) = results.rows_of_stopping([{k: str(v) for k, v in line.items()} for line in lines])
    assert row == {
        "method": "DPOK_no_KL", "pretrained": "0.300 ± 0.000", "end": "0.700 ± 0.200",
        "hindsight": "0.700 ± 0.200", "rule, 100 nats": "0.350 ± 0.050",
        "rule, 1000 nats": "0.650 ± 0.250", "rule, inf nats": "0.650 ± 0.250",
        "price: end": 1600, "price: rule, 100 nats": 1600 + 2 * 64,
        "price: rule, 1000 nats": 1600 + 3 * 64, "price: rule, inf nats": 1600 + 3 * 64}
