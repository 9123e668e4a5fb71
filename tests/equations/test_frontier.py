"""The frontier against closed forms, enumerated draws and other weights."""
import math

import numpy as np
import pytest
import torch

from experiments import frontier as fr

equation = pytest.mark.equation
STREAM = np.random.default_rng(5)


def normal(*shape):
    return torch.from_numpy(STREAM.standard_normal(shape))


@equation("frontier", "experiments.frontier.tilted_weights")
@equation("effective sample size", "experiments.frontier.effective_pictures")
@pytest.mark.parametrize("beta", [1.0, 2.0, math.inf])
def test_tilted_gaussian_in_closed_form(beta):
    """N(m, s²) tilted is N(m + s²/β, s²), at KL s²/2β²; gold's mean follows by its slope on r."""
    m, s, r = -1.8, 0.7, -1.8 + 0.7 * normal(400_000)
    w = fr.tilted_weights(r, beta)
    kl, reward, gold, ess = fr.point(r, 0.3 * r + normal(len(r)), w).tolist()
    assert kl == pytest.approx(s**2 / (2 * beta**2), rel=0.02, abs=1e-12)
    assert reward == pytest.approx(m + s**2 / beta, abs=0.006)
    assert gold == pytest.approx(0.3 * (m + s**2 / beta), abs=0.008)
    assert ess == pytest.approx(len(r) * math.exp(-(s**2) / beta**2), rel=0.02)


@equation("KL of weights", "experiments.frontier.weights_kl")
def test_kl_of_weights_is_its_definition_and_the_free_energy():
    r, beta = normal(50), 0.3
    w = fr.tilted_weights(r, beta)
    by_hand = sum(p * math.log(p * 50) for p in (w / 50).tolist())
    free_energy = (w * r).mean() / beta - (r / beta).exp().mean().log()
    assert fr.weights_kl(w).item() == pytest.approx(by_hand, rel=1e-12)
    assert fr.weights_kl(w).item() == pytest.approx(free_energy.item(), rel=1e-12)
    assert fr.weights_kl(torch.tensor([0.0, 3.0, 0.0]).double()) == pytest.approx(math.log(3))
    assert fr.effective_pictures(torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(49 / 25)


@equation("frontier", "experiments.frontier.points")
@equation("least KL", "experiments.frontier.least_kl")
def test_the_frontier_rises_and_no_other_weights_lie_above_it():
    r, g = normal(60).round(decimals=1), normal(60)
    C = len(fr.BETAS)
    kl, reward, _, _ = fr.points(r, g, fr.BETAS).T
    assert kl[0] == 0 and min(kl[:C].diff().min(), reward[:C].diff().min()) >= -1e-12
    curve = fr.rows_of(("kl", "reward"), kl[:C], reward[:C])
    others = [*zip(kl[C:], reward[C:]), *zip(map(fr.ev.best_of_n_kl, fr.NS), reward[C:])]
    for a, b in STREAM.uniform(0, 3, (500, 2)):
        w = 60 * torch.softmax(a * r + b * normal(60), 0)
        others.append(fr.point(r, g, w)[:2])
    assert max(fr.least_kl(curve, its) - its_kl for its_kl, its in others) < 2e-3  # interpolation
    on_it = fr.point(r, g, fr.tilted_weights(r, 0.4)).tolist()
    assert fr.least_kl(curve, on_it[1]) == pytest.approx(on_it[0], abs=2e-3)


@equation("bootstrap", "experiments.frontier.bootstrap_errors")
def test_errors_at_equal_kl_are_those_of_the_free_energy():
    """reward(KL) = min_β β·(KL + log Z), so at equal KL its error is β·s(w)/√N (delta method)."""
    r, betas = normal(2000), np.array([math.inf, *np.logspace(1, -1, 41)])
    errors = fr.bootstrap_errors(r, r + 3, betas, 0)
    for k in (15, 20, 24):
        want = betas[k] * fr.tilted_weights(r, betas[k]).std().item() / 2000**0.5
        assert errors[k] == pytest.approx([want] * 2, rel=0.15)
    for error in (errors[0], errors[len(betas)]):  # of all pictures, and of the best of 1
        assert error == pytest.approx([r.std().item() / 2000**0.5] * 2, rel=0.15)


def test_table_and_figure_set_each_kl_between_the_curve_and_a_bound(monkeypatch):
    names = ("kl", "reward", "reward_se", "gold", "gold_se", "beta")
    curve = [dict(zip(names, (k, 10.0 * k, 0.1, k / 10, 0.01, 30.0 - k))) for k in range(21)]
    rows = fr.table_of(curve, {"best of 4": dict(zip(names, (3.5, 20.0, 0.2, 0.5, 0.02))),
                               "a run": dict(zip(names, (80.0, 45.0, 0.3, 0.7, 0.03)))})
    assert [row["what"] for row in rows] == ["β = 30", "β = 20", "β = 10", "best of 4", "a run"]
    bounds = [(float(row["KL at least"]), float(row["KL at most"])) for row in rows]
    assert bounds == [(0, 0), (10, 10), (20, 20), (2, 3.5), (4.5, 80)]
    assert list(rows[4].values())[3:] == ["45.0±0.3", "0.70±0.03"]
    drawn = []
    monkeypatch.setattr(fr.Figure, "savefig", lambda figure, path: drawn.append(figure))
    fr.draw("x", curve, {"above it": curve[20] | {"reward": 230.0}}, fr.Config())
    assert drawn[0].axes[0].lines[1].get_xydata().tolist() == [[20, 200], [23, 230]]  # slope β


def test_the_tables_least_kl_is_that_of_a_runs_reward_less_two_errors():
    curve = [{"beta": 1 / (k + 1), "kl": float(k), "reward": 2.0 * k, "gold": 0.5, "reward_se": 0.1,
              "gold_se": 0.1} for k in range(3)]
    point = {"kl": 9.0, "reward": 3.0, "reward_se": 0.5, "gold": 0.7, "gold_se": 0.1}
    rows = fr.table_of(curve, {"best of 4": point, "run": point | {"least reward": 2.0}})
    found = {row["what"]: (row["KL at least"], row["KL at most"]) for row in rows}
    assert found["best of 4"] == ("1.5", "9") and found["run"] == ("1", "9")
