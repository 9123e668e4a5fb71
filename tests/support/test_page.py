"""The evaluation's page: what it says of given claims, and that it fits a real screen."""
import math
import re
from types import SimpleNamespace

import pytest

from support import page

NASTY, SAFE = "<b>|& __NOTE__ \"'", "&lt;b&gt;|&amp; __NOTE__ &quot;&#x27;"
CLAIMS = [dict(zip("claim a b metric mean low high verdict".split(), v), split="seen") for v in (
    ("X wins", "X", "Y", "reward", 0.5, 0.25, 0.75, "holds"),
    ("X wins", "X", NASTY, "reward", -0.01, -0.25, 0.23, "cannot be told"),
    ("KL helps", "K", "L", "gold", -3.0, -4.0, -1.0, "fails"),
    ("X wins", "Z", "Y", "reward", 0.3, 0.125, 0.5, "holds"))]
COLUMNS = ("reward", "gold", "gold a", "gold unseen", "aesthetic", "kB", "path_kl", "diversity")


def write(out, claims=CLAIMS, **changes):
    """The text of a page for two models, one of which has a nasty name, and one picture."""
    config = dict(out=out, reward="r", gold="g", others=("aesthetic", "kB"), runs=(), quick=False,
                  seeds=5)
    summary = {name: (i + 0.123456, 0.04321, 9) for i, name in enumerate(COLUMNS)}
    (out / "scores.png").write_bytes(b"one")
    results = {"summaries": {"plain": summary, NASTY: summary}, "claims": claims, "prices": []}
    page.write(SimpleNamespace(**config | changes), results)
    return (out / "index.html").read_text(encoding="utf-8")


def test_findings_say_each_claim_once_a_verdict_with_its_smallest_difference(tmp_path):
    assert page.findings(CLAIMS) == {
        "holds": [("X wins", "in 2 of 3 comparisons; smallest difference: Z − Y, reward +0.300 "
                             "(+0.125 to +0.500)")],
        "fails": [("KL helps", "K − L, gold −3.000 (−4.000 to −1.000)")],
        "cannot be told": [("X wins", f"in 1 of 3 comparisons; X − {NASTY}, reward −0.010 (−0.250 "
                                      "to +0.230)")]}
    assert re.findall("<h3>(.*?) of 4 comparisons</h3>", write(tmp_path)) == [
        "✓ Holds: 2", "✗ Fails: 1", "? Cannot be told: 1"]
    for text in (write(tmp_path, quick=True), write(tmp_path, []), write(tmp_path, [], seeds=1)):
        assert "<h3>Nothing can be concluded here: " in text
        assert not re.search("class='forest'|<li>|comparisons|interval", text.split("<body>")[1])


def test_forest_has_a_row_a_claim_and_a_scale_a_measure(tmp_path):
    text, rows = write(tmp_path), []
    for block in text.split("<tr class='scale'>")[1:]:
        ticks = re.findall(r"class='tick' style='left:([\d.]+)%'>([^<]*)<", block)
        (x0, v0), *_, (x1, v1) = [(float(x), float(v.replace("−", "-"))) for x, v in ticks]
        for style, head, names, row in re.findall(
                "<tr class='([a-z]+)'>(.*?)<td class='names'>(.*?)</td>(.*?)</tr>", block):
            zero, low, width, mean = map(float, re.findall(r":(-?[\d.]+)%", row))
            assert min(zero, low) > 0 and max(zero, low + width) < 100
            shown = [v0 + (x - x0) * (v1 - v0) / (x1 - x0) for x in (zero, low, mean, low + width)]
            rows.append((style, names, pytest.approx(shown, abs=2e-3), "rowspan='3'" in head))
    assert rows == [("holds", "X − Y", [0, 0.25, 0.5, 0.75], True),
                    ("unknown", f"X − {SAFE}", [0, -0.25, -0.01, 0.23], False),
                    ("holds", "Z − Y", [0, 0.125, 0.3, 0.5], False),
                    ("fails", "K − L", [0, -4, -3, -1], False)]
    assert "<b>? cannot be told</b><small>−0.010 (−0.250 to +0.230)</small>" in text
    assert page.places([dict(low=0.0, high=0.0)])[0](0.0) == 50


def test_table_shows_seven_columns_and_folds_the_rest_and_no_name_is_markup(tmp_path):
    text = write(tmp_path, reward=NASTY)
    shown, folded = [re.findall("<th>([^<]*)<small>N = 9</small>", part)
                     for part in text.split("<details>")]
    assert shown == ["reward", "gold", "gold unseen", "path KL", "diversity", "aesthetic"]
    assert folded == ["gold a", "kB"] and text.count(SAFE) == 6 and "<b>|" not in text
    assert text.count("<td>0.12 <small>± 0.04</small></td>") == 2  # as many digits as are known
    assert re.findall("src=(.*?)>", text) == ["'data:image/png;base64,b25l'"]
    assert not re.search(r"href|https?:|@import|url\(|<script", text)  # it needs no other file


def test_page_fits_a_projector_and_a_phone(chromium, tmp_path):
    write(tmp_path, [{**claim, "a": "DPOK_no_KL", "b": "pretrained"} for claim in CLAIMS])
    for width, height, first in ((1280, 720, ".first"), (360, 740, ".findings h3")):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get((tmp_path / "index.html").as_uri())
        chromium.execute_script("document.querySelector('details').open = true")
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        box = chromium.find_element("css selector", first).rect
        assert box["y"] + box["height"] < height  # on a projector, all claims at once


def test_prices_are_a_row_a_model_and_a_column_a_budget_with_a_dash_for_what_none_paid():
    line = {"price": "queries", "budget": 400, "model": "best of n", "n": 3, "reward": -0.194,
            "standard_error": 0.0207}
    text = page.price_table([line, line | {"model": NASTY, "n": "", "reward": 0.5},
                             line | {"price": "evaluations", "budget": 64000, "model": NASTY,
                                     "n": "", "reward": 1.0, "standard_error": math.nan}])
    assert re.findall("<th>([^<]*)<small>([^<]*)<", text) == [
        ("400", "reward queries"), ("64,000", "UNet evaluations")]
    assert re.findall("<th>([^<]*)</th>(.*?)</tr>", text.split("<tbody>")[1]) == [
        ("best of n", "<td>−0.19 <small>± 0.02</small> <small>n = 3</small></td><td>–</td>"),
        (SAFE, "<td>0.50 <small>± 0.02</small></td><td>1.00</td>")]
    assert page.price_table([]) == ""
