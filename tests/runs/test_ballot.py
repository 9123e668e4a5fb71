"""experiments/ballot.py: blind, counted right, and a page that works in a real browser."""
import base64
import io
import json
import random
import re
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

try:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    pass  # the fixture chromium skips the test that needs them

ballot = import_module("experiments.ballot")
ddpo = import_module("03_ddpo")
LEFT = ["tuned", "plain", "plain", "tuned"]
KEY = {"ballot": "id", "models": ["tuned", "plain"], "pairs": [{"left": left} for left in LEFT]}


def make_ballot(folder, n=6, seed=0):
    """A ballot in a folder on n pairs: tuned is red, plain is blue, the pair's number is green."""
    prompts = [f"prompt {i} </script><b>" for i in range(n)]
    pictures = {"tuned": [Image.new("RGB", (8, 8), (200, i, 0)) for i in range(n)],
                "plain": [Image.new("RGB", (8, 8), (0, i, 200)) for i in range(n)]}
    pictures["tuned"][0].info["icc_profile"] = b"made by the tuned model"
    page, key = ballot.make_ballot(prompts, pictures, random.Random(seed))
    (folder / "ballot.html").write_text(page, encoding="utf-8")
    (folder / "ballot_key.json").write_text(json.dumps(key))
    return page, key


def is_tuned(uri):
    """Whether a picture of the page is the tuned model's, and of which pair."""
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    red, i, _ = Image.open(io.BytesIO(png)).getpixel((0, 0))
    return red == 200, i


def write_votes(file, rater, alignment, quality="tie tie tie tie", ballot="id"):
    pairs = zip(alignment.split(), quality.split(), strict=True)
    votes = [{"pair": k, "alignment": x, "quality": y} for k, (x, y) in enumerate(pairs)]
    file.write_text(json.dumps({"ballot": ballot, "rater": rater, "votes": votes}))
    return str(file)


def test_the_key_tells_what_the_page_does_not(tmp_path):
    orders, lefts = set(), set()
    for seed in range(20):
        page, key = make_ballot(tmp_path, seed=seed)
        assert "tuned" not in page and "plain" not in page and "icc" not in page
        shown = json.loads(re.search(r"const BALLOT = (.*);\n", page)[1])
        assert shown["ballot"] == key["ballot"] and key["models"] == ["tuned", "plain"]
        for pair, secret in zip(shown["pairs"], key["pairs"], strict=True):
            (tuned_left, i), (tuned_right, j) = is_tuned(pair["left"]), is_tuned(pair["right"])
            assert i == j and pair["prompt"].startswith(f"prompt {i} ")
            assert tuned_left != tuned_right and secret["left"] == ("plain", "tuned")[tuned_left]
        left = [pair["left"] for pair in key["pairs"]]
        assert left.count("tuned") == 3  # who always says left favors nobody
        lefts.add(tuple(left))
        orders.add(tuple(pair["prompt"] for pair in key["pairs"]))
    assert len(orders) > 15 and len(lefts) > 8


@pytest.mark.equation("preference rate", "experiments.ballot.preference_rate")
def test_rates_by_hand():
    answers = "left left tie right".split()  # tuned, tuned, tie, plain
    assert ballot.preference_rate("left right tie right".split(), LEFT, "tuned") == 2.5 / 4
    assert ballot.preference_rate(answers, LEFT, "tuned") == 1.5 / 4
    assert ballot.preference_rate(answers, LEFT, "plain") == 2.5 / 4


def test_votes_are_counted_once_each_and_only_on_their_ballot(tmp_path):
    (tmp_path / "ballot_key.json").write_text(json.dumps(KEY))
    ann = write_votes(tmp_path / "a", "Ann", "left right tie right")
    bo = write_votes(tmp_path / "b", "Bo", "left right right tie")
    # 62.5 and 87.5 % of the pairs: the standard deviation is 25/√2, with n − 1.
    rows = ballot.main(["--out", str(tmp_path), "--votes", ann, bo])
    assert list(rows[0].values())[1:] == [2, 4, "75.0 ± 17.7", "25.0 ± 17.7", "25.0"]
    assert "75.0 ± 17.7,25.0 ± 17.7" in (tmp_path / "votes.csv").read_text(encoding="utf-8")
    for i, (reason, rater, answers, of) in enumerate([
            ("already", " ann ", "left left left left", "id"),
            ("another ballot", "Cy", "left left left left", "other"),
            ("not one answer", "Cy", "left left left both", "id")]):
        bad = write_votes(tmp_path / str(i), rater, answers, ballot=of)
        with pytest.raises(ValueError, match=f"{bad}.* {reason}"):
            ballot.main(["--out", str(tmp_path), "--votes", ann, bad])
    with pytest.raises(ValueError, match="not what the page saves"):
        ballot.main(["--out", str(tmp_path), "--votes", str(tmp_path / "votes.csv")])


def test_both_runs_draw_as_they_were_trained_on_equal_noise(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ballot.models, "load_run", lambda folder, *rest: (pipe, None))
    for name in "AB":
        config = asdict(ddpo.Config(num_steps=2, guidance_scale=2.0))
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"method": "ddpo_is"}))
    monkeypatch.chdir(tmp_path)
    ballot.main(["A", "B", "--prompts", "tasks", "--pairs", "10", "--out", "new"])
    page = Path("new/ballot.html").read_text(encoding="utf-8")
    pairs = json.loads(re.search(r"const BALLOT = (.*);\n", page)[1])["pairs"]
    assert len(pairs) == 10 and all(pair["left"] == pair["right"] for pair in pairs)  # one model
    assert len({pair["left"] for pair in pairs}) == 10  # but each pair has noise of its own
    with pytest.raises(ValueError, match="ballot_key.json"):  # votes may be under way
        ballot.main(["A", "B", "--out", "new"])


def test_a_rater_clicks_through_the_page_and_is_counted(chromium, tmp_path):
    _, key = make_ballot(tmp_path)
    chromium.get((tmp_path / "ballot.html").as_uri())
    ActionChains(chromium).send_keys("Ann Ü", Keys.ENTER).perform()
    # Ann finds that tuned always fits better, and that the right picture always looks better.
    for pair in key["pairs"]:
        left = chromium.execute_script("return document.getElementById('left').src")
        assert is_tuned(left)[0] == (pair["left"] == "tuned")
        arrow = Keys.ARROW_LEFT if is_tuned(left)[0] else Keys.ARROW_RIGHT
        ActionChains(chromium).send_keys(arrow).perform()
        chromium.refresh()  # what was answered outlives the page
        ActionChains(chromium).send_keys(Keys.ARROW_UP, Keys.BACKSPACE).perform()  # taken back
        chromium.find_element("css selector", "[data-act=right] img").click()
    chromium.find_element("id", "download").click()
    file = tmp_path / "votes_Ann_Ü.json"
    WebDriverWait(chromium, 30).until(lambda _: file.exists() and file.stat().st_size)
    rows = ballot.main(["--out", str(tmp_path), "--votes", str(file)])
    assert [row["tuned preferred, %"] for row in rows] == ["100.0", "50.0"]
