"""DPOK's equations on a chain of Gaussians: closed forms, torch.distributions, loops.

p_pre is the chain with κ = 1 and θ = 0. θ shifts a step's mean; κ makes the KL depend on the state.
"""
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.equations import closed_forms as chain
from tests.equations.closed_forms import CASES, LOOP, T, randn

dpok = import_module("04_dpok")
CONFIG = dpok.Config(batch_size=10**6, num_steps=T)


@pytest.mark.equation("DPOK", "04_dpok.dpok_objective")
def test_alpha_weighs_the_surrogate_and_beta_takes_the_kl_away():
    log_prob, change, A, kl = randn(4, 7).requires_grad_()
    inputs = dict(log_prob=log_prob, old_log_prob=(log_prob + 0.3 * change).detach(),
                  advantage=A.detach(), kl=kl)
    J = dpok.dpok_objective(**inputs, clip_range=0.2, alpha=3.0, beta=0.5)
    by_log_prob, by_kl = torch.autograd.grad(J.sum(), (log_prob, kl))
    for n in range(7):
        w, a = math.exp(-0.3 * change[n].item()), A[n].item()
        far_enough = w > 1.2 if a > 0 else w < 0.8
        by_hand = 3.0 * min(w * a, min(max(w, 0.8), 1.2) * a) - 0.5 * kl[n].item()
        assert J[n].item() == pytest.approx(by_hand, rel=1e-12)
        assert by_log_prob[n].item() == pytest.approx(0 if far_enough else 3.0 * w * a)
        assert by_kl[n].item() == -0.5
    for bad in (dict(kl=kl[:1]), dict(kl=kl.sum()), dict(advantage=A[:, None])):
        with pytest.raises(AssertionError):
            dpok.dpok_objective(**inputs | bad, clip_range=0.2, alpha=1, beta=1)


@pytest.mark.equation("μ(x_t, z, t)", "04_dpok.step_means")
@pytest.mark.equation("KL_t", "04_dpok.path_kl")
@pytest.mark.parametrize("eta, scale, batch_size", [(1.0, 1.0, 1000), (0.4, 3.0, 4)])
def test_step_means_and_path_kl_are_of_the_present_policy_at_every_state(eta, scale, batch_size):
    generator, pipe = torch.Generator().manual_seed(0), chain.make_pipe(*chain.START)
    trajectory = chain.draw(chain.make_pipe(), 9, generator, eta, scale)
    config = replace(CONFIG, eta=eta, guidance_scale=scale, batch_size=batch_size)
    means = dpok.step_means(pipe, trajectory, config)
    by_hand, _ = chain.means_and_log_probs(pipe, trajectory, eta, scale)
    torch.testing.assert_close(means, by_hand.detach(), rtol=0, atol=1e-10)
    assert not means.requires_grad
    pre = trajectory.means + 0.05 * randn(9, T, 1, 1, 1)
    kl = dpok.path_kl(pipe, trajectory, pre, config)
    assert kl.shape == (9, T)
    for k, sigma in enumerate(chain.coefficients(eta)[3]):
        drew, reference = Normal(trajectory.means[:, k], sigma), Normal(pre[:, k], sigma)
        by_hand = kl_divergence(drew, reference).sum((1, 2, 3))
        torch.testing.assert_close(kl[:, k], by_hand, rtol=1e-9, atol=0)


# ---- the loop -------------------------------------------------------------------------------


class KnownValue:
    """In the place of Value: what it predicts is told, what it is fitted on is kept."""
    fitted = []

    def __init__(self, pipe, config):
        self.fitted.clear()

    def predict(self, trajectory):
        return 10 * randn(*trajectory.log_probs.shape, seed=len(self.fitted))

    def fit(self, trajectory, r, n):
        self.fitted.append((trajectory, r, n))


def advantages_by_hand(trajectory, prompts, n):
    rest = chain.reward_of(trajectory)[:, None] - 10 * randn(len(prompts), T, seed=n)
    means = [[rest[j] for j in range(len(rest)) if j != i and prompts[j] == prompts[i]]
             for i in range(len(rest))]
    return rest - torch.stack([sum(others) / len(others) for others in means])


@pytest.mark.equation("DPOK", "04_dpok.train")
@pytest.mark.parametrize("case, beta", [*((case, 0.5) for case in CASES), ("plain", 20.0)])
def test_train_takes_k_steps_a_round_along_dpoks_gradient(case, beta, monkeypatch, tmp_path):
    config = dpok.Config(**LOOP | CASES[case], alpha=0.2, beta=beta, out=str(tmp_path))
    steps, rows = chain.rehearse(dpok.train, config, monkeypatch, KnownValue)
    chain.check_loop((steps, rows), chain.by_hand(config, "dpok", advantages_by_hand))
    for n, (row, (trajectory, r, fitted)) in enumerate(zip(rows, KnownValue.fitted, strict=True)):
        assert fitted == n and torch.equal(r, chain.reward_of(trajectory))
        assert torch.equal(row["reward"], r)
        assert torch.equal(row["gold"], chain.gold_of(trajectory))
        pre, _ = chain.means_and_log_probs(
            chain.make_pipe(), trajectory, config.eta, config.guidance_scale)
        z = (trajectory.means - pre) / chain.coefficients(config.eta)[3].view(T, 1, 1, 1)
        torch.testing.assert_close(row["kl"], z.square().sum((1, 2, 3, 4)).detach() / 2)


