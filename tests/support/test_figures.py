"""What the figures show: read back from the axes, before they become pixels."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import figures

GRAYS = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(12)]
CONFIG = SimpleNamespace(reward="r", gold="g", others=("a", "b"), runs=(), quick=False)


@pytest.fixture
def axes(monkeypatch):
    """path -> axes of all figures that were saved."""
    found = {}
    monkeypatch.setattr(figures.Figure, "savefig",
                        lambda self, path: found.update({path: self.axes}))
    return found


def gray(ax):
    return int(ax.images[0].get_array().max())


def points(ax):
    """The points of each line, error bars' data included once."""
    return [list(zip(*(v.tolist() for v in line.get_data()))) for line in ax.lines]


def spans(ax):
    """(x, low, high) of every error bar."""
    return [(round(s[0][0], 3), round(s[0][1], 3), round(s[1][1], 3))
            for part in ax.collections for s in part.get_segments()]


def test_beliefs_are_a_row_a_prompt_and_ten_columns_from_first_to_last(axes):
    steps = [[Image.new("RGB", (2, 2), (k + side, 0, 0)) for side in (0, 100)] for k in range(50)]
    figures.beliefs("b", ["p", "q"], steps, [str(k) for k in range(50)], GRAYS[10:])
    top, bottom = axes["b"][:11], axes["b"][11:]
    shown = [gray(ax) for ax in top[:-1]]
    assert shown == [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert [gray(ax) for ax in bottom[:-1]] == [k + 100 for k in shown]
    assert (gray(top[-1]), gray(bottom[-1])) == (10, 11)


def test_ranking_runs_evenly_from_best_to_worst(axes):
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
    figures.ranking("r", GRAYS[:5], list("abcde"), {"r": values, "-r": -values}, 3)
    shown = [(gray(ax), ax.get_title(), ax.get_xlabel()) for ax in axes["r"]]
    assert shown == [(1, "9.00", "b"), (4, "5.00", "e"), (2, "1.00", "c"),
                     (2, "-1.00", "c"), (4, "-5.00", "e"), (1, "-9.00", "b")]


def test_before_and_after_are_the_same_seeds_from_bad_to_good(axes):
    before, after = torch.arange(12.0).flip(0) / 4, torch.arange(12.0)
    figures.before_after("b", [f"p{i}" for i in range(12)], (before, after), (GRAYS, GRAYS[::-1]))
    top, bottom = axes["b"][:10], axes["b"][10:]
    assert [gray(ax) for ax in top] == [11, 10, 9, 7, 6, 5, 4, 2, 1, 0]
    assert [gray(ax) + gray(below) for ax, below in zip(top, bottom)] == [11] * 10
    assert top[0].get_title() == "p11\n0.00 → 11.00" and top[-1].get_title() == "p0\n2.75 → 0.00"


def test_curves_show_rounds_and_both_ends(axes):
    rows = [dict(queries=8, reward=0.5, reward_se=0.1, kl=2.0),
            dict(queries=16, reward=0.75, reward_se=0.2, kl=3.0)]
    ends = dict(reward=(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])),
                kl=(torch.zeros(2), torch.tensor([4.0, 8.0])))
    figures.curves("c", rows, ends, dict(reward="r", kl="KL"))
    reward, kl = axes["c"]
    assert [(8, 0.5), (16, 0.75)] in points(reward) and [(0, 0.5), (16, 1)] in points(reward)
    assert [(8, 2), (16, 3)] in points(kl) and [(0, 0), (16, 6)] in points(kl)
    assert spans(reward) == [(8, 0.4, 0.6), (16, 0.55, 0.95), (0, 0, 1), (16, 1, 1)]  # ± s.e.


def test_sweep_puts_every_ratio_at_its_kl(axes):
    rows = [(0.0, (300.0, 8.0), (-0.6, 0.1), (0.8, 0.02)),
            (0.1, (5.0, 1.0), (-1.3, 0.1), (0.6, 0.04))]
    figures.sweep("s", rows, ("proxy", "gold"))
    for ax, values in zip(axes["s"], ((-0.6, -1.3), (0.8, 0.6))):
        assert [(300, values[0]), (5, values[1])] in points(ax)
        assert ax.texts[1].get_text() == "0.1" and ax.texts[1].xy == (5, values[1])
    assert [spans(ax)[0] for ax in axes["s"]] == [(300, -0.7, -0.5), (300, 0.78, 0.82)]


