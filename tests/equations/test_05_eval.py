"""Chapter 5's statistics, against closed forms, plain loops and rows made by hand."""
import math
from importlib import import_module
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch

from support import tables
from tests.equations.closed_forms import randn

ev = import_module("05_eval")


def plain_diversity(f):
    """Mean distance over all ordered pairs of different pictures."""
    distances = [1 - a @ b / (a.norm() * b.norm()) for a, b in permutations(f, 2)]
    return sum(distances).item() / len(distances)


@pytest.mark.equation("diversity", "05_eval.diversity_values")
@pytest.mark.parametrize("N", [3, 7])
def test_diversity_values_average_to_a_double_loop_and_are_those_of_leaving_one_out(N):
    f = randn(N, 6) + 1
    values = ev.diversity_values(f * torch.arange(1, N + 1)[:, None])  # lengths do not count
    assert values.mean().item() == pytest.approx(plain_diversity(f), rel=1e-9)
    for i, value in enumerate(values.tolist()):
        without = torch.cat([f[:i], f[i + 1:]])
        expected = N * plain_diversity(f) - (N - 1) * plain_diversity(without)
        assert value == pytest.approx(expected, rel=1e-9)
    assert ev.diversity_values(f[:2]).isnan().tolist() == [True, True]  # too few to leave one out


@pytest.mark.equation("best of n", "05_eval.best_of_n_kl")
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_numbers(n):
    """Density of the largest: n·u^(n−1); KL to the uniform, by the midpoint rule."""
    u = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    p = n * u ** (n - 1)
    assert float(ev.best_of_n_kl(n)) == pytest.approx((p * p.log()).mean().item(), abs=1e-4)


@pytest.mark.equation("best of n", "05_eval.best_of_n")
def test_best_of_n_keeps_the_best_by_reward_so_far_of_each_request(monkeypatch):
    r = torch.tensor([[1.0, 5.0, 0.0], [2.0, 4.0, 0.0], [-1.0, 9.0, 0.0], [3.0, 1.0, 0.5],
                      [7.0, 9.0, 0.1], [7.0, 0.0, 0.7]])  # draw k, request i
    calls, requests = [], [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]

    def draw(pipe, wanted, config, k=0):
        assert wanted == requests
        calls.append(k)
        return SimpleNamespace(images=[(k, i) for i in range(3)])

    def reward(images, prompts):
        assert prompts == ["a", "b", "c"]
        return [r[image].item() for image in images]

    monkeypatch.setattr(ev, "draw", draw)
    monkeypatch.setattr(ev.rewards, "score",
                        lambda reward, images, prompts, out: torch.tensor(reward(images, prompts)))
    measures = SimpleNamespace(rewards={"reward": reward},
                               rows=lambda wanted, images, kl: (list(images), kl))
    config = SimpleNamespace(best_of=6, out=".")
    found = ev.best_of_n({3, 6, 50}, None, requests, measures, config)
    assert calls == [0, 1, 2, 3, 4, 5] and set(found) == {1, 2, 3, 4, 6}
    for n, ((measured, kl), images) in found.items():
        best = r[:n].max(0).values
        want = [(r[:n, i].tolist().index(best[i]), i) for i in range(3)]  # the first of equals
        assert measured == images == want
        assert kl == pytest.approx([math.log(n) - (n - 1) / n] * 3)


