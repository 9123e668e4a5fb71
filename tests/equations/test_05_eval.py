"""Chapter 5's statistics, against closed forms, plain loops and what repeated samples show."""
import math
from importlib import import_module

import numpy as np
import pytest
import torch

from support import tables

ev = import_module("05_eval")


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ---- the interval of a difference -----------------------------------------------------------


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
@pytest.mark.parametrize("level, z", [(0.95, 1.960), (0.5, 0.674)])
def test_bootstrap_interval_is_the_normal_one_where_that_holds(level, z):
    N = 400
    d = normal(N) + 0.3
    mean, low, high = ev.paired_bootstrap(d, level=level)
    half = z * d.std().item() / N**0.5
    assert mean == pytest.approx(d.mean().item(), rel=1e-12)
    assert low == pytest.approx(mean - half, abs=0.07 * half)
    assert high == pytest.approx(mean + half, abs=0.07 * half)


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
def test_bootstrap_interval_of_two_numbers_by_hand():
    """Means of two draws from {0, 1} are 0, ½, 1 with shares ¼, ½, ¼."""
    d = torch.tensor([0.0, 1.0]).double()
    assert ev.paired_bootstrap(d, level=0.4) == (0.5, 0.5, 0.5)
    assert ev.paired_bootstrap(d, level=0.6) == (0.5, 0, 1)


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    stream, held = np.random.default_rng(1), 0
    for _ in range(400):
        d = torch.from_numpy(stream.random(60)) ** 3  # skewed; its mean is 1/4
        _, low, high = ev.paired_bootstrap(d, draws=500)
        held += low <= 0.25 <= high
    assert 0.89 < held / 400 < 0.98  # of 0.95: two standard errors are 0.02


@pytest.mark.equation("bootstrap", "05_eval.paired_bootstrap")
def test_bootstrap_is_the_same_twice_and_other_with_another_seed():
    d = normal(30)
    assert ev.paired_bootstrap(d) == ev.paired_bootstrap(d) != ev.paired_bootstrap(d, seed=1)


@pytest.mark.equation("verdict", "05_eval.verdict")
def test_verdict_of_intervals_above_below_and_around_0():
    assert (ev.verdict(0.1, 0.2), ev.verdict(-0.2, -0.1)) == ("holds", "FAILS")
    for low, high in ((-0.1, 0.1), (0.0, 0.1), (-0.1, 0.0), (0.0, 0.0)):
        assert ev.verdict(low, high) == "cannot be told from chance"


# ---- diversity ------------------------------------------------------------------------------


def distance(a, b):
    return 1 - (a @ b / math.sqrt((a @ a) * (b @ b))).item()


def plain_diversity(f):
    """Over all ordered pairs of different pictures."""
    distances = []
    for i in range(len(f)):
        for j in range(len(f)):
            if i != j:
                distances.append(distance(f[i], f[j]))
    return sum(distances) / len(distances)


@pytest.mark.equation("diversity", "05_eval.diversity_values")
@pytest.mark.parametrize("N", [3, 4, 9])
def test_diversity_is_the_mean_of_a_double_loop(N):
    f = normal(N, 6) + 1
    values = ev.diversity_values(f.float() * torch.arange(1, N + 1)[:, None])  # lengths don't count
    assert values.shape == (N,)
    assert values.mean().item() == pytest.approx(plain_diversity(f), rel=1e-6)


@pytest.mark.equation("diversity", "05_eval.diversity_values")
def test_diversity_by_hand():
    """Two equal pictures and one at a right angle: distances 0, 1, 1."""
    f = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    assert ev.diversity_values(f).tolist() == pytest.approx([0, 0, 2])  # 3·⅔ − 2·d, d = 1, 1, 0
    assert ev.diversity_values(f[:1].expand(5, 2)).abs().max() < 1e-12


@pytest.mark.equation("diversity", "05_eval.diversity_values")
def test_diversity_values_are_those_of_really_leaving_one_out():
    f, N = normal(7, 5) + 0.5, 7
    for i, value in enumerate(ev.diversity_values(f).tolist()):
        without = torch.cat([f[:i], f[i + 1:]])
        expected = N * plain_diversity(f) - (N - 1) * plain_diversity(without)
        assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("diversity", "05_eval.diversity_values")
