"""The experiments' equations against hand-worked numbers, closed forms and exact quadrature."""
import math
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from experiments import lemma, overoptimization, penalties, sft, variance
from support import models, training
from tests.equations.closed_forms import linear_steps, randn, stable_scheduler

mdp = import_module("01_mdp")
dpok = import_module("04_dpok")

equation = pytest.mark.equation
T = 3


class ToyUNet(torch.nn.Module):
    """ε = gain_t·(x_t − √ᾱ_t·belief), the best denoiser of N(belief, s²), said as ε, v or x_0.

    belief: θ + c, c the prompt's embedding, or θ·x_t where depends is true.
    """
    dtype = torch.float64

    def __init__(self, scheduler, theta, s, depends):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float64))
        self.scheduler, self.s, self.depends = scheduler, s, depends

    def forward(self, x, t, encoder_hidden_states):
        a = self.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        c = encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1)
        belief = self.theta * x if self.depends else self.theta + c
        eps = (1 - a).sqrt() * (x - a.sqrt() * belief) / (a * self.s**2 + 1 - a)
        x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        v = a.sqrt() * eps - (1 - a).sqrt() * x_0
        answers = {"epsilon": eps, "v_prediction": v, "sample": x_0}
        return SimpleNamespace(sample=answers[self.scheduler.config.prediction_type])


def toy_pipe(theta=0.0, s=0.5, prediction_type="epsilon", depends=False):
    scheduler = stable_scheduler(T, prediction_type=prediction_type)
    unet = ToyUNet(scheduler, theta, s, depends)
    return SimpleNamespace(scheduler=scheduler, unet=unet, device="cpu")


@equation("RWR", "experiments.sft.rwr_weights")
def test_rwr_weights_by_hand():
    w = sft.rwr_weights(torch.tensor([1.0, 7.0, 2.0]), ["a", "b", "a"], 0.5)
    e = math.exp(-2.0)
    assert w.tolist() == [pytest.approx(2 * e / (1 + e)), 1.0, pytest.approx(2 / (1 + e))]


@equation("sparse RWR", "experiments.sft.sparse_weights")
def test_sparse_weights_by_hand():
    w = sft.sparse_weights(torch.tensor([5.0, 1.0, 9.0, 3.0, 2.0]), list("aabaa"), 0.5)
    assert w.tolist() == [2.0, 0.0, 1.0, 2.0, 0.0]
    w = sft.sparse_weights(torch.arange(10.0), ["a"] * 10, 0.01)  # at least one is kept
    assert w.tolist() == [0.0] * 9 + [10.0]


@equation("supervised objective", "experiments.sft.sft_objective")
def test_sft_objective_by_hand():
    pred = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    eps = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).view(2, 1, 1, 2)
    J = sft.sft_objective(pred, eps, torch.tensor([2.0, 0.5]), torch.zeros_like(pred), 0.1)
    want = -((2 * 2.5 + 0.1 * 2.5) + (0.5 * 5 + 0.1 * 0)) / 2  # the weight is not the drift's
    assert J.item() == pytest.approx(want)


@pytest.mark.parametrize("prediction_type, weights", [
    ("epsilon", "rwr"), ("v_prediction", "sparse"), ("sample", "rwr")])
@equation("supervised objective", "experiments.sft.predict_eps")
def test_sft_gradient_in_closed_form_whatever_is_predicted(prediction_type, weights, monkeypatch):
    """A model that believes x_0 to be θ + c is wrong in ε by √(ᾱ/(1−ᾱ))·(x_0 − θ − c)."""
    monkeypatch.setattr(sft.models, "encode_prompts", lambda pipe, prompts: torch.tensor(
        [float(len(prompt)) for prompt in prompts]).double().view(-1, 1, 1))
    prompts, x_0 = ["a", "bb", "a", "ccc", "a"], randn(5, 1, 2, 2)
    r = torch.tensor([1.0, 0.0, 3.0, 2.0, 2.5]).double()
    pictures = sft.PictureSet()
    for part in (slice(0, 2), slice(2, None)):  # in two rounds
        latents = torch.stack([0 * x_0[part], x_0[part]], 1)
        pictures.add(SimpleNamespace(latents=latents, prompts=prompts[part]), r[part])
    config = sft.Config(weights=weights, batch_size=3, temperature=2.0, keep=0.5, beta=0.3, seed=7,
                        samples_per_prompt=5, num_steps=4, updates_per_round=2)
    pipe = toy_pipe(0.4, 0.0, prediction_type)
    reference = models.make_reference(pipe, toy_pipe(-0.2, 0.0, prediction_type).unet)
    sft.accumulate(pipe, reference, pictures, config, 6, 1)

    stream = training.random_stream(7, "sft batches", 6, 1)
    rows, t = stream.integers(5, size=10), stream.integers(1000, size=10)
    w = {"rwr": sft.rwr_weights(r, prompts, 2.0), "sparse": [0, 1, 1.5, 1, 1.5]}[weights]
    want = 0.0
    for i, a in zip(rows, pipe.scheduler.alphas_cumprod.double()[t]):
        error = x_0[i].mean() - 0.4 - len(prompts[i])
        want += a / (1 - a) * (w[i] * 2 * error - 0.3 * 2 * (0.4 + 0.2)) / 10
    assert -pipe.unet.theta.grad.item() == pytest.approx(want.item(), rel=1e-4)  # ᾱ is float32