def test_bounds_and_the_line_where_they_are_equal(axes):
    figures.bounds("b", {5: [(0.1, 0.2), (1.0, 3.0)], 10: [(0.1, 0.15), (1.0, 2.0)]})
    (ax,) = axes["b"]
    assert points(ax) == [[(0.1, 0.2), (1, 3)], [(0.1, 0.15), (1, 2)], [(0.1, 0.1), (1, 1)]]


def test_overoptimization_marks_hindsights_best(axes):
    rows = [dict(kl=float(k), reward=k / 2, gold=1 - k / 4) for k in range(3)]
    figures.overoptimization("o", {"β = 0": (rows, 1)}, dict(reward="r", gold="g"), "title")
    for ax, key in zip(axes["o"], ("reward", "gold")):
        assert points(ax) == [[(k, rows[k][key]) for k in range(3)], [(1, rows[1][key])]]


@pytest.mark.parametrize("passed, stop", [(2, [200]), (3, [])])
def test_early_stopping_has_a_panel_a_run_and_marks_rule_stop_and_hindsight(passed, stop, axes):
    rows = [dict(queries=100 * n, gold=n / 4, gold_se=0.1, labels_mean=n / 2, labels_se=0.2)
            for n in range(3)]
    figures.early_stopping("e", {"A": (rows, 1, passed, 2), "B": (rows, 0, 3, 0)}, "g", 20)
    a, b, *_ = axes["e"]
    assert (a.get_title(), b.get_title()) == ("A", "B")
    shown = {line.get_label(): list(zip(*line.get_data())) for line in a.lines}
    assert shown["truth ± s.e."] == [(0, 0), (100, 0.25), (200, 0.5)]
    assert (shown["kept by the rule"], shown["hindsight's best"]) == ([(100, 0.25)], [(200, 0.5)])
    ((labels, _, (bars,)),) = a.containers
    assert labels.get_ydata().tolist() == [0, 0.5, 1]
    assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [
        pytest.approx(ends) for ends in ([-0.2, 0.2], [0.3, 0.7], [0.8, 1.2])]
    dashed = [list(line.get_xdata()) for line in a.lines if line.get_linestyle() == "--"]
    assert [x[0] for x in dashed if x] == stop


def dots(ax):
    """(model, group's marker, mean, low, high) of each dot of a panel."""
    found = []
    for line, _, (bars,) in ax.containers:
        for x, y, (left, right) in zip(*line.get_data(), bars.get_segments(), strict=True):
            assert left[1] == right[1] == y
            (model,) = ax.yaxis.get_major_formatter().format_ticks([round(y)])
            values = [round(float(v), 3) for v in (x, left[0], right[0])]
            found.append((model, line.get_marker(), *values))
    return found


def test_scores_have_a_panel_a_measure_with_its_own_numbers(axes):
    columns = ("reward", "gold", "a", "b", "diversity")
    summaries = {}
    for k, model in enumerate(("A", "B")):
        summaries[model] = {name: (10.0 * k + i, 0.5, 9) for i, name in enumerate(columns)}
    del summaries["A"]["diversity"]
    figures.draw_scores("s", summaries, CONFIG, "")
    found = {ax.get_title(): dots(ax) for ax in axes["s"]}
    assert found == {
        "reward (r)": [("A", "o", 0, -0.5, 0.5), ("B", "o", 10, 9.5, 10.5)],
        "gold (g)": [("A", "o", 1, 0.5, 1.5), ("B", "o", 11, 10.5, 11.5)],
        "a": [("A", "o", 2, 1.5, 2.5), ("B", "o", 12, 11.5, 12.5)],
        "diversity": [("B", "o", 14, 13.5, 14.5)]}
    assert axes["s"][0].get_ylim() == (1.5, -0.5)  # the first model on top


def test_generalization_is_gold_by_family_and_split(axes):
    """Of each group two pictures, 0.2 apart: of one seed ± s.d./√2; of two seeds 1 apart, ± 0.5."""
    gold, rows = {("x", "seen"): 1.0, ("y", "seen"): 2.0, ("x", "unseen"): 4.0}, []
    for seed in (0, 1):
        for i, (family, split) in enumerate([*gold, *gold]):
            rows.append({"seed": seed, "family": family, "split": split, "prompt": family + split,
                         "reward": 99.0, "gold": gold[family, split] + 0.2 * (i > 2) + seed})
    figures.draw_generalization("g", {"A": rows, "B": rows[:6], "best of 3": rows[:2]}, CONFIG, "")
    x, y = axes["g"]
    assert (x.get_title(), y.get_title()) == ("x", "y")
    assert dots(x) == [("A", "o", 1.6, 1.09, 2.11), ("B", "o", 1.1, 1, 1.2),  # √(0.5² + 0.1²)
                       ("A", "s", 4.6, 4.09, 5.11), ("B", "s", 4.1, 4, 4.2)]
    assert dots(y) == [("A", "o", 2.6, 2.09, 3.11), ("B", "o", 2.1, 2, 2.2)]
    (legend,) = x.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["seen", "unseen"]


