"""DDPO's estimators on chains of Gaussians, where each density, J and ∇J can be written out.

A trajectory is drawn and scored here with the textbook's formulas: of chapter 1 nothing is used.
"""
import math
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

from support import training
from tests.oracles import linear_steps, randn, stable_scheduler

mdp = import_module("01_mdp")
ddpo = import_module("03_ddpo")

T, SHAPE, S, GOAL = 6, (2, 2, 3), 0.5, 1.5  # steps, a latent, spread of the data, best picture
D = math.prod(SHAPE)
CONFIG = ddpo.Config(batch_size=10**6, num_steps=T, step_weight="none")


@cache
def coefficients(eta=1.0):
    """[(gain, keep, feed, σ)] of all steps: μ = keep·x_t + feed·ε, best where ε = gain·x_t.

    That is the best denoiser for data N(0, s²).
    """
    rows = []
    for a, keep, feed, sigma in linear_steps(stable_scheduler(T), eta):
        rows.append((math.sqrt(1 - a) / (a * S**2 + 1 - a), keep, feed, sigma))
    return rows


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


class SmallUNet(torch.nn.Module):
    """ε = κ·gain_t·x_t + (σ_t/feed_t)·θ_t + c·listen: tensors of shapes (), (T,) and (2,)."""
    dtype = torch.float64
    config = SimpleNamespace(in_channels=2, sample_size=(2, 3), cross_attention_dim=2)

    def __init__(self, kappa=1.0, theta=0.0):
        super().__init__()
        self.kappa = torch.nn.Parameter(double(kappa))
        self.theta = torch.nn.Parameter(double([theta] * T))
        self.listen = torch.nn.Parameter(double([0.2, -0.1]))
        self.timesteps = stable_scheduler(T).timesteps
        self.gain = double([gain for gain, _, _, _ in coefficients()])
        self.push = double([sigma / feed for _, _, feed, sigma in coefficients()])

    def forward(self, x, t, encoder_hidden_states):
        k = (t[:, None] == self.timesteps).int().argmax(1)
        shift = self.push[k] * self.theta[k] + encoder_hidden_states.mean(1) @ self.listen
        eps = (self.kappa * self.gain[k]).view(-1, 1, 1, 1) * x + shift.view(-1, 1, 1, 1)
        return SimpleNamespace(sample=eps)


def make_pipe(kappa=1.0, theta=0.0):
    return SimpleNamespace(unet=SmallUNet(kappa, theta), scheduler=stable_scheduler(T),
                           device="cpu")


def mean_by_hand(pipe, x, k, c, empty, eta=1.0, scale=1.0):
    _, keep, feed, _ = coefficients(eta)[k]
    t = pipe.unet.timesteps[k].expand(len(x))
    eps = pipe.unet(x, t, c).sample
    if scale != 1:
        eps_empty = pipe.unet(x, t, empty.expand_as(c)).sample
        eps = eps_empty + scale * (eps - eps_empty)
    return keep * x + feed * eps


def means_and_log_probs(pipe, trajectory, eta=1.0, scale=1.0):
    """μ (B,T,...) and log p (B,T) of a trajectory's steps under these weights, with gradient."""
    means, log_probs = [], []
    for k in range(T):
        mean = mean_by_hand(pipe, trajectory.latents[:, k], k, trajectory.prompt_embeds,
                            trajectory.negative_embeds, eta, scale)
        density = Normal(mean, coefficients(eta)[k][3])
        means.append(mean)
        log_probs.append(density.log_prob(trajectory.latents[:, k + 1]).sum((1, 2, 3)))
    return torch.stack(means, 1), torch.stack(log_probs, 1)


@torch.no_grad()
def draw(pipe, B, generator, eta=1.0, scale=1.0, prompts=True):
    """A trajectory in float64, each picture with its own prompt embedding (0 without prompts)."""
    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    c, empty = prompts * noise(B, 4, 2), prompts * noise(1, 4, 2)
    x = [noise(B, *SHAPE)]
    for k in range(T):
        mean = mean_by_hand(pipe, x[k], k, c, empty, eta, scale)
        x.append(mean + coefficients(eta)[k][3] * noise(B, *SHAPE))
    trajectory = mdp.Trajectory(torch.stack(x, 1), None, None, pipe.scheduler.timesteps, c, empty,
                                ["p"] * B, None)
    trajectory.means, trajectory.log_probs = means_and_log_probs(pipe, trajectory, eta, scale)
    return trajectory


def reward_of(trajectory):
    return -((trajectory.latents[:, -1] - GOAL) ** 2).sum((1, 2, 3))


