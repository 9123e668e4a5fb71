"""The ballot: blinding, counting votes, and the page in a real browser."""
import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from support import ballot

try:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    pass  # the fixture chromium skips the tests that need them

NAMES = ("tuned", "plain")
BEFORE_LOAD = "Page.addScriptToEvaluateOnNewDocument"
KEY = {"ballot": "0123456789abcdef", "a": "tuned", "b": "plain",
       "pairs": [{"prompt": "p", "left": left} for left in ("tuned", "plain", "plain", "tuned")]}


def make_pairs(n):
    """a is reddish, b bluish, and the k of a pair is in its green."""
    return [{"prompt": f"prompt {k}", "a": Image.new("RGB", (8, 8), (200, k, 0)),
             "b": Image.new("RGB", (8, 8), (0, k, 200))} for k in range(n)]


def identify(pair):
    """A pair on the page -> k, whether a is left.  Both pictures must be of one pair."""
    corners = []
    for side in ("left", "right"):
        png = base64.b64decode(pair[side].removeprefix("data:image/png;base64,"))
        corners.append(Image.open(io.BytesIO(png)).getpixel((0, 0)))
    (red, k, blue), other = corners
    assert other == (blue, k, red)
    return k, red == 200


def make_form(rater="Ann", alignment="left right tie right", quality="tie tie tie tie", **changes):
    answers = zip(alignment.split(), quality.split())
    votes = [{"pair": k, "alignment": x, "quality": y} for k, (x, y) in enumerate(answers)]
    return {"ballot": KEY["ballot"], "rater": rater, "votes": votes, **changes}


VOTES = make_form()["votes"]


def write(file, content):
    """A form as JSON; a str as it is."""
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


@pytest.mark.parametrize("seed", range(4))
def test_key_unblinds_what_the_page_shows(seed, tmp_path):
    page, key = ballot.make_ballot(make_pairs(7), seed, NAMES)
    data, votes = json.loads(re.search(r"const BALLOT = (.*);\n", page)[1]), []
    for public, secret in zip(data["pairs"], key["pairs"], strict=True):
        k, a_is_left = identify(public)
        assert public["prompt"] == secret["prompt"] == f"prompt {k}"
        assert secret["left"] == ("tuned" if a_is_left else "plain")
        a, b = ("left", "right") if a_is_left else ("right", "left")
        votes.append({"pair": len(votes), "alignment": a, "quality": b})
    assert {pair["prompt"] for pair in key["pairs"]} == {f"prompt {k}" for k in range(7)}
    # So who always finds that a fits better and b looks better is counted so.
    file = write(tmp_path / "x.json", make_form(ballot=data["ballot"], votes=votes))
    counted = ballot.read_votes([file], json.loads(json.dumps(key)))
    assert counted["alignment"]["rates"] == [1] and counted["quality"]["rates"] == [0]


def test_page_does_not_give_the_models_away():
    pairs = make_pairs(6)
    pairs[0]["a"].info["icc_profile"] = b"made by the tuned model"
    page, key = ballot.make_ballot(pairs, 3, NAMES)
    other, other_key = ballot.make_ballot(make_pairs(6), 3, ("sft", "rl"))
    # With other names and metadata only the id differs, so nothing else hangs on them.
    assert page.replace(key["ballot"], other_key["ballot"]) == other
    pairs[2]["a"].putpixel((0, 0), (9, 9, 9))  # other pictures are another ballot
    assert ballot.make_ballot(pairs, 3, NAMES)[1]["ballot"] != key["ballot"]
    with pytest.raises(ValueError):  # pictures of two sizes
        ballot.make_ballot([{**pairs[0], "b": pairs[0]["b"].resize((4, 4))}], 0)


def test_sides_are_balanced_and_shuffled_and_cannot_be_foretold(tmp_path):
    keys = [ballot.make_ballot(make_pairs(3), seed, NAMES)[1] for seed in range(400)]
    sides = np.array([[pair["left"] == "tuned" for pair in key["pairs"]] for key in keys])
    assert set(sides.sum(1)) == {1, 2}
    # Each place is fair by itself: of 400 seeds, 200 ± 10 have a on the left.
    assert np.all(abs(sides.sum(0) - 200) < 50)
    assert len({tuple(pair["prompt"] for pair in key["pairs"]) for key in keys}) == 6
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        ballot.write(folder, ["p"] * 40, dict.fromkeys(NAMES, [Image.new("RGB", (8, 8))] * 40))
        written.append((folder / "ballot_key.json").read_text(encoding="utf-8"))
    assert written[0] != written[1]