def test_error_of_diversity_is_how_much_it_varies_over_fresh_pictures():
    stream, N, means, errors = np.random.default_rng(2), 40, [], []
    for _ in range(600):
        f = torch.from_numpy(stream.standard_normal((N, 4))) + torch.tensor([2, 0, 0, 0])
        values = ev.diversity_values(f)
        means.append(values.mean().item())
        errors.append(values.std().item() / N**0.5)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


@pytest.mark.equation("diversity", "05_eval.diversity_values")
def test_of_fewer_than_three_pictures_there_is_no_diversity_value():
    for N in (1, 2):
        values = ev.diversity_values(normal(N, 4))
        assert values.shape == (N,) and values.isnan().all()


# ---- best of n ------------------------------------------------------------------------------


@pytest.mark.equation("best of n", "05_eval.best_of_n_kl")
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_numbers(n):
    """Density of the largest: n·u^(n−1); KL to the uniform, by the midpoint rule."""
    u = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    p = n * u ** (n - 1)
    assert ev.best_of_n_kl(n) == pytest.approx((p * p.log()).mean().item(), abs=1e-4)


# ---- pairs of pictures ----------------------------------------------------------------------


def make_rows(values, split="seen", family="f", first=0, **columns):
    rows = []
    for i, value in enumerate(values):
        rows.append({"picture": first + i, "split": split, "family": family, "gold": value})
        rows[-1] |= columns
    return rows


def test_picture_means_average_the_seeds_in_the_pictures_order():
    rows = make_rows([1.0, 2.0, 6.0], seed=0) + make_rows([3.0, 4.0, 7.0], seed=1)
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 4, 2, 1, 3]):
        means = tables.picture_means([rows[i] for i in order], "gold")
        assert means.tolist() == [2, 3, 6.5] and means.dtype == torch.float64


def test_picture_means_keep_splits_and_families_apart_and_drop_nan():
    rows = [*make_rows([1.0, 2.0]), *make_rows([3.0, math.nan], family="g", first=2),
            *make_rows([5.0], "unseen", first=4), *make_rows([6.0], "unseen", "g", first=5)]
    assert tables.picture_means(rows, "gold").tolist() == [1, 2, 3]
    assert tables.picture_means(rows, "gold", "unseen").tolist() == [5, 6]
    assert tables.picture_means(rows, "gold", "seen", "g").tolist() == [3]
    assert tables.picture_means(rows, "gold", "unseen", "f").tolist() == [5]
    assert tables.picture_means(rows, "gold", "seen", "h").tolist() == []


def test_difference_is_a_minus_b_of_the_same_picture():
    """Pictures differ by far more than models: only pairs show that B is 1 ± 0.1 above A."""
    values = [100.0 * i for i in range(10)]
    shifted = [100.0 * i + 1 + (-1) ** i * 0.1 for i in range(10)]
    rows = {"A": make_rows(values), "B": make_rows(shifted)[::-1]}  # another order in the list
    up, down = ev.difference(rows, "B", "A", "gold"), ev.difference(rows, "A", "B", "gold")
    assert up["mean"] == pytest.approx(1) == -down["mean"]
    assert 0.9 < up["low"] < 1 < up["high"] < 1.1 and -1.1 < down["low"] < -1 < down["high"] < -0.9
    assert (up["verdict"], down["verdict"]) == ("holds", "FAILS")
    assert (up["a"], up["b"], up["metric"], up["split"], up["pairs"]) == (
        "B", "A", "gold", "seen", 10)


def test_difference_averages_seeds_before_it_pairs():
    rows = {"A": make_rows([1.0, 2.0]) + make_rows([3.0, 4.0]), "B": make_rows([0.0, 0.0])}
    found = ev.difference(rows, "A", "B", "gold")
    assert (found["mean"], found["pairs"]) == (2.5, 2)


def test_difference_is_of_the_split_that_was_asked_for():
    rows = {"A": make_rows([1.0]) + make_rows([8.0], "unseen", first=1),
            "B": make_rows([0.0]) + make_rows([3.0], "unseen", first=1)}
    assert ev.difference(rows, "A", "B", "gold", "unseen")["mean"] == 5


def test_no_difference_without_both_models_or_without_pairs():
    rows = {"A": make_rows([1.0, 2.0]), "B": make_rows([1.0]), "C": make_rows([math.nan] * 2)}
    for a, b in (("A", "D"), ("D", "A"), ("A", "B"), ("C", "C")):
        assert ev.difference(rows, a, b, "gold") is None
    assert ev.difference(rows, "A", "A", "gold", "unseen") is None
