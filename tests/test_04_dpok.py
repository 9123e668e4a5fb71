"""DPOK's equations against closed forms: Gaussian chains, hand-worked numbers, torch.distributions.

The chain of test_03_ddpo.py with two dials: θ shifts a step's mean, κ scales the noise predicted,
so that the KL to the pretrained model (θ = 0, κ = 1) depends on the state.
"""
import copy
import csv
import json
import math
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from test_03_ddpo import M, linear_pipe

mdp = import_module("01_mdp")
ddpo, dpok = import_module("03_ddpo"), import_module("04_dpok")

S, GOAL, SHAPE, T = 0.5, 1.5, (1, 2, 2), 6
D = math.prod(SHAPE)


class DialUNet(torch.nn.Module):
    """ε = κ·gain·x_t − push_t·θ_t, gain that of the best denoiser of N(0, s²); one θ a step."""

    def __init__(self, scheduler, theta=0.0, kappa=1.0):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.full((T,), theta, dtype=torch.float64))
        self.kappa = torch.nn.Parameter(torch.tensor(kappa, dtype=torch.float64))
        self.table, self.timesteps = scheduler.alphas_cumprod.double(), scheduler.timesteps
        self.per_step = mdp.noise_weight(scheduler, scheduler.timesteps)
        self.dtype = torch.float64

    def forward(self, x, t, encoder_hidden_states):
        a = self.table[t].view(-1, 1, 1, 1)
        k = (t[:, None] == self.timesteps[None]).int().argmax(1)
        shift = (self.theta / self.per_step)[k].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.kappa * (1 - a).sqrt() * x / (a * S**2 + 1 - a) - shift)


def dial_pipe(theta=0.0, kappa=1.0):
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(T)
    return SimpleNamespace(scheduler=scheduler, unet=DialUNet(scheduler, theta, kappa),
                           device="cpu")


CONFIG = dpok.Config(batch_size=10**6, max_grad_norm=1e9, step_weight="none")


@torch.no_grad()
def sample(pipe, B, generator, reward=lambda x: -((x - GOAL) ** 2).sum((1, 2, 3))):
    x = torch.randn(B, *SHAPE, generator=generator, dtype=torch.float64)
    latents, means, log_probs = [x], [], []
    for t in pipe.scheduler.timesteps:
        mean, std = mdp.policy(pipe, x, t, torch.zeros(B, 1, 1), None, 1.0, 1.0)
        x = mean + std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        latents.append(x)
        means.append(mean)
        log_probs.append(mdp.log_prob(x, mean, std))
    return SimpleNamespace(
        latents=torch.stack(latents, 1), means=torch.stack(means, 1),
        log_probs=torch.stack(log_probs, 1), reward=reward(x), negative_embeds=None,
        timesteps=pipe.scheduler.timesteps, prompt_embeds=torch.zeros(B, 1, 1))


def coefficients():
    """μ = (keep + feed·κ)·x_t + σ_t·θ_t, from the textbook; nothing of the scripts is used."""
    table = [float(a) for a in dial_pipe().scheduler.alphas_cumprod.double()]
    rows = []
    for t in dial_pipe().scheduler.timesteps.tolist():
        a, b = table[t], table[max(t - 1000 // T, 0)]
        sigma2 = (1 - b) / (1 - a) * (1 - a / b)
        to_eps = math.sqrt(1 - b - sigma2) - math.sqrt(b * (1 - a) / a)
        gain = math.sqrt(1 - a) / (a * S**2 + 1 - a)
        rows.append((math.sqrt(b / a), to_eps * gain, math.sqrt(sigma2)))
    return rows


def closed_form(theta, kappa, alpha, beta, frozen_states=False):
    """J of DPOK as a float64 tensor with gradient; frozen_states: E_{p(x_t)} without its gradient.

    The reward's term always has its whole gradient; the KL's term then has only that of KL_t.
    """
    mean, var, penalty = torch.zeros(()).double(), torch.ones(()).double(), 0.0
    for k, (keep, feed, sigma) in enumerate(coefficients()):
        m, v = (mean.detach(), var.detach()) if frozen_states else (mean, var)
        gap, slope = feed * (kappa - 1) * m + sigma * theta[k], feed * (kappa - 1)
        penalty = penalty + D * (gap**2 + slope**2 * v) / (2 * sigma**2)
        mean, var = (keep + feed * kappa) * mean + sigma * theta[k], (
            keep + feed * kappa) ** 2 * var + sigma**2
    return -alpha * D * (var + (mean - GOAL) ** 2) - beta * penalty


def slope_of(theta, kappa, alpha, beta, frozen_states=False):
    theta = torch.full((T,), theta).double().requires_grad_()
    kappa = torch.tensor(kappa).double().requires_grad_()
    J = closed_form(theta, kappa, alpha, beta, frozen_states)
    return torch.autograd.grad(J, kappa)[0].item()


def pre_means(run):
    return dpok.step_means(dial_pipe(), run, CONFIG)


def accumulated(pipe, run, advantage, config, beta, pairs=None, kl_weight=torch.ones(T)):
    """∇J that `accumulate` leaves behind: κ's, and θ's."""
    B = len(run.latents)
    pairs = ddpo.draw_pairs(B, T, 1.0, 1, torch.Generator())[0] if pairs is None else pairs
    dpok.accumulate(pipe, run, pre_means(run)[0], advantage, pairs, torch.ones(T), kl_weight, beta,
                    config)
    return -pipe.unet.kappa.grad.item(), -pipe.unet.theta.grad


# ---- the objective --------------------------------------------------------------------------


def numbers(seed=0, B=7):
    generator = torch.Generator().manual_seed(seed)
    log_prob, change, kl = torch.randn(3, B, T, generator=generator, dtype=torch.float64)
    A = torch.randn(B, generator=generator, dtype=torch.float64)
    return log_prob.requires_grad_(), log_prob.detach() + 0.3 * change, A, kl**2


def test_beta_0_and_alpha_1_is_exactly_ddpo():
    log_prob, old, A, kl = numbers()
    ours = dpok.dpok_objective(log_prob, old, A, kl, 0.2, 1.0, 0.0)
    theirs = ddpo.ddpo_is_objective(log_prob, old, A, 0.2)
    assert ours.item() == theirs.item()
    assert torch.equal(*(torch.autograd.grad(J, log_prob)[0] for J in (ours, theirs)))
    a_step = dpok.dpok_objective(log_prob, old, A[:, None].expand(-1, T), kl, 0.2, 1.0, 0.0)
    assert a_step.item() == theirs.item()


def test_objective_by_hand():
    log_prob, old = torch.tensor([[0.1, -0.5], [0.5, 0.0]]).double(), torch.zeros(2, 2).double()
    A, kl = torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 2.0], [3.0, 5.0]]).double()
    surrogate = [math.exp(0.1) + math.exp(-0.5), -2 * math.exp(0.5) - 2]
    want = (3 * surrogate[0] - 0.5 * 3 + 3 * surrogate[1] - 0.5 * 8) / 2
    assert dpok.dpok_objective(log_prob, old, A, kl, 0.2, 3.0, 0.5).item() == pytest.approx(want)
    by_step = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).double()
    want = (math.exp(0.1) + 2 * math.exp(-0.5) + 4) / 2  # no clip reached with these signs
    J = dpok.dpok_objective(log_prob, old, by_step, kl, 0.2, 1.0, 0.0)
    assert J.item() == pytest.approx(want)


