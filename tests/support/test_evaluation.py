"""Tables, verdicts and page of made-up numbers, cell by cell."""
import math
import re
from types import SimpleNamespace

import pytest

from support import evaluation

NASTY, SAFE = "<b>& \"'", "&lt;b&gt;&amp; &quot;&#x27;"
CONFIG = SimpleNamespace(reward=NASTY, gold="g", others=("aesthetic",), quick=False, runs=())


def test_the_end_is_each_models_last_reading_a_mean_over_prompts_for_each_seed():
    seeds = [{"p": {"A": [{"gold": 9}, {"gold": k}], "B": [{"reward": 1}],
                    "C": [{"gold": 5}]},
              "q": {"A": [{"gold": k + 4}]}} for k in (0, 10)]
    found = evaluation.at_the_end(seeds, "gold")
    assert {model: values.tolist() for model, values in found.items()} == {"A": [2, 12]}


@pytest.mark.parametrize("mean, error, text", [
    (-0.4374, 0.028, "-0.44±0.03"), (535.49, 131.4, "535±131"), (0.1372, 0.0078, "0.137±0.008"),
    (0.12345, math.nan, "0.123"), (8706.0, math.nan, "8706"), (1.0, 0.0, "1"),
    (math.nan, math.nan, "–"),
    (0.5, 1e-9, "0.5000±0.0000")])
def test_a_number_has_as_many_digits_as_its_error_knows(mean, error, text):
    assert evaluation.cell(mean, error) == text


def test_the_terminals_table_has_the_columns_that_a_terminal_has_room_for():
    row = {"model": "A", "reward": "-0.44±0.03", "gold": 1}
    assert evaluation.as_text([row]) == "model      reward  gold\nA      -0.44±0.03     1"
    assert evaluation.as_text([row] * 3, 21) == "\n".join(
        ["model      reward  …", *["A      -0.44±0.03  …"] * 3])
    assert evaluation.as_text([row], 21) == "\n".join(
        ["model            A", "reward  -0.44±0.03", "gold             1"])


def test_a_page_has_the_verdicts_the_table_and_the_figures_and_needs_no_other_file(tmp_path):
    claim = dict(claim="A wins", a="A", b=NASTY, column="gold", at="the end", mean=0.5, low=-0.25,
                 high=1.25, p=0.04, holm=0.0012345, verdict="holds", seeds_needed=7)
    sentence = evaluation.sentence_of(claim)
    assert sentence == (f"holds: A wins\n    A − {NASTY}, gold at the end: +0.500 (-0.250 to "
                        "+1.250), p after Holm 0.0012")
    untold = evaluation.sentence_of(claim | {"verdict": "cannot be told"})
    assert untold.endswith("; if this is the true effect, 7 new seeds would tell it 4 times in 5")
    assert "more than 100 new seeds" in evaluation.sentence_of(
        claim | {"verdict": "cannot be told", "seeds_needed": math.inf})
    for name in evaluation.CAPTIONS:
        (tmp_path / f"{name}.png").write_bytes(b"one")
    config = SimpleNamespace(**vars(CONFIG) | {"out": tmp_path})
    table = [{"model": NASTY, "gold": "0.44±0.03"}, {"model": "A", "gold": "1"}]
    evaluation.write_page(config, table, [sentence])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall("<td>(.*?)</td>", text) == ["model", "gold", SAFE, "0.44±0.03", "A", "1"]
    assert "holds: A wins" in text and text.count(SAFE) == 3 and "<b>" not in text
    assert re.findall("src=(.*?) ", text) == (
        ["'data:image/png;base64,b25l'"] * len(evaluation.CAPTIONS))
    assert not re.search(r"href|https?:|@import|url\(|<script", text)
    assert evaluation.rounded({"p": 0.000199980002, "seeds": 5, "claim": "A 0.12345"}) == {
        "p": "0.0002", "seeds": 5, "claim": "A 0.12345"}


def test_table_is_written_last_and_what_another_comparison_left_is_gone(tmp_path, monkeypatch):
    config = SimpleNamespace(out=tmp_path, others=(), seed=0)
    readings = [{"four stars": {"pretrained": [{"reward": 1.0, "queries": 0}]}}]
    for name in ("rounds.csv", "claims.csv"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(evaluation, "draw", lambda *_: 1 / 0)  # stopped before the end
    with pytest.raises(ZeroDivisionError):
        evaluation.write(config, readings, [{}], [], {}, {})
    assert {path.name for path in tmp_path.iterdir()} == {"readings.csv"}