def closed_form(unet, alpha=1.0, beta=0.0, frozen_states=False):
    """J = E[−α·‖x_0 − goal‖² − β·Σ KL_t] without prompts, from the chain's two moments.

    KL from the chain with κ = 1, θ = 0. frozen_states: without how θ changes which x_t are met.
    """
    mean, variance, penalty = double(0.0), double(1.0), 0.0
    for k, (gain, keep, feed, sigma) in enumerate(coefficients()):
        m, v = (mean.detach(), variance.detach()) if frozen_states else (mean, variance)
        slope = feed * gain * (unet.kappa - 1)
        gap = slope * m + sigma * unet.theta[k]  # between the two means, at the mean state
        penalty = penalty + D * (gap**2 + slope**2 * v) / (2 * sigma**2)
        factor = keep + feed * gain * unet.kappa
        mean, variance = factor * mean + sigma * unet.theta[k], factor**2 * variance + sigma**2
    return -alpha * D * (variance + (mean - GOAL) ** 2) - beta * penalty


# ---- the estimators -------------------------------------------------------------------------


@pytest.mark.equation("DDPO_SF", "03_ddpo.ddpo_sf_objective")
@pytest.mark.equation("DDPO_IS", "03_ddpo.ddpo_is_objective")
def test_the_estimators_average_to_the_true_gradient():
    """A constant is taken off the reward, its known mean: ∇J is the same, with less noise."""
    pipe, generator, found = make_pipe(1.1, 0.1), torch.Generator().manual_seed(0), []
    params = [pipe.unet.kappa, pipe.unet.theta]
    J = closed_form(pipe.unet)
    truth = torch.cat([slope.flatten() for slope in torch.autograd.grad(J, params)])
    for _ in range(40):
        trajectory = draw(pipe, 1000, generator, prompts=False)
        _, log_prob = means_and_log_probs(pipe, trajectory)
        A = (reward_of(trajectory) - J.item())[:, None].expand(-1, T)
        terms = ddpo.ddpo_sf_objective(log_prob, A)
        slopes = torch.autograd.grad(terms.sum(1).mean(), params, retain_graph=True)
        found.append(torch.cat([slope.flatten() for slope in slopes]))
        terms = ddpo.ddpo_is_objective(log_prob, trajectory.log_probs, A, 0.2)
        for sf, importance in zip(slopes, torch.autograd.grad(terms.sum(1).mean(), params)):
            torch.testing.assert_close(importance, sf)
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert error.norm() < 0.15 * truth.norm(), "too noisy to tell"
    assert ((found.mean(0) - truth).abs() < 4 * error).all()


@pytest.mark.equation("DDPO_SF", "03_ddpo.ddpo_sf_objective")
def test_is_has_the_gradient_of_sf_at_the_old_policy():
    """Trap 6: log p / log p_old is 1 there too. So values and gradients are looked at."""
    log_prob, A = double([-3.0, 2.0, -0.5]).requires_grad_(), double([1.0, -2.0, 0.5])
    sf = ddpo.ddpo_sf_objective(log_prob, A)
    ratio = ddpo.ddpo_is_objective(log_prob, log_prob.detach(), A, 0.2)
    assert sf.tolist() == [-3.0, -4.0, -0.25] and ratio.tolist() == A.tolist()
    for terms in (sf, ratio):
        assert torch.autograd.grad(terms.sum(), log_prob)[0].tolist() == A.tolist()
    with pytest.raises(AssertionError):  # shapes that would broadcast in silence
        ddpo.ddpo_sf_objective(torch.zeros(4, 4), torch.zeros(4, 1))
    with pytest.raises(AssertionError):
        ddpo.ddpo_is_objective(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4), 0.1)


@pytest.mark.equation("DDPO_IS", "03_ddpo.ddpo_is_objective")
def test_clipping_keeps_the_two_corrective_sides_and_no_other():
    for A in (1.0, -1.0, 2.0):
        for ratio in (0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5):
            old, advantage = torch.tensor([[-7.0], [A]], dtype=torch.float64)
            log_prob = (old + math.log(ratio)).requires_grad_()
            J = ddpo.ddpo_is_objective(log_prob, old, advantage, 0.2)
            slope = torch.autograd.grad(J.sum(), log_prob)[0].item()
            left_for_good = ratio > 1.2 if A > 0 else ratio < 0.8
            assert slope == pytest.approx(0.0 if left_for_good else ratio * A, abs=1e-12)
            value = min(ratio * A, min(max(ratio, 0.8), 1.2) * A)
            assert J.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.equation("clip", "03_ddpo.equivalent_clip")