def test_objective_refuses_what_would_broadcast():
    log_prob, old, A, kl = numbers(B=T)
    for bad in (dict(kl=kl[0]), dict(kl=kl.sum(1)), dict(advantage=A[:, None]),
                dict(advantage=A[:3])):
        inputs = dict(log_prob=log_prob, old_log_prob=old, advantage=A, kl=kl) | bad
        with pytest.raises(AssertionError):
            dpok.dpok_objective(**inputs, clip_range=0.2, alpha=1, beta=1)


def test_step_kl_is_torch_distributions_at_all_steps():
    run = sample(dial_pipe(0.4, 1.2), 5, torch.Generator().manual_seed(0))
    means, std = pre_means(run)
    kl = dpok.per_step(mdp.kl_divergence, run.means, means, std)
    for k, (keep, feed, sigma) in enumerate(coefficients()):
        pre = Normal((keep + feed) * run.latents[:, k], sigma)
        now = Normal((keep + 1.2 * feed) * run.latents[:, k] + 0.4 * sigma, sigma)
        want = kl_divergence(now, pre).sum((1, 2, 3))
        assert kl[:, k] == pytest.approx(want, rel=1e-6)  # std is float32
        log_prob = now.log_prob(run.latents[:, k + 1]).sum((1, 2, 3))
        assert run.log_probs[:, k] == pytest.approx(log_prob, rel=1e-9)


def test_kl_gradient_against_finite_differences():
    """A = 0 leaves −β Σ KL_t: its gradient by `accumulate`, and by moving each dial."""
    run, beta = sample(dial_pipe(0.3, 1.1), 8, torch.Generator().manual_seed(0)), 0.7
    A = torch.zeros(8, T).double()
    kappa, theta = accumulated(dial_pipe(0.3, 1.1), run, A, CONFIG, beta)

    def penalty(pipe):
        means, std = dpok.step_means(pipe, run, CONFIG)
        return -beta * dpok.per_step(mdp.kl_divergence, means, pre_means(run)[0],
                                     std.double()).sum(1).mean().item()

    h = 1e-5
    want = (penalty(dial_pipe(0.3, 1.1 + h)) - penalty(dial_pipe(0.3, 1.1 - h))) / (2 * h)
    assert kappa == pytest.approx(want, rel=1e-5) and abs(want) > 1
    want = (penalty(dial_pipe(0.3 + h, 1.1)) - penalty(dial_pipe(0.3 - h, 1.1))) / (2 * h)
    assert theta.sum().item() == pytest.approx(want, rel=1e-5) and abs(want) > 0.1


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_accumulate_is_the_whole_objective_whatever_the_batch_size(batch_size):
    run = sample(dial_pipe(0.2, 1.1), 9, torch.Generator().manual_seed(0))
    A = torch.randn(9, T, generator=torch.Generator().manual_seed(1)).double()
    config = dpok.Config(batch_size=batch_size, alpha=2.0)
    kappa, theta = accumulated(dial_pipe(0.25, 1.05), run, A, config, 0.3)
    pipe = dial_pipe(0.25, 1.05)
    mean, std = zip(*[mdp.policy(pipe, run.latents[:, k], t, torch.zeros(9, 1, 1), None, 1.0, 1.0)
                      for k, t in enumerate(run.timesteps)])
    new = torch.stack([mdp.log_prob(run.latents[:, k + 1], mean[k], std[k]) for k in range(T)], 1)
    kl = torch.stack([mdp.kl_divergence(mean[k], pre_means(run)[0][:, k], std[k])
                      for k in range(T)], 1)
    J = dpok.dpok_objective(new, run.log_probs, A, kl, config.clip_range, 2.0, 0.3)
    want = torch.autograd.grad(J, [pipe.unet.kappa, pipe.unet.theta])
    assert kappa == pytest.approx(want[0].item(), rel=1e-9)
    assert theta == pytest.approx(want[1], rel=1e-9)


def test_accumulate_weighs_each_step_as_it_is_told():
    """Step weights on the reward's term alone, KL weights on the KL alone; the share clipped."""
    run = sample(dial_pipe(0.2, 1.1), 9, torch.Generator().manual_seed(0))
    A = torch.randn(9, T, generator=torch.Generator().manual_seed(1)).double()
    weight, kl_weight = torch.arange(1.0, T + 1), torch.arange(T, 0.0, -1) ** 2
    pipe, twin = dial_pipe(0.5, 1.0), dial_pipe(0.5, 1.0)
    pairs, = ddpo.draw_pairs(9, T, 1.0, 1, torch.Generator())
    clipped = dpok.accumulate(pipe, run, pre_means(run)[0], A, pairs, weight, kl_weight, 0.3,
                              dpok.Config(batch_size=7))
    J, ratios = 0.0, []
    for k, t in enumerate(run.timesteps):
        mean, std = mdp.policy(twin, run.latents[:, k], t, torch.zeros(9, 1, 1), None, 1.0, 1.0)
        ratio = (mdp.log_prob(run.latents[:, k + 1], mean, std) - run.log_probs[:, k]).exp()
        term = torch.minimum(ratio * A[:, k], ratio.clamp(0.8, 1.2) * A[:, k])
        kl = mdp.kl_divergence(mean, pre_means(run)[0][:, k], std)
        J = J + ((k + 1) * term - 0.3 * (T - k) ** 2 * kl).mean()
        ratios.append(ratio.detach())
    want = torch.autograd.grad(J, [twin.unet.kappa, twin.unet.theta])
    assert -pipe.unet.kappa.grad.item() == pytest.approx(want[0].item(), rel=1e-9)
    assert -pipe.unet.theta.grad == pytest.approx(want[1], rel=1e-9)
    outside = torch.stack([(r < 0.8) | (r > 1.2) for r in ratios]).double().mean().item()
    assert clipped == pytest.approx(outside, rel=1e-6) and 0.1 < outside < 0.9


