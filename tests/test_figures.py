"""What the figures show: read back from the axes, before they become pixels."""
import base64
import re

import pytest
import torch
from PIL import Image

from tiny_sd import figures

GRAYS = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(12)]


@pytest.fixture
def drawn(monkeypatch):
    """path -> figure of all that was saved."""
    found = {}
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: found.update({path: self}))
    return found


def gray(ax):
    return int(ax.images[0].get_array().max())


def points(ax):
    """The points of each line, error bars' data included once."""
    return [list(zip(*(v.tolist() for v in line.get_data()))) for line in ax.lines]


def test_sheet_puts_each_picture_under_its_names(drawn):
    figures.sheet("s", [GRAYS[0:3], GRAYS[3:6]], ["one", "two"], ["a", "b", "c"])
    axes = drawn["s"].axes
    assert [gray(ax) for ax in axes] == [0, 1, 2, 3, 4, 5]
    assert [ax.get_title() for ax in axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["one", "", "", "two", "", ""]


def test_ranking_runs_evenly_from_best_to_worst(drawn):
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
    figures.ranking("r", GRAYS[:5], list("abcde"), {"r": values, "-r": -values}, 3)
    shown = [(gray(ax), ax.get_title(), ax.get_xlabel()) for ax in drawn["r"].axes]
    assert shown == [(1, "9.00", "b"), (4, "5.00", "e"), (2, "1.00", "c"),
                     (2, "-1.00", "c"), (4, "-5.00", "e"), (1, "-9.00", "b")]
    figures.ranking("all", GRAYS[:5], list("abcde"), {"r": values}, 99)
    assert [gray(ax) for ax in drawn["all"].axes] == [1, 3, 4, 0, 2]


def test_before_and_after_are_the_same_seeds_from_bad_to_good(drawn):
    before, after = torch.arange(12.0).flip(0) / 4, torch.arange(12.0)
    figures.before_after("b", [f"p{i}" for i in range(12)], (before, after), (GRAYS, GRAYS[::-1]))
    top, bottom = drawn["b"].axes[:10], drawn["b"].axes[10:]
    assert [gray(ax) for ax in top] == [11, 10, 9, 7, 6, 5, 4, 2, 1, 0]
    assert [gray(ax) + gray(below) for ax, below in zip(top, bottom)] == [11] * 10
    assert top[0].get_title() == "p11\n0.00 → 11.00" and top[-1].get_title() == "p0\n2.75 → 0.00"
    assert (top[0].get_ylabel(), bottom[0].get_ylabel()) == ("before", "after")


def test_curves_show_rounds_and_both_ends(drawn):
    rows = [dict(queries=8, reward=0.5, reward_se=0.1, kl=2.0),
            dict(queries=16, reward=0.75, reward_se=0.2, kl=3.0)]
    ends = dict(reward=(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])),
                kl=(torch.zeros(2), torch.tensor([4.0, 8.0])))
    figures.curves("c", rows, ends, dict(reward="r", kl="KL"))
    reward, kl = drawn["c"].axes
    assert [(8, 0.5), (16, 0.75)] in points(reward) and [(0, 0.5), (16, 1)] in points(reward)
    assert [(8, 2), (16, 3)] in points(kl) and [(0, 0), (16, 6)] in points(kl)
    bars = [bar[:, 1].tolist() for part in reward.collections for bar in part.get_segments()]
    assert [round(v, 3) for v in bars[0]] == [0.4, 0.6]  # ± s.e. of a round
    assert [round(v, 3) for v in bars[2]] == [0.0, 1.0]  # s.e. of 0 and 1: ½


def test_sweep_puts_every_beta_at_its_kl(drawn):
    rows = [(0.0, (300.0, 8.0), (-0.6, 0.1), (0.8, 0.02)), (0.1, (5.0, 1.0), (-1.3, 0.1),
                                                            (0.6, 0.04))]
    figures.sweep("s", rows, ("proxy", "gold"))
    for ax, values in zip(drawn["s"].axes, ((-0.6, -1.3), (0.8, 0.6))):
        assert [(300, values[0]), (5, values[1])] in points(ax)
        assert [(text.get_text(), text.xy) for text in ax.texts] == [
            ("0", (300, values[0])), ("0.1", (5, values[1]))]


def test_bounds_and_the_line_where_they_are_equal(drawn):
    figures.bounds("b", {5: [(0.1, 0.2), (1.0, 3.0)], 10: [(0.1, 0.15), (1.0, 2.0)]})
    (ax,) = drawn["b"].axes
    assert points(ax) == [[(0.1, 0.2), (1, 3)], [(0.1, 0.15), (1, 2)], [(0.1, 0.1), (1, 1)]]


def test_overoptimization_marks_the_stop(drawn):
    rows = [dict(kl=float(k), reward=k / 2, gold=1 - k / 4) for k in range(3)]
    figures.overoptimization("o", {"β = 0": (rows, 1)}, dict(reward="r", gold="g"), "title")
    for ax, key in zip(drawn["o"].axes, ("reward", "gold")):
        assert points(ax) == [[(k, rows[k][key]) for k in range(3)], [(1, rows[1][key])]]


