"""Chapter 5's equations: against scipy's paired test, enumeration, integrals and plain loops."""
import math
from dataclasses import fields
from importlib import import_module
from itertools import combinations, permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from support import evaluation, flags
from tests.equations.closed_forms import randn

ev = import_module("05_eval")
METHODS = {"RWR": ("experiments/sft.py", {"data": "fresh", "weights": "rwr"}),
           "SFT": ("experiments/sft.py", {"data": "fixed", "weights": "sparse"}),
           "DDPO_SF": ("03_ddpo.py", {"estimator": "sf", "anneal": False}),
           "DDPO_IS": ("03_ddpo.py", {"estimator": "is", "anneal": False}),
           "DPOK": ("04_dpok.py", {"beta": 0.01}),
           "DPOK_no_KL": ("04_dpok.py", {"beta": 0})}


# ---- is a difference more than chance? ------------------------------------------------------


@pytest.mark.equation("paired interval", "05_eval.paired_interval")
@pytest.mark.parametrize("S", [2, 5, 8])
def test_paired_interval_is_scipys_paired_t_test(S):
    a, b = randn(S, seed=1).numpy() + 0.4, randn(S, seed=2).numpy()
    oracle = stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.95)
    want = {"mean": (a - b).mean(), "low": low, "high": high, "p": oracle.pvalue}
    assert ev.paired_interval(a, b) == pytest.approx(want, rel=1e-9)
    equal = ev.paired_interval(np.ones(S), np.zeros(S))  # of which seeds say nothing
    assert equal == {"mean": 1, "low": 1, "high": 1, "p": 1}


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


# ---- from pictures to claims ----------------------------------------------------------------


def pictures(gold, seed=0, split="seen", family="f"):
    return [{"seed": seed, "split": split, "family": family, "gold": g} for g in gold]


@pytest.mark.equation("seed means", "support.evaluation.seed_means")
def test_seed_means_are_of_a_models_own_pictures_split_family_and_seed_in_order():
    rows = {"A": [*pictures([1, 3], 7), *pictures([100], 7, "unseen"),
                  *pictures(["5", "6", "13"], "3"), *pictures([20], 3, family="g")],
            "B": pictures([math.pi])}
    rows["B"][0]["kind"] = 4
    found = evaluation.seed_means(rows, "gold", family="f")
    assert {model: means.tolist() for model, means in found.items()} == {
        "A": [8, 2], "B": [math.pi]}  # seed 3 before seed 7; text, as CSV files have it
    assert evaluation.seed_means(rows, "gold")["A"].tolist() == [11, 2]
    assert {m: v.tolist() for m, v in evaluation.seed_means(rows, "gold", "unseen").items()} == {
        "A": [100]}
    assert list(evaluation.seed_means(rows, "kind")) == ["B"]


def test_claims_are_of_a_minus_b_by_seed_and_corrected_for_all_of_them(monkeypatch):
    """Pictures and seeds differ by far more than models: only pairs show that B is above A."""
    rows, gains, elsewhere = {"A": [], "B": []}, [0.9, 1.0, 1.2, 1.1, 0.8], [1, 2, 0.5, 2, 0.3]
    for seed in range(5):
        base = [100.0 * i + 1000 * (seed % 3) for i in range(4)]
        rows["A"] += pictures(base, seed) + pictures([8.0] * 3, seed, "unseen")
        rows["B"] += pictures([g + gains[seed] for g in base], seed)
        rows["B"] += pictures([8.0 + elsewhere[seed]] * 3, seed, "unseen")
    monkeypatch.setattr(ev, "CLAIMS", (
        ("B wins", "gold", "seen", "B", "A"), ("A wins", "gold", "seen", "A", "B"),
        ("nobody is there", "gold", "seen", "A", "C"), ("of no such", "beauty", "seen", "A", "B"),
        ("also elsewhere", "gold", "unseen", "B", "A"), ("A there", "gold", "unseen", "A", "B")))
    found = ev.claims(rows)
    assert [(row["claim"], row["verdict"]) for row in found] == [
        ("B wins", "holds"), ("A wins", "fails"), ("also elsewhere", "cannot be told"),
        ("A there", "cannot be told")]  # p = 0.03, but twice that by Holm
    p = [stats.ttest_1samp(values, 0).pvalue for values in (gains, elsewhere)]
    assert [row["p"] for row in found] == pytest.approx([p[0], p[0], p[1], p[1]])
    assert [row["holm"] for row in found] == pytest.approx([4 * p[0]] * 2 + [2 * p[1]] * 2)
    assert found[0]["mean"] == pytest.approx(1) == -found[1]["mean"]
    assert ev.claims({"A": rows["A"]}) == []