def test_eta_reaches_means_stds_and_weights():
    """The mean square of ε_θ − ε_pre is 2·KL_t·(σ_t/c_t)²/D at every η, if all use the same."""
    now, run = dial_pipe(0.3, 1.2), sample(dial_pipe(0.3, 1.2), 4, torch.Generator().manual_seed(0))
    config = dpok.Config(batch_size=7, eta=0.5)
    (means, std), (pre, _) = (dpok.step_means(pipe, run, config) for pipe in (now, dial_pipe()))
    assert std.tolist() == pytest.approx([sigma / 2 for _, _, sigma in coefficients()], rel=1e-6)
    kl = dpok.per_step(mdp.kl_divergence, means, pre, std)
    weight = dpok.kl_weights(now.scheduler, run.timesteps, 0.5, "mse", D)
    for k, t in enumerate(run.timesteps):
        eps = [pipe.unet(run.latents[:, k], t.expand(4), None).sample
               for pipe in (now, dial_pipe())]
        mse = (eps[0] - eps[1]).square().mean((1, 2, 3)).detach()
        assert weight[k] * kl[:, k] == pytest.approx(mse, rel=1e-5)


class PromptUNet(torch.nn.Module):
    """ε = θ·(x_t + the mean of the prompt's embedding)."""
    dtype = torch.float64

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x, t, encoder_hidden_states):
        return SimpleNamespace(
            sample=self.theta * (x + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)))


def test_the_policy_is_asked_with_each_pictures_prompt_and_with_guidance():
    pipe, run = dial_pipe(), sample(dial_pipe(), 3, torch.Generator().manual_seed(0))
    pipe.unet, c = PromptUNet(), torch.tensor([1.0, 2.0, 4.0]).double()
    run.prompt_embeds, run.negative_embeds = c.view(3, 1, 1), torch.full((1, 1, 1), 8.0).double()
    means, _ = dpok.step_means(pipe, run, dpok.Config(batch_size=4, guidance_scale=3.0))
    for k, t in enumerate(run.timesteps):
        x = run.latents[:, k]
        eps = 0.5 * (x + (8 + 3 * (c - 8)).view(3, 1, 1, 1))
        want = mdp.step_mean_std(pipe.scheduler, eps, t, x)[0]
        assert means[:, k] == pytest.approx(want.detach(), rel=1e-9)


def test_a_step_is_clipped_forgets_its_gradient_and_refuses_nan():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer, config = torch.optim.SGD([p], lr=1.0), dpok.Config(max_grad_norm=0.5)
    p.grad = torch.tensor([30.0, -40.0])
    assert dpok.step(optimizer, [p], config) == pytest.approx(50)
    assert p.tolist() == pytest.approx([-0.3, 0.4]) and p.grad is None
    p.grad = torch.tensor([math.nan, 1.0])
    with pytest.raises(ValueError, match="--learning-rate"):
        dpok.step(optimizer, [p], config)
    assert p.isfinite().all()


def test_kl_in_the_loss_drops_a_term_and_kl_in_the_reward_has_it():
    """On the chain with κ: both gradients in closed form, and which form estimates which."""
    theta, kappa, alpha, beta = 0.4, 1.3, 1.0, 3.0
    full = slope_of(theta, kappa, alpha, beta)
    dropped = slope_of(theta, kappa, alpha, beta, frozen_states=True)
    generator, found = torch.Generator().manual_seed(0), {"exact": [], "reward": []}
    for _ in range(40):
        run = sample(dial_pipe(theta, kappa), 1000, generator)
        means, std = pre_means(run)
        pre_log_prob = dpok.per_step(mdp.log_prob, run.latents[:, 1:], means, std.double())
        paid = dpok.kl_in_reward(run.reward, run.log_probs, pre_log_prob, alpha, beta)
        for form, r, in_loss in (("exact", run.reward, beta), ("reward", paid, 0.0)):
            A = dpok.centered(r[:, None].expand(-1, T), ["p"] * len(r))
            found[form].append(accumulated(dial_pipe(theta, kappa), run, A, CONFIG, in_loss)[0])
    found = {form: torch.tensor(values) for form, values in found.items()}
    error = {form: values.std().item() / len(values) ** 0.5 for form, values in found.items()}
    assert max(error.values()) < abs(full - dropped) / 8, "too noisy to tell them apart"
    assert found["exact"].mean().item() == pytest.approx(dropped, abs=3.5 * error["exact"])
    assert found["reward"].mean().item() == pytest.approx(full, abs=3.5 * error["reward"])


def test_kl_in_reward_by_hand():
    r = dpok.kl_in_reward(torch.tensor([1.0]), torch.tensor([[-1.0, -2.0]]),
                          torch.tensor([[-2.0, -5.0]]), 2.0, 0.5)
    assert r.tolist() == [1.0 - 0.5 / 2.0 * (1 + 3)]


def test_mse_weights_turn_the_kl_into_the_mean_square_of_the_noise():
    now, run = dial_pipe(0.3, 1.2), sample(dial_pipe(0.3, 1.2), 4, torch.Generator().manual_seed(0))
    means, std = pre_means(run)
    kl = dpok.per_step(mdp.kl_divergence, run.means, means, std)
    weight = dpok.kl_weights(now.scheduler, run.timesteps, 1.0, "mse", D)
    for k, t in enumerate(run.timesteps):
        eps = [pipe.unet(run.latents[:, k], t.expand(4), None).sample
               for pipe in (now, dial_pipe())]
        mse = (eps[0] - eps[1]).square().mean((1, 2, 3)).detach()
        assert weight[k] * kl[:, k] == pytest.approx(mse, rel=1e-5)
    exact = dpok.kl_weights(now.scheduler, run.timesteps, 1.0, "exact", D)
    assert exact.tolist() == [1.0] * T


