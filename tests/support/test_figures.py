"""The numbers and pictures that go into a figure, read back before they become pixels."""
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import evaluation, figures

GRAYS = [Image.new("RGB", (4, 4), (i, i, i)) for i in range(112)]


@pytest.fixture
def axes(monkeypatch):
    """Axes of all figures that were saved."""
    found = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, path: found.extend(self.axes))
    return found


def gray(ax):
    return int(ax.images[0].get_array().max())


def test_beliefs_are_a_row_a_prompt_and_ten_columns_from_first_to_last(axes):
    steps = [[GRAYS[k], GRAYS[k + 50]] for k in range(50)]
    trajectory = SimpleNamespace(prompts=["p", "q"], images=GRAYS[110:], timesteps=range(50, 0, -1))
    figures.beliefs("b", trajectory, steps)
    shown = [0, 5, 11, 16, 22, 27, 33, 38, 44, 49]
    assert [gray(ax) for ax in axes] == [*shown, 110, *(k + 50 for k in shown), 111]
    assert [axes[1].get_title(), axes[11].get_ylabel()] == ["t = 45", "q"]


def test_ranking_runs_evenly_from_best_to_worst(axes):
    values = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0])
    figures.ranking("r", GRAYS[:5], list("abcde"), {"r": values, "-r": -values}, 3)
    shown = [(gray(ax), ax.get_title(), ax.get_xlabel()) for ax in axes]
    assert shown == [(1, "9.00", "b"), (4, "5.00", "e"), (2, "1.00", "c"),
                     (2, "-1.00", "c"), (4, "-5.00", "e"), (1, "-9.00", "b")]


def test_before_and_after_are_the_same_noise_from_bad_to_good(axes):
    before = {"prompts": [f"p{i}" for i in range(12)], "images": GRAYS[:12],
              "reward": torch.arange(12.0).flip(0) / 4}
    after = {"images": GRAYS[20:32], "reward": torch.arange(12.0)}
    figures.before_after("b", before, after)
    shown = [11, 10, 9, 7, 6, 5, 4, 2, 1, 0]
    assert [gray(ax) for ax in axes] == [*shown, *(i + 20 for i in shown)]
    assert [axes[0].get_title(), axes[9].get_title()] == ["p11\n0.00 → 11.00", "p0\n2.75 → 0.00"]


def test_curves_show_rounds_and_looks_each_in_its_own_panel(axes):
    rows = [{"queries": 8 * n, "reward": n / 2, "reward_se": 0.1, "kl": n, "kl_se": 0.2}
            for n in (1, 2)]
    fresh = [{"queries": 8 * n, "reward": 9.0, "reward_se": 0.1, "kl": n, "kl_se": 0.2}
             for n in (0, 2)]
    figures.curves("c", rows, fresh, {"reward": "r", "kl": "KL"})
    for ax, name, title in zip(axes, ("reward", "kl"), ("r", "KL"), strict=True):
        assert ax.get_title() == title
        for (line, _, (bars,)), wanted in zip(ax.containers, (rows, fresh), strict=True):
            points = [(row["queries"], row[name]) for row in wanted]
            assert list(zip(*(values.tolist() for values in line.get_data()))) == points
            ends = [list(bar[:, 1]) for bar in bars.get_segments()]
            for (low, high), row in zip(ends, wanted):
                assert high - low == pytest.approx(2 * row[name + "_se"])


def test_chapter_5s_dots_and_curves_are_of_the_right_column_and_model(axes):
    summary = {"pretrained": {"a": (1.0, 0.1), "b": (2.0, 0.2)}, "M": {"a": (3.0, 0.3)}}
    evaluation.draw_dots("d", summary, {"first": {"seen": "a"}, "second": {"seen": "b"}})
    dots = [ax.containers[0][0].get_xydata().tolist() for ax in axes]
    assert dots == [[[1, 0], [3, 1]], [[2, 0]]] and [ax.get_title() for ax in axes] == [
        "first", "second"]
    del axes[:]
    points = {1: (0.0, 1.0), 4: (2.0, 3.0)}
    summary = {name: {"reward": (r, 0.1), "gold": (g, 0.1)} for name, (r, g) in zip(
        ("pretrained", "best of 4", "M"), (*points.values(), (5.0, 7.0)))}
    evaluation.draw_best_of_n("n", summary, ["M"])
    for k, ax in enumerate(axes):
        assert ax.containers[0][0].get_xydata().tolist() == [[n, p[k]] for n, p in points.items()]
        assert ax.lines[-1].get_ydata()[0] == (5, 7)[k]
