"""Flow-matching steps against plain floats, Gaussian data, torch.distributions and chapter 1."""
import json
import math
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from experiments import flow
from support import models, runs
from tests.equations import closed_forms as chain
from tests.equations.closed_forms import LOOP, double, randn, stable_scheduler

mdp, ddpo = import_module("01_mdp"), import_module("03_ddpo")
equation = pytest.mark.equation
SAMPLERS = ("sde", "constant", "cps", "ddim")


class Linear:
    """A UNet whose prediction is linear in x, with another slope at each t."""
    dtype = torch.float64

    def __call__(self, x, t, encoder_hidden_states):
        slope = 0.4 + t.double() / 2000
        c = encoder_hidden_states.mean((1, 2))
        return SimpleNamespace(sample=slope.view(-1, 1, 1, 1) * x + c.view(-1, 1, 1, 1))


def step_of(config, policy=flow.policy, prediction="epsilon", x=randn(5, 2, 3, 3), c=None):
    """Mean and std of a policy at all T steps at once: picture k is at step k."""
    T = len(x)
    scheduler = stable_scheduler(T, prediction_type=prediction)
    pipe = SimpleNamespace(scheduler=scheduler, unet=Linear())
    c = randn(T, 4, 6, seed=1) if c is None else c
    return policy(pipe, x, scheduler.timesteps, c, c[:1], config)


def cold_policy(pipe, x_t, t, c, empty, config):
    """DDIM without noise, by chapter 1."""
    eps = mdp.predict_noise(pipe.unet, x_t, t, c, empty, config.guidance_scale)
    return mdp.step_mean_std(pipe.scheduler, eps, t, x_t, eta=0.0)


