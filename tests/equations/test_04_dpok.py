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

ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")
chain = import_module("tests.equations.test_03_ddpo")  # draw, coefficients, the small UNet

T, D, GOAL = chain.T, chain.D, chain.GOAL
CONFIG = dpok.Config(batch_size=10**6, num_steps=T, step_weight="none")


def closed_form(unet, alpha, beta, frozen_states=False):
    """J of DPOK without prompts, from the chain's two moments; with gradient.

    frozen_states: the KL's term has the gradient of KL_t alone, and not that of the states x_t.
    """
    mean, variance, penalty = torch.zeros(()).double(), torch.ones(()).double(), 0.0
    for k, (keep, feed, sigma) in enumerate(chain.coefficients()):
        m, v = (mean.detach(), variance.detach()) if frozen_states else (mean, variance)
        slope = feed * chain.gain(k) * (unet.kappa - 1)
        gap = slope * m + sigma * unet.theta[k]  # between the two means, at the mean state
        penalty = penalty + D * (gap**2 + slope**2 * v) / (2 * sigma**2)
        factor = keep + feed * chain.gain(k) * unet.kappa
        mean, variance = factor * mean + sigma * unet.theta[k], factor**2 * variance + sigma**2
    return -alpha * D * (variance + (mean - GOAL) ** 2) - beta * penalty


def example(eta=1.0, scale=1.0, B=9):
    """As in chapter 3: an older policy's trajectory, A (B,T), the present pipe; and μ_pre."""
    trajectory, A, pipe = chain.example(eta, scale, B)
    return trajectory, trajectory.means + 0.05, A, pipe  # neither the old policy nor the present


# ---- the objective --------------------------------------------------------------------------


def numbers(N=7):
    generator = torch.Generator().manual_seed(0)
    log_prob, change, A, kl = torch.randn(4, N, generator=generator, dtype=torch.float64)
    return log_prob.requires_grad_(), log_prob.detach() + 0.3 * change, A, kl.square()


def test_beta_0_and_alpha_1_is_exactly_ddpo():
    log_prob, old, A, kl = numbers()
    ours = dpok.dpok_objective(log_prob, old, A, kl, 0.2, 1.0, 0.0)
    theirs = ddpo.ddpo_is_objective(log_prob, old, A, 0.2)
    slopes = [torch.autograd.grad(terms.sum(), log_prob)[0] for terms in (ours, theirs)]
    assert torch.equal(ours, theirs) and torch.equal(*slopes)


@pytest.mark.equation("DPOK", "04_dpok.dpok_objective")
def test_alpha_weighs_the_surrogate_and_beta_takes_the_kl_away():
    log_prob, old, A, kl = numbers()
    J = dpok.dpok_objective(log_prob, old, A, kl, 0.2, 3.0, 0.5)
    for n in range(7):
        w, a = math.exp(log_prob[n].item() - old[n].item()), A[n].item()
        by_hand = 3.0 * min(w * a, min(max(w, 0.8), 1.2) * a) - 0.5 * kl[n].item()
        assert J[n].item() == pytest.approx(by_hand, rel=1e-12)
    for bad in (dict(kl=kl[:1]), dict(kl=kl.sum()), dict(advantage=A[:, None])):
        inputs = dict(log_prob=log_prob, old_log_prob=old, advantage=A, kl=kl) | bad
        with pytest.raises(AssertionError):
            dpok.dpok_objective(**inputs, clip_range=0.2, alpha=1, beta=1)


@pytest.mark.parametrize("eta, scale", [(1.0, 1.0), (0.7, 1.0), (1.0, 3.0), (0.4, 3.0)])
@pytest.mark.parametrize("batch_size", [4, 1000])
def test_step_means_are_the_present_policys_at_every_state(eta, scale, batch_size):
    """Each with its own state, timestep and prompt, past the empty prompt, and no gradient."""
    trajectory, _, _, pipe = example(eta, scale)
    config = replace(CONFIG, eta=eta, guidance_scale=scale, batch_size=batch_size)
    means = dpok.step_means(pipe, trajectory, config)
    by_hand, _ = chain.means_and_log_probs(pipe, trajectory, eta, scale)
    torch.testing.assert_close(means, by_hand.detach(), rtol=0, atol=1e-10)
    assert not means.requires_grad