def test_training_reaches_the_optimum_that_exp_of_the_reward_tilts_to():
    """p* ∝ p_pre·exp(α·r/β) in closed form: its mean, reached by training the shifts θ_t.

    With σ_t fixed only the mean can move. p* also tilts x_T, which no policy does; that is the
    difference between v_0 and the part of it that comes from the steps' noise: below 2 % here.
    """
    alpha, beta = 1.0, 0.25
    var, kept = 1.0, 1.0  # of x_0 under p_pre, and how much of x_T is left in it
    for keep, feed, sigma in coefficients():
        var, kept = (keep + feed) ** 2 * var + sigma**2, (keep + feed) * kept
    tilt = 2 * alpha / beta  # exp(α r/β) = exp(−½·tilt·(x − goal)²)
    best = tilt * GOAL / (1 / var + tilt)  # mean of N(0, var)·exp(...)
    pipe, generator = dial_pipe(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([pipe.unet.theta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        run = sample(pipe, 256, generator)
        A = dpok.centered(run.reward[:, None].expand(-1, T), ["p"] * 256)
        pairs, = ddpo.draw_pairs(256, T, 1.0, 1, generator)
        dpok.accumulate(pipe, run, pre_means(run)[0], A, pairs, torch.ones(T), torch.ones(T), beta,
                        dpok.Config(batch_size=10**6, alpha=alpha))
        dpok.step(optimizer, [pipe.unet.theta], CONFIG)
        schedule.step()
    mean = 0.0
    for k, (keep, feed, sigma) in enumerate(coefficients()):
        mean = (keep + feed) * mean + sigma * pipe.unet.theta[k].item()
    assert kept**2 / var < 0.02
    assert mean == pytest.approx(best, rel=0.03) and best < 0.8 * GOAL  # β = 0 would go to GOAL


def test_adapt_beta():
    assert dpok.adapt_beta(0.1, 20.0, 20.0) == 0.1
    assert dpok.adapt_beta(0.1, 25.0, 20.0) == pytest.approx(0.1 * (1 + 0.2 * 0.25))
    assert dpok.adapt_beta(0.1, 1000.0, 20.0) == pytest.approx(0.12)
    assert dpok.adapt_beta(0.1, 0.0, 20.0) == pytest.approx(0.08)


# ---- the value function ---------------------------------------------------------------------


def test_centered_against_a_loop():
    A, prompts = torch.randn(5, T).double(), ["a", "b", "a", "a", "b"]
    got = dpok.centered(A, prompts)
    for i in range(5):
        same = [A[j] for j in range(5) if j != i and prompts[j] == prompts[i]]
        assert got[i] == pytest.approx(A[i] - torch.stack(same).mean(0), rel=1e-12)


def test_a_value_of_the_state_keeps_the_gradient_and_takes_variance_away():
    """V = E[r | x_t] in closed form, for the pretrained chain."""
    reach = [(1.0, 0.0)]  # x_0 given x_t: mean factor·x_t, variance
    for keep, feed, sigma in reversed(coefficients()):
        factor, var = reach[0]
        reach.insert(0, (factor * (keep + feed), var + factor**2 * sigma**2))
    generator, plain, with_value = torch.Generator().manual_seed(0), [], []
    for _ in range(60):
        run = sample(dial_pipe(), 500, generator)
        V = torch.stack([-((f * run.latents[:, k] - GOAL) ** 2).sum((1, 2, 3)) - D * v
                         for k, (f, v) in enumerate(reach[:T])], 1)
        for found, A in ((plain, run.reward[:, None] - run.reward.mean()),
                         (with_value, run.reward[:, None] - V)):
            A = A.expand(-1, T)
            found.append(accumulated(dial_pipe(), run, A, CONFIG, 0.0)[0])
    plain, with_value = torch.tensor(plain), torch.tensor(with_value)
    truth, error = slope_of(0.0, 1.0, 1.0, 0.0), with_value.std().item() / 60**0.5
    assert with_value.mean().item() == pytest.approx(truth, abs=3.5 * error)
    assert error < 0.1 * abs(truth) and with_value.var() < 0.5 * plain.var()


def test_gradient_variance_is_that_of_the_whole_rounds_gradient():
    """Against the spread over many rounds, by brute force; and a good V lowers it."""
    generator, found, said = torch.Generator().manual_seed(0), [], []
    for _ in range(200):
        run = sample(dial_pipe(), 64, generator)
        pipe, A = dial_pipe(), (run.reward[:, None] - run.reward.mean()).expand(-1, T)
        kappa, theta = accumulated(pipe, run, A, CONFIG, 0.0)
        found.append(torch.cat([theta, torch.tensor([kappa])]))
        params = list(dial_pipe().unet.parameters())
        pipe = dial_pipe()
        params = [pipe.unet.theta, pipe.unet.kappa]
        said.append(dpok.gradient_variance(pipe, params, run, pre_means(run)[0], {"A": A},
                                           torch.ones(T), CONFIG)["A"])
        assert all(p.grad is None for p in params)
    truth = torch.stack(found).var(0).sum().item()
    assert sum(said) / len(said) == pytest.approx(truth, rel=0.25)


def test_value_learns_what_a_state_says_of_the_reward():
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(600, *SHAPE, generator=generator)
    c = torch.randn(600, 3, 5, generator=generator)
    t = torch.randint(1000, (600,), generator=generator)
    r = 5 + 2 * x_t.mean((1, 2, 3)) + c.mean((1, 2)) + t / 1000
    torch.manual_seed(0)
    value = dpok.Value(1, 5, hidden=16)
    optimizer = torch.optim.AdamW(value.parameters(), lr=1e-2)
    rounds = [tuple(v[rows] for v in (x_t, c, t, r)) for rows in (slice(300), slice(300, 500))]
    dpok.fit_value(value, optimizer, rounds, generator, epochs=60)
    with torch.no_grad():
        assert (value(x_t[500:], c[500:], t[500:]) - r[500:]).square().mean() < 0.1 * r[500:].var()
        assert value(x_t[500:], c[500:], t[500:]).mean().item() == pytest.approx(
            r[500:].mean().item(), abs=0.1)
        early, late = (value(x_t[500:], c[500:], torch.full((100,), n)) for n in (0, 999))
        assert (late - early).mean().item() == pytest.approx(1.0, abs=0.3)
        more = value(x_t[500:], c[500:] + 0.3, t[500:]) - value(x_t[500:], c[500:], t[500:])
        assert more.mean().item() == pytest.approx(0.3, abs=0.1)


def test_a_reward_in_other_units_gives_the_same_value_in_those_units():
    """Fitted on 1000·r + 7, V says 1000·V + 7: it learns in units of the rewards' own spread."""
    generator, found = torch.Generator().manual_seed(0), []
    x_t, c = torch.randn(50, *SHAPE, generator=generator), torch.randn(50, 3, 5)
    t, r = torch.arange(0, 1000, 20), torch.randn(50, generator=generator)
    for scale, shift in ((1, 0), (1000, 7)):
        torch.manual_seed(0)
        value = dpok.Value(1, 5, hidden=4)
        optimizer = torch.optim.SGD(value.parameters(), lr=0.1)
        data = [(x_t, c, t, scale * r + shift)]
        dpok.fit_value(value, optimizer, data, torch.Generator().manual_seed(0), epochs=3)
        found.append(value(x_t, c, t).detach())
    assert found[1] == pytest.approx(1000 * found[0] + 7, rel=1e-3, abs=1)
    assert value.scale.tolist() == pytest.approx(
        [1000 * r.mean().item() + 7, 1000 * r.std().item()], rel=1e-5)


# ---- supervised fine-tuning -----------------------------------------------------------------


def test_rwr_weights_by_hand():
    w = dpok.rwr_weights(torch.tensor([1.0, 2.0, 7.0]), ["a", "a", "b"], 0.5)
    e = math.exp(-2.0)
    assert w.tolist() == [pytest.approx(2 * e / (1 + e)), pytest.approx(2 / (1 + e)), 1.0]
    assert dpok.rwr_weights(torch.randn(9), ["a"] * 9, 0.1).mean().item() == pytest.approx(1)


def test_sparse_weights_by_hand():
    w = dpok.sparse_weights(torch.tensor([5.0, 1.0, 3.0, 2.0, 9.0]), list("aaaab"), 0.5)
    assert w.tolist() == [2.0, 0.0, 2.0, 0.0, 1.0]
    w = dpok.sparse_weights(torch.arange(10.0), ["a"] * 10, 0.01)  # at least one is kept
    assert w.tolist() == [0.0] * 9 + [10.0]


def test_sft_objective_by_hand():
    pred, eps = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    shape = (2, 1, 1, 2)
    J = dpok.sft_objective(pred.view(shape), eps.view(shape), torch.tensor([2.0, 0.5]),
                           torch.zeros(shape), 0.1)
    want = -((2 * 2.5 + 0.1 * 2.5) + (0.5 * 5 + 0.1 * 0)) / 2  # the weight is not the drift's
    assert J.item() == pytest.approx(want)


@pytest.mark.parametrize("beta, batch_size", [(0.0, 1000), (0.0, 70), (1.0, 70)])
def test_supervised_learning_finds_the_weighted_pictures(beta, batch_size):
    """Pictures of weight 2 at 1.5, of weight 0 at −1.5, a model of N(M + θ, s²) that starts at M.

    Its loss is a number times (M + θ − 1.5)² + β·θ², whose minimum is known.
    """
    pipe = linear_pipe()
    frozen, params = copy.deepcopy(pipe.unet), [pipe.unet.theta]
    x_0 = torch.tensor([1.5, -1.5]).repeat(200).view(-1, 1, 1, 1).expand(-1, *SHAPE).double()
    data = x_0, torch.zeros(400, 1, 1), torch.tensor([2.0, 0.0]).repeat(200)
    optimizer, generator = torch.optim.Adam(params, lr=0.05), torch.Generator().manual_seed(0)
    for _ in range(150):
        dpok.accumulate_sft(pipe, frozen, data, torch.arange(400), generator, beta,
                            dpok.Config(batch_size=batch_size))
        dpok.step(optimizer, params, CONFIG)
    want = (1.5 + beta * M) / (1 + beta)
    assert M + params[0].item() == pytest.approx(want, abs=0.05) and pipe.unet is not frozen
    assert frozen.theta.item() == 0


def test_accumulate_sft_is_the_mean_over_rows_whatever_the_batch_size():
    x_0 = torch.randn(30, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    data, found = (x_0, torch.zeros(30, 1, 1), torch.ones(30)), []
    for batch_size in (30, 7):
        pipe, found_now = linear_pipe(), []
        for seed in range(200):  # other batches draw other noise: the same only on average
            pipe.unet.theta.grad = None
            dpok.accumulate_sft(pipe, None, data, torch.arange(30),
                                torch.Generator().manual_seed(seed), 0.0,
                                dpok.Config(batch_size=batch_size))
            found_now.append(pipe.unet.theta.grad.item())
        found.append(torch.tensor(found_now))
    error = (found[0].var() / 200 + found[1].var() / 200).sqrt().item()
    assert (found[0].mean() - found[1].mean()).item() == pytest.approx(0, abs=4 * error)
    assert error < 0.05 * found[0].mean().abs().item()


def test_accumulate_sft_reads_the_same_rows_of_all_its_data():
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(10, *SHAPE, generator=generator).double(),
            torch.randn(10, 2, 3, generator=generator).double(), torch.arange(10.0))
    rows, found = torch.tensor([7, 3, 3, 9, 0, 5, 8]), []
    for some, i in ((data, rows), (tuple(v[rows] for v in data), torch.arange(7))):
        pipe = dial_pipe()
        pipe.unet = PromptUNet()
        dpok.accumulate_sft(pipe, None, some, i, torch.Generator().manual_seed(1), 0.0,
                            dpok.Config(batch_size=3))
        found.append(pipe.unet.theta.grad.item())
    assert found[0] == pytest.approx(found[1], rel=1e-12) and found[0] != 0


# ---- the pretrained model -------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_reference_is_the_pretrained_model_bit_for_bit(lora_rank):
    pipe = mdp.load_pipeline("tiny_sd", "cpu")
    c = mdp.encode_prompts(pipe, ["four stars"] * 2)
    x = torch.randn(2, *mdp.latent_shape(pipe), generator=torch.Generator().manual_seed(0))
    predict = lambda: mdp.predict_noise(pipe.unet, x, 501, c)  # noqa: E731
    with torch.no_grad():
        truth = predict()
        frozen = None if lora_rank else copy.deepcopy(pipe.unet)
        params = ddpo.trainable(pipe, lora_rank, 0, dpok.Config().lora_targets)
        assert torch.allclose(predict(), truth, atol=1e-6)  # at initialization: the same model
        for p in params:
            p += 0.01
        assert (predict() - truth).abs().max() > 1e-3
        with dpok.pretrained(pipe, frozen):
            assert torch.equal(predict(), truth)
        assert (predict() - truth).abs().max() > 1e-3  # and back to the tuned one
        with pytest.raises(RuntimeError), dpok.pretrained(pipe, frozen):
            raise RuntimeError
        assert (predict() - truth).abs().max() > 1e-3


def test_at_initialization_the_ratio_is_1_and_the_kl_is_0():
    pipe = mdp.load_pipeline("tiny_sd", "cpu")
    ddpo.trainable(pipe, 4, 0, dpok.Config().lora_targets)
    run = mdp.rollout(pipe, ["four stars"] * 3, 5, seed=0)
    config = dpok.Config(batch_size=3)
    with dpok.pretrained(pipe):
        means, std = dpok.step_means(pipe, run, config)
    kl = dpok.per_step(mdp.kl_divergence, run.means, means, std)
    log_prob = dpok.per_step(mdp.log_prob, run.latents[:, 1:], means, std)
    assert kl.abs().max() < 1e-6
    assert (log_prob - run.log_probs).abs().max() < 2e-3  # other batches, other kernels


# ---- Lemma 4.2 ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps, eta", [(1, 1.0), (4, 1.0), (4, 0.5)])
def test_gaussian_chains_against_the_joint_distribution(num_steps, eta):
    """Path KL and KL of x_0 from the joint Gaussians of all x_t, by torch.distributions."""
    scheduler = dial_pipe().scheduler
    kl, bound = dpok.gaussian_chains(scheduler, num_steps, 0.7, 0.4, 0.1, 0.6, eta)
    joints = []
    for m, s in ((0.7, 0.4), (0.1, 0.6)):
        # x_{k+1} = b_k x_k + a_k + σ_k z, so x = L·(noise) + mean, L lower triangular.
        mean, L = torch.zeros(num_steps + 1).double(), torch.eye(num_steps + 1).double()
        table = scheduler.alphas_cumprod.double()
        for k, t in enumerate(scheduler.timesteps.tolist()):
            a, p = table[t], table[max(t - 1000 // num_steps, 0)]
            sigma2 = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
            to_eps = (1 - p - sigma2).clamp(min=0).sqrt() - (p * (1 - a) / a).sqrt()
            gain = (1 - a).sqrt() / (a * s**2 + 1 - a)
            b = (p / a).sqrt() + to_eps * gain
            mean[k + 1] = b * mean[k] - to_eps * gain * a.sqrt() * m
            L[k + 1] = b * L[k]
            L[k + 1, k + 1] = sigma2.sqrt()
        joints.append(MultivariateNormal(mean, scale_tril=L))
    ends = [Normal(j.mean[-1], j.variance[-1].sqrt()) for j in joints]
    assert kl == pytest.approx(kl_divergence(*ends).item(), rel=1e-9)
    assert bound == pytest.approx(kl_divergence(*joints).item(), rel=1e-9)
    assert 0 < kl < bound


def test_lemma_table_holds_and_is_drawn(tmp_path, capsys):
    dpok.main(["--lemma", "--out", str(tmp_path)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:7]]
    pairs = [(float(row[i]), float(row[i + 2])) for row in rows for i in (1, 4, 7, 10)]
    assert len(pairs) == 20 and all(0 < truth < bound for truth, bound in pairs)
    assert (tmp_path / "lemma.png").stat().st_size > 5000


# ---- runs -----------------------------------------------------------------------------------

TINY = ["--rounds", "2", "--samples-per-prompt", "4", "--num-steps", "3", "--eval-samples", "4",
        "--device", "cpu"]


@pytest.mark.parametrize("flags", [
    (), ("--kl", "reward", "--target-kl", "5", "--prompts", "tasks", "--prompts-per-round", "2"),
    ("--kl", "mse", "--lora-rank", "0", "--guidance-scale", "3", "--no-value"),
    ("--method", "ddpo", "--prompts", "a red circle"), ("--method", "sft", "--beta", "0.1"),
    ("--method", "sft", "--sft-weights", "sparse"),
])
def test_every_method_runs_and_saves_what_it_trained(flags, tmp_path, capsys):
    dpok.main([*TINY, *flags, "--out", str(tmp_path), "--name", "run"])
    said = capsys.readouterr().out
    assert "image_reward" in said and "alignment" in said and "path KL" in said
    rows = list(csv.DictReader(open(tmp_path / "run/metrics.csv")))
    assert len(rows) == 2 and float(rows[0]["kl"]) < 1e-3 < float(rows[1]["kl"])
    assert json.loads((tmp_path / "run/config.json").read_text())["rounds"] == 2
    for name in ("reward.png", "before_after.png", "film.png"):
        assert (tmp_path / "run" / name).stat().st_size > 5000
    StableDiffusionPipeline.from_pretrained(tmp_path / "run/model")


def brightness(images, prompts):
    """A reward for tests: instant, and another one for each picture."""
    return [sum(image.convert("L").tobytes()) / 1e5 + len(prompt)
            for image, prompt in zip(images, prompts)]


def watched(monkeypatch, tmp_path, **flags):
    """A short training run: result, config, and what each function of the loop was called with."""
    calls = {name: [] for name in ("rollout", "accumulate", "accumulate_sft", "fit_value")}

    def watch(module, name):
        original = getattr(module, name)

        def wrapper(*args, **kwargs):
            state = copy.deepcopy(args[0]) if name == "fit_value" else None  # V before its fit
            out = original(*args, **kwargs)
            calls[name].append((args, out if name == "rollout" else state))
            return out
        monkeypatch.setattr(module, name, wrapper)

    gold = lambda images, prompts: [-v for v in brightness(images, prompts)]  # noqa: E731
    monkeypatch.setattr(dpok.rewards, "get_reward",
                        lambda name, *_: gold if name == "alignment" else brightness)
    monkeypatch.setattr(dpok, "save", lambda *_: None)
    watch(mdp, "rollout")
    for name in ("accumulate", "accumulate_sft", "fit_value"):
        watch(dpok, name)
    if flags.get("method", "dpok") == "dpok":
        flags = dict(value_rounds=2) | flags
    config = dpok.Config(**dict(
        rounds=3, prompts="tasks", prompts_per_round=2, samples_per_prompt=3, num_steps=3,
        updates_per_round=2, eval_samples=2, seed=5, lora_rank=4, batch_size=8, device="cpu",
        out=str(tmp_path), name="run") | flags)
    return dpok.train(config), config, calls


def others_out(a, prompts):
    """a_i less the mean over the prompt's other pictures, by a loop."""
    B = range(len(prompts))
    same = [[a[j] for j in B if j != i and prompts[j] == prompts[i]] for i in B]
    return torch.stack([a[i] - torch.stack(same[i]).mean(0) for i in B])


@pytest.mark.parametrize("flags", [
    dict(beta=0.0), dict(kl="reward", value=False, alpha=2.0, beta=3.0, target_kl=0.01),
    dict(kl="mse", step_weight="none", target_kl=0.01, lora_rank=0, guidance_scale=2.0),
    dict(method="ddpo", updates_per_round=1)])
def test_each_round_hands_the_equations_what_they_ask_for(flags, tmp_path, monkeypatch):
    """Advantage, reference, V's data, β and the row: each worked out anew from the round's run."""
    result, config, calls = watched(monkeypatch, tmp_path, **flags)
    K = config.updates_per_round
    beta = flags.get("beta", {"dpok": 0.01, "ddpo": 0.0}[config.method])
    updates = [args for args, _ in calls["accumulate"] if args[6].any()]  # else for a variance
    rounds = [updates[i:i + K] for i in range(0, len(updates), K)]
    assert len(rounds) == 3 and len(updates) == 3 * K
    fresh = mdp.load_pipeline("tiny_sd", "cpu")
    fresh.scheduler.set_timesteps(3)
    for n, updates in enumerate(rounds):
        _, run, pre, A, _, weight, kl_weight, in_loss, _ = updates[0]
        row, prompts = result["rows"][n], run.prompts
        pairs = torch.cat([args[4] for args in updates]).tolist()
        assert sorted(pairs) == [[i, k] for i in range(6) for k in range(3)]
        assert len(set(prompts)) == 2 and prompts[:3] == [prompts[0]] * 3

        want, std = dpok.step_means(fresh, run, config)
        assert pre == pytest.approx(want, abs=1e-4)
        r = torch.tensor(brightness(run.images, prompts)).double()
        kl = ((run.means - pre) ** 2).sum((2, 3, 4)) / (2 * std**2)
        assert row["kl"] == pytest.approx(kl.sum(1).mean().item(), rel=1e-4)
        assert row["reward"] == -row["gold"] == pytest.approx(r.mean().item(), rel=1e-6)
        assert row["reward_se"] == row["gold_se"] == pytest.approx(r.std().item() / 6**0.5)
        assert row["queries"] == 6 * (n + 1) and row["beta"] == pytest.approx(beta, rel=1e-9)
        assert in_loss == pytest.approx(0.0 if config.kl == "reward" else beta)

        if config.kl == "reward":
            x, sigma = run.latents[:, 1:], std.view(1, 3, 1, 1, 1)
            log_ratio = [Normal(m, sigma).log_prob(x).sum((1, 2, 3, 4)) for m in (run.means, pre)]
            r = r - beta / config.alpha * (log_ratio[0] - log_ratio[1])
        V = torch.zeros(6, 3)
        if config.method == "dpok" and config.value:
            (value, _, data, _), before = calls["fit_value"][n]
            if n:
                with torch.no_grad():
                    V = torch.stack([before(run.latents[:, k], run.prompt_embeds, t.expand(6))
                                     for k, t in enumerate(run.timesteps)], 1)
            assert len(data) == min(n + 1, 2)
            for i, k in pairs:
                x_t, c, t, target = (column[3 * i + k] for column in data[-1])
                assert torch.equal(x_t, run.latents[i, k]) and t == run.timesteps[k]
                assert torch.equal(c, run.prompt_embeds[i].mean(0, keepdim=True))
                assert target == pytest.approx(r[i].item())
        else:
            assert not calls["fit_value"]
        assert A == pytest.approx(others_out(r[:, None] - V, prompts), rel=1e-3, abs=1e-3)
        if config.method == "dpok" and config.value and n:
            error = (r[:, None] - V).square().mean().item()
            assert row["value_loss"] == pytest.approx(error, rel=1e-4)
        else:  # no V has been fitted
            assert math.isnan(row["value_loss"])
        c_over_sigma = mdp.noise_weight(fresh.scheduler, run.timesteps, 1.0).float()
        flat = c_over_sigma.reciprocal() / c_over_sigma.reciprocal().mean()
        assert weight == pytest.approx(flat if config.step_weight == "sigma" else torch.ones(3))
        mse = 2 / (math.prod(mdp.latent_shape(fresh)) * c_over_sigma**2)
        assert kl_weight == pytest.approx(mse if config.kl == "mse" else torch.ones(3), rel=1e-5)
        if config.target_kl:
            beta = dpok.adapt_beta(beta, row["kl"], config.target_kl)
    assert (beta != result["rows"][0]["beta"]) == bool(config.target_kl)
    assert set(result["variance"]) == (
        {"r", "r − mean", "r − V, centered"} if calls["fit_value"] else set())
    if result["variance"]:  # the prompts' own means differ by far more than the pictures of one
        assert result["variance"]["r"] > 2 * result["variance"]["r − mean"]


@pytest.mark.parametrize("kind", ["rwr", "sparse"])
def test_supervised_rounds_learn_from_pretrained_pictures_only(kind, tmp_path, monkeypatch):
    result, config, calls = watched(monkeypatch, tmp_path, method="sft", sft_weights=kind, beta=0.1,
                                    temperature=2.0, keep=0.34)
    fresh, pictures = mdp.load_pipeline("tiny_sd", "cpu"), []
    fresh.scheduler.set_timesteps(3)
    runs = [run for _, run in calls["rollout"] if len(run.prompts) == 6]
    assert len(runs) == 2 * 3 and len(calls["accumulate_sft"]) == 3 * 2
    for n, (own, drawn) in enumerate(zip(runs[::2], runs[1::2])):
        assert drawn.means == pytest.approx(dpok.step_means(fresh, drawn, config)[0], abs=1e-4)
        assert own.prompts == drawn.prompts
        row = result["rows"][n]  # is about the tuned model's own pictures
        assert row["reward"] == pytest.approx(sum(brightness(own.images, own.prompts)) / 6)
        pictures += [(prompt, r, x_0, c) for prompt, r, x_0, c in zip(
            drawn.prompts, brightness(drawn.images, drawn.prompts), drawn.latents[:, -1],
            drawn.prompt_embeds)]
        for args, _ in calls["accumulate_sft"][2 * n:2 * n + 2]:
            (x_0, c, w), rows, beta = args[2], args[3], args[5]
            assert torch.equal(x_0, torch.stack([p[2] for p in pictures]))
            assert torch.equal(c, torch.stack([p[3] for p in pictures]))
            assert len(rows) == 6 * 3 // 2 and rows.max() < len(pictures) and beta == 0.1
            for i, (prompt, r, *_) in enumerate(pictures):
                same = [p[1] for p in pictures if p[0] == prompt]
                if kind == "rwr":
                    want = math.exp(r / 2) / sum(math.exp(v / 2) for v in same) * len(same)
                else:
                    kept = round(0.34 * len(same))
                    want = len(same) / kept if r >= sorted(same)[-kept] else 0.0
                assert w[i].item() == pytest.approx(want, rel=1e-6)
    assert result["rows"][-1]["kl"] > 1e-3


def test_evaluation_is_on_the_same_seeds_and_measured_from_the_pretrained(tmp_path, monkeypatch):
    monkeypatch.chdir(mdp.HERE)
    gold = lambda images, prompts: range(len(images))  # noqa: E731
    pipe, fresh = (mdp.load_pipeline("tiny_sd", "cpu") for _ in range(2))
    config = dpok.Config(eval_samples=5, num_steps=3, batch_size=4, seed=1, lora_rank=4)
    params = ddpo.trainable(pipe, 4, 0, config.lora_targets)
    many = ddpo.get_prompts("location")[:10]
    for prompts, want in ((many[:2], [0, 1, 0, 1, 0]), (many, [0, 2, 4, 6, 8])):
        with torch.no_grad():
            torch._foreach_zero_(params)
            before = dpok.evaluate(pipe, None, prompts, brightness, gold, config)
            torch._foreach_add_(params, 0.02)
        assert before["prompts"] == [many[i] for i in want]
        assert before["gold"].tolist() == [0, 1, 2, 3, 4] and before["kl"].max() < 1e-6
        after = dpok.evaluate(pipe, None, before["prompts"], brightness, gold, config)
        run = mdp.rollout(pipe, before["prompts"], 3, seed=mdp.FRESH + 1, batch_size=4)
        fresh.scheduler.set_timesteps(3)
        pre, std = dpok.step_means(fresh, run, config)
        kl = ((run.means - pre) ** 2).sum((2, 3, 4)) / (2 * std**2)
        assert after["kl"] == pytest.approx(kl.sum(1).double(), rel=1e-3) and kl.sum() > 0.1
        assert after["kl_per_step"] == pytest.approx(kl.mean(0).double(), rel=1e-3)
        assert after["prompts"] == before["prompts"] and before["reward"].tolist() == (
            pytest.approx(brightness(before["images"], before["prompts"])))
        assert after["reward"].tolist() == pytest.approx(brightness(run.images, run.prompts))


def test_report_by_hand(capsys):
    sides = [dict(reward=torch.tensor(r).double(), gold=torch.tensor(g).double(),
                  kl=torch.tensor(kl).double(), kl_per_step=torch.tensor([2.0, 5.5]))
             for r, g, kl in (([0.0, 2.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]),
                              ([3.0, 4.0, 8.0], [1.0, 1.0, 1.0], [6.0, 7.0, 9.5]))]
    dpok.report(dict(before=sides[0], after=sides[1], timesteps=[667, 334], kl_weight=[0.5, 34.6],
                     variance={"r": 12.0, "A": 3.0}), dpok.Config())
    said = " ".join(capsys.readouterr().out.split())
    assert "image_reward 1.000 ± 0.577 before, 5.000 ± 1.528 after, gain +4.000 ± 1.528" in said
    assert "alignment 1.000 ± 1.000 before, 1.000 ± 0.000 after, gain +0.000 ± 1.000" in said
    assert "path KL 7.50 ± 1.04 nats" in said and "step t 667 334" in said
    assert "0.50 34.60" in said and "KL_t, nats 2.00 5.50" in said and "r: 12, A: 3" in said


def test_sweep(tmp_path, capsys, monkeypatch):
    sweep = dpok.figures.sweep
    ends, drawn, train = [], [], dpok.train
    monkeypatch.setattr(dpok, "train", lambda config: ends.append(train(config)) or ends[-1])
    monkeypatch.setattr(dpok.figures, "sweep", lambda path, rows, names: drawn.append(rows) or
                        sweep(path, rows, names))
    dpok.main([*TINY, "--sweep", "0", "0.1", "--alpha", "2", "--out", str(tmp_path)])
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert {p.name for p in tmp_path.iterdir()} == {
        "sweep.png", "sweep_beta_0", "sweep_beta_0.1"}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:-2]]
    for beta, row in zip((0.0, 0.1), rows, strict=True):  # each run has its β, and its own line
        folder = tmp_path / f"sweep_beta_{beta:g}"
        assert json.loads((folder / "config.json").read_text())["beta"] == beta
        assert float(row[0]) == beta / 2  # β/α
        assert {float(r["beta"]) for r in csv.DictReader(open(folder / "metrics.csv"))} == {beta}
    for row, shown, end in zip(rows, drawn[0], ends, strict=True):
        for key, text, (mean, error) in zip(("kl", "reward", "gold"), row[1::3], shown[1:]):
            values = end["after"][key]
            assert mean == pytest.approx(values.mean().item())
            assert error == pytest.approx(values.std().item() / len(values) ** 0.5)
            assert float(text) == pytest.approx(mean, abs=0.051)


def test_a_second_sweep_harms_nothing_of_the_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "sweep_beta_0.1").mkdir()
    monkeypatch.setattr(dpok, "train", None)
    with pytest.raises(ValueError, match="--sweep: .*sweep_beta_0.1 is there already"):
        dpok.main([*TINY, "--sweep", "0", "0.1", "--out", str(tmp_path)])
    monkeypatch.undo()
    (tmp_path / "sweep.png").write_bytes(b"precious")
    dpok.main([*TINY, "--sweep", "0.1", "0.2", "--name", "other", "--out", str(tmp_path)])
    assert (tmp_path / "sweep.png").read_bytes() == b"precious"
    assert (tmp_path / "other.png").stat().st_size > 5000


def test_the_lemma_hears_eta(tmp_path, capsys):
    said = []
    for eta in ("1", "0.5"):
        dpok.main(["--lemma", "--eta", eta, "--out", str(tmp_path)])
        said.append(capsys.readouterr().out)
    kl, bound = dpok.gaussian_chains(mdp.load_pipeline("tiny_sd", "cpu").scheduler, 5, 0.1, 0.5,
                                     0.0, 0.5, 0.5)
    assert said[0] != said[1] and f"{kl:.4f} ≤ {bound:8.4f}" in said[1]


@pytest.mark.parametrize("flags, named", [
    (["--method", "ddpo", "--beta", "0.1"], "--method ddpo"), (["--beta", "-1"], "--beta"),
    (["--target-kl", "0"], "--target-kl"), (["--keep", "2"], "--keep"),
    (["--samples-per-prompt", "1"], "--samples-per-prompt"), (["--sweep", "0.1"], "--sweep"),
    (["--method", "sft", "--target-kl", "3"], "--target-kl"),
    (["--method", "sft", "--kl", "mse"], "--kl"), (["--updates-per-round", "5"], "--updates-per-"),
    (["--target-kl", "3", "--beta", "0"], "--target-kl"),
    (["--method", "ddpo", "--sweep", "0", "0.1"], "--method ddpo"),
    (["--method", "sft", "--temperature", "0"], "--temp"), (["--temperature", "2"], "--temp"),
    (["--method", "ddpo", "--kl", "mse"], "--kl"), (["--method", "ddpo", "--no-value"], "--value"),
    (["--method", "sft", "--alpha", "2"], "--alpha"), (["--sweep", "0.1", "0.1"], "--sweep"),
    (["--sweep", "0.1", "0.2", "--beta", "1"], "--beta"), (["--gold", "beauty"], "--gold beauty"),
    (["--gold", "beauty=1"], "--gold beauty"), (["--gold", "no.py:f"], "--gold no.py:f"),
    (["--prompts", "a red dog"], "'dog'"), (["--prompts", "dogs.txt"], "--prompts dogs.txt"),
    (["--lora-targets", "to_z"], "--lora-targets"), (["--alpha", "0"], "--alpha"),
])
def test_bad_input_is_one_line_naming_the_flag(flags, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        mdp.run_main(lambda: dpok.main([*TINY, *flags, "--out", str(tmp_path / "runs")]))
    assert exit.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("runs/*"))


def test_prompt_sets():
    assert dpok.get_prompts("tasks_sd") == [
        "A green colored rabbit", "Four wolves in the park", "A cat and a dog", "A dog on the moon",
        "Four roses"]
    assert "four stars" in dpok.get_prompts("tasks") and len(dpok.get_prompts("tasks")) == 5
    assert dpok.get_prompts("a red circle") == ["a red circle"]
    assert dpok.get_prompts("bias") == ["four stars"] and dpok.get_prompts("bias ") == ["bias"]
    assert dpok.get_prompts(long := 99 * "a star ") == [long.strip()]


def test_learning_on_the_tiny_model(tmp_path):
    """"four stars", by the learned proxy: gold rises, and a strong KL term holds the model back."""
    flags = dict(rounds=5, samples_per_prompt=32, num_steps=8, eval_samples=48, device="cpu",
                 out=str(tmp_path))
    free, held = (dpok.train(dpok.Config(**flags, beta=beta)) for beta in (0.0, 1.0))
    gain = free["after"]["gold"] - free["before"]["gold"]
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    assert held["after"]["kl"].mean() < 0.3 * free["after"]["kl"].mean()
