"""Intervals by simulation on models with known effects; errors and Holm by other algebra."""
import math
import statistics
from itertools import combinations

import numpy as np
import pytest
import torch

from support import significance, training
from tests.oracles import randn

bootstrap = significance.hierarchical_bootstrap
BOOTSTRAP = pytest.mark.equation("seeds as units", "support.significance.hierarchical_bootstrap")


def draw(stream, seeds, prompts, both, pictures, rest, shape=(5, 4, 12)):
    """d[s,p,k] of effects with these standard deviations; their mean is 0."""
    (S, P, K), z = shape, stream.standard_normal
    return torch.from_numpy(seeds * z((S, 1, 1)) + prompts * z((P, 1)) + both * z((S, P, 1))
                            + pictures * z((P, K)) + rest * z((S, P, K)))


@BOOTSTRAP
@pytest.mark.parametrize("stds, families", [
    ((1, 0, 0.3, 0.3, 0.3), None), ((0.02, 0, 0, 1, 0.3), None), ((0.02, 0, 0, 0, 1), None),
    ((0.3, 1, 0.3, 0.3, 0.3), "ffff")], ids=["seeds", "shared noise", "pictures", "prompts"])
def test_interval_covers_the_truth_as_often_as_it_says_and_a_plain_one_does_not(stds, families):
    """Of 500 the standard error is 0.01. What both models share is far larger than d."""
    stream, held, plain_held, p = np.random.default_rng(1), 0, 0, []
    for n in range(500):
        d, shared = draw(stream, *stds), draw(stream, 0, 0, 0, 100, 0)[:1]
        found = bootstrap(d + shared, shared, families, n, 600)
        held += found["low"] <= 0 <= found["high"]
        p.append(found["p"])
        means = d.flatten().numpy()[stream.integers(240, size=(100, 240))].mean(1)
        plain_held += np.quantile(means, 0.025) <= 0 <= np.quantile(means, 0.975)
    assert 0.92 < held / 500 < 0.98
    assert np.mean(np.array(p) < 0.01) < 0.0225  # five seeds' tails are right as well
    assert stds[0] != 1 or plain_held / 500 < 0.5  # of the 95 % that it promises