def test_equivalent_clip_is_the_band_of_the_power_and_is_printed_for_the_other_ratio(capsys):
    low, high = ddpo.equivalent_clip(1e-4, 16384)  # Stable Diffusion's latent has 4·64·64 numbers
    assert (low, high) == (pytest.approx(0.194, abs=5e-4), pytest.approx(5.147, abs=5e-4))
    for ratio, said in (("exact", "0.945742 to 1.04664"), ("per_dim", "0.4096 to 2.0736")):
        ddpo.print_clip(replace(CONFIG, ratio=ratio, clip_range=0.2), 4)
        assert said in capsys.readouterr().out  # 0.8^¼ to 1.2^¼, and 0.8⁴ to 1.2⁴


@pytest.mark.equation("step weight", "03_ddpo.step_weights")
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_step_weights_are_sigma_over_the_means_derivative(eta):
    by_hand = torch.tensor([sigma / abs(feed) for _, _, feed, sigma in coefficients(eta)])
    config = replace(CONFIG, eta=eta, step_weight="sigma")
    weight = ddpo.step_weights(stable_scheduler(4), config)  # it sets the number of steps
    torch.testing.assert_close(weight, by_hand / by_hand.mean(), rtol=1e-5, atol=0)
    assert ddpo.step_weights(stable_scheduler(), CONFIG).tolist() == [1.0] * T
    weight = ddpo.step_weights(stable_scheduler(set_alpha_to_one=True), config)
    assert weight[-1] == 0 and weight.mean().item() == pytest.approx(1)


# ---- advantages -----------------------------------------------------------------------------


@pytest.mark.equation("mean of others", "03_ddpo.mean_of_others")
@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_mean_of_others_leaves_the_picture_itself_and_other_prompts_out(shape):
    values, prompts = randn(*shape), ["a", "b", "a", "a", "b"]
    means = ddpo.mean_of_others(values, prompts)
    for i in range(5):
        others = [values[j] for j in range(5) if j != i and prompts[j] == prompts[i]]
        torch.testing.assert_close(means[i], sum(others) / len(others), rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match="--samples-per-prompt"):
        ddpo.mean_of_others(values, ["a", "a", "b", "b", "c"])


@pytest.mark.equation("leave-one-out advantage", "03_ddpo.leave_one_out_advantage")
def test_leave_one_out_advantage_against_a_loop_over_whole_numbers():
    r, prompts = torch.tensor([1, 2, 4, 8, 16]), ["a", "b", "a", "a", "b"]
    A = ddpo.leave_one_out_advantage(r, prompts)
    baselines, scale = [6, 16, 4.5, 2.5, 2], math.sqrt(sum((v - 6.2) ** 2 for v in r.tolist()) / 5)
    assert A.dtype == torch.float64
    for i in range(5):
        assert A[i].item() == pytest.approx((r[i].item() - baselines[i]) / scale, rel=1e-12)
    equal = ddpo.leave_one_out_advantage(torch.full((5,), 0.1), prompts)
    assert equal.abs().max() < 1e-12  # 0, and not 0/0


def test_a_baseline_without_the_sample_keeps_the_gradient():
    """By enumeration: E[(r_i − baseline)·∇log p] = ∂E[r]/∂θ; with the sample it would be less.

    n throws b of a coin with p = sigmoid(θ), a reward of 1 + 2b; ∂log p(b)/∂θ = b − p.
    """
    p, n, truth, estimate = 0.3, 4, 2 * 0.3 * 0.7, 0.0
    for heads in range(n + 1):  # their order changes nothing
        throws = double([1.0] * heads + [0.0] * (n - heads))
        r = 1 + 2 * throws
        A = ddpo.leave_one_out_advantage(r, ["p"] * n) * r.std(unbiased=False)
        chance = math.comb(n, heads) * p**heads * (1 - p) ** (n - heads)
        estimate += chance * (A * (throws - p)).mean().item()
    assert estimate == pytest.approx(truth, rel=1e-12)


