"""The ballot: blinding, counting votes, and the page in a real browser."""
import base64
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from support import ballot

try:
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.wait import WebDriverWait
except ImportError:
    webdriver = None

NAMES = ("tuned", "plain")
KEY = {"ballot": "0123456789abcdef", "a": "tuned", "b": "plain",
       "pairs": [{"prompt": "p", "left": left} for left in ("tuned", "plain", "plain", "tuned")]}


def paint(red, green, blue, size=8):
    return Image.new("RGB", (size, size), (red, green, blue))


def make_pairs(n):
    """a is reddish, b bluish, and the k of a pair is in its green."""
    return [{"prompt": f"prompt {k}", "a": paint(200, k, 0), "b": paint(0, k, 200)}
            for k in range(n)]


def page_data(page):
    return json.loads(re.search(r"const BALLOT = (.*);\n", page)[1])


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def identify(pair):
    """A pair on the page -> k, whether a is left.  Both pictures must be of one pair."""
    left, right = picture(pair["left"]), picture(pair["right"])
    red, k, blue = left.getpixel((0, 0))
    assert (red, blue) in ((200, 0), (0, 200)) and right.getpixel((0, 0)) == (blue, k, red)
    return k, red == 200


def make_form(rater="Ann", alignment="left right tie right", quality="tie tie tie tie", **changes):
    answers = zip(alignment.split(), quality.split())
    votes = [{"pair": k, "alignment": x, "quality": y} for k, (x, y) in enumerate(answers)]
    return {"ballot": KEY["ballot"], "rater": rater, "votes": votes, **changes}


VOTES = make_form()["votes"]


