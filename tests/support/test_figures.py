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


def made_readings():
    """Two seeds, two prompts: each number is made of seed, prompt, model and place."""
    readings = []
    for seed in (0.0, 2.0):
        of_seed = {}
        for k, prompt in enumerate("pq"):
            of_seed[prompt] = {
                model: [{"queries": 8 * n, "kl": 10 * n + j, "reward": seed + 100 * k + 10 * j + n,
                         "gold": 1000 + seed + 100 * k + 10 * j + n} for n in places]
                for j, (model, places) in enumerate(
                    {"pretrained": [0], "ceiling": [0], "best of 4": [0], "M": [0, 1, 3]}.items())}
        readings.append(of_seed)
    return readings


def test_chapter_5s_curves_and_dots_are_of_the_right_column_prompt_and_model(axes):
    readings = made_readings()
    evaluation.draw_curves("c", readings, {"reward": "R", "gold": "G"})
    for ax, (k, column) in zip(axes, ((0, 0), (0, 1000), (1, 0), (1, 1000)), strict=True):
        base = 1 + column + 100 * k  # the mean over seeds
        curve, ceiling, best = (line.get_xydata().tolist() for line in ax.lines)
        assert curve == [[8 * n, base + 30 + n] for n in (0, 1, 3)]
        assert (ceiling[0][1], best[0][1]) == (base + 10, base + 20)
    assert [ax.get_title() for ax in axes] == ["p: R", "p: G", "q: R", "q: G"]
    del axes[:]
    evaluation.draw_kl("k", readings, "G")
    for k, ax in enumerate(axes):
        assert [line.get_xydata().tolist() for line in ax.lines] == [
            [[10 * n + 3, 1000 + seed + 100 * k + 30 + n] for n in (0, 1, 3)] for seed in (0, 2)]
    del axes[:]
    evaluation.draw_scores("s", {name: evaluation.at_the_end(readings, name)
                                 for name in ("reward", "gold")})
    for ax, base in zip(axes, (51, 1051), strict=True):  # over seeds and prompts
        dots = [dot[0].get_xydata()[0].tolist() for dot in ax.containers]
        assert dots == [[base, 0], [base + 10, 1], [base + 20, 2], [base + 33, 3]]
        assert ax.containers[3][2][0].get_segments()[0][:, 0].tolist() == [base + 32, base + 34]


def test_the_same_noise_stands_in_a_column_for_every_model_and_prompt(monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "sheet", lambda *sheet, **_: sheets.append(sheet))
    images = {prompt: {model: [f"{prompt} {model} {i}" for i in range(9)] for model in "AB"}
              for prompt in "pq"}
    evaluation.draw_same_seeds("s", images, most=5)
    assert sheets == [("s", [["p A 0", "p A 1", "q A 0", "q A 1"],
                             ["p B 0", "p B 1", "q B 0", "q B 1"]], ["A", "B"], list("ppqq"))]

