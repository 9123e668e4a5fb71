"""Tables, verdicts and page of made-up numbers, cell by cell."""
import math
import re
from types import SimpleNamespace

import pytest

from support import evaluation

NASTY, SAFE = "<b>& \"'", "&lt;b&gt;&amp; &quot;&#x27;"
CONFIG = SimpleNamespace(reward=NASTY, gold="g", others=("aesthetic",), quick=False, runs=())


def pictures(seed, reward, split="seen"):
    return [{"seed": seed, "family": "f", "split": split, "prompt": "p", "reward": reward + k,
             "gold": 1.0, "path_kl": 0.0} for k in (0, 2)]


def test_a_summary_is_over_seeds_and_has_no_error_of_one_seed():
    rows = {"pretrained": pictures(0, 1) + pictures(1, 4) + pictures(1, 9, "unseen"),
            "best of 3": pictures(0, 5)}
    found = evaluation.summarize(rows, CONFIG)
    assert found["pretrained"]["reward"] == pytest.approx((3.5, 1.5))  # of seeds with 2 and 5
    assert found["pretrained"]["gold unseen"][0] == 1 and "gold unseen" not in found["best of 3"]
    assert found["best of 3"]["reward"][0] == 6 and math.isnan(found["best of 3"]["reward"][1])
    assert list(found["pretrained"]) == ["reward", "gold", "gold unseen", "path_kl", "gold f",
                                         "gold unseen f"]  # no quality: nothing measured it


@pytest.mark.parametrize("mean, error, text", [
    (-0.4374, 0.028, "-0.44±0.03"), (535.49, 131.4, "535±131"), (0.1372, 0.0078, "0.137±0.008"),
    (0.12345, math.nan, "0.123"), (8706.0, math.nan, "8706"), (1.0, 0.0, "1"),
    (0.5, 1e-9, "0.5000±0.0000")])
def test_a_number_has_as_many_digits_as_its_error_knows(mean, error, text):
    assert evaluation.cell(mean, error) == text


def test_the_terminals_table_is_at_most_as_wide_as_a_terminal():
    lines = [["model", "reward", "gold", "wide"], ["A", "-0.44±0.03", "1", "x" * 70],
             ["a name that is too long for a table", "5", "–", ""]]
    assert evaluation.as_text(lines, ["gold", "wide", "beauty", "reward"]) == [
        "model                     gold      reward", "A                            1  -0.44±0.03",
        "a name that is too long      –           5"]
    found = evaluation.as_text(lines, ["wide", "reward", "gold"])
    assert max(map(len, found)) <= 100 and "reward" not in found[0] and "gold" not in found[0]


def test_a_page_has_the_verdicts_the_table_and_the_figures_and_needs_no_other_file(tmp_path):
    claim = dict(claim="A wins", a="A", b=NASTY, metric="gold", split="seen", mean=0.5, low=-0.25,
                 high=1.25, p=0.04, holm=0.0012345, verdict="holds")
    sentence = evaluation.sentence_of(claim)
    assert sentence == (f"holds: A wins\n    A − {NASTY}, gold on seen prompts: +0.500 (-0.250 to "
                        "+1.250), p = 0.0012")
    (tmp_path / "scores.png").write_bytes(b"one")
    config = SimpleNamespace(**vars(CONFIG) | {"out": tmp_path})
    table = [["model", "gold"], [NASTY, "0.44±0.03"], ["A", "1"]]
    evaluation.write_page(config, table, [sentence])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert re.findall("<td>(.*?)</td>", text) == ["model", "gold", SAFE, "0.44±0.03", "A", "1"]
    assert "holds: A wins" in text and text.count(SAFE) == 3 and "<b>" not in text
    assert re.findall("src=(.*?) ", text) == ["'data:image/png;base64,b25l'"]
    assert not re.search(r"href|https?:|@import|url\(|<script", text)
    assert evaluation.rounded({"p": 0.000199980002, "seeds": 5, "claim": "A 0.12345"}) == {
        "p": "0.0002", "seeds": 5, "claim": "A 0.12345"}