@pytest.mark.equation("KL_t", "04_dpok.path_kl")
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_path_kl_is_torch_distributions_at_every_step(eta):
    trajectory, pre, _, pipe = example(eta)
    kl = dpok.path_kl(pipe, trajectory, pre, replace(CONFIG, eta=eta))
    assert kl.shape == (9, T)
    for k, (_, _, sigma) in enumerate(chain.coefficients(eta)):
        now, reference = Normal(trajectory.means[:, k], sigma), Normal(pre[:, k], sigma)
        by_hand = kl_divergence(now, reference).sum((1, 2, 3))
        torch.testing.assert_close(kl[:, k], by_hand, rtol=1e-9, atol=0)


# ---- accumulate -----------------------------------------------------------------------------


def gradient_by_hand(trajectory, pre, A, pipe, pictures, config, n=0):
    """−∇J of DPOK, by the textbook: a sum over steps, a mean over pictures."""
    means, log_prob = chain.means_and_log_probs(pipe, trajectory, config.eta,
                                                config.guidance_scale)
    variance = chain.double([sigma**2 for *_, sigma in chain.coefficients(config.eta)])
    kl = (means - pre).square().sum((2, 3, 4)) / (2 * variance)
    i, k, weight = chain.pairs_by_hand(config, pictures, n)
    power = 1 / D if config.ratio == "per_dim" else 1
    w = ((log_prob - trajectory.log_probs)[i, k] * power).exp()
    band = w.clamp(1 - config.clip_range, 1 + config.clip_range)
    surrogate = torch.minimum(w * A[i, k], band * A[i, k])
    terms = config.alpha * surrogate - config.beta * power * kl[i, k]
    loss = -(weight * terms).sum() / len(pictures)
    return torch.autograd.grad(loss, list(pipe.unet.parameters()))


CASES = {
    "both terms": dict(),
    "batches of 1": dict(batch_size=1),
    "batches of 7": dict(batch_size=7),
    "another eta": dict(eta=0.5),
    "guidance": dict(guidance_scale=3.0),
    "ratio's D-th root and KL per dim": dict(ratio="per_dim", clip_range=0.02),
    "half of the steps": dict(timestep_fraction=0.5, batch_size=7),
}


@pytest.mark.equation("DPOK", "04_dpok.accumulate")
@pytest.mark.parametrize("case", CASES)
def test_accumulate_adds_the_gradient_of_minus_j(case):
    config = replace(CONFIG, alpha=2.0, beta=0.3, **CASES[case])
    trajectory, pre, A, pipe = example(config.eta, config.guidance_scale)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    by_hand = gradient_by_hand(trajectory, pre, A, pipe, pictures, config, n=4)
    weights = [p.detach().clone() for p in pipe.unet.parameters()]
    for repeat in (1, 2):  # adds to the gradients that are there, and takes no step
        dpok.accumulate(pipe, trajectory, pre, A, pictures, config, 4)
        for found, expected in zip(chain.gradients(pipe.unet), by_hand, strict=True):
            torch.testing.assert_close(found, repeat * expected, rtol=1e-7, atol=1e-9)
    for p, before in zip(pipe.unet.parameters(), weights):
        assert torch.equal(p, before)


