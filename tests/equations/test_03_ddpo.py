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
from diffusers import DDIMScheduler
from torch.distributions import Normal

from support import training

mdp = import_module("01_mdp")
ddpo = import_module("03_ddpo")

T, SHAPE, S, GOAL = 6, (2, 2, 3), 0.5, 1.5  # steps, a latent, spread of the data, best picture
D = math.prod(SHAPE)
CONFIG = ddpo.Config(batch_size=10**6, num_steps=T, step_weight="none")


# ---- the chain ------------------------------------------------------------------------------


def make_scheduler():
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    scheduler.set_timesteps(T)
    return scheduler


@cache
def coefficients(eta=1.0):
    """[(keep, feed, σ)] of all steps: μ = keep·x_t + feed·ε (DDIM eq. 12 and 16)."""
    scheduler, rows = make_scheduler(), []
    table = scheduler.alphas_cumprod.tolist()
    for t in scheduler.timesteps.tolist():
        a, b = table[t], table[max(t - 1000 // T, 0)]  # set_alpha_to_one=False ends on table[0]
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        feed = math.sqrt(1 - b - sigma**2) - math.sqrt(b * (1 - a) / a)
        rows.append((math.sqrt(b / a), feed, sigma))
    return rows


@cache
def gain(k):
    """ε = gain·x_t is the best denoiser for data N(0, s²)."""
    scheduler = make_scheduler()
    a = scheduler.alphas_cumprod[scheduler.timesteps[k]].item()
    return math.sqrt(1 - a) / (a * S**2 + 1 - a)


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
        self.timesteps = make_scheduler().timesteps
        self.gain = double([gain(k) for k in range(T)])
        self.push = double([sigma / feed for _, feed, sigma in coefficients()])

    def forward(self, x, t, encoder_hidden_states):
        k = (t[:, None] == self.timesteps).int().argmax(1)
        shift = self.push[k] * self.theta[k] + encoder_hidden_states.mean(1) @ self.listen
        eps = (self.kappa * self.gain[k]).view(-1, 1, 1, 1) * x + shift.view(-1, 1, 1, 1)
        return SimpleNamespace(sample=eps)


def make_pipe(kappa=1.0, theta=0.0):
    return SimpleNamespace(unet=SmallUNet(kappa, theta), scheduler=make_scheduler(), device="cpu")


def gradients(unet):
    return [p.grad.clone() for p in unet.parameters()]


def mean_by_hand(pipe, x, k, c, empty, eta=1.0, scale=1.0):
    keep, feed, _ = coefficients(eta)[k]
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
        density = Normal(mean, coefficients(eta)[k][2])
        means.append(mean)
        log_probs.append(density.log_prob(trajectory.latents[:, k + 1]).sum((1, 2, 3)))
    return torch.stack(means, 1), torch.stack(log_probs, 1)


@torch.no_grad()
def draw(pipe, B, generator, eta=1.0, scale=1.0, prompts=True):
    """A trajectory in float64, each picture with its own prompt embedding (0 without prompts)."""
    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    c, empty = prompts * randn(B, 4, 2), prompts * randn(1, 4, 2)
    x = [randn(B, *SHAPE)]
    for k in range(T):
        mean = mean_by_hand(pipe, x[k], k, c, empty, eta, scale)
        x.append(mean + coefficients(eta)[k][2] * randn(B, *SHAPE))
    trajectory = mdp.Trajectory(torch.stack(x, 1), None, None, pipe.scheduler.timesteps, c, empty,
                                ["p"] * B, None)
    trajectory.means, trajectory.log_probs = means_and_log_probs(pipe, trajectory, eta, scale)
    return trajectory


def reward_of(trajectory):
    return -((trajectory.latents[:, -1] - GOAL) ** 2).sum((1, 2, 3))


def closed_form(unet):
    """J = E[−‖x_0 − goal‖²] without prompts, from the chain's two moments; with gradient."""
    mean, variance = 0.0, 1.0
    for k, (keep, feed, sigma) in enumerate(coefficients()):
        factor = keep + feed * unet.kappa * gain(k)
        mean, variance = factor * mean + sigma * unet.theta[k], factor**2 * variance + sigma**2
    return -D * (variance + (mean - GOAL) ** 2)


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
def test_is_has_the_gradient_and_the_slope_of_sf_at_the_old_policy():
    """Trap 6: log p / log p_old is 1 there too. So values and gradients are looked at."""
    log_prob = double([-3.0, 2.0, -0.5]).requires_grad_()
    A = double([1.0, -2.0, 0.5])
    sf = ddpo.ddpo_sf_objective(log_prob, A)
    ratio = ddpo.ddpo_is_objective(log_prob, log_prob.detach(), A, 0.2)
    assert sf.tolist() == [-3.0, -4.0, -0.25] and ratio.tolist() == A.tolist()
    for terms in (sf, ratio):
        assert torch.autograd.grad(terms.sum(), log_prob)[0].tolist() == A.tolist()
    moved = ddpo.ddpo_is_objective(log_prob + 1e-6, log_prob, A, 0.2)
    assert ((moved - A) / 1e-6).tolist() == pytest.approx(A.tolist(), rel=1e-5)


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


def test_shapes_that_would_broadcast_in_silence_are_refused():
    with pytest.raises(AssertionError):
        ddpo.ddpo_sf_objective(torch.zeros(4, 4), torch.zeros(4, 1))
    with pytest.raises(AssertionError):
        ddpo.ddpo_is_objective(torch.zeros(4), torch.zeros(4, 1), torch.zeros(4), 0.1)


@pytest.mark.equation("clip", "03_ddpo.equivalent_clip")
def test_equivalent_clip_is_the_band_of_the_power():
    low, high = ddpo.equivalent_clip(1e-4, 16384)  # Stable Diffusion's latent has 4·64·64 numbers
    assert (low, high) == (pytest.approx(0.194, abs=5e-4), pytest.approx(5.147, abs=5e-4))
    low, high = ddpo.equivalent_clip(0.2, 1 / 256)
    assert low**256 == pytest.approx(0.8) and high**256 == pytest.approx(1.2)


@pytest.mark.equation("step weight", "03_ddpo.step_weights")
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_step_weights_are_sigma_over_the_means_derivative(eta):
    by_hand = torch.tensor([sigma / abs(feed) for _, feed, sigma in coefficients(eta)])
    config = replace(CONFIG, eta=eta, step_weight="sigma")
    weight = ddpo.step_weights(make_scheduler(), config)
    torch.testing.assert_close(weight, by_hand / by_hand.mean(), rtol=1e-5, atol=0)
    other = ddpo.step_weights(make_scheduler(), replace(config, num_steps=4))
    assert len(other) == 4 and other.mean().item() == pytest.approx(1)
    assert ddpo.step_weights(make_scheduler(), CONFIG).tolist() == [1.0] * T
    noiseless_end = DDIMScheduler.from_config(make_scheduler().config, set_alpha_to_one=True)
    weight = ddpo.step_weights(noiseless_end, config)
    assert weight[-1] == 0 and weight.mean().item() == pytest.approx(1)


# ---- advantages -----------------------------------------------------------------------------


@pytest.mark.equation("mean of others", "03_ddpo.mean_of_others")
@pytest.mark.parametrize("shape", [(5,), (5, 3)])
def test_mean_of_others_leaves_the_picture_itself_and_other_prompts_out(shape):
    values, prompts = torch.randn(shape).double(), ["a", "b", "a", "a", "b"]
    means = ddpo.mean_of_others(values, prompts)
    for i in range(5):
        total, count = torch.zeros(shape[1:]).double(), 0
        for j in range(5):
            if j != i and prompts[j] == prompts[i]:
                total, count = total + values[j], count + 1
        torch.testing.assert_close(means[i], total / count, rtol=1e-12, atol=0)
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


def coins(n, p):
    """Chance, throws as floats, and scores b − p = ∂log p(b)/∂θ of a coin with p = sigmoid(θ).

    For each number of heads in n throws: their order changes nothing of what is measured here.
    """
    for heads in range(n + 1):
        throws = torch.tensor([1.0] * heads + [0.0] * (n - heads)).double()
        yield math.comb(n, heads) * p**heads * (1 - p) ** (n - heads), throws, throws - p


def test_a_baseline_without_the_sample_keeps_the_gradient_and_one_with_it_does_not():
    """By enumeration: E[(r_i − baseline)·∇log p] = ∂E[r]/∂θ, with a reward of 1 + 2b."""
    p, n, truth, estimate, with_sample = 0.3, 4, 2 * 0.3 * 0.7, 0.0, 0.0
    for chance, throws, score in coins(n, p):
        r = 1 + 2 * throws
        A = ddpo.leave_one_out_advantage(r, ["p"] * n) * r.std(unbiased=False)
        estimate += chance * (A * score).mean().item()
        with_sample += chance * ((r - r.mean()) * score).mean().item()
    assert estimate == pytest.approx(truth, rel=1e-12)
    assert with_sample == pytest.approx(truth * (1 - 1 / n), rel=1e-12)


def test_the_rounds_own_scale_is_biased_by_order_1_over_b_and_beats_one_without_the_sample():
    """Coins of which p show heads, 16 a round, the reward 1 for heads, enumerated.

    The scale that holds the sample changes E[∇J/σ] by a factor: 0.76 for p = 0.05, 1.02 for 0.3.
    One that leaves the sample out too is further off, and is noisier where rewards are rare.
    """
    def measure(p, advantage, n=16):
        mean, square = 0.0, 0.0
        for chance, throws, score in coins(n, p):
            g = (advantage(throws) * score).mean().item()
            mean, square = mean + chance * g, square + chance * g**2
        return mean / math.sqrt(p * (1 - p)), mean / math.sqrt(square - mean**2)

    def shared(r):
        return ddpo.leave_one_out_advantage(r, ["p"] * len(r))

    def left_out(r):
        A = torch.empty_like(r)
        for i in range(len(r)):
            others = torch.cat([r[:i], r[i + 1:]])
            scale = others.std(unbiased=False)
            A[i] = (r[i] - others.mean()) / (scale if scale > 1e-6 else 1)
        return A

    length, signal_to_noise = measure(0.05, shared)
    assert (length, signal_to_noise) == pytest.approx((0.760, 1.085), abs=1e-3)
    assert measure(0.05, left_out) == pytest.approx((0.526, 0.665), abs=1e-3)
    assert measure(0.3, shared)[0] == pytest.approx(1.023, abs=1e-3)
    assert measure(0.3, shared, 32)[0] == pytest.approx(1.012, abs=1e-3)  # as 1/B: half of it


def test_equal_rewards_give_no_advantage():
    r = torch.full((6,), 0.1, dtype=torch.float64)
    assert ddpo.leave_one_out_advantage(r, ["a"] * 6).abs().max() < 1e-12
    assert ddpo.running_advantage(r, ["a"] * 6, {}).abs().max() < 1e-12
    assert ddpo.running_advantage(r, ["a"] * 6, {}, min_count=2).abs().max() < 1e-12


@pytest.mark.equation("running advantage", "03_ddpo.running_advantage")
def test_running_advantage_by_hand_over_rounds():
    history = {}
    first = ddpo.running_advantage(torch.tensor([1, 3]), ["a", "b"], history, 3, 2)
    assert first.tolist() == [-1.0, 1.0] and first.dtype == torch.float64  # the round's: 2 ± 1
    assert history == {"a": [1.0], "b": [3.0]}
    second = ddpo.running_advantage(torch.tensor([5.0, 9.0]), ["a", "c"], history, 3, 2)
    assert second.tolist() == [1.0, 1.0]  # a: 5 of 1, 5; c: 9 of the round's 5, 9
    third = ddpo.running_advantage(torch.tensor([6.0, 10.0]), ["a", "a"], history, 3, 2)
    spread = math.sqrt(((5 - 7) ** 2 + (6 - 7) ** 2 + (10 - 7) ** 2) / 3)
    assert third.tolist() == pytest.approx([-1 / spread, 3 / spread])
    assert history == {"a": [5.0, 6.0, 10.0], "b": [3.0], "c": [9.0]}


def test_running_advantage_trusts_a_prompt_from_16_rewards_on_and_forgets_after_32():
    r, history = torch.tensor([0.0, 7.0]), {"a": [1.0, 3.0] * 7, "b": [1.0, 3.0] * 20}
    A = ddpo.running_advantage(r, ["a", "b"], history)
    assert A[0].item() == -1 and len(history["a"]) == 15  # the round's: 3.5 ± 3.5
    known = [1.0, 3.0] * 15 + [3.0, 7.0]
    assert sorted(history["b"]) == sorted(known)
    mean = sum(known) / 32
    assert A[1].item() == pytest.approx((7 - mean) / math.sqrt(
        sum((v - mean) ** 2 for v in known) / 32))


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


# ---- accumulate -----------------------------------------------------------------------------


def example(eta=1.0, scale=1.0, B=9):
    """A trajectory of an older policy, advantages (B,T) that differ by step, the present pipe."""
    generator = torch.Generator().manual_seed(0)
    trajectory = draw(make_pipe(1.0, 0.0), B, generator, eta, scale)
    A = torch.randn(B, T, generator=generator, dtype=torch.float64)
    return trajectory, A, make_pipe(1.05, 0.08)


def pairs_by_hand(config, pictures, n=0):
    """(picture, step) in the order drawn, and the weight T/kept that makes a sum over all steps."""
    i, k = training.step_pairs(pictures, T, config, n)
    return i, k, T * len(pictures) / len(i)


def gradient_by_hand(trajectory, A, pipe, pictures, config, n=0):
    """−∇J of DDPO, by the textbook: a sum over steps, a mean over pictures."""
    _, log_prob = means_and_log_probs(pipe, trajectory, config.eta, config.guidance_scale)
    i, k, weight = pairs_by_hand(config, pictures, n)
    change = (log_prob - trajectory.log_probs)[i, k]
    power = 1 / D if config.ratio == "per_dim" else 1
    w = (change * power).exp()
    terms = torch.minimum(w * A[i, k], w.clamp(1 - config.clip_range, 1 + config.clip_range)
                          * A[i, k])
    if config.estimator == "sf":
        terms = power * log_prob[i, k] * A[i, k]
    loss = -(weight * terms).sum() / len(pictures)
    return torch.autograd.grad(loss, list(pipe.unet.parameters())), w


CASES = {
    "importance sampling": dict(),
    "score function": dict(estimator="sf"),
    "batches of 1": dict(batch_size=1),
    "batches of 7": dict(batch_size=7),
    "another eta": dict(eta=0.5),
    "guidance": dict(guidance_scale=3.0),
    "ratio's D-th root": dict(ratio="per_dim", clip_range=0.02),
    "score function per dim": dict(estimator="sf", ratio="per_dim"),
    "half of the steps": dict(timestep_fraction=0.5, batch_size=7),
    "a wide clip": dict(clip_range=0.9),
}


@pytest.mark.equation("DDPO_IS", "03_ddpo.accumulate")
@pytest.mark.parametrize("case", CASES)
def test_accumulate_adds_the_gradient_of_minus_j(case):
    config = replace(CONFIG, **CASES[case])
    trajectory, A, pipe = example(config.eta, config.guidance_scale)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    by_hand, _ = gradient_by_hand(trajectory, A, pipe, pictures, config, n=4)
    weights = [p.detach().clone() for p in pipe.unet.parameters()]
    for repeat in (1, 2):  # adds to the gradients that are there, and takes no step
        ddpo.accumulate(pipe, trajectory, A, pictures, config, 4)
        for found, expected in zip(gradients(pipe.unet), by_hand, strict=True):
            torch.testing.assert_close(found, repeat * expected, rtol=1e-7, atol=1e-9)
    for p, before in zip(pipe.unet.parameters(), weights):
        assert torch.equal(p, before)


@pytest.mark.parametrize("ratio, clip_range", [("exact", 0.2), ("per_dim", 0.02)])
def test_accumulate_reports_the_exact_kl_to_the_old_policy_and_the_clipped_share(ratio, clip_range):
    config = replace(CONFIG, ratio=ratio, clip_range=clip_range, eta=0.7, batch_size=7)
    trajectory, A, pipe = example(0.7)
    pictures = torch.tensor([7, 2, 3, 0, 8])
    seen = ddpo.accumulate(pipe, trajectory, A, pictures, config, 0)
    _, w = gradient_by_hand(trajectory, A, pipe, pictures, config)
    means, _ = means_and_log_probs(pipe, trajectory, 0.7)
    kl = 0.0
    for i in pictures.tolist():
        for k, (_, _, sigma) in enumerate(coefficients(0.7)):
            gap = (means[i, k] - trajectory.means[i, k]).square().sum().item()
            kl += gap / (2 * sigma**2) / len(pictures)
    assert seen["kl_old"] == pytest.approx(kl, rel=1e-9)
    outside = ((w < 1 - clip_range) | (w > 1 + clip_range)).double().mean().item()
    assert seen["clip_fraction"] == pytest.approx(outside) and 0.1 < outside < 0.9