def make_rows(values, seed=0, split="seen", prompts="abc"):
    """Two pictures of each prompt; a family has the letter of its prompts in upper case."""
    return [{"seed": seed, "picture": i, "split": split, "family": prompts[i // 2].upper(),
             "prompt": prompts[i // 2], "gold": value} for i, value in enumerate(values)]


def test_values_stand_by_seed_prompt_and_picture():
    rows = make_rows([1, 2, 3, 4, 5, 6]) + make_rows([7, 8], split="unseen", prompts="d")
    rows += make_rows([10, 20, 30, 40, 50, 60], seed=1) + make_rows([70, 80], 1, "unseen", "d")
    values, families = tables.values_of(rows, "gold")
    assert values.tolist() == [[[1, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [50, 60]]]
    assert families == ["A", "B", "C"] and values.dtype == torch.float64
    assert tables.values_of(rows, "gold", "unseen")[0].tolist() == [[[7, 8]], [[70, 80]]]
    assert tables.values_of(rows, "gold", "seen", "B")[0].tolist() == [[[3, 4]], [[30, 40]]]
    assert len(tables.values_of(rows, "gold", "seen", "X")[0]) == 0
    assert len(tables.values_of(make_rows([1, math.nan]), "gold")[0]) == 0


def test_difference_is_a_minus_b_of_the_same_seed_and_picture_and_of_the_split_asked_for():
    """Pictures and seeds differ by far more than models: only pairs show that B is above A."""
    rows = {"A": [], "B": []}
    for seed in range(5):
        values = [100.0 * i + 1000 * seed for i in range(6)]
        shifted = [v + 1 + 0.1 * ((i + seed) % 3 - 1) for i, v in enumerate(values)]
        rows["A"] += make_rows(values, seed) + make_rows([8.0] * 4, seed, "unseen", "de")
        rows["B"] += make_rows(shifted, seed) + make_rows([3.0] * 4, seed, "unseen", "de")
    found = ev.difference(rows, "B", "A", "gold")
    assert 0.8 < found["low"] < 1 < found["high"] < 1.2 and found["p"] < 0.001
    assert found["mean"] == pytest.approx(1)
    names = ("a", "b", "metric", "split", "seeds", "prompts", "pictures")
    assert [found[name] for name in names] == ["B", "A", "gold", "seen", 5, 3, 2]
    assert ev.difference(rows, "A", "B", "gold", "unseen")["mean"] == 5


def test_unseen_prompts_are_units_and_seen_ones_strata():
    """Prompts differ in what B gains: this widens the interval of unseen ones alone."""
    rows = {"A": [], "B": []}
    for seed in range(5):
        for split in ("seen", "unseen"):
            rows["A"] += make_rows([0.0] * 8, seed, split, "aaaa")
            gains = [0.9, 1.1, 2.9, 3.1, 4.9, 5.1, 6.9, 7.1]
            rows["B"] += make_rows(gains, seed, split, "abcd")
    for row in rows["A"] + rows["B"]:
        row["family"] = "F"
    for i, row in enumerate(rows["A"]):
        row["prompt"] = "abcd"[i % 8 // 2]
    seen, unseen = (ev.difference(rows, "B", "A", "gold", s) for s in ("seen", "unseen"))
    assert seen["mean"] == unseen["mean"] == 4
    assert unseen["high"] - unseen["low"] > 5 * (seen["high"] - seen["low"])


def test_no_difference_without_both_models_or_without_pairs():
    rows = {"A": make_rows([1.0, 2.0, 3.0, 4.0]), "B": make_rows([1.0, 2.0]),
            "C": make_rows([math.nan] * 4)}
    for a, b in (("A", "D"), ("D", "A"), ("A", "B"), ("C", "C")):
        assert ev.difference(rows, a, b, "gold") is None
    assert ev.difference(rows, "A", "A", "beauty") is None


def test_claims_are_corrected_for_all_of_them_together(monkeypatch):
    rows = {"A": [], "B": []}
    for seed in range(5):
        rows["A"] += make_rows([0.0] * 6, seed)
        rows["B"] += make_rows([0.5 + 0.4 * ((i + 3 * seed) % 5) for i in range(6)], seed)
    pairs = {"B wins": ("gold", "seen", (("B", "A"),)), "A wins": ("gold", "seen", (("A", "B"),))}
    monkeypatch.setattr(ev, "CLAIMS", pairs)
    first, second = ev.claims(rows)
    assert (first["verdict"], second["verdict"]) == ("holds", "fails")
    p = [first["p"], second["p"]]
    corrected = sorted([first["holm"], second["holm"]])
    assert corrected == [2 * min(p), max(2 * min(p), max(p))]