@pytest.mark.equation("preference rate", "support.ballot.read_votes")
def test_rates_by_hand(tmp_path):
    # a is on the left in pairs 0 and 3, on the right in 1 and 2.
    forms = [make_form(),
             make_form("Bo", "left left left left", "right right right tie"),
             make_form(" Cy ", "left right right left", "right left left right")]
    files = [write(tmp_path / f"{k}.json", form) for k, form in enumerate(forms)]
    # Ann: a, a, tie, b -> 2.5/4. Bo: a, b, b, a -> 2/4; b, a, a, tie -> 2.5/4. Cy: all a; all b.
    assert ballot.read_votes(files, KEY) == {
        "alignment": {"rates": [0.625, 0.5, 1], "ties": [0.25, 0, 0]},
        "quality": {"rates": [0.5, 0.625, 0], "ties": [1, 0.25, 0]},
        "raters": ["ann", "bo", "cy"], "pairs": 4}
    # Exchanging the models turns every rate over, and the order of votes does not matter.
    write(files[0], make_form(votes=[VOTES[k] for k in (2, 0, 1, 3)]))
    turned = ballot.read_votes(files[:1], {**KEY, "a": "plain", "b": "tuned"})
    assert turned["alignment"] == {"rates": [0.375], "ties": [0.25]}


REFUSED = {  # a word of the reason -> files that are refused after Bo's good one
    "JSON": ["{", ""],
    "saves": [[1], {"rater": "A", "votes": VOTES}, make_form(votes=4), make_form(["Ann"])],
    "name": [make_form(" \n ")],
    "on ballot": [make_form(ballot="f" * 16)],
    "one vote each": [make_form(votes=VOTES[:3]), make_form(votes=VOTES + VOTES[:1]),
                      *(make_form(votes=[*VOTES[:3], {**VOTES[3], "pair": pair}])
                        for pair in (4, 2, True, "1"))],
    "unknown": [make_form(alignment=f"left left left {answer}") for answer in ("both", "Left")],
    "already": [make_form("Bo", quality="left left left left"), make_form(" b O\n")],
    "same file": [make_form("Bo")],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_read_votes_refuses(tmp_path, reason):
    good = write(tmp_path / "good.json", make_form("Bo"))
    for content in REFUSED[reason]:
        bad = write(tmp_path / "bad.json", content)
        with pytest.raises(ValueError, match=reason) as caught:
            ballot.read_votes([good, bad], KEY)
        assert str(caught.value).startswith(f"{bad}: ") and "\n" not in str(caught.value)


def test_votes_are_counted_into_a_table_of_means(tmp_path):
    forms = [make_form(), make_form("Di", "left right right tie")]
    files = [write(tmp_path / f"{k}.json", form) for k, form in enumerate(forms)]
    with pytest.raises(ValueError, match="ballot_key.json"):
        ballot.count_votes(files, tmp_path)
    write(tmp_path / "ballot_key.json", KEY)
    alone = ballot.count_votes(files[:1], tmp_path)
    assert "| 62.5 ± – % | 37.5 ± – % | 25.0 ± – % | 1 | 4 |" in alone
    text = ballot.count_votes(files, tmp_path)
    # 62.5 and 87.5: the standard deviation is 25/√2, with n − 1.
    assert "| 75.0 ± 17.7 % | 25.0 ± 17.7 % | 25.0 ± 0.0 % | 2 | 4 |" in text
    assert "| Question | tuned preferred | plain preferred |" in text
    assert text.endswith((tmp_path / "votes.md").read_text(encoding="utf-8").strip())
    for refused in ([], files[:1] * 2, [tmp_path / "none"]):
        with pytest.raises(ValueError, match="--votes"):
            ballot.count_votes(refused, tmp_path)


class Page:
    """A ballot that a rater sees, and what a rater can do to it."""

    def __init__(self, driver, folder):
        self.driver, self.file = driver, folder / "ballot.html"

    def open(self, pairs, rater, width=1000):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page, key = ballot.make_ballot(pairs, 11, NAMES)
        self.file.write_text(page, encoding="utf-8")
        self.driver.get(self.file.as_uri())
        self.press(rater, Keys.ENTER)
        return key

    def js(self, expression):
        return self.driver.execute_script(f"return {expression}")

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def click(self, selector):
        self.find(selector).click()  # Selenium refuses what is hidden or covered

    def part(self):
        assert self.js("document.documentElement.scrollHeight <= innerHeight")  # all is in sight
        parts = ("start", "vote", "end")
        (shown,) = [part for part in parts if not self.js(f"$('{part}').hidden")]
        return shown

    def answers(self):
        return " ".join(self.js("state.answers"))

    def asked(self):
        """Whether a is left, and the question."""
        k, a_is_left = identify(self.js("{left: $('left').src, right: $('right').src}"))
        assert self.js("$('prompt').innerText") == f"“prompt {k}”"
        return a_is_left, self.js("$('question').innerText")


@pytest.fixture
def browser(chromium, tmp_path):
    return Page(chromium, tmp_path)


def test_a_rater_from_the_first_click_to_the_file_and_the_next_one(browser, tmp_path):
    key = browser.open(make_pairs(4), rater=" ")
    assert browser.part() == "start"  # a blank is no name
    browser.press("Ann O/")
    browser.click("#start button")

    # This rater always finds that a fits better, and that b looks better but for two ties.
    arrows = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT}
    for k in range(4):
        a_is_left, question = browser.asked()
        assert question == ballot.QUESTIONS["alignment"]
        a, b = ("left", "right") if a_is_left else ("right", "left")
        if k == 1:  # a mistake, taken back
            browser.press(arrows[b], Keys.BACKSPACE)
        if k % 2:
            browser.click(f"[data-act={a}] img")
        else:
            browser.press(arrows[a])
        if k == 2:  # what is on the screen outlives the page
            browser.driver.refresh()
        assert browser.asked() == (a_is_left, ballot.QUESTIONS["quality"])
        if k == 2:
            browser.press(Keys.ARROW_UP)
        else:
            browser.click(f"[data-act={b}]")

    assert browser.part() == "end"
    browser.press(Keys.ARROW_UP)  # too late to count
    browser.click("#end [data-act=back]")
    browser.click("[data-act=tie]")
    browser.click("#download")
    file = tmp_path / "votes_Ann_O_.json"
    WebDriverWait(browser.driver, 30).until(lambda _: file.exists() and file.stat().st_size)
    votes = ballot.read_votes([file], key)
    assert votes["alignment"] == {"rates": [1], "ties": [0]}
    assert votes["quality"] == {"rates": [0.25], "ties": [0.5]}

    browser.click("[data-act=next]")
    browser.driver.switch_to.alert.dismiss()
    assert browser.part() == "end" and browser.js("state.rater") == "Ann O/"
    browser.click("[data-act=next]")
    browser.driver.switch_to.alert.accept()
    browser.driver.refresh()
    assert browser.part() == "start" and browser.answers() == ""