@pytest.mark.parametrize("num_steps, eta", [(1, 1.0), (4, 1.0), (4, 0.5)])
@equation("Lemma 4.2", "experiments.lemma.gaussian_chains")
def test_gaussian_chains_against_the_joint_distribution(num_steps, eta):
    """Path KL and KL of x_0 from the joint Gaussians of all x_t, by torch.distributions."""
    kl, bound = lemma.gaussian_chains(stable_scheduler(), num_steps, 0.7, 0.4, 0.1, 0.6, eta)
    joints, steps = [], linear_steps(stable_scheduler(num_steps), eta)
    for m, s in ((0.7, 0.4), (0.1, 0.6)):
        # x_{k+1} = b_k x_k + a_k + σ_k z, so x = L·(noise) + mean, L lower triangular.
        mean, L = torch.zeros(num_steps + 1).double(), torch.eye(num_steps + 1).double()
        for k, (a, keep, feed, sigma) in enumerate(steps):
            gain = math.sqrt(1 - a) / (a * s**2 + 1 - a)
            b = keep + feed * gain
            mean[k + 1] = b * mean[k] - feed * gain * math.sqrt(a) * m
            L[k + 1] = b * L[k]
            L[k + 1, k + 1] = sigma
        joints.append(MultivariateNormal(mean, scale_tril=L))
    ends = [Normal(j.mean[-1], j.variance[-1].sqrt()) for j in joints]
    assert kl == pytest.approx(kl_divergence(*ends).item(), rel=1e-9)
    assert bound == pytest.approx(kl_divergence(*joints).item(), rel=1e-9)
    assert 0 < kl < bound


CONFIG = penalties.Config(batch_size=100, step_weight="none", num_steps=T, alpha=2.0, beta=3.0)
NODES, NODE_WEIGHTS = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(4))


@torch.no_grad()
def all_chains(pipe):
    """Every chain of the quadrature: x_T and all z from its nodes.  -> trajectory, weights (B,)"""
    z = torch.cartesian_prod(*[NODES] * (T + 1))
    weight = torch.cartesian_prod(*[NODE_WEIGHTS / NODE_WEIGHTS.sum()] * (T + 1)).prod(1)
    x, c = z[:, 0].view(-1, 1, 1, 1), torch.zeros(len(z), 1, 1)
    latents, means, log_probs = [x], [], []
    for k, t in enumerate(pipe.scheduler.timesteps):
        mean, std = mdp.policy(pipe, x, t, c, None, CONFIG)
        x = mean + std * z[:, k + 1].view(-1, 1, 1, 1)
        for column, new in zip((latents, means, log_probs), (x, mean, mdp.log_prob(x, mean, std))):
            column.append(new)
    columns = [torch.stack(column, 1) for column in (latents, means, log_probs)]
    return mdp.Trajectory(*columns, pipe.scheduler.timesteps, c, None, None, None), weight


def closed_form(theta, beta, frozen_states=False):
    """J = E[α·r − β·Σ KL_t], r = −x_0²; frozen_states: without how θ changes which x_t are met.

    The policy's belief is θ·x_t, the pretrained one's 0: the KL depends on the state.
    """
    var, paid = torch.ones(()).double(), 0.0
    for a, keep, feed, sigma in linear_steps(stable_scheduler(T)):
        gain = math.sqrt(1 - a) / (a * 0.25 + 1 - a)
        paid = paid + (feed * gain * math.sqrt(a) * theta) ** 2 * (
            var.detach() if frozen_states else var) / (2 * sigma**2)
        var = (keep + feed * gain * (1 - math.sqrt(a) * theta)) ** 2 * var + sigma**2
    return -CONFIG.alpha * var - beta * paid