@pytest.mark.equation("running advantage", "03_ddpo.running_advantage")
def test_running_advantage_by_hand_over_rounds():
    history = {}
    first = ddpo.running_advantage(torch.tensor([1, 3]), ["a", "b"], history, 3, 2)
    assert first.tolist() == [-1.0, 1.0] and first.dtype == torch.float64  # the round's: 2 ± 1
    second = ddpo.running_advantage(torch.tensor([5.0, 9.0]), ["a", "c"], history, 3, 2)
    assert second.tolist() == [1.0, 1.0]  # a: 5 of 1, 5; c: 9 of the round's 5, 9
    third = ddpo.running_advantage(torch.tensor([6.0, 10.0]), ["a", "a"], history, 3, 2)
    spread = math.sqrt(((5 - 7) ** 2 + (6 - 7) ** 2 + (10 - 7) ** 2) / 3)
    assert third.tolist() == pytest.approx([-1 / spread, 3 / spread])
    assert history == {"a": [5.0, 6.0, 10.0], "b": [3.0], "c": [9.0]}
    history = {}
    equal = ddpo.running_advantage(torch.tensor([0.5, 0.5]), ["a", "a"], history)
    assert equal.tolist() == [0, 0] and history == {"a": [0.5, 0.5]}
    # A prompt is trusted from 16 rewards on, and those before the latest 32 are forgotten.
    history = {"a": [0.0] * 14, "b": [0.0] * 15, "c": [9.0, *[0.0] * 31]}
    A = ddpo.running_advantage(torch.tensor([1.0, 1.0, 4.0]), ["a", "b", "c"], history)
    by_hand = [(1 - 2) / math.sqrt(2), 15 / 16 / math.sqrt(15 / 256), (31 / 8) / math.sqrt(31 / 64)]
    assert A.tolist() == pytest.approx(by_hand)  # the round's: 2 ± √2


def test_advantages_are_the_chosen_kind_cut_to_the_clip():
    r, prompts = double([0.0, 0.0, 0.0, 0.0, 9.0, 1.0]), ["a"] * 6
    config = ddpo.Config(advantage_clip=0.5)
    A = ddpo.advantages(r, prompts, {}, config)
    expected = ddpo.leave_one_out_advantage(r, prompts).clamp(-0.5, 0.5)
    assert A.dtype == torch.float32 and A.tolist() == pytest.approx(expected.tolist())
    assert A.max() == 0.5 and A.min() == -0.5
    history = {}
    config = replace(config, baseline="running", advantage_clip=math.inf)
    A = ddpo.advantages(r, prompts, history, config)
    expected = ddpo.running_advantage(r, prompts, {})
    assert A.tolist() == pytest.approx(expected.tolist()) and len(history["a"]) == 6
    for baseline in ("running", "leave_one_out"):  # equal rewards give none
        equal = replace(config, baseline=baseline)
        assert ddpo.advantages(0 * r + 0.1, prompts, {}, equal).abs().max() < 1e-12


# ---- accumulate -----------------------------------------------------------------------------


def example(eta=1.0, scale=1.0, B=9):
    """A trajectory of an older policy, advantages (B,T) that differ by step, the present pipe."""
    generator = torch.Generator().manual_seed(0)
    trajectory = draw(make_pipe(1.0, 0.0), B, generator, eta, scale)
    A = torch.randn(B, T, generator=generator, dtype=torch.float64)
    return trajectory, A, make_pipe(1.05, 0.08)


def gradient_by_hand(pipe, trajectory, A, pictures, config, n, pre=None):
    """−∇J by the textbook, a mean over pictures of a sum over steps, and the statistics.

    pre: DPOK's reference means. Without them it is DDPO.
    """
    means, log_prob = means_and_log_probs(pipe, trajectory, config.eta, config.guidance_scale)
    i, k = training.step_pairs(pictures, T, config, n)
    sigma = double([sigma for *_, sigma in coefficients(config.eta)])[k]
    power = 1 / D if config.ratio == "per_dim" else 1
    w = ((log_prob - trajectory.log_probs)[i, k] * power).exp()
    band = w.clamp(1 - config.clip_range, 1 + config.clip_range)
    J = torch.minimum(w * A[i, k], band * A[i, k])
    if pre is not None:
        kl = (means - pre)[i, k].square().sum((1, 2, 3)) / (2 * sigma**2)
        J = config.alpha * J - config.beta * power * kl
    elif config.estimator == "sf":
        J = power * log_prob[i, k] * A[i, k]
    steps = T * len(pictures) / len(i)  # what a step stands for, if some are left out
    loss = -(steps * J).sum() / len(pictures)
    kl_old = (means - trajectory.means)[i, k].square().sum((1, 2, 3)) / (2 * sigma**2)
    seen = {"kl_old": (steps * kl_old).sum().item() / len(pictures),
            "clip_fraction": (w != band).double().mean().item()}
    return torch.autograd.grad(loss, list(pipe.unet.parameters())), seen


