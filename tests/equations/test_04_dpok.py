"""DPOK's equations on the chains of test_03_ddpo.py: closed forms, torch.distributions, loops.

p_pre is the chain with κ = 1 and θ = 0. θ shifts a step's mean; κ makes the KL depend on the state.
"""
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from support import training
from tests.oracles import randn

dpok = import_module("04_dpok")
chain = import_module("tests.equations.test_03_ddpo")  # draw, coefficients, the small UNet

T = chain.T
CONFIG = dpok.Config(batch_size=10**6, num_steps=T, step_weight="none")


def example(eta=1.0, scale=1.0, B=9):
    """As in chapter 3: an older policy's trajectory, A (B,T), the present pipe; and μ_pre."""
    trajectory, A, pipe = chain.example(eta, scale, B)
    return trajectory, trajectory.means + 0.05, A, pipe  # neither the old policy nor the present


@pytest.mark.equation("DPOK", "04_dpok.dpok_objective")
def test_alpha_weighs_the_surrogate_and_beta_takes_the_kl_away():
    log_prob, change, A, kl = randn(4, 7)
    inputs = dict(log_prob=log_prob, old_log_prob=log_prob + 0.3 * change, advantage=A, kl=kl**2)
    J = dpok.dpok_objective(**inputs, clip_range=0.2, alpha=3.0, beta=0.5)
    for n in range(7):
        w, a = math.exp(-0.3 * change[n].item()), A[n].item()
        by_hand = 3.0 * min(w * a, min(max(w, 0.8), 1.2) * a) - 0.5 * kl[n].item() ** 2
        assert J[n].item() == pytest.approx(by_hand, rel=1e-12)
    for bad in (dict(kl=kl[:1]), dict(kl=kl.sum()), dict(advantage=A[:, None])):
        with pytest.raises(AssertionError):
            dpok.dpok_objective(**inputs | bad, clip_range=0.2, alpha=1, beta=1)


@pytest.mark.equation("μ(x_t, z, t)", "04_dpok.step_means")
@pytest.mark.equation("KL_t", "04_dpok.path_kl")
@pytest.mark.parametrize("eta, scale, batch_size", [(1.0, 1.0, 1000), (0.4, 3.0, 4)])
def test_step_means_and_path_kl_are_of_the_present_policy_at_every_state(eta, scale, batch_size):
    trajectory, pre, _, pipe = example(eta, scale)
    config = replace(CONFIG, eta=eta, guidance_scale=scale, batch_size=batch_size)
    means = dpok.step_means(pipe, trajectory, config)
    by_hand, _ = chain.means_and_log_probs(pipe, trajectory, eta, scale)
    torch.testing.assert_close(means, by_hand.detach(), rtol=0, atol=1e-10)
    assert not means.requires_grad
    kl = dpok.path_kl(pipe, trajectory, pre, config)
    assert kl.shape == (9, T)
    for k, (*_, sigma) in enumerate(chain.coefficients(eta)):
        now, reference = Normal(trajectory.means[:, k], sigma), Normal(pre[:, k], sigma)
        by_hand = kl_divergence(now, reference).sum((1, 2, 3))
        torch.testing.assert_close(kl[:, k], by_hand, rtol=1e-9, atol=0)


@pytest.mark.equation("DPOK", "04_dpok.accumulate")
@pytest.mark.parametrize("case", chain.CASES)
def test_accumulate_adds_minus_the_gradient_and_reports_clip_and_kl(case):
    config = replace(CONFIG, alpha=2.0, beta=0.3, **chain.CASES[case])
    trajectory, pre, A, pipe = example(config.eta, config.guidance_scale)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    by_hand, seen = chain.gradient_by_hand(pipe, trajectory, A, pictures, config, 4, pre)
    chain.check_accumulate(
        lambda: dpok.accumulate(pipe, trajectory, pre, A, pictures, config, 4), pipe, by_hand, seen)


