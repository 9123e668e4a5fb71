"""Chapter 5's statistics, against closed forms, plain loops and rows made by hand."""
import math
from importlib import import_module
from itertools import permutations

import numpy as np
import pytest
import torch

from support import tables
from tests.oracles import randn

ev = import_module("05_eval")


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
@pytest.mark.parametrize("level, z", [(0.95, 1.960), (0.5, 0.674)])
def test_bootstrap_interval_is_the_normal_one_where_that_holds(level, z):
    d = randn(400) + 0.3
    mean, low, high = found = ev.paired_bootstrap(d, level=level)
    half = z * d.std().item() / 400**0.5
    assert mean == pytest.approx(d.mean().item(), rel=1e-12)
    assert (low - mean, high - mean) == pytest.approx((-half, half), abs=0.07 * half)
    assert found == ev.paired_bootstrap(d, level=level) != ev.paired_bootstrap(d, 1, level=level)


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    stream, held = np.random.default_rng(1), 0
    for _ in range(400):
        d = torch.from_numpy(stream.random(60)) ** 3  # skewed; its mean is 1/4
        _, low, high = ev.paired_bootstrap(d, draws=500)
        held += low <= 0.25 <= high
    assert 0.89 < held / 400 < 0.98  # of 0.95: two standard errors are 0.02


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
def test_bootstrap_interval_of_two_numbers_by_hand():
    d = torch.tensor([0.0, 1.0]).double()  # means of two draws: 0, ½, 1 with shares ¼, ½, ¼
    assert ev.paired_bootstrap(d, level=0.4) == (0.5, 0.5, 0.5)
    assert ev.paired_bootstrap(d, level=0.6) == (0.5, 0, 1)


@pytest.mark.equation("verdict", "05_eval.verdict")
def test_verdict_of_intervals_above_below_and_around_0():
    assert (ev.verdict(0.1, 0.2), ev.verdict(-0.2, -0.1)) == ("holds", "FAILS")
    for low, high in ((-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (0.0, 0.0)):
        assert ev.verdict(low, high) == "cannot be told from chance"


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
    assert ev.best_of_n_kl(n) == pytest.approx((p * p.log()).mean().item(), abs=1e-4)


def make_rows(values, split="seen", family="f", first=0):
    return [{"picture": first + i, "split": split, "family": family, "gold": value}
            for i, value in enumerate(values)]


def test_picture_means_average_seeds_and_keep_splits_and_families_apart_and_drop_nan():
    rows = make_rows([1.0, 2.0, 6.0]) + make_rows([3.0, 4.0, 7.0])  # two seeds
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 4, 2, 1, 3]):
        means = tables.picture_means([rows[i] for i in order], "gold")
        assert means.tolist() == [2, 3, 6.5] and means.dtype == torch.float64
    rows = [*make_rows([1.0, 2.0]), *make_rows([3.0, math.nan], family="g", first=2),
            *make_rows([5.0], "unseen", first=4), *make_rows([6.0], "unseen", "g", first=5)]
    assert tables.picture_means(rows, "gold").tolist() == [1, 2, 3]
    assert tables.picture_means(rows, "gold", "seen", "g").tolist() == [3]
    assert tables.picture_means(rows, "gold", "unseen", "f").tolist() == [5]
    assert tables.picture_means(rows, "gold", "seen", "h").tolist() == []


def test_difference_is_a_minus_b_of_the_same_picture_and_of_the_split_asked_for():
    """Pictures differ by far more than models: only pairs show that B is 1 ± 0.1 above A."""
    values = [100.0 * i for i in range(10)]
    shifted = [100.0 * i + 1 + (-1) ** i * 0.1 for i in range(10)]
    rows = {"A": make_rows(values) + make_rows([8.0], "unseen", first=10),
            "B": make_rows([3.0], "unseen", first=10) + make_rows(shifted)[::-1]}
    found = ev.difference(rows, "B", "A", "gold")
    assert 0.9 < found.pop("low") < 1 < found.pop("high") < 1.1
    assert found == {"a": "B", "b": "A", "metric": "gold", "split": "seen", "verdict": "holds",
                     "mean": pytest.approx(1), "pairs": 10}
    assert ev.difference(rows, "A", "B", "gold")["verdict"] == "FAILS"
    assert ev.difference(rows, "A", "B", "gold", "unseen")["mean"] == 5


def test_no_difference_without_both_models_or_without_pairs():
    rows = {"A": make_rows([1.0, 2.0]), "B": make_rows([1.0]), "C": make_rows([math.nan] * 2)}
    for a, b in (("A", "D"), ("D", "A"), ("A", "B"), ("C", "C")):
        assert ev.difference(rows, a, b, "gold") is None