CASES = {
    "plain": dict(),
    "batches of 1": dict(train_batch_size=1),
    "another eta": dict(eta=0.5, train_batch_size=7),
    "guidance": dict(guidance_scale=3.0),
    "ratio's D-th root": dict(ratio="per_dim", clip_range=0.02),
    "half of the steps": dict(timestep_fraction=0.5, train_batch_size=7),
}
ESTIMATORS = {
    "score function": dict(estimator="sf"),
    "score function per dim": dict(estimator="sf", ratio="per_dim"),
    "a wide clip": dict(clip_range=0.9),
}


def check_accumulate(accumulate, pipe, by_hand, seen):
    """It adds to the gradients that are there, and takes no step."""
    for repeat in (1, 2):
        assert accumulate() == pytest.approx(seen, rel=1e-9)
        for p, expected in zip(pipe.unet.parameters(), by_hand, strict=True):
            torch.testing.assert_close(p.grad, repeat * expected, rtol=1e-7, atol=1e-9)


@pytest.mark.equation("DDPO_IS", "03_ddpo.accumulate")
@pytest.mark.parametrize("case", CASES | ESTIMATORS)
def test_accumulate_adds_minus_the_gradient_and_reports_clip_and_kl(case):
    config = replace(CONFIG, **(CASES | ESTIMATORS)[case])
    trajectory, A, pipe = example(config.eta, config.guidance_scale)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    by_hand, seen = gradient_by_hand(pipe, trajectory, A, pictures, config, 4)
    check_accumulate(lambda: ddpo.accumulate(pipe, trajectory, A, pictures, config, 4), pipe,
                     by_hand, seen)
    assert case != "plain" or 0.1 < seen["clip_fraction"] < 0.9


@pytest.mark.equation("DDPO_IS", "03_ddpo.accumulate")
@pytest.mark.parametrize("nothing", [0.0, 1e-17])  # rewards may be equal up to rounding
def test_pairs_without_an_advantage_are_left_out_and_the_gradient_is_the_same(nothing):
    trajectory, A, pipe = example()
    pictures, A[[2, 8]] = torch.tensor([7, 2, 3, 0, 8]), nothing
    by_hand, _ = gradient_by_hand(pipe, trajectory, A, pictures, CONFIG, 4)
    seen = []
    pipe.unet.register_forward_hook(lambda unet, inputs, output: seen.append(len(inputs[0])))
    stats = ddpo.accumulate(pipe, trajectory, A, pictures, CONFIG, 4)
    for p, expected in zip(pipe.unet.parameters(), by_hand, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9)
    assert sum(seen) == 3 * T
    only = torch.tensor([7, 3, 0])  # the statistics are those of the pairs that were looked at
    _, expected = gradient_by_hand(pipe, trajectory, A, only, CONFIG, 4)
    assert stats == pytest.approx(expected, rel=1e-9)


@pytest.mark.equation("DDPO_IS", "03_ddpo.accumulate")
def test_a_batch_that_is_clipped_flat_is_not_taken_back_through_the_unet():
    trajectory, A, pipe = example()
    config = replace(CONFIG, train_batch_size=1, clip_range=0.02)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    by_hand, _ = gradient_by_hand(pipe, trajectory, A, pictures, config, 4)
    _, log_prob = means_and_log_probs(pipe, trajectory, config.eta, config.guidance_scale)
    ratio = (log_prob - trajectory.log_probs).exp()[pictures]
    outwards = torch.where(A[pictures] > 0, ratio > 1.02, ratio < 0.98)
    seen = []

    def watch(unet, inputs, output):
        output.sample.register_hook(seen.append)

    pipe.unet.register_forward_hook(watch)
    ddpo.accumulate(pipe, trajectory, A, pictures, config, 4)
    for p, expected in zip(pipe.unet.parameters(), by_hand, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9)
    assert 3 < len(seen) == (~outwards).sum() < outwards.numel() - 3


def test_an_update_with_nothing_to_learn_is_a_step_along_a_gradient_of_zero():
    trajectory, A, pipe = example()
    stats = ddpo.accumulate(pipe, trajectory, 0 * A, torch.arange(3), CONFIG, 4)
    assert stats == {"clip_fraction": 0, "kl_old": 0}
    params = list(pipe.unet.parameters())
    assert all(p.grad is None for p in params)
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, 0.1, weight_decay=0.5)
    assert training.optimizer_step(optimizer, params, CONFIG)["grad_norm"] == 0
    for p, old in zip(params, before):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.5))  # the weight decay