def test_no_title_is_cut_off(axes, tmp_path):
    title = "QUICK TOUR, far too little training: the mean and the standard error of everything"
    Image.new("RGB", (400, 90)).save(tmp_path / "p.png")
    figures.frame("f", tmp_path / "p.png", title)
    figures.dots("d", {"m": {"A": {"seen": (0.0, 1.0)}}}, title)
    figures.queries("q", {"A": ([1, 2], torch.ones(1, 2))}, ("queries", "r"), title)
    for path in "fdq":
        figure = axes[path][0].figure
        figure.draw_without_rendering()
        (text,) = figure.texts
        assert text.get_text().split() == title.split()
        box, page = text.get_window_extent(), figure.bbox
        assert 0 < box.x0 and box.x1 < page.x1 and box.y1 < page.y1
        assert box.y0 > axes[path][0].get_window_extent().y1


def test_queries_are_means_of_seeds_over_the_latest_three_rounds(axes):
    seeds = []
    for base in (0.0, 6.0):
        seeds.append([{"queries": 8.0 * (k + 1), "reward": base + r, "gold": 99.0}
                      for k, r in enumerate((3.0, 6.0, 9.0, 12.0))])
    figures.draw_queries("q", {"A": seeds, "B": seeds[:1]}, CONFIG, "queries", "queries", "")
    (ax,) = axes["q"]
    assert points(ax) == [[(8, 6), (16, 7.5), (24, 9), (32, 12)],
                          [(8, 3), (16, 4.5), (24, 6), (32, 9)]]
    assert len(ax.collections) == 1  # one seed has no spread
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    deviation = 3 * 2**0.5
    assert (band.min(), band.max()) == pytest.approx((6 - deviation, 12 + deviation))


def test_best_of_n_is_a_curve_with_the_trained_models_means_as_lines(axes):
    """Only models that were trained have a line; reward above, gold below."""
    curve = [{"n": n, "reward": n / 8, "reward_se": 0.05, "gold": 1 - n / 8, "gold_se": 0.1}
             for n in (1, 2, 4)]
    summaries = {m: {"reward": (k + 0.5, 0.1, 9), "gold": (k + 0.25, 0.1, 9)}
                 for k, m in enumerate(("pretrained", "A", "B"))}
    results = {"best_of_n": curve, "summaries": summaries}
    figures.draw_best_of_n("n", {"A": [], "B": []}, CONFIG, results, "")
    reward, gold = axes["n"]
    assert (reward.get_title(), gold.get_title()) == ("reward (r)", "gold (g)")
    assert reward.lines[0].get_xydata().tolist() == [[1, 0.125], [2, 0.25], [4, 0.5]]
    assert gold.lines[0].get_xydata().tolist() == [[1, 0.875], [2, 0.75], [4, 0.5]]
    assert spans(reward) == [(1, 0.075, 0.175), (2, 0.2, 0.3), (4, 0.45, 0.55)]
    assert spans(gold) == [(1, 0.775, 0.975), (2, 0.65, 0.85), (4, 0.4, 0.6)]
    for ax, levels in ((reward, [1.5, 2.5]), (gold, [1.25, 2.25])):
        flat = [line for line in ax.lines if line.get_label() in summaries]
        assert [(line.get_label(), *line.get_ydata()) for line in flat] == [
            (model, y, y) for model, y in zip("AB", levels)]
    assert reward.get_xscale() == "log"


def test_same_seeds_show_two_seen_pictures_of_each_family_a_row_a_model(monkeypatch):
    calls = []
    monkeypatch.setattr(figures, "sheet", lambda *arguments, inches: calls.append(arguments))
    monkeypatch.setattr(figures, "frame", lambda *arguments: None)
    asked = [{"family": family, "split": "seen" if i < 6 else "unseen", "prompt": f"p{i}"}
             for i, family in enumerate("xxxyyyxy")]
    images = {"A": [f"A{i}" for i in range(8)], "best of 2": [f"B{i}" for i in range(6)]}
    figures.draw_same_seeds("s", asked, images, "")
    grid = [["A0", "A1", "A3", "A4"], ["B0", "B1", "B3", "B4"]]
    assert calls == [("s", grid, ["A", "best of 2"], ["p0", "p1", "p3", "p4"])]