@pytest.mark.equation("DPOK's gradient", "04_dpok.dpok_objective")
def test_the_gradient_of_the_kl_drops_how_the_states_change():
    """The estimator averages to the closed form with frozen states, which is not the whole ∇J."""
    alpha, beta, pipe, found = 1.0, 3.0, chain.make_pipe(1.3, 0.4), []
    whole, dropped = (torch.autograd.grad(chain.closed_form(pipe.unet, alpha, beta, frozen),
                                          pipe.unet.kappa)[0].item() for frozen in (False, True))
    r_mean = chain.closed_form(pipe.unet).item()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        trajectory = chain.draw(pipe, 1000, generator, prompts=False)
        means, log_prob = chain.means_and_log_probs(pipe, trajectory)
        pre, _ = chain.means_and_log_probs(chain.make_pipe(), trajectory)
        A = (chain.reward_of(trajectory) - r_mean)[:, None].expand(-1, T)
        sigma = chain.double([sigma for *_, sigma in chain.coefficients()])
        kl = (means - pre.detach()).square().sum((2, 3, 4)) / (2 * sigma**2)
        terms = dpok.dpok_objective(log_prob, trajectory.log_probs, A, kl, 0.2, alpha, beta)
        slope, = torch.autograd.grad(terms.sum(1).mean(), pipe.unet.kappa)
        found.append(slope)
    found = torch.stack(found)
    error = found.std().item() / 40**0.5
    assert error < abs(whole - dropped) / 8, "too noisy to tell them apart"
    assert found.mean().item() == pytest.approx(dropped, abs=3.5 * error)


def test_training_reaches_the_optimum_that_exp_of_the_reward_tilts_to():
    """p* ∝ p_pre·exp(α·r/β) in closed form: its mean, reached by training the shifts θ_t.

    With σ_t fixed only the mean can move. p* also tilts x_T, which no policy does; that is the
    difference between x_0's variance and the part of it that the steps' noise makes: 2 % here.
    """
    alpha, beta, variance, kept = 1.0, 0.25, 1.0, 1.0  # of x_0, and what is left of x_T in it
    for gain, keep, feed, sigma in chain.coefficients():
        factor = keep + feed * gain
        variance, kept = factor**2 * variance + sigma**2, factor * kept
    tilt = 2 * alpha / beta  # exp(α·r/β) = exp(−½·tilt·(x − goal)²)
    best = tilt * chain.GOAL / (1 / variance + tilt)  # mean of N(0, variance)·exp(...)
    pipe, generator = chain.make_pipe(), torch.Generator().manual_seed(0)
    params, config = [pipe.unet.theta], replace(CONFIG, alpha=alpha, beta=beta)
    optimizer = torch.optim.Adam(params, lr=0.08)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    for n in range(80):
        trajectory = chain.draw(pipe, 128, generator, prompts=False)
        r = chain.reward_of(trajectory)
        A = (r - r.mean())[:, None].expand(-1, T)
        pre = dpok.step_means(chain.make_pipe(), trajectory, config)
        dpok.accumulate(pipe, trajectory, pre, A, torch.arange(128), config, n)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    mean = 0.0
    for k, (gain, keep, feed, sigma) in enumerate(chain.coefficients()):
        mean = (keep + feed * gain) * mean + sigma * pipe.unet.theta[k].item()
    assert kept**2 / variance < 0.02
    assert mean == pytest.approx(best, rel=0.03) and best < 0.8 * chain.GOAL  # β = 0 goes to GOAL


def round_of_pictures(seed, B=40):
    """A float32 trajectory, as rollout's are, and rewards that its states and prompts tell of."""
    trajectory = chain.draw(chain.make_pipe(), B, torch.Generator().manual_seed(seed))
    for name in ("latents", "means", "log_probs", "prompt_embeds"):
        setattr(trajectory, name, getattr(trajectory, name).float())
    x_0 = trajectory.latents[:, -1].mean((1, 2, 3))
    return trajectory, (5 + 2 * x_0 + trajectory.prompt_embeds.mean((1, 2))).double()