def test_one_answer_for_one_press_on_a_phone_where_storage_is_blocked(browser):
    prompt = 'a <b>"star"</b> & </script><script>document.title = "x"</script> ' + 12 * "blue "
    browser.driver.execute_cdp_cmd(BEFORE_LOAD, {"source": """
        for (const store of ["localStorage", "sessionStorage"]) Object.defineProperty(window, store,
            {get() { throw new DOMException("blocked", "SecurityError"); }});"""})
    browser.open([{**pair, "prompt": prompt} for pair in make_pairs(3)], "Bo", width=400)
    assert browser.part() == "vote" and browser.js("$('prompt').textContent") == f"“{prompt}”"
    assert browser.js("document.documentElement.scrollWidth <= 400")
    actions = ActionChains(browser.driver)
    actions.key_down(Keys.ALT).send_keys(Keys.ARROW_LEFT).key_up(Keys.ALT).send_keys("x").perform()
    assert browser.answers() == ""  # these keys are the browser's
    for repeat in (False, True):  # a key held down
        event = {"type": "rawKeyDown", "key": "ArrowLeft", "autoRepeat": repeat}
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event)
    ActionChains(browser.driver).double_click(browser.find("[data-act=right]")).perform()
    browser.press(" ")
    assert browser.answers() == "left right tie"
    browser.press(Keys.TAB, " ")  # to the left picture, where space means that button
    assert browser.answers() == "left right tie left"
    browser.press(*5 * [Keys.BACKSPACE])  # from the first question back to the name
    assert browser.answers() == "" and browser.part() == "start"


@pytest.mark.parametrize("lost, kept", [("localStorage", "sessionStorage"),
                                        ("sessionStorage", "localStorage")])
def test_votes_outlive_the_loss_of_one_store(browser, lost, kept):
    browser.open(make_pairs(2), "Bo")
    browser.press(Keys.ARROW_LEFT)
    slot, saved, same = browser.js("[slot, ...stores.map((store) => window[store].getItem(slot))]")
    assert saved == same and json.loads(saved) == {"rater": "Bo", "answers": ["left"]}
    # Written before the page runs, because Chromium's localStorage may come up empty by itself.
    script = f"{lost}.clear(); {kept}.setItem({slot!r}, {saved!r});"
    browser.driver.execute_cdp_cmd(BEFORE_LOAD, {"source": script})
    browser.driver.refresh()
    assert browser.js("state.rater") == "Bo" and browser.answers() == "left"