def test_queries_are_means_of_seeds(drawn):
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    figures.queries("q", {"A": ([10, 20], y), "B": ([10, 20], y[:1])}, "r", "title")
    (ax,) = drawn["q"].axes
    assert points(ax) == [[(10, 2), (20, 3)], [(10, 1), (20, 2)]] and len(ax.collections) == 1
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(3 + 2**0.5) and band.min() == pytest.approx(2 - 2**0.5)


def test_bars_and_groups_are_as_high_as_their_means(drawn):
    figures.bars("b", {"r": {"A": (1.0, 0.1, 9), "B": (-2.0, 0.2, 9)}}, "title")
    assert [bar.get_height() for bar in drawn["b"].axes[0].patches] == [1, -2]
    figures.groups("g", {"A": {"x": (1.0, 0.1), "y": (2.0, 0.1)},
                         "B": {"x": (3.0, 0.1), "y": (4.0, 0.1)}}, "r", "title")
    (ax,) = drawn["g"].axes
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 3, 4]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["x", "y"]
    assert drawn["g"].get_suptitle() == "title"


def spans(ax):
    """(x, low, high) of every error bar."""
    return [(round(s[0][0], 3), round(s[0][1], 3), round(s[1][1], 3))
            for part in ax.collections for s in part.get_segments()]


def test_error_bars_labels_and_titles_of_bars_and_groups(drawn):
    figures.bars("b", {"r": {"A": (1.0, 0.1, 9), "B": (-2.0, 0.2, 9)}}, "title")
    ax = drawn["b"].axes[0]
    assert spans(ax) == [(0, 0.9, 1.1), (1, -2.2, -1.8)]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["A", "B"] and ax.get_title() == "r"
    figures.groups("g", {"A": {"x": (1.0, 0.1)}, "B": {"x": (3.0, 0.2)}}, "r", "title")
    ax = drawn["g"].axes[0]
    assert [bar[1:] for bar in spans(ax)] == [(0.9, 1.1), (2.8, 3.2)]
    sets = [bars for bars in ax.containers if hasattr(bars, "patches")]
    assert {bars.get_label(): bars[0].get_height() for bars in sets} == {"A": 1, "B": 3}


def lines_of(ax):
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines}


def test_every_line_has_its_own_label_and_every_axis_its_title(drawn, tmp_path):
    y = torch.tensor([[1.0, 2.0]])
    figures.queries("q", {"A": ([10, 20], y), "B": ([10, 20], y + 4)}, "r", "title")
    ax = drawn["q"].axes[0]
    assert lines_of(ax) == {"A": [1, 2], "B": [5, 6]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("reward queries", "r")
    runs = {f"β = {i}": ([dict(kl=1.0 + i, reward=2.0 + i, gold=3.0 + i)], 0) for i in (0, 1)}
    figures.overoptimization("o", runs, dict(reward="r", gold="g"), "title")
    reward, gold = drawn["o"].axes
    assert (reward.get_title(), gold.get_title()) == ("reward: r", "gold: g")
    assert lines_of(reward)["β = 0"] == [2] and lines_of(gold)["β = 1"] == [4]
    figures.bounds("l", {5: [(0.1, 0.2), (1.0, 3.0)], 10: [(0.1, 0.15), (1.0, 2.0)]})
    found = lines_of(drawn["l"].axes[0])
    assert (found["T = 5"], found["T = 10"]) == ([0.2, 3], [0.15, 2])
    figures.sweep("s", [(0.0, (300.0, 8.0), (-0.6, 0.1), (0.8, 0.02))], ("proxy", "gold"))
    assert [spans(ax)[0] for ax in drawn["s"].axes] == [(300, -0.7, -0.5), (300, 0.78, 0.82)]
    assert [ax.get_title() for ax in drawn["s"].axes] == ["proxy", "gold"]
    ends = dict(reward=(torch.zeros(2), torch.ones(2)))
    figures.curves("c", [dict(queries=8, reward=0.5, reward_se=0.1)], ends, dict(reward="Title"))
    assert drawn["c"].axes[0].get_title() == "Title"
    Image.new("RGB", (240, 120)).save(tmp_path / "p.png")
    figures.frame("f", tmp_path / "p.png", "what it shows")
    assert drawn["f"].get_suptitle() == "what it shows"


def test_page_puts_each_caption_under_its_figure(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    figures.page(tmp_path / "i.html", ["| a | b |", "| --- | --- |", "| 1 | 2 |"], ["said"],
                 dict(one="First.", two="Second.", missing="Third."), "<p>note</p>")
    text = (tmp_path / "i.html").read_text()
    found = re.findall(r"base64,([^']*)'><figcaption>([^<]*)<", text)
    assert [(base64.b64decode(data).decode(), caption) for data, caption in found] == [
        ("one", "First."), ("two", "Second.")]
    assert "Third" not in text and "<p>note</p>" in text
    assert "<td>1</td><td>2</td>" in text and "<li>said</li>" in text