@pytest.mark.parametrize("changed", [dict(), dict(ratio="per_dim", clip_range=0.02, batch_size=7)])
def test_accumulate_without_a_leash_is_chapter_3s(changed):
    trajectory, pre, A, pipe = example()
    pictures, found = torch.tensor([7, 2, 3, 0, 8]), []
    seen = dpok.accumulate(pipe, trajectory, pre, A, pictures,
                           replace(CONFIG, alpha=1.0, beta=0.0, **changed), 0)
    found.append(chain.gradients(pipe.unet))
    pipe.unet.zero_grad()
    config = replace(chain.CONFIG, **changed)
    assert seen == pytest.approx(ddpo.accumulate(pipe, trajectory, A, pictures, config, 0))
    assert seen["kl_old"] > 0.1 and seen["clip_fraction"] > 0.1
    for ours, theirs in zip(found[0], chain.gradients(pipe.unet), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_with_advantage_0_all_that_is_left_pulls_the_kl_down():
    """A holds the step weights, so they cannot touch the KL. Against finite differences."""
    trajectory, pre, A, _ = example()

    def pulled(kappa, theta):
        means = dpok.step_means(chain.make_pipe(kappa, theta), trajectory, CONFIG)
        kl = 0.0
        for k, (_, _, sigma) in enumerate(chain.coefficients()):
            kl += ((means - pre)[:, k] ** 2).sum().item() / (2 * sigma**2) / 9
        return 0.7 * kl

    pipe, h = chain.make_pipe(1.1, 0.3), 1e-5
    config = replace(CONFIG, beta=0.7)
    dpok.accumulate(pipe, trajectory, pre, 0 * A, torch.arange(9), config, 0)
    slope = (pulled(1.1 + h, 0.3) - pulled(1.1 - h, 0.3)) / (2 * h)
    assert pipe.unet.kappa.grad.item() == pytest.approx(slope, rel=1e-5) and abs(slope) > 1
    slope = (pulled(1.1, 0.3 + h) - pulled(1.1, 0.3 - h)) / (2 * h)
    assert pipe.unet.theta.grad.sum().item() == pytest.approx(slope, rel=1e-5) and abs(slope) > 0.1


# ---- what the leash does --------------------------------------------------------------------


@pytest.mark.equation("DPOK's gradient", "04_dpok.dpok_objective")
def test_the_gradient_of_the_kl_drops_how_the_states_change():
    """The estimator averages to the closed form with frozen states, which is not the whole ∇J."""
    alpha, beta, pipe, found = 1.0, 3.0, chain.make_pipe(1.3, 0.4), []
    whole, dropped = (torch.autograd.grad(closed_form(pipe.unet, alpha, beta, frozen),
                                          pipe.unet.kappa)[0].item() for frozen in (False, True))
    r_mean = closed_form(pipe.unet, 1.0, 0.0).item()
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        trajectory = chain.draw(pipe, 1000, generator, prompts=False)
        means, log_prob = chain.means_and_log_probs(pipe, trajectory)
        pre, _ = chain.means_and_log_probs(chain.make_pipe(), trajectory)
        A = (chain.reward_of(trajectory) - r_mean)[:, None].expand(-1, T)
        kl = []
        for k, (_, _, sigma) in enumerate(chain.coefficients()):
            gap = means[:, k] - pre[:, k].detach()
            kl.append(gap.square().sum((1, 2, 3)) / (2 * sigma**2))
        terms = dpok.dpok_objective(log_prob, trajectory.log_probs, A, torch.stack(kl, 1), 0.2,
                                    alpha, beta)
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
    for k, (keep, feed, sigma) in enumerate(chain.coefficients()):
        factor = keep + feed * chain.gain(k)
        variance, kept = factor**2 * variance + sigma**2, factor * kept
    tilt = 2 * alpha / beta  # exp(α·r/β) = exp(−½·tilt·(x − goal)²)
    best = tilt * GOAL / (1 / variance + tilt)  # mean of N(0, variance)·exp(...)
    pipe, generator = chain.make_pipe(), torch.Generator().manual_seed(0)
    params, config = [pipe.unet.theta], replace(CONFIG, alpha=alpha, beta=beta, max_grad_norm=1e9)
    optimizer = torch.optim.Adam(params, lr=0.08)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    for n in range(80):
        trajectory = chain.draw(pipe, 128, generator, prompts=False)
        A = chain.reward_of(trajectory)
        A = (A - A.mean())[:, None].expand(-1, T)
        pre = dpok.step_means(chain.make_pipe(), trajectory, config)
        dpok.accumulate(pipe, trajectory, pre, A, torch.arange(128), config, n)
        training.optimizer_step(optimizer, params, config)
        schedule.step()
    mean = 0.0
    for k, (keep, feed, sigma) in enumerate(chain.coefficients()):
        mean = (keep + feed * chain.gain(k)) * mean + sigma * pipe.unet.theta[k].item()
    assert kept**2 / variance < 0.02
    assert mean == pytest.approx(best, rel=0.03) and best < 0.8 * GOAL  # β = 0 would go to GOAL


# ---- the value function ---------------------------------------------------------------------


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
    correlation = torch.corrcoef(torch.stack([V[:, 0], prompt_part]))[0, 1]
    assert correlation > 0.8


def test_value_is_0_before_its_first_fit_and_never_saw_the_rewards_it_is_taken_from():
    (first, r_first), (second, r_second) = round_of_pictures(1), round_of_pictures(2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    value, twin = make_value(), make_value()
    assert torch.equal(value.predict(first), torch.zeros(40, T))
    value.fit(first, r_first, 0)
    twin.fit(first, r_first, 0)
    before = value.predict(second)
    assert before.abs().min() > 0 and torch.equal(before, twin.predict(second))
    value.fit(second, r_second, 1)
    twin.fit(second, -r_second, 1)  # only now do these rewards make a difference
    assert (value.predict(second) - twin.predict(second)).abs().min() > 0.1
    assert torch.equal(state, torch.get_rng_state()), "global random numbers were drawn"


def test_value_is_fitted_on_the_latest_rounds_only_and_on_each_pictures_own_reward():
    value = make_value(value_rounds=2)
    rounds = [round_of_pictures(n, 5) for n in range(4)]
    for n, (trajectory, r) in enumerate(rounds):
        value.fit(trajectory, r, n)
    latest = torch.cat([rounds[2][1], rounds[3][1]]).repeat_interleave(T).float()
    assert value.mean.item() == pytest.approx(latest.mean().item(), rel=1e-5)
    assert value.std.item() == pytest.approx(latest.std().item(), rel=1e-5)
    assert len(value.rounds) == 2
    for (x_t, c, t, target), (trajectory, r) in zip(value.rounds, rounds[2:]):
        for i in range(5):
            for k in range(T):
                row = i * T + k
                assert torch.equal(x_t[row], trajectory.latents[i, k])
                torch.testing.assert_close(c[row], trajectory.prompt_embeds[i].mean(0))
                assert t[row] == trajectory.timesteps[k]
                assert target[row].item() == pytest.approx(r[i].item())


def test_a_reward_in_other_units_gives_the_same_value_in_those_units():
    values = []
    for scale, shift in ((1, 0), (1000, 7)):
        value = make_value()
        for n in range(3):
            trajectory, r = round_of_pictures(n)
            value.fit(trajectory, scale * r + shift, n)
        values.append(value.predict(trajectory))
    torch.testing.assert_close(values[1], 1000 * values[0] + 7, rtol=1e-3, atol=1)


@pytest.mark.equation("A = r − V, less the others' mean", "04_dpok.value_advantage")
def test_value_advantage_is_a_loop_over_a_picture_and_the_others_at_each_step():
    prompts = ["a", "b", "a", "a", "b"]
    generator = torch.Generator().manual_seed(1)
    reward = torch.randn(5, generator=generator, dtype=torch.float64)
    V = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    A = dpok.value_advantage(reward, V, prompts)
    assert A.shape == (5, 3)
    for i in range(5):
        for k in range(3):
            others = []
            for j in range(5):
                if j != i and prompts[j] == prompts[i]:
                    others.append(reward[j] - V[j, k])
            expected = reward[i] - V[i, k] - sum(others) / len(others)
            assert A[i, k].item() == pytest.approx(expected.item(), abs=1e-12)