# ---- the value function ---------------------------------------------------------------------


def round_of_pictures(seed, B=40):
    """A float32 trajectory, as rollout's are, and rewards that its states and prompts tell of."""
    trajectory = chain.draw(chain.make_pipe(), B, torch.Generator().manual_seed(seed))
    for name in ("latents", "means", "log_probs", "prompt_embeds"):
        setattr(trajectory, name, getattr(trajectory, name).detach().float())
    x_0 = trajectory.latents[:, -1].mean((1, 2, 3))
    return trajectory, (5 + 2 * x_0 + trajectory.prompt_embeds.mean((1, 2))).double()


def state_of(trajectory, i, k):
    """What V's network sees of one state: x_t, the prompt, the time."""
    prompt = trajectory.prompt_embeds[i].mean(0)
    time = trajectory.timesteps[k:k + 1] / 1000
    return torch.cat([trajectory.latents[i, k].flatten(), prompt, time])


def make_value(**changed):
    return dpok.Value(chain.make_pipe(), replace(CONFIG, **changed))


@pytest.mark.equation("V", "04_dpok.Value.predict")
@pytest.mark.equation("V", "04_dpok.Value.forward")
@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_value_is_0_before_its_first_fit_and_then_its_networks_answer():
    (first, r_first), (second, _) = round_of_pictures(1), round_of_pictures(2)
    state = torch.get_rng_state()
    value, equal, off = (make_value(value=value) for value in (True, True, False))
    assert torch.equal(value.predict(first), torch.zeros(40, T))
    equal.fit(first, 0 * r_first + 3, 0)  # equal rewards leave a number
    assert (equal.predict(first) - 3).abs().max() < 1e-3
    off.fit(first, r_first, 0)  # with --no-value it stays 0
    assert not off.predict(first).any()
    value.fit(first, r_first, 0)
    V = value.predict(second)
    for i, k in ((0, 0), (7, 2), (39, T - 1)):
        net = value.net(state_of(second, i, k))
        torch.testing.assert_close(V[i, k], value.mean + value.std * net[0])
    assert torch.equal(state, torch.get_rng_state()), "global random numbers were drawn"


@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_value_is_fitted_once_on_each_state_of_the_latest_rounds_toward_its_own_reward():
    """Of a network that gives 0 everywhere, whose inputs and errors are kept."""
    rounds, seen = [round_of_pictures(n, 5) for n in range(4)], []

    def net(features):
        out = torch.zeros(len(features), 1, requires_grad=True)
        out.register_hook(lambda slope: seen.extend(zip(features, slope.flatten().tolist())))
        return out

    value = make_value(value_rounds=2)
    value.net.forward = net
    for n, (trajectory, r) in enumerate(rounds):
        seen.clear()
        value.fit(trajectory, r, n, batch_size=20)
    r = torch.cat([r for _, r in rounds[2:]])
    assert (value.mean, value.std) == pytest.approx((r.mean().item(), r.std().item()), rel=1e-5)
    assert len(seen) == 2 * 5 * T
    for trajectory, rewards in rounds[2:]:
        for i in range(5):
            target = (rewards[i].item() - value.mean) / value.std
            for k in range(T):
                state = state_of(trajectory, i, k)
                (slope,) = [slope for features, slope in seen if torch.allclose(features, state)]
                assert slope == pytest.approx(-2 * target / 20, abs=1e-5)


@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_the_order_in_which_value_learns_is_drawn_anew_in_each_round():
    values = []
    for n in (0, 1):
        value, (trajectory, r) = make_value(), round_of_pictures(0, 5)
        value.fit(trajectory, r, n, batch_size=8)
        assert all(p.grad is None for p in value.parameters()), "a step's gradient is left"
        values.append(value.predict(trajectory))
    assert not torch.equal(*values)


def test_what_value_knows_survives_a_checkpoint(tmp_path):
    (first, r_first), (second, r_second) = round_of_pictures(1), round_of_pictures(2)
    value, other = make_value(), make_value(seed=1)
    assert not torch.equal(value.net[0].weight, other.net[0].weight)
    value.fit(first, r_first, 0)
    torch.save(value.state_dict(), tmp_path / "value.pt")
    other.load_state_dict(torch.load(tmp_path / "value.pt", weights_only=True))
    for both in (value, other):
        both.config = CONFIG
        both.fit(second, r_second, 1)
    assert torch.equal(value.predict(second), other.predict(second))


@pytest.mark.equation("A = r − V, less the others' mean", "04_dpok.value_advantage")
def test_value_advantage_is_a_loop_over_a_picture_and_the_others_at_each_step():
    prompts, reward, V = ["a", "b", "a", "a", "b"], randn(5, seed=1), randn(5, 3, seed=2)
    A = dpok.value_advantage(reward, V, prompts)
    assert A.shape == (5, 3)
    for i in range(5):
        rest = [reward[j] - V[j] for j in range(5) if j != i and prompts[j] == prompts[i]]
        expected = reward[i] - V[i] - sum(rest) / len(rest)
        torch.testing.assert_close(A[i], expected, rtol=0, atol=1e-12)