@pytest.mark.equation("errors clustered two ways", "support.significance.unit_share")
@pytest.mark.parametrize("families", [None, list("ffggfggg") * 5])
def test_what_seed_and_unit_add_together_counts_once(families):
    """By an analysis of variance; of seeds with equal means, so that V is V_U − V_SU."""
    d = draw(np.random.default_rng(2), 0, 2, 4, 2, 4, (4, 40, 8))
    d = d - d.mean((1, 2), keepdim=True) + 5
    units, labels, V_U, V_SU = d.mean(2), families, 0, 0
    if families is None:
        units, labels = d.flatten(1), [k // 8 for k in range(320)]
    for label in set(labels):
        own = units[:, [k for k in range(len(labels)) if labels[k] == label]]
        n, rest = own.shape[1], own - own.mean(0) - own.mean(1, keepdim=True) + own.mean()
        V_U += own.mean(0).var() * n
        V_SU += rest.square().sum() / ((n - 1) * 3) / 4 * n
    assert significance.unit_share(units, labels).item() == pytest.approx((1 - V_SU / V_U).item())
    half = 2.0 * (V_U - V_SU).item() ** 0.5 / len(labels)
    want = {"mean": 5, "low": 5 - half, "high": 5 + half, "p": 2 / 10001}
    assert bootstrap(d, torch.zeros(1, 40, 8), families) == pytest.approx(want, abs=0.05 * half)


@BOOTSTRAP
@pytest.mark.parametrize("level, t", [(0.95, 2.776), (0.99, 4.604)])
def test_interval_is_students_t_where_only_seeds_or_only_prompts_of_two_families_differ(level, t):
    five = torch.tensor([-1.4, -0.4, 0, 0.4, 1.4]).double().view(5, 1, 1) * (5 / 1.06) ** 0.5
    six = torch.tensor([-1.0, 0, 1, 8, 9, 10]).double().view(1, 6, 1) * 6**0.5  # errors are 1
    for d, families in ((five, None), (five, "ffffgg"), (six, "fffggg")):  # ν = 5 − 1, 2·(3 − 1)
        found = bootstrap(d.expand(5, 6, 2), torch.zeros(1, 6, 2), families, 0, 40000, level)
        ends = found["low"] - found["mean"], found["high"] - found["mean"]
        assert ends == pytest.approx((-t, t), rel=0.06)


@BOOTSTRAP
def test_bootstrap_pairs_seeds_and_noise_and_its_p_is_that_of_its_interval():
    a, b, zero = randn(5, 3, 4, seed=1) + 0.3, randn(5, 3, 4, seed=2), torch.zeros(1, 3, 4)
    assert bootstrap(a - b, zero) == pytest.approx(bootstrap(a, b)) != bootstrap(a, b, seed=1)
    assert bootstrap(a, b[:1]) == pytest.approx(bootstrap(a - b[:1], zero))  # one against all five
    for x, y, end in ((a, b, "low"), (b, a, "high")):
        p = bootstrap(x, y)["p"]
        assert 0.05 < p < 0.6 and abs(bootstrap(x, y, level=1 - p)[end]) < 0.01
    alone = {"mean": (a - b)[0].mean().item(), "low": -math.inf, "high": math.inf, "p": 1}
    assert bootstrap(a[:1], b[:1]) == pytest.approx(alone)
    assert bootstrap(a + 100, b)["p"] == pytest.approx(2 / 10001)  # never 0 from 10,000 draws
    assert bootstrap(a, a) == {"mean": 0, "low": 0, "high": 0, "p": 1}


@pytest.mark.equation("resampling", "support.significance.resampled_deviations")
@pytest.mark.equation("Welch's ν", "support.significance.degrees_of_freedom")
@pytest.mark.equation("strata", "support.significance.strata_variances")
@pytest.mark.equation("standard error", "support.significance.mean_error")
def test_errors_of_strata_by_hand_and_by_simulation():
    values, labels = torch.tensor([1.0, 10, 3, 14, 12]), list("ababb")
    error = error_of(values, labels)
    assert error == pytest.approx(math.sqrt(2 * 2 + 3 * 4) / 5)
    nu = significance.degrees_of_freedom(*significance.strata_variances(values, labels))
    assert nu.item() == pytest.approx(16**2 / (4**2 + 12**2 / 2))
    stream = training.random_stream(0, "bootstrap")
    found = significance.resampled_deviations(values, labels, stream, 40000)
    assert (found.std().item(), found.mean().item()) == pytest.approx((error, 0), abs=0.02 * error)
    stream, draws = training.random_stream(0, "bootstrap"), torch.zeros(40000).double()
    for label, own in (("a", [1.0, 3]), ("b", [10.0, 14, 12])):  # in the order of the labels
        n, own = len(own), torch.tensor(own).double() - statistics.mean(own)
        draws += math.sqrt(n / (n - 1)) * own[stream.integers(n, size=(40000, n))].sum(1) / 5
    torch.testing.assert_close(found, draws)
    size = torch.tensor([1.0] * 3 + [2.0] * 5)  # strata of other means and other spreads
    samples = 10 * size + size * randn(4000, 8)
    squares = [error_of(row, size.tolist()) ** 2 for row in samples]
    assert np.mean(squares) == pytest.approx(samples.mean(1).var().item(), rel=0.06)
    with pytest.raises(ValueError, match="a single value of 'b'"):
        error_of(torch.zeros(3), list("aab"))


def error_of(values, labels):
    return significance.strata_variances(values, labels)[0].sum().sqrt().item()


@pytest.mark.equation("standard error", "support.significance.mean_error")
@pytest.mark.equation("units", "support.significance.units_of")
@pytest.mark.equation("variances", "support.significance.variances")
def test_mean_error_is_that_of_the_interval_and_of_one_seed_that_of_its_pictures():
    values = randn(5, 24, 6) + randn(24, 1, seed=1) + randn(5, 1, 1, seed=2) / 4
    values = values + torch.tensor([10.0] * 12 + [0.0] * 12)[:, None]  # strata keep this out
    for families in (None, list("a" * 12 + "b" * 12)):
        mean, error = significance.mean_error(values, families)
        found = bootstrap(values, torch.zeros(1, 24, 6), families, 0, 40000, 0.6827)
        assert mean == pytest.approx(values.double().mean().item())
        assert (found["high"] - found["low"]) / 2 == pytest.approx(error, rel=0.25)
    labels = [i // 6 for i in range(144)]
    of_one = significance.mean_error(values[:1])[1]
    assert of_one == pytest.approx(error_of(values[0].flatten(), labels), rel=1e-6)
    units, strata = significance.units_of(values, list("a" * 23 + "b"))  # b is alone: one stratum
    assert units.shape == (5, 24) and len(set(strata)) == 1
    units, strata = significance.units_of(values[:, :1], ["a"])  # a single prompt: its pictures
    assert units.shape == (5, 6) and len(set(strata)) == 1


@pytest.mark.equation("Holm", "support.significance.holm")
@pytest.mark.equation("verdict", "support.significance.verdict")
def test_holm_is_the_closed_test_of_all_subsets_and_a_verdict_needs_its_p_and_the_interval():
    """A claim holds if Bonferroni rejects every set of hypotheses that its own is in."""
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p, closed = [0.3, 0.011, 0.02, 0.011, 0.9, 0.001], []
    for i in range(6):
        sets = [s for size in range(1, 7) for s in combinations(range(6), size) if i in s]
        closed.append(max(min(1, len(s) * min(p[j] for j in s)) for s in sets))
    assert significance.holm(p) == pytest.approx(closed) and significance.holm([]) == []
    assert significance.holm([0.9, 0.6]) == [1, 1]
    assert significance.verdict(0.1, 0.2, 0.05) == "holds"
    assert significance.verdict(-0.2, -0.1, 0.01) == "fails"
    for case in ((0.1, 0.2, 0.051), (-0.2, -0.1, 0.2), (-0.1, 0.1, 0.01), (0, 0.1, 0.01)):
        assert significance.verdict(*case) == "cannot be told"
