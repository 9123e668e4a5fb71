"""Chapter 5's equations: against scipy's paired test, enumeration, integrals and plain loops."""
import math
from dataclasses import fields
from importlib import import_module
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from scipy import stats

from support import evaluation, flags
from support.measures import diversity
from tests.equations.closed_forms import randn

ev = import_module("05_eval")
METHODS = {"SFT": ("experiments/sft.py", {"data": "fixed", "weights": "sparse"}),
           "DDPO_IS": ("03_ddpo.py", {"anneal": False, "prompts_per_round": 1}),
           "DPOK": ("04_dpok.py", {"beta": 0.01}),
           "DPOK_no_KL": ("04_dpok.py", {"beta": 0.0})}


# ---- is a difference more than chance? ------------------------------------------------------


@pytest.mark.equation("paired interval", "05_eval.interval")
@pytest.mark.parametrize("S", [2, 5, 8])
def test_interval_is_scipys_paired_t_test(S):
    a, b = randn(S, seed=1).numpy() + 0.4, randn(S, seed=2).numpy()
    oracle = stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.95)
    want = {"mean": (a - b).mean(), "low": low, "high": high, "p": oracle.pvalue}
    assert ev.interval(a - b) == pytest.approx(want, rel=1e-9)
    equal = ev.interval(np.ones(S))  # of which seeds say nothing
    assert equal == {"mean": 1, "low": 1, "high": 1, "p": 1}


@pytest.mark.equation("power", "support.evaluation.seeds_needed")
def test_as_many_seeds_as_are_needed_tell_an_effect_four_times_in_five():
    d, level = np.array([0.5, 1.5, 2.5]), 0.0125  # an effect of 1.5 standard deviations
    S = evaluation.seeds_needed(d, level)
    stream, told = np.random.default_rng(0), []
    for n in (S - 1, S):
        p = stats.ttest_1samp(1.5 + stream.standard_normal((20_000, n)), 0, axis=1).pvalue
        told.append((p <= level).mean())
    assert told[0] < 0.79 and 0.79 < told[1]
    assert evaluation.seeds_needed(-d, level) == S
    assert evaluation.seeds_needed(np.array([3.0, 4.0, 5.0]), level) == 4  # scipy's cdf is NaN here
    assert evaluation.seeds_needed(np.ones(3), level) == math.inf  # nothing is known of seeds
    assert evaluation.seeds_needed(np.array([-1, 1.001]), level) == math.inf


@pytest.mark.equation("Holm", "05_eval.holm")
def test_holm_is_the_closed_test_of_all_subsets():
    """A claim is told if Bonferroni rejects every set of hypotheses that its own is in."""
    assert ev.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p, closed = [0.3, 0.011, 0.02, 0.011, 0.9, 0.001], []
    for i in range(6):
        sets = [s for size in range(1, 7) for s in combinations(range(6), size) if i in s]
        closed.append(max(min(1, len(s) * min(p[j] for j in s)) for s in sets))
    assert ev.holm(p) == pytest.approx(closed)
    assert ev.holm([0.9, 0.6]).tolist() == [1, 1] and ev.holm([]).tolist() == []


@pytest.mark.equation("verdict", "05_eval.verdict")
@pytest.mark.parametrize("difference, p, want", [
    (0.1, 0.05, "holds"), (0.1, 0.051, "cannot be told"),
    (-0.1, 0.05, "fails"), (-0.1, 0.051, "cannot be told")])
def test_verdict_needs_the_corrected_p_and_has_the_sign_of_the_difference(difference, p, want):
    assert ev.verdict(difference, p) == want


# ---- what needs no training -----------------------------------------------------------------


@pytest.mark.equation("best of n", "05_eval.best_of_n_weights")
@pytest.mark.parametrize("n", [1, 2, 4])
def test_best_of_n_by_enumerating_all_draws_with_ties(n):
    r = torch.tensor([2, 0, 2, 5, 2, 5]).double()
    share = torch.zeros(6).double()
    for draws in product(range(6), repeat=n):
        best = [i for i in draws if r[i] == r[list(draws)].max()]
        for i in best:
            share[i] += 1 / len(best) / 6**n
    assert ev.best_of_n_weights(r, n).tolist() == pytest.approx((6 * share).tolist())


@pytest.mark.equation("best of n", "05_eval.best_of_n_kl")
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_numbers(n):
    """Density of the largest: n·u^(n−1); KL to the uniform, by the midpoint rule."""
    u = (torch.arange(200000, dtype=torch.float64) + 0.5) / 200000
    p = n * u ** (n - 1)
    assert float(ev.best_of_n_kl(n)) == pytest.approx((p * p.log()).mean().item(), abs=1e-4)


@pytest.mark.equation("diversity", "support.measures.diversity")
@pytest.mark.parametrize("N", [2, 3, 7])
def test_diversity_is_a_pictures_mean_distance_to_the_others_by_a_double_loop(N):
    f = randn(N, 6) + 1
    distances = torch.zeros(N, N)
    for i, j in permutations(range(N), 2):
        distances[i, j] = 1 - f[i] @ f[j] / (f[i].norm() * f[j].norm())
    values = diversity(f * torch.arange(1, N + 1)[:, None])  # lengths do not count
    assert values.tolist() == pytest.approx((distances.sum(1) / (N - 1)).tolist(), rel=1e-5)
    assert diversity(f[:1].repeat(4, 1)).tolist() == pytest.approx([0] * 4, abs=1e-6)