def write(file, content):
    """A form as JSON; a str as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    file.write_text(text, encoding="utf-8")
    return file


# ---- blinding -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_key_unblinds_what_the_page_shows(seed, tmp_path):
    page, key = ballot.make_ballot(make_pairs(7), seed, NAMES)
    data, numbers, votes = page_data(page), set(), []
    for public, secret in zip(data["pairs"], key["pairs"], strict=True):
        k, a_is_left = identify(public)
        assert public["prompt"] == secret["prompt"] == f"prompt {k}"
        assert secret["left"] == ("tuned" if a_is_left else "plain")
        a, b = ("left", "right") if a_is_left else ("right", "left")
        votes.append({"pair": len(votes), "alignment": a, "quality": b})
        numbers.add(k)
    assert numbers == set(range(7))
    # So who always finds that a fits better and b looks better is counted so.
    file = write(tmp_path / "x.json", make_form(ballot=data["ballot"], votes=votes))
    counted = ballot.read_votes([file], json.loads(json.dumps(key)))
    assert counted["alignment"]["rates"] == [1] and counted["quality"]["rates"] == [0]


def test_page_does_not_know_the_models():
    page, key = ballot.make_ballot(make_pairs(6), 3, NAMES)
    other, other_key = ballot.make_ballot(make_pairs(6), 3, ("sft", "rl"))
    # With other names only the id differs, so nothing else in the page depends on them.
    assert page.replace(key["ballot"], other_key["ballot"]) == other
    data = page_data(page)
    assert set(data) == {"ballot", "questions", "pairs"}
    assert set().union(*data["pairs"]) == {"prompt", "left", "right"}


@pytest.mark.parametrize("size, rendering", [(64, "pixelated"), (512, "auto")])
def test_pictures_carry_no_metadata_and_have_one_size(size, rendering):
    pair = {"prompt": "p", "a": paint(200, 0, 0, size), "b": paint(0, 0, 200, size)}
    pair["a"].info["icc_profile"] = b"made by the tuned model"
    page, _ = ballot.make_ballot([pair], 0)
    assert f"image-rendering: {rendering}" in page
    public, = page_data(page)["pairs"]
    assert picture(public["left"]).info == picture(public["right"]).info == {}
    with pytest.raises(ValueError):
        ballot.make_ballot([{**pair, "b": paint(0, 0, 200, 4)}], 0)


def test_sides_are_balanced_and_shuffled():
    for n in (1, 3, 4):
        a_left, orders = np.zeros((400, n)), set()
        for seed in range(400):
            _, key = ballot.make_ballot(make_pairs(n), seed, NAMES)
            a_left[seed] = [pair["left"] == "tuned" for pair in key["pairs"]]
            orders.add(tuple(pair["prompt"] for pair in key["pairs"]))
        assert np.all(abs(2 * a_left.sum(1) - n) == n % 2)
        # Each place is fair by itself: of 400 seeds, 200 ± 10 have a on the left.
        assert np.all(abs(a_left.sum(0) - 200) < 50)
        assert len(orders) == math.factorial(n)


def test_equal_seeds_make_equal_ballots_and_all_else_another_id():
    page, key = ballot.make_ballot(make_pairs(6), 5)
    assert (page, key) == ballot.make_ballot(make_pairs(6), 5)
    repainted, renamed = make_pairs(6), make_pairs(6)
    repainted[2]["a"].putpixel((0, 0), (9, 9, 9))
    renamed[2]["prompt"] = "another"
    for pairs, seed in ((make_pairs(6), 6), (repainted, 5), (renamed, 5)):
        assert ballot.make_ballot(pairs, seed)[1]["ballot"] != key["ballot"]
    # The id covers the sides too: here all pages look alike, but keys differ.
    alike = [{"prompt": "p", "a": paint(9, 9, 9), "b": paint(9, 9, 9)}]
    assert len({ballot.make_ballot(alike, seed)[1]["ballot"] for seed in range(20)}) == 2


# ---- votes ----------------------------------------------------------------------------------


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
    "JSON": ["{", "", "[" * 100_000],
    "saves": [[1], "3", {"ballot": KEY["ballot"], "votes": VOTES}, {"rater": "A", "votes": VOTES},
              make_form(votes={"0": "left"}), make_form(votes=4), make_form(["Ann"]),
              make_form(votes=[{"pair": 0, "alignment": "left"}])],
    "name": [make_form(" \n ")],
    "on ballot": [make_form(ballot="f" * 16)],
    "one vote each": [make_form(votes=VOTES[:3]), make_form(votes=VOTES + VOTES[:1])],
    "already": [make_form("Bo", quality="left left left left"), make_form(" b O\n")],
    "same file": [make_form("Bo")],
}
for pair in (4, -1, 2, True, 1.0, "1"):
    REFUSED["one vote each"].append(make_form(votes=[*VOTES[:3], {**VOTES[3], "pair": pair}]))
REFUSED["unknown"] = []
for answer in ("both", "Left", None, ["left"], "left\nright"):
    REFUSED["unknown"].append(make_form(votes=[*VOTES[:3], {**VOTES[3], "quality": answer}]))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_read_votes_refuses(tmp_path, reason):
    good = write(tmp_path / "good.json", make_form("Bo"))
    for content in REFUSED[reason]:
        bad = write(tmp_path / "bad.json", content)
        with pytest.raises(ValueError, match=reason) as caught:
            ballot.read_votes([good, bad], KEY)
        assert str(caught.value).startswith(f"{bad}: ") and "\n" not in str(caught.value)


def test_preference_table_by_hand():
    votes = {"alignment": {"rates": [0.5, 0.625, 0.75], "ties": [0, 0.25, 0.5]},
             "quality": {"rates": [0.75], "ties": [0.5]}, "pairs": 4}
    head, _, alignment, quality = ballot.preference_table(votes, ("RL", "SFT")).splitlines()
    assert head.index("RL preferred") < head.index("SFT preferred") < head.index("ties")
    # 62.5 and 62.5 ± 12.5: std 12.5 with n − 1. One rater alone has no spread.
    assert alignment.endswith("| 62.5 ± 12.5 % | 37.5 ± 12.5 % | 25.0 ± 25.0 % | 3 | 4 |")
    assert quality.endswith("| 75.0 ± – % | 25.0 ± – % | 50.0 ± – % | 1 | 4 |")


def test_votes_are_counted_into_votes_md(tmp_path):
    form = write(tmp_path / "ann.json", make_form())
    with pytest.raises(ValueError, match="ballot_key.json"):
        ballot.count_votes([form], tmp_path)
    write(tmp_path / "ballot_key.json", KEY)
    text = ballot.count_votes([form], tmp_path)
    table = (tmp_path / "votes.md").read_text(encoding="utf-8")
    assert table.strip() in text and "| 62.5 ± – % | 37.5 ± – % | 25.0 ± – % | 1 | 4 |" in table
    (tmp_path / "latin.json").write_bytes('"Zoë"'.encode("latin-1"))
    for files in ([], [form, form], [tmp_path], [tmp_path / "none"], [tmp_path / "latin.json"]):
        with pytest.raises(ValueError, match="--votes"):
            ballot.count_votes(files, tmp_path)


# ---- the page in a browser ------------------------------------------------------------------


class Page:
    """A ballot that a rater sees, and what a rater can do to it."""

    def __init__(self, driver, folder):
        self.driver, self.file = driver, folder / "ballot.html"

    def before_load(self, script):
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def open(self, pairs, rater, seed=1, width=1000):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        page, key = ballot.make_ballot(pairs, seed, NAMES)
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
        assert self.js("document.documentElement.scrollHeight <= innerHeight"), "needs scrolling"
        parts = ("start", "vote", "end")
        visible, = [part for part in parts if self.find(f"#{part}").is_displayed()]
        return visible

    def answers(self):
        return " ".join(self.js("state.answers"))

    def state(self):
        """Whether a is left, which question, and the line and the bar of progress."""
        k, a_is_left = identify(self.js("{left: $('left').src, right: $('right').src}"))
        assert self.find("#prompt").text == f"“prompt {k}”"
        names = {text: name for name, text in ballot.QUESTIONS.items()}
        question = names[self.find("#question").text]
        return a_is_left, question, self.find("#progress").text, self.js("$('bar').value")


@pytest.fixture
def browser(tmp_path):
    program, driver_program = shutil.which("chromium"), shutil.which("chromedriver")
    if None in (webdriver, program, driver_program):
        pytest.skip("needs Chromium, chromedriver and Selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver_program)) as driver:
        yield Page(driver, tmp_path)
        # Whatever a test did, the page must have been quiet: no error, no request.
        assert driver.get_log("browser") == []
        schemes = set()
        for entry in driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                schemes.add(event["params"]["request"]["url"].partition(":")[0])
        # Chromium's own new tab is chrome:.
        assert "file" in schemes and schemes <= {"file", "data", "blob", "chrome"}


def test_a_rater_from_the_first_click_to_the_file(browser, tmp_path):
    key = browser.open(make_pairs(4), rater=" ", seed=11)
    assert browser.part() == "start", "a blank is no name"
    browser.press("Ann O/")
    browser.click("#start button")

    # This rater always finds that a fits better, and that b looks better but for two ties.
    arrows = {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT}
    for k in range(4):
        assert browser.part() == "vote"
        a_is_left, *state = browser.state()
        assert state == ["alignment", f"Pair {k + 1} of 4, question 1 of 2", k / 4]
        a, b = ("left", "right") if a_is_left else ("right", "left")
        if k == 1:  # a mistake, taken back
            browser.press(arrows[b], Keys.BACKSPACE)
        if k % 2:
            browser.click(f"[data-act={a}] img")
        else:
            browser.press(arrows[a])
        state = a_is_left, "quality", f"Pair {k + 1} of 4, question 2 of 2", k / 4 + 1 / 8
        assert browser.state() == state
        if k == 2:
            browser.driver.refresh()
            assert browser.state() == state
            browser.press(Keys.ARROW_UP)
        elif k == 1:
            browser.press(arrows[b])
        else:
            browser.click(f"[data-act={b}]")

    assert browser.part() == "end"
    browser.press(Keys.ARROW_UP)  # too late to count
    browser.click("#end [data-act=back]")
    assert browser.part() == "vote" and browser.state()[1] == "quality"
    browser.click("[data-act=tie]")
    browser.click("#download")
    file = tmp_path / "votes_Ann_O_.json"
    WebDriverWait(browser.driver, 30).until(lambda _: file.exists() and file.stat().st_size)
    votes = ballot.read_votes([file], key)
    assert json.loads(file.read_text(encoding="utf-8"))["rater"] == "Ann O/"
    assert votes["alignment"] == {"rates": [1], "ties": [0]}
    assert votes["quality"] == {"rates": [0.25], "ties": [0.5]}


def test_one_answer_for_one_press(browser):
    browser.open(make_pairs(3), "Bo")
    actions = ActionChains(browser.driver)
    actions.key_down(Keys.ALT).send_keys(Keys.ARROW_LEFT).key_up(Keys.ALT).send_keys("x").perform()
    assert browser.answers() == "", "these keys are the browser's"
    for repeat in (False, True, True):  # a key held down
        event = {"type": "rawKeyDown", "key": "ArrowLeft", "autoRepeat": repeat}
        browser.driver.execute_cdp_cmd("Input.dispatchKeyEvent", event)
    assert browser.answers() == "left"
    ActionChains(browser.driver).double_click(browser.find("[data-act=right]")).perform()
    browser.press(" ")
    assert browser.answers() == "left right tie"
    browser.press(Keys.TAB, " ")  # to the left picture, where space means that button
    assert browser.answers() == "left right tie left"
    browser.press(*4 * [Keys.BACKSPACE])
    assert browser.answers() == "" and browser.part() == "vote"
    browser.press(Keys.BACKSPACE)  # from the first question back to the name
    assert browser.part() == "start" and browser.js("document.activeElement.id") == "rater"


def test_the_next_rater_starts_from_nothing(browser):
    browser.open(make_pairs(1), "Bo")
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    browser.click("[data-act=next]")
    browser.driver.switch_to.alert.dismiss()
    assert browser.part() == "end" and browser.js("state.rater") == "Bo"
    browser.click("[data-act=next]")
    browser.driver.switch_to.alert.accept()
    for _ in range(2):
        assert browser.part() == "start" and browser.js("$('rater').value") == ""
        assert browser.answers() == ""
        browser.driver.refresh()


@pytest.mark.parametrize("lost, kept", [("localStorage", "sessionStorage"),
                                        ("sessionStorage", "localStorage")])
def test_votes_outlive_the_loss_of_one_store(browser, lost, kept):
    browser.open(make_pairs(2), "Bo")
    browser.press(Keys.ARROW_LEFT)
    slot, saved, same = browser.js("[slot, ...stores.map((store) => window[store].getItem(slot))]")
    assert saved == same and json.loads(saved) == {"rater": "Bo", "answers": ["left"]}
    # Written before the page runs, because Chromium's localStorage may come up empty by itself.
    browser.before_load(f"{lost}.clear(); {kept}.setItem({slot!r}, {saved!r});")
    browser.driver.refresh()
    assert browser.js("state.rater") == "Bo" and browser.answers() == "left"
    assert browser.js(f"{lost}.length") == 0, "what was not found must not be overwritten"


def test_works_on_a_phone_where_storage_is_blocked(browser):
    prompt = 'a <b>"star"</b> & </script><script>document.title = "x"</script> ' + 12 * "blue "
    browser.before_load("""
        for (const store of ["localStorage", "sessionStorage"]) Object.defineProperty(window, store,
            {get() { throw new DOMException("blocked", "SecurityError"); }});""")
    browser.open([{**pair, "prompt": prompt} for pair in make_pairs(2)], "Cy", width=400)
    assert browser.js("$('prompt').textContent") == f"“{prompt}”"
    assert browser.driver.title == "Picture ballot"
    assert browser.js("document.documentElement.scrollWidth <= 400")
    for _ in range(4):
        assert browser.part() == "vote" and browser.js("document.activeElement.id") == "question"
        # A button, a picture, a field without a name would be nothing to a screen reader.
        named = browser.driver.find_elements("css selector", "#vote :is(button, progress, h1)")
        assert len(named) == 6 and all(element.accessible_name for element in named)
        browser.click("[data-act=tie]")
    assert browser.part() == "end"
    browser.driver.refresh()  # nothing was kept, and nothing breaks
    assert browser.part() == "start"