# ---- variety, choice ------------------------------------------------------------------------


@pytest.mark.equation("diversity", "05_eval.diversity")
@pytest.mark.parametrize("N", [2, 3, 7])
def test_diversity_is_a_pictures_mean_distance_to_the_others_by_a_double_loop(N):
    f = randn(N, 6) + 1
    distances = torch.zeros(N, N)
    for i, j in permutations(range(N), 2):
        distances[i, j] = 1 - f[i] @ f[j] / (f[i].norm() * f[j].norm())
    values = ev.diversity(f * torch.arange(1, N + 1)[:, None])  # lengths do not count
    assert values.tolist() == pytest.approx((distances.sum(1) / (N - 1)).tolist(), rel=1e-5)
    assert ev.diversity(f[:1].repeat(4, 1)).tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert ev.diversity(torch.eye(3)).tolist() == [1] * 3


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

    def score(column, images, prompts):
        assert (column, prompts) == ("reward", ["a", "b", "c"])
        return torch.tensor([r[image] for image in images])

    monkeypatch.setattr(ev, "draw", draw)
    measures = SimpleNamespace(score=score, rows=lambda wanted, images, kl: (list(images), kl))
    found = ev.best_of_n(None, requests, measures, SimpleNamespace(best_of=(6, 1, 4)))
    assert calls == [0, 1, 2, 3, 4, 5] and list(found) == ["best of 1", "best of 4", "best of 6"]
    for name, ((measured, kl), images) in found.items():
        n = int(name.split()[-1])
        best = r[:n].max(0).values
        want = [(r[:n, i].tolist().index(best[i]), i) for i in range(3)]  # the first of equals
        assert measured == images == want
        assert kl == pytest.approx([math.log(n) - (n - 1) / n] * 3)


# ---- the methods' commands ------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--sd", "--sd --quick", "--samples 1", "--samples 9 --seed 4 --model m --reward r --gold g "
    "--prompts count --rounds 7 --prompts-per-round 3 --samples-per-prompt 6 --eta 0.6 "
    "--lora-rank 3 --lora-targets to_q conv1 --num-steps 9 --guidance-scale 2.5 --batch-size 11 "
    "--device cpu --clip c --aesthetic-weights a --image-reward-weights i --vlm v"])
def test_each_command_has_the_methods_own_flag_all_shared_ones_and_no_other(words):
    config = flags.parse(ev.Config, None, words.split(), ev.SD, ev.QUICK)
    assert config.rounds == 4 or not config.quick
    table = ev.commands_of(config)
    assert list(table) == [f"{method}_seed{config.seed}" for method in METHODS]
    shared = {field.name for field in fields(config)} - {"out", "sd"}
    for (method, (script, own)), (found, *rest) in zip(METHODS.items(), table.values()):
        assert found == script
        module = import_module(script.removesuffix(".py").replace("/", "."))
        job = flags.parse(module.Config, None, rest, module.SD)
        expected = {field.name: field.default for field in fields(job)}
        expected |= module.SD | {"sd": True} if config.sd else {}
        expected |= {field: getattr(config, field) for field in shared & expected.keys()}
        expected |= own | {"keep_every": max(1, config.rounds // 4), "eval_samples": 40}
        if not config.sd:
            expected["learning_rate"], expected["updates_per_round"] = ev.METHODS[method][1:]
        assert vars(job) == expected