def flow_times(T=5):
    """s and s' of each step, and c' = √ᾱ' + √(1−ᾱ'), in plain floats."""
    scheduler, rows = stable_scheduler(T), []
    for t in scheduler.timesteps.tolist():
        a, b = (scheduler.alphas_cumprod[max(k, 0)].item() for k in (t, t - 1000 // T))
        c, c_prev = a**0.5 + (1 - a) ** 0.5, b**0.5 + (1 - b) ** 0.5
        rows.append(((1 - a) ** 0.5 / c, (1 - b) ** 0.5 / c_prev, c_prev))
    return double(rows).T


# ---- change of variables --------------------------------------------------------------------


@equation("change of variables", "experiments.flow.flow_time")
@equation("velocity", "experiments.flow.velocity")
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_a_model_of_any_prediction_is_a_flow_matching_model(prediction):
    scheduler = stable_scheduler(prediction_type=prediction)
    alpha = scheduler.alphas_cumprod.double()[[1, 400, 901]].view(-1, 1, 1, 1)
    x_0, eps = randn(3, 2, 3, 3), randn(3, 2, 3, 3, seed=1)
    x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * eps
    says = {"epsilon": eps, "sample": x_0,
            "v_prediction": alpha.sqrt() * eps - (1 - alpha).sqrt() * x_0}[prediction]
    s, c = flow.flow_time(alpha)
    x = x_t / c
    v = flow.velocity(*mdp.x0_and_noise(scheduler, says, alpha, x_t))
    for found, want in ((x, (1 - s) * x_0 + s * eps), (v, eps - x_0), (x - s * v, x_0),
                        (x + (1 - s) * v, eps)):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    assert (0 < s).all() and (s < 1).all() and s[0] < s[1] < s[2]


# ---- the steps ------------------------------------------------------------------------------


def left_of_gaussian_data(sampler, T, variance=0.25, a=0.7):
    """Variance after T equal steps with the best velocity for data N(0, variance)."""
    times = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    total = 1.0
    for s, s_prev in zip(times, times[1:]):
        v = (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2)  # E[ε − x_0 | x̃ = 1]
        below_one = min(s, times[1])  # at s = 1 flow_grpo puts the next s into 1 − s
        if sampler == "cps":
            mean, std = flow.cps_step(1.0, v, s, s_prev, flow.cps_noise(s_prev, a))
        else:
            of_grpo = flow.flow_grpo_noise(below_one, a) * (s / below_one).sqrt()
            g = {"sde": of_grpo, "constant": double(a), "ode": double(0.0)}[sampler]
            mean, std = flow.sde_step(1.0, v, s, s_prev, g)
        total = mean**2 * total + std**2
    return total.item()


@equation("the SDE's step", "experiments.flow.sde_step")
@equation("Flow-GRPO's noise", "experiments.flow.flow_grpo_noise")
@equation("CPS's step", "experiments.flow.cps_step")
@equation("CPS's noise", "experiments.flow.cps_noise")
@pytest.mark.parametrize("sampler, few, many", (
    ("ode", 0.186, 0.248), ("sde", 0.23, 0.251), ("constant", 0.225, 0.249), ("cps", 0.137, 0.179)))
def test_on_gaussian_data_the_sde_keeps_the_variance_and_cps_does_not(sampler, few, many):
    found = [left_of_gaussian_data(sampler, T) for T in (10, 400)]
    assert found == pytest.approx([few, many], abs=5e-4)
    if sampler != "cps":
        assert left_of_gaussian_data(sampler, 10000) == pytest.approx(0.25, abs=5e-4)


@equation("the SDE's step", "experiments.flow.sde_step")
@equation("Flow-GRPO's noise", "experiments.flow.flow_grpo_noise")
def test_the_sdes_noise_by_hand_and_what_its_last_step_leaves():
    assert flow.flow_grpo_noise(double([0.8]), 0.7).item() == pytest.approx(0.7 * 2)
    _, std = flow.sde_step(*map(double, (2.0, 3.0, 0.8, 0.5, 1.5)))
    assert std.item() == pytest.approx(1.5 * math.sqrt(0.3))
    _, std = flow.sde_step(*map(double, (2.0, 3.0, 0.1, 0.0, 0.7 / 3)))
    assert std.item() == pytest.approx(0.0738, abs=1e-4)
    with pytest.raises(ValueError, match="infinite"):
        flow.flow_grpo_noise(double([0.5, 1.0]), 0.7)


@equation("CPS's step", "experiments.flow.cps_step")
@equation("CPS's noise", "experiments.flow.cps_noise")
def test_cps_keeps_the_noise_that_is_due_and_flow_grpo_agrees_to_first_order():
    x, v, s = double(2.0), double(3.0), double(0.8)
    tau = flow.cps_noise(double(0.5), 1 / 3)
    assert tau.item() == pytest.approx(0.25)
    mean, std = flow.cps_step(x, v, s, double(0.5), tau)
    assert mean.item() == pytest.approx(0.5 * -0.4 + math.sqrt(0.25 - 0.0625) * 2.6) and std == tau
    apart = []
    for dt in (1e-3, 1e-4):
        sde, std = flow.sde_step(x, v, s, s - dt, double(1.4))
        cps, _ = flow.cps_step(x, v, s, s - dt, std)
        apart.append(abs(sde - cps).item())
    assert apart[1] < 0.012 * apart[0] < 1e-5  # dt²


@equation("KL of flow models", "experiments.flow.flow_kl")
def test_kl_is_that_of_two_gaussians_and_has_dt():
    x, v_p, v_q = (randn(4, 2, 3, 3, seed=seed) for seed in range(3))
    s, s_prev, g = (double(numbers).view(-1, 1, 1, 1) for numbers in (
        (0.9, 0.6, 0.3, 0.2), (0.8, 0.3, 0.1, 0.0), (2.1, 0.7, 0.5, 0.1)))
    (p, std), (q, _) = (flow.sde_step(x, v, s, s_prev, g) for v in (v_p, v_q))
    want = kl_divergence(Normal(p, std), Normal(q, std)).sum((1, 2, 3))
    torch.testing.assert_close(flow.flow_kl(v_p, v_q, s, s_prev, g), want)
    torch.testing.assert_close(mdp.kl_divergence(p, q, std), want)


# ---- the policy -----------------------------------------------------------------------------


@equation("flow policy", "experiments.flow.policy")
@pytest.mark.parametrize("eta, scale", ((1.0, 1.0), (0.4, 3.0)))
@pytest.mark.parametrize("prediction", ("epsilon", "v_prediction", "sample"))
def test_chapter_1s_step_is_cps_with_its_own_tau(prediction, eta, scale):
    config = flow.Config(sampler="ddim", eta=eta, guidance_scale=scale)
    for found, want in zip(step_of(config, prediction=prediction),
                           step_of(config, mdp.policy, prediction)):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@equation("flow policy", "experiments.flow.policy")
@pytest.mark.parametrize("sampler", SAMPLERS[:3])
def test_a_flow_step_in_chapter_1s_coordinates(sampler):
    """Mean and deviation times c', and so log p less D·log c'; each picture at its own step."""
    x_t = randn(5, 2, 3, 3)
    mean, std = step_of(flow.Config(sampler=sampler, noise=0.6), x=x_t)
    eps, _ = step_of(flow.Config(), lambda pipe, x, t, c, *_: (pipe.unet(x, t, c).sample, None))
    s, s_prev, c_prev = (values.view(-1, 1, 1, 1) for values in flow_times())
    alpha = stable_scheduler(5).alphas_cumprod.double()[[801, 601, 401, 201, 1]].view(-1, 1, 1, 1)
    x_0 = (x_t - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    x, dt = (1 - s) * x_0 + s * eps, s_prev - s
    if sampler == "cps":
        tau = s_prev * math.sin(0.3 * math.pi)
        mu = (1 - s_prev) * x_0 + (s_prev**2 - tau**2).sqrt() * eps
    else:
        g = 0.6 * (s / (1 - s)).sqrt() if sampler == "sde" else 0.6
        mu = x * (1 + g**2 * dt / (2 * s)) + (eps - x_0) * (1 + g**2 * (1 - s) / (2 * s)) * dt
        tau = g * (-dt).sqrt()
    torch.testing.assert_close(mean, c_prev * mu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(std, c_prev * tau, rtol=1e-9, atol=0)
    action = randn(5, 2, 3, 3, seed=2)
    of_flow = Normal(mu, tau).log_prob(action / c_prev).sum((1, 2, 3))
    want = of_flow - 18 * c_prev.flatten().log()
    torch.testing.assert_close(mdp.log_prob(action, mean, std), want, rtol=1e-8, atol=1e-6)


@equation("flow policy", "experiments.flow.policy")
@pytest.mark.parametrize("sampler, noisy", ((SAMPLERS[0], 1), *zip(SAMPLERS, (2, 3, 2, 9))))
def test_a_window_has_noise_and_the_rest_is_ddim_without_noise(sampler, noisy):
    config = flow.Config(sampler=sampler, noise_steps=noisy, guidance_scale=2.0)
    mean, std = step_of(config)
    everywhere, full = step_of(replace(config, noise_steps=0))
    cold, _ = step_of(config, cold_policy)
    assert (full > 0).all() and (std[noisy:] == 0).all() and torch.equal(std[:noisy], full[:noisy])
    assert torch.equal(mean[:noisy], everywhere[:noisy])
    torch.testing.assert_close(mean[noisy:], cold[noisy:])
    one_at_a_time, _ = step_of(config, lambda pipe, x, t, c, *rest: (torch.cat([
        flow.policy(pipe, x[[k]], t[k], c[[k]], *rest)[0] for k in range(5)]), None))
    torch.testing.assert_close(one_at_a_time, mean)


@pytest.mark.parametrize("sampler, most, at", (
    ("ddim", 8.32, 8), ("sde", 1.90, 8), ("constant", 3.28, 0), ("cps", 8.89, 8)))
def test_which_step_dominates(sampler, most, at):
    """By how many σ a mean moves with ε, of ten steps: chapter 1's κ/σ. Flow-GRPO's are alike."""
    x, config = double([0.0] * 10).view(-1, 1, 1, 1), flow.Config(sampler=sampler)
    (zero, std), (one, _) = (
        step_of(config, x=x, c=torch.full((10, 1, 1), eps)) for eps in (0.0, 1.0))
    moves = ((one - zero).abs() / std).flatten()
    assert moves.max().item() == pytest.approx(most, abs=0.01) and moves.argmax() == at
    if sampler == "ddim":
        scheduler = stable_scheduler()
        torch.testing.assert_close(moves, mdp.noise_weight(scheduler, scheduler.timesteps))


@pytest.mark.parametrize("sampler", ("sde", "cps"))
def test_what_is_published_differs_by_known_factors(sampler):
    """Means over D; flow_grpo's KL has g² for σ², its CPS's log-probability no 1/(2σ²)."""
    x, v, other = (randn(4, 2, 3, 3, seed=seed) for seed in range(3))
    s, s_prev, g = double(0.6), double(0.5), double(0.7)
    step, noise = (flow.sde_step, g) if sampler == "sde" else (flow.cps_step, double(0.3))
    (p, std), (q, _) = (step(x, velocity, s, s_prev, noise) for velocity in (v, other))
    if sampler == "sde":
        published = (p - q) ** 2 / (2 * g**2)
        ours = flow.flow_kl(v, other, s, s_prev, g) * 0.1
    else:
        published = (x - q) ** 2 - (x - p) ** 2
        ours = (mdp.log_prob(x, p, std) - mdp.log_prob(x, q, std)) * 2 * std**2
    torch.testing.assert_close(published.mean((1, 2, 3)), ours / 18)


# ---- advantages, and the loop ---------------------------------------------------------------


@equation("GRPO's advantage", "experiments.flow.group_advantage")
@pytest.mark.parametrize("normalize, scales", (
    ("group", (math.sqrt(14 / 3), 4.0)), ("round", [math.sqrt(28.64)] * 2), ("none", (1.0, 1.0))))
def test_group_advantages_by_hand(normalize, scales):
    """Rewards 1, 2 and 6 of "a", 8 and 16 of "b": means 3 and 12; all five: 6.6."""
    r, prompts = torch.tensor([1, 8, 2, 6, 16]), ["a", "b", "a", "a", "b"]
    A = flow.group_advantage(r, prompts, normalize)
    a, b = scales
    want = [-2 / a, -4 / b, -1 / a, 3 / a, 4 / b]
    assert A.dtype == torch.float64 and A.tolist() == pytest.approx(want, rel=1e-12)
    assert flow.group_advantage(torch.full((4,), 0.1), ["a"] * 4, normalize).abs().max() < 1e-12


def test_steps_without_noise_and_a_last_step_left_out_get_no_advantage():
    config = flow.Config(num_steps=5, advantage_clip=1.5)
    for flags_of, kept in (({}, [1, 1, 1, 1, 1]), ({"train_last": False}, [1, 1, 1, 1, 0]),
                           ({"noise_steps": 2}, [1, 1, 0, 0, 0]),
                           ({"noise_steps": 5, "train_last": False}, [1, 1, 1, 1, 0])):
        for sign in (1, -1):  # of one that stands out by 1.73 deviations
            r = sign * double([0.0, 0.0, 0.0, 9.0])
            cut = flow.group_advantage(r, ["a"] * 4, "group").clamp(-1.5, 1.5)
            A = flow.advantages(r, ["a"] * 4, {}, replace(config, **flags_of))
            torch.testing.assert_close(A, cut[:, None] * double(kept))
            assert A.abs().max() == 1.5


@equation("DDPO_IS", "03_ddpo.train")
@pytest.mark.parametrize("guidance_scale", (1.0, 3.0))
def test_with_chapter_1s_step_the_loop_is_chapter_3s_but_for_the_mean(guidance_scale, monkeypatch):
    """GRPO's mean has the picture's own reward in it: all gradients are 4/5 of chapter 3's."""
    settings = LOOP | dict(guidance_scale=guidance_scale, step_weight="none", learning_rate=0.0,
                           max_grad_norm=math.inf, advantage_clip=math.inf)
    config = flow.Config(**settings, sampler="ddim", normalize="round")
    with monkeypatch.context() as patch:
        plain, _ = chain.rehearse(ddpo.train, ddpo.Config(**settings), patch)

    def policy(*words):
        called.append(words)
        return flow.policy(*words)

    called = []
    same, _ = chain.rehearse(ddpo.train, config, monkeypatch, policy, flow.advantages)
    assert called and len(plain) == len(same) == 6
    for gradients, found in zip(plain, same):
        for a, b in zip(gradients, found):
            torch.testing.assert_close(b, 0.8 * a, rtol=1e-5, atol=1e-5)


def test_the_script_draws_looks_and_learns_by_its_policy_and_judges_by_the_ode(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.Run, "draw", lambda *_: None)
    known, policy = [], flow.policy

    def watched(pipe, x_t, *rest):
        mean, std = policy(pipe, x_t, *rest)
        known.append((torch.is_grad_enabled(), len(x_t), std.max().item() > 0))
        return mean, std

    monkeypatch.setattr(flow, "policy", watched)
    words = ("--sampler cps --num-steps 3 --rounds 1 --prompts bias --prompts-per-round 1 "
             "--samples-per-prompt 4 --reward compressibility --eval-samples 2 --film-pictures 2 "
             "--device cpu --seed 3 --noise-steps 1 --updates-per-round 1 --learning-rate 1e-3")
    run = flow.main([*words.split(), "--out", str(tmp_path)])
    look, cold = [(2, True), (2, False), (2, False)], [(2, False)] * 3
    drawn = [(number, noisy) for learns, number, noisy in known if not learns]
    assert drawn == cold + look + [(4, True), (4, False), (4, False)] + look + cold
    assert [(number, noisy) for learns, number, noisy in known if learns] == [(4, True)]
    assert 0 < run.rows[0]["grad_norm"] < math.inf
    reward, told = import_module("02_rewards").get_reward("compressibility"), capsys.readouterr()
    kept = json.loads((run.folder / "by_ode.json").read_text())
    for model, when in (("tiny_sd", "before"), (run.folder, "after")):
        pipe = models.load_pipeline(str(model))
        r = ddpo.evaluate(pipe, ["four stars"], reward, run.config, cold_policy)["reward"]
        assert f"noise: {r.mean():.3f} ± {r.std() / 2**0.5:.3f} {when}" in told.out
        assert kept[when] == pytest.approx([r.mean().item(), r.std().item() / 2**0.5])