# ---- from readings to claims ----------------------------------------------------------------


def rounds(*points):
    return [{"kl": kl, "gold": gold} for kl, gold in points]


@pytest.mark.equation("equal KL", "05_eval.difference")
def test_equal_kl_is_the_largest_that_both_came_to_read_where_they_first_did():
    A = rounds((0, 0.5), (10, 0.7), (30, 0.9))
    B = rounds((0, 0.5), (20, 0.6), (12, 0.2), (20, 0.1), (19, 0.3))  # it went back, and away again
    assert ev.at_kl(A, 20, "gold") == pytest.approx(0.8)
    assert ev.at_kl(B, 6, "gold") == pytest.approx(0.53) and ev.at_kl(B, 20, "gold") == 0.6
    of_seed = {"p": {"A": A, "B": B}, "q": {"A": rounds((0, 0), (1, 1)), "B": rounds((0, 0))}}
    assert ev.difference(of_seed, "gold", "equal KL", "A", "B") == pytest.approx(0.2 / 2)
    assert ev.difference(of_seed, "gold", "the end", "A", "B") == pytest.approx((0.6 + 1) / 2)
    assert ev.difference(of_seed, "gold", "equal KL", "B", "A") == pytest.approx(-0.1)


def test_claims_are_of_a_minus_b_by_seed_and_corrected_for_all_of_them(monkeypatch):
    """Seeds differ by far more than models: only pairs show that B is above A."""
    gains, elsewhere, seeds = [0.9, 1.0, 1.2, 1.1, 0.8], [1, 2, 0.5, 2, 0.3], []
    for seed in range(5):
        base = 1000.0 * (seed % 3)
        A, B = {"gold": base, "reward": 8.0}, {"gold": base, "reward": 8.0 + elsewhere[seed]}
        seeds.append({prompt: {"A": [A], "B": [B | {"gold": base + gains[seed] + shift}]}
                      for prompt, shift in (("p", -7), ("q", 7))})
    monkeypatch.setattr(ev, "CLAIMS", (
        ("B wins", "gold", "the end", "B", "A"), ("A wins", "gold", "the end", "A", "B"),
        ("nobody is there", "gold", "the end", "A", "C"), ("rounds", "gold", "equal KL", "A", "B"),
        ("also this", "reward", "the end", "B", "A"), ("or that", "reward", "the end", "A", "B")))
    A, B = rounds((0, 0), (2, 1)), rounds((0, 0), (4, 0))
    found = ev.claims(seeds, [{"p": {"A": A, "B": B}}] * 5)
    assert found.pop(2)["mean"] == 1  # at 2 nats
    assert [(row["claim"], row["verdict"]) for row in found] == [
        ("B wins", "holds"), ("A wins", "fails"), ("also this", "cannot be told"),
        ("or that", "cannot be told")]  # p = 0.03, but twice that by Holm
    p = [stats.ttest_1samp(values, 0).pvalue for values in (gains, elsewhere)]
    assert [row["p"] for row in found] == pytest.approx([p[0], p[0], p[1], p[1]])
    assert [row["holm"] for row in found] == pytest.approx([5 * p[0]] * 2 + [3 * p[1]] * 2)
    assert found[0]["mean"] == pytest.approx(1) == -found[1]["mean"]


# ---- the methods' commands ------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--sd", "--quick", "--seed 4 --model m --reward r --gold g --rounds 17 --samples-per-prompt 6 "
    "--eta 0.6 --lora-rank 3 --lora-targets to_q conv1 --num-steps 9 --guidance-scale 2.5 "
    "--batch-size 11 --device cpu --clip c --aesthetic-weights a --image-reward-weights i --vlm v"])
def test_each_command_has_the_methods_own_flag_all_shared_ones_and_no_other(words):
    config = flags.parse(ev.Config, None, words.split(), ev.SD, ev.QUICK)
    shared = {field.name for field in fields(config)} - {"out", "sd", "prompts"}
    for method, (script, own) in METHODS.items():
        found, *rest = ev.command_of(method, "two red stars", config)
        assert found == script
        module = import_module(script.removesuffix(".py").replace("/", "."))
        job = flags.parse(module.Config, None, rest, module.SD)
        of_method, tuned = ev.METHODS[method]
        expected = vars(module.Config()) | module.SD | {"sd": True}
        if not config.sd:
            chosen = [*of_method.split()[1:], *tuned.split()]
            expected = dict(vars(flags.parse(module.Config, None, chosen)))
        expected |= {field: getattr(config, field) for field in shared & expected.keys()}
        expected |= own | {"prompts": "two red stars", "keep_every": max(1, config.rounds // 8),
                           "eval_samples": 16}
        assert vars(job) == expected