@equation("KL in the reward", "experiments.penalties.reward_to_go")
def test_kl_in_the_reward_has_all_of_the_gradient():
    """By exact quadrature over all chains of three steps; the loss's KL lacks the states' term."""
    pipe, pre = toy_pipe(0.4, depends=True), toy_pipe()
    trajectory, weight = all_chains(pipe)
    r = -trajectory.latents[:, -1, 0, 0, 0] ** 2
    reference_means = dpok.step_means(pre, trajectory, CONFIG)
    pre_log_prob = penalties.pre_log_probs(pre, trajectory, reference_means, CONFIG)
    R = penalties.reward_to_go(r, trajectory.log_probs, pre_log_prob, CONFIG.alpha, CONFIG.beta)
    A = len(r) * weight[:, None] * R  # accumulate's mean becomes the quadrature's
    penalties.accumulate(pipe, trajectory, reference_means, A, torch.zeros(T),
                         torch.arange(len(r)), CONFIG, 0)
    theta = torch.tensor(0.4).double().requires_grad_()
    full, = torch.autograd.grad(closed_form(theta, CONFIG.beta), theta)
    dropped, = torch.autograd.grad(closed_form(theta, CONFIG.beta, True), theta)
    assert -pipe.unet.theta.grad.item() == pytest.approx(full.item(), rel=1e-6)
    assert abs(full - dropped) > 0.1 * abs(full)


def test_reward_to_go_by_hand():
    R = penalties.reward_to_go(torch.tensor([1.0, 0.0]), torch.tensor([[-1.0, -2.0], [0.0, 0.0]]),
                               torch.tensor([[-2.0, -5.0], [0.0, 4.0]]), 2.0, 0.5)
    assert R.tolist() == [[1 - 0.25 * 4, 1 - 0.25 * 3], [1.0, 1.0]]


@pytest.mark.parametrize("prediction_type, eta, ratio", [
    ("epsilon", 1.0, "exact"), ("epsilon", 0.5, "per_dim"), ("v_prediction", 1.0, "exact")])
@equation("published code's KL", "experiments.penalties.mse_weights")
def test_mse_leash_is_the_square_of_what_the_predictions_differ_by(prediction_type, eta, ratio):
    """With A = 0 `accumulate` leaves −β·∇ of the mean over pictures of Σ_t ‖ε_θ − ε_pre‖²."""
    pipe, pre = toy_pipe(0.7, 0.5, prediction_type), toy_pipe(0.1, 0.5, prediction_type)
    config = replace(CONFIG, eta=eta, ratio=ratio)
    x = randn(6, T + 1, 1, 2, 2)
    trajectory = mdp.Trajectory(x, x[:, 1:], torch.zeros(6, T).double(), pipe.scheduler.timesteps,
                                torch.zeros(6, 1, 1), None, None, None)
    reference_means = dpok.step_means(pre, trajectory, config)
    weight = penalties.mse_weights(pipe.scheduler, config)
    penalties.accumulate(pipe, trajectory, reference_means, torch.zeros(6, T), 0.3 * weight,
                         torch.arange(6), config, 0)
    J = 0.0
    for k, t in enumerate(trajectory.timesteps):
        now, then = (p.unet(x[:, k], t.expand(6), torch.zeros(6, 1, 1)).sample for p in (pipe, pre))
        J = J - 0.3 * (now - then.detach()).square().sum((1, 2, 3)).mean()
    want, = torch.autograd.grad(J, pipe.unet.theta)
    want = want.item() / (4 if ratio == "per_dim" else 1)
    assert -pipe.unet.theta.grad.item() == pytest.approx(want, rel=1e-4) and abs(want) > 0.01


@equation("a β that adapts", "experiments.penalties.adapt_beta")
def test_adapt_beta():
    for kl, want in ((20.0, 0.1), (25.0, 0.1 * (1 + 0.2 * 0.25)), (1000.0, 0.12), (0.0, 0.08)):
        assert penalties.adapt_beta(0.1, kl, 20.0) == pytest.approx(want)


@equation("variance of the gradient", "experiments.variance.gradient_variance")
def test_gradient_variance_is_that_of_a_mean_of_groups():
    trajectory, _ = all_chains(toy_pipe())
    means = dpok.step_means(toy_pipe(0.3, depends=True), trajectory, CONFIG)
    A = randn(256, T)
    pipe, config = toy_pipe(), variance.Config(groups=5, beta=9.0, alpha=2.0)
    found = variance.gradient_variance(pipe, [pipe.unet.theta], trajectory, means, A, config, 0)
    gradients = []
    for first in range(5):
        pipe.unet.theta.grad = None
        pictures = torch.arange(256)[torch.arange(256) % 5 == first]
        dpok.accumulate(pipe, trajectory, means, A, pictures, replace(CONFIG, beta=0.0), 0)
        gradients.append(pipe.unet.theta.grad.item())
    assert found == pytest.approx(np.var(gradients, ddof=1) / 5, rel=1e-9) and found > 0


@equation("hindsight's best", "experiments.overoptimization.hindsights_best")
def test_hindsights_best_by_hand():
    assert overoptimization.hindsights_best([0, 9, 0, 0, 5, 5, 5, 5, 5, 1], window=3) == 6
    assert overoptimization.hindsights_best([3, 1, 2], window=5) == 0
