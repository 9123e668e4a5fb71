"""What the figures show: read back from the axes, before they become pixels."""
import base64
import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import figures

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


def lines_of(ax):
    return {line.get_label(): line.get_ydata().tolist() for line in ax.lines}


def spans(ax):
    """(x, low, high) of every error bar."""
    return [(round(s[0][0], 3), round(s[0][1], 3), round(s[1][1], 3))
            for part in ax.collections for s in part.get_segments()]


def bars_of(ax):
    """Label -> heights, of bars side by side."""
    return {bars.get_label(): [bar.get_height() for bar in bars]
            for bars in ax.containers if hasattr(bars, "patches")}


def ticks(ax):
    return [text.get_text() for text in ax.get_xticklabels()]


def test_sheet_puts_each_picture_under_its_names_and_frame_a_title_above(drawn, tmp_path):
    figures.sheet("s", [GRAYS[0:3], GRAYS[3:6]], ["one", "two"], ["a", "b", "c"])
    axes = drawn["s"].axes
    assert [gray(ax) for ax in axes] == [0, 1, 2, 3, 4, 5]
    assert [ax.get_title() for ax in axes] == ["a", "b", "c", "", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["one", "", "", "two", "", ""]
    GRAYS[7].resize((240, 120)).save(tmp_path / "p.png")
    figures.frame("f", tmp_path / "p.png", "title")
    assert (gray(drawn["f"].axes[0]), drawn["f"].get_suptitle()) == (7, "title")


@pytest.mark.parametrize("T", [4, 50])
def test_beliefs_are_a_row_a_prompt_and_at_most_ten_columns_from_first_to_last(drawn, T):
    steps = [[Image.new("RGB", (2, 2), (k + side, 0, 0)) for side in (0, 100)] for k in range(T)]
    figures.beliefs("b", ["p", "q"], steps, [str(k) for k in range(T)], GRAYS[10:])
    axes = drawn["b"].axes
    C = len(axes) // 2
    shown = [gray(ax) for ax in axes[:C - 1]]
    assert C == min(T, 10) + 1 and (shown[0], shown[-1]) == (0, T - 1)
    assert {b - a for a, b in zip(shown, shown[1:])} <= {T // 10 or 1, T // 10 + 1}
    assert [ax.get_title() for ax in axes[:C]] == [*map(str, shown), "$x_0$"]
    assert [gray(ax) for ax in axes[C:-1]] == [k + 100 for k in shown]
    assert (gray(axes[C - 1]), gray(axes[-1])) == (10, 11)
    assert (axes[0].get_ylabel(), axes[C].get_ylabel()) == ("p", "q")


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
    assert spans(reward) == [(8, 0.4, 0.6), (16, 0.55, 0.95), (0, 0, 1), (16, 1, 1)]  # ± s.e.
    assert (reward.get_title(), kl.get_title()) == ("r", "KL")


def test_sweep_puts_every_ratio_at_its_kl(drawn):
    rows = [(0.0, (300.0, 8.0), (-0.6, 0.1), (0.8, 0.02)), (0.1, (5.0, 1.0), (-1.3, 0.1),
                                                            (0.6, 0.04))]
    figures.sweep("s", rows, ("proxy", "gold"))
    for ax, values in zip(drawn["s"].axes, ((-0.6, -1.3), (0.8, 0.6))):
        assert [(300, values[0]), (5, values[1])] in points(ax)
        assert [(text.get_text(), text.xy) for text in ax.texts] == [
            ("0", (300, values[0])), ("0.1", (5, values[1]))]
    assert [spans(ax)[0] for ax in drawn["s"].axes] == [(300, -0.7, -0.5), (300, 0.78, 0.82)]
    assert [ax.get_title() for ax in drawn["s"].axes] == ["proxy", "gold"]


def test_bounds_and_the_line_where_they_are_equal(drawn):
    figures.bounds("b", {5: [(0.1, 0.2), (1.0, 3.0)], 10: [(0.1, 0.15), (1.0, 2.0)]})
    (ax,) = drawn["b"].axes
    assert points(ax) == [[(0.1, 0.2), (1, 3)], [(0.1, 0.15), (1, 2)], [(0.1, 0.1), (1, 1)]]
    assert lines_of(ax) == {"T = 5": [0.2, 3], "T = 10": [0.15, 2], "equal": [0.1, 1]}


def test_overoptimization_marks_the_stop(drawn):
    rows = [dict(kl=float(k), reward=k / 2, gold=1 - k / 4) for k in range(3)]
    figures.overoptimization("o", {"β = 0": (rows, 1)}, dict(reward="r", gold="g"), "title")
    for ax, key in zip(drawn["o"].axes, ("reward", "gold")):
        assert points(ax) == [[(k, rows[k][key]) for k in range(3)], [(1, rows[1][key])]]
        assert lines_of(ax)["β = 0"] == [row[key] for row in rows]
    assert [ax.get_title() for ax in drawn["o"].axes] == ["reward: r", "gold: g"]


def test_queries_are_means_of_seeds(drawn):
    y = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    figures.queries("q", {"A": ([10, 20], y), "B": ([10, 20], y[:1] + 4)}, "r", "title")
    (ax,) = drawn["q"].axes
    assert points(ax) == [[(10, 2), (20, 3)], [(10, 5), (20, 6)]] and len(ax.collections) == 1
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(3 + 2**0.5) and band.min() == pytest.approx(2 - 2**0.5)
    assert lines_of(ax) == {"A": [2, 3], "B": [5, 6]}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("reward queries", "r")


def test_bars_and_groups_are_as_high_as_their_means(drawn):
    figures.bars("b", {"r": {"A": (1.0, 0.1, 9), "B": (-2.0, 0.2, 9)}}, "title")
    ax = drawn["b"].axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1, -2]
    assert spans(ax) == [(0, 0.9, 1.1), (1, -2.2, -1.8)]
    assert ticks(ax) == ["A", "B"] and ax.get_title() == "r"
    figures.groups("g", {"A": {"x": (1.0, 0.1), "y": (2.0, 0.1)},
                         "B": {"x": (3.0, 0.2), "y": (4.0, 0.1)}}, "r", "title")
    (ax,) = drawn["g"].axes
    assert bars_of(ax) == {"A": [1, 2], "B": [3, 4]} and ticks(ax) == ["x", "y"]
    assert [bar[1:] for bar in spans(ax)] == [(0.9, 1.1), (1.9, 2.1), (2.8, 3.2), (3.9, 4.1)]
    assert drawn["g"].get_suptitle() == "title"


# ---- chapter 5's page -----------------------------------------------------------------------

CONFIG = SimpleNamespace(reward="r", gold="g", others=("a", "b"), runs=(), quick=False)


def test_same_seeds_show_two_seen_pictures_of_each_family_a_row_a_model(monkeypatch):
    calls = []
    monkeypatch.setattr(figures, "sheet", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(figures, "frame", lambda *arguments: calls.append(arguments))
    asked = []
    for i, family in enumerate("xxxyyyxy"):
        asked.append({"family": family, "split": "seen" if i < 6 else "unseen", "prompt": f"p{i}"})
    images = {"A": [f"A{i}" for i in range(8)], "best of 2": [f"B{i}" for i in range(6)]}
    figures.draw_same_seeds("s", asked, images, "NOTE ")
    grid = [["A0", "A1", "A3", "A4"], ["B0", "B1", "B3", "B4"]]
    assert calls[0] == ("s", grid, ["A", "best of 2"], ["p0", "p1", "p3", "p4"])
    assert calls[1][:2] == ("s", "s") and calls[1][2].startswith("NOTE ")


def test_scores_have_a_panel_a_measure_with_its_own_numbers(drawn):
    columns = ("reward", "gold", "a", "b", "diversity")
    summaries = {}
    for k, model in enumerate(("A", "B")):
        summaries[model] = {name: (10.0 * k + i, 0.5, 9) for i, name in enumerate(columns)}
    del summaries["B"]["diversity"]
    figures.draw_scores("s", summaries, CONFIG, "NOTE ")
    heights = {ax.get_title(): [bar.get_height() for bar in ax.patches] for ax in drawn["s"].axes}
    assert heights == {"reward: r": [0, 10], "gold: g": [1, 11], "a": [2, 12], "diversity": [4]}
    assert drawn["s"].get_suptitle().startswith("NOTE ")


def test_generalization_is_gold_by_family_and_split_a_picture_of_two_seeds_counted_once(drawn):
    """Of each group two pictures, of seeds that differ by far more than the pictures do."""
    gold, rows = {("x", "seen"): 1.0, ("y", "seen"): 2.0, ("x", "unseen"): 4.0}, []
    for seed in (0, 10):
        for i, (family, split) in enumerate([*gold, *gold]):
            rows.append({"picture": i, "family": family, "split": split, "reward": 99.0,
                         "gold": gold[family, split] + 0.2 * (i > 2) + seed})
    figures.draw_generalization("g", {"A": rows, "best of 3": rows[:2]}, CONFIG, "NOTE ")
    (ax,) = drawn["g"].axes
    assert ticks(ax) == ["x\nseen", "y\nseen", "x\nunseen"]
    assert bars_of(ax) == {"A": pytest.approx([6.1, 7.1, 9.1])}
    assert [high - low for _, low, high in spans(ax)] == pytest.approx([0.2] * 3)  # ± s.d./√2
    assert ax.get_ylabel() == "g" and drawn["g"].get_suptitle().startswith("NOTE ")


def test_queries_run_over_the_mean_of_the_latest_three_rounds(drawn):
    seeds = []
    for base in (0.0, 6.0):
        seeds.append([{"queries": 8.0 * (k + 1), "reward": base + r, "gold": 99.0}
                      for k, r in enumerate((3.0, 6.0, 9.0, 12.0))])
    figures.draw_queries("q", {"A": seeds}, CONFIG, "NOTE ")
    (ax,) = drawn["q"].axes
    assert points(ax) == [[(8, 6), (16, 7.5), (24, 9), (32, 12)]] and ax.get_ylabel() == "r"
    assert drawn["q"].get_suptitle().startswith("NOTE ")


def test_page_puts_each_caption_under_its_figure(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    figures.page(tmp_path / "i.html", ["| a | b |", "| --- | --- |", "| 1 | 2 |"], ["said"],
                 dict(one="First.", two="Second.", missing="Third."), "<p>note</p>")
    text = (tmp_path / "i.html").read_text(encoding="utf-8")
    found = re.findall(r"base64,([^']*)'><figcaption>([^<]*)<", text)
    assert [(base64.b64decode(data).decode(), caption) for data, caption in found] == [
        ("one", "First."), ("two", "Second.")]
    assert "Third" not in text and "<p>note</p>" in text
    assert "<td>1</td><td>2</td>" in text and "<li>said</li>" in text
