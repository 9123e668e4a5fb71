"""The experiments' equations against hand-worked numbers, closed forms and torch.distributions."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from experiments import lemma, sft, variance
from tests.equations import closed_forms as chain
from tests.equations.closed_forms import linear_steps, randn, stable_scheduler

equation = pytest.mark.equation


@equation("RWR", "experiments.sft.rwr_weights")
def test_rwr_weights_by_hand():
    w = sft.rwr_weights(torch.tensor([1.0, 7.0, 2.0]), ["a", "b", "a"], 0.5)
    e = math.exp(-2.0)
    assert w.tolist() == [pytest.approx(2 * e / (1 + e)), 1.0, pytest.approx(2 / (1 + e))]


@equation("sparse RWR", "experiments.sft.sparse_weights")
def test_sparse_weights_by_hand():
    w = sft.sparse_weights(torch.tensor([5.0, 1.0, 9.0, 3.0, 2.0]), list("aabaa"), 0.5)
    assert w.tolist() == [2.0, 0.0, 1.0, 2.0, 0.0]
    w = sft.sparse_weights(torch.tensor([4.0, 3.0, 2.0, 1.0]), ["a"] * 4, 0.4)  # 1.6 of them: 2
    assert w.tolist() == [2, 2, 0, 0]
    w = sft.sparse_weights(torch.arange(10.0), ["a"] * 10, 0.01)  # at least one is kept
    assert w.tolist() == [0.0] * 9 + [10.0]


@equation("supervised objective", "experiments.sft.sft_objective")
def test_sft_objective_by_hand():
    pred = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    eps = torch.tensor([[0.0, 0.0], [3.0, 1.0]]).view(2, 1, 1, 2)
    J = sft.sft_objective(pred, eps, torch.tensor([2.0, 0.5]), torch.zeros_like(pred), 0.1)
    want = -((2 * 2.5 + 0.1 * 2.5) + (0.5 * 5 + 0.1 * 0)) / 2  # the weight is not the drift's
    assert J.item() == pytest.approx(want)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@equation("supervised objective", "experiments.sft.predict_eps")
def test_sft_learns_the_noise_whatever_is_predicted(prediction_type):
    """A model that says what makes x_t = √ᾱ·x_0 + √(1−ᾱ)·ε is said to predict ε."""
    x_0, eps, t = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1), torch.tensor([9, 500, 0, 77])
    scheduler = stable_scheduler(prediction_type=prediction_type)
    a = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    answer = {"epsilon": eps, "sample": x_0,
              "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x_0}[prediction_type]

    def unet(x, t, encoder_hidden_states):
        return SimpleNamespace(sample=answer)

    unet.dtype = torch.float64
    pipe = SimpleNamespace(scheduler=scheduler, unet=unet)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    found = sft.predict_eps(pipe, x_t, t, torch.zeros(4, 1, 1))
    torch.testing.assert_close(found, eps, rtol=1e-4, atol=1e-4)  # ᾱ is float32


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


@equation("variance of the gradient", "experiments.variance.gradient_variance")
@equation("gradient of the reward's term", "experiments.variance.gradient")
def test_gradient_variance_is_that_of_a_mean_of_groups():
    pipe, B = chain.make_pipe(1.1, 0.2), 23
    trajectory = chain.draw(pipe, B, torch.Generator().manual_seed(2))
    A, params = randn(B, chain.T), list(pipe.unet.parameters())
    config = variance.Config(groups=5, alpha=2.0, num_steps=chain.T, train_batch_size=7)
    found = variance.gradient_variance(pipe, params, trajectory, A, config, 0)
    _, log_prob = chain.means_and_log_probs(pipe, trajectory)
    groups = []
    for first in range(5):
        J = 2.0 * (A * log_prob)[first::5].sum(1).mean()
        g = torch.autograd.grad(J, params, retain_graph=True)
        groups.append(torch.cat([part.flatten() for part in g]).numpy())
    assert found == pytest.approx(np.var(groups, axis=0, ddof=1).sum() / 5, rel=1e-9) and found > 0