def make_value(**changed):
    return dpok.Value(chain.make_pipe(), replace(CONFIG, **changed))


@pytest.mark.equation("V", "04_dpok.Value")
@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_value_learns_what_each_state_says_of_the_reward():
    """Late states tell the reward, the first only the prompt's part: judged on new pictures."""
    value, (test, r) = make_value(), round_of_pictures(99, 100)
    for n in range(30):
        value.fit(*round_of_pictures(n), n)
    V = value.predict(test)
    assert V.shape == (100, T) and not V.requires_grad
    prompt_part = test.prompt_embeds.mean((1, 2))
    error = (r[:, None] - V).square().mean(0) / r.var()
    assert error[-1] < 0.2 and error[-1] < 0.5 * error[0]
    assert V.mean().item() == pytest.approx(r.mean().item(), abs=0.1)
    assert torch.corrcoef(torch.stack([V[:, 0], prompt_part]))[0, 1] > 0.8


@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_value_is_0_before_its_first_fit_and_never_saw_the_rewards_it_is_taken_from():
    (first, r_first), (second, r_second) = round_of_pictures(1), round_of_pictures(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    value, twin = make_value(), make_value()
    assert torch.equal(value.predict(first), torch.zeros(40, T))
    equal = make_value()
    equal.fit(first, 0 * r_first + 3, 0)  # equal rewards leave a number
    assert (equal.predict(first) - 3).abs().max() < 1e-3
    value.fit(first, r_first, 0)
    twin.fit(first, r_first, 0)
    before = value.predict(second)
    assert before.abs().min() > 0 and torch.equal(before, twin.predict(second))
    value.fit(second, r_second, 1)
    twin.fit(second, -r_second, 1)  # only now do these rewards make a difference
    assert (value.predict(second) - twin.predict(second)).abs().min() > 0.1
    assert torch.equal(state, torch.get_rng_state()), "global random numbers were drawn"


@pytest.mark.equation("V", "04_dpok.Value.fit")
def test_value_is_fitted_on_the_latest_rounds_and_each_pictures_own_reward(monkeypatch):
    calls, original = [], training.random_stream
    monkeypatch.setattr(training, "random_stream", lambda *a: calls.append(a) or original(*a))
    value = make_value(value_rounds=2)
    rounds = [round_of_pictures(n, 5) for n in range(4)]
    for n, (trajectory, r) in enumerate(rounds):
        value.fit(trajectory, r, n)
    assert calls[1:] == [(CONFIG.seed, "value batches", n) for n in range(4)]
    assert len(value.rounds) == 2
    for (x_t, c, t, target), (trajectory, r) in zip(value.rounds, rounds[2:]):
        for i in range(5):
            for k in range(T):
                row = i * T + k
                assert torch.equal(x_t[row], trajectory.latents[i, k])
                torch.testing.assert_close(c[row], trajectory.prompt_embeds[i].mean(0))
                assert t[row] == trajectory.timesteps[k]
                assert target[row].item() == pytest.approx(r[i].item())


@pytest.mark.equation("A = r − V, less the others' mean", "04_dpok.value_advantage")
def test_value_advantage_is_a_loop_over_a_picture_and_the_others_at_each_step():
    prompts, reward, V = ["a", "b", "a", "a", "b"], randn(5, seed=1), randn(5, 3, seed=2)
    A = dpok.value_advantage(reward, V, prompts)
    assert A.shape == (5, 3)
    for i in range(5):
        rest = [reward[j] - V[j] for j in range(5) if j != i and prompts[j] == prompts[i]]
        expected = reward[i] - V[i] - sum(rest) / len(rest)
        torch.testing.assert_close(A[i], expected, rtol=0, atol=1e-12)
