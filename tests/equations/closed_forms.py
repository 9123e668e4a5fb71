"""What the tests compare with: a step by the textbook, a chain of Gaussians, a loop on that chain.

Of the chapters nothing is used here but the class Trajectory, which holds what was drawn.
"""
import math
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from support import training

T, SHAPE, S, GOAL = 6, (2, 2, 3), 0.5, 1.5  # steps, a latent, spread of the data, best picture
D = math.prod(SHAPE)
START = (1.05, 0.08)  # κ and θ of the policy that a loop begins with
LOOP = dict(num_steps=T, rounds=2, prompts_per_round=2, samples_per_prompt=5, updates_per_round=3,
            learning_rate=0.02, max_grad_norm=2.0, seed=3)
CASES = {
    "plain": dict(),
    "no step weights": dict(step_weight="none"),
    "a large gradient is not cut": dict(max_grad_norm=math.inf, learning_rate=1e-3),
    "another eta, batches of 7": dict(eta=0.5, train_batch_size=7),
    "guidance": dict(guidance_scale=3.0),
    "the ratio's D-th root": dict(ratio="per_dim", clip_range=0.02, max_grad_norm=0.2),
    "half of the steps": dict(timestep_fraction=0.5, train_batch_size=7),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---- rewards and pictures -------------------------------------------------------------------


def warmth(images, prompts):
    """Red against blue: a smooth reward, which one rounded pixel moves by nearly nothing."""
    return [np.asarray(image, float)[..., [0, 2]].mean((0, 1)) @ (1, -1) for image in images]


def lightness(images, prompts):  # beside another prompt it would be another number
    return [np.mean(image) - 10 * len(prompt) for image, prompt in zip(images, prompts)]


def difference(images, others):
    """Mean difference of a pixel, of 255, in the pair of pictures that differs most."""
    pairs = zip(images, others, strict=True)
    return max(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs)


# ---- one step by the textbook ---------------------------------------------------------------


def stable_scheduler(num_steps=10, **settings):
    """Stable Diffusion v1's scheduler, with some settings changed."""
    stable = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    scheduler = DDIMScheduler(**stable | settings)
    scheduler.set_timesteps(num_steps)
    return scheduler


def gaussian(scheduler, pred, t, x, eta=1.0):
    """μ and σ from DDIM's equations 12 and 16, with the textbook's x̂_0 and ε; plain floats."""
    table = scheduler.alphas_cumprod.double().tolist()
    a, b = table[t], table[max(t - 1000 // scheduler.num_inference_steps, 0)]
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        x_0, eps = (x - (1 - a) ** 0.5 * pred) / a**0.5, pred
    elif kind == "v_prediction":
        x_0 = a**0.5 * x - (1 - a) ** 0.5 * pred
        eps = a**0.5 * pred + (1 - a) ** 0.5 * x
    else:
        x_0, eps = pred, (x - a**0.5 * pred) / (1 - a) ** 0.5
    sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
    return b**0.5 * x_0 + max(1 - b - sigma**2, 0) ** 0.5 * eps, sigma


def linear_steps(scheduler, eta=1.0):
    """(ᾱ_t, keep, feed, σ_t) of each step: a model that predicts ε has μ = keep·x_t + feed·ε."""
    rows = []
    for t in scheduler.timesteps.tolist():
        keep, sigma = gaussian(scheduler, 0.0, t, 1.0, eta)
        feed, _ = gaussian(scheduler, 1.0, t, 0.0, eta)
        rows.append((scheduler.alphas_cumprod[t].item(), keep, feed, sigma))
    return rows


# ---- a chain of Gaussians: T steps, a UNet of three tensors, all densities written out -------


@cache
def coefficients(eta=1.0):
    """gain, keep, feed, σ of all steps, (T,) each: μ = keep·x_t + feed·ε.

    ε = gain·x_t is the best denoiser for data N(0, s²).
    """
    a, keep, feed, sigma = double(linear_steps(stable_scheduler(T), eta)).T
    return (1 - a).sqrt() / (a * S**2 + 1 - a), keep, feed, sigma


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
        self.gain, _, feed, sigma = coefficients()
        self.push = sigma / feed

    def forward(self, x, t, encoder_hidden_states):
        k = (t[:, None] == self.timesteps).int().argmax(1)
        shift = self.push[k] * self.theta[k] + encoder_hidden_states.mean(1) @ self.listen
        eps = (self.kappa * self.gain[k]).view(-1, 1, 1, 1) * x + shift.view(-1, 1, 1, 1)
        return SimpleNamespace(sample=eps)


def make_pipe(kappa=1.0, theta=0.0):
    return SimpleNamespace(unet=SmallUNet(kappa, theta), scheduler=stable_scheduler(T),
                           device="cpu")


def mean_by_hand(pipe, x, k, c, empty, eta=1.0, scale=1.0):
    """μ of step k, of B latents x."""
    _, keep, feed, _ = coefficients(eta)
    t = pipe.unet.timesteps[k].expand(len(x))
    heard = empty + scale * (c - empty)  # this UNet is linear in c, so guidance can act on c
    return keep[k] * x + feed[k] * pipe.unet(x, t, heard).sample


def means_and_log_probs(pipe, trajectory, eta=1.0, scale=1.0):
    """μ (B,T,...) and log p (B,T) of a trajectory's steps under these weights, with gradient."""
    means, log_probs = [], []
    for k, sigma in enumerate(coefficients(eta)[3]):
        mean = mean_by_hand(pipe, trajectory.latents[:, k], k, trajectory.prompt_embeds,
                            trajectory.negative_embeds, eta, scale)
        density = Normal(mean, sigma).log_prob(trajectory.latents[:, k + 1])
        means.append(mean)
        log_probs.append(density.sum((1, 2, 3)))
    return torch.stack(means, 1), torch.stack(log_probs, 1)


@torch.no_grad()
def draw(pipe, B, generator, eta=1.0, scale=1.0, prompts=True, policy=None):
    """A trajectory in float64, each picture with its own prompt embedding (0 without prompts)."""
    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    c, empty = prompts * noise(B, 4, 2), prompts * noise(1, 4, 2)
    x = [noise(B, *SHAPE)]
    for k, sigma in enumerate(coefficients(eta)[3]):
        mean = mean_by_hand(pipe, x[k], k, c, empty, eta, scale)
        x.append(mean + sigma * noise(B, *SHAPE))
    mdp = import_module("01_mdp")
    trajectory = mdp.Trajectory(
        policy=policy or mdp.policy, prompts=["p"] * B, prompt_embeds=c, negative_embeds=empty,
        timesteps=pipe.scheduler.timesteps, latents=torch.stack(x, 1), means=None, log_probs=None,
        images=list(x[-1]))  # each picture is its latent
    trajectory.means, trajectory.log_probs = means_and_log_probs(pipe, trajectory, eta, scale)
    return trajectory


def reward_of(trajectory):
    return -((trajectory.latents[:, -1] - GOAL) ** 2).sum((1, 2, 3))


def gold_of(trajectory):
    return trajectory.latents[:, -1].mean((1, 2, 3))


def closed_form(unet):
    """J = E[−‖x_0 − goal‖²] without prompts, from the chain's two moments."""
    mean, variance = double(0.0), double(1.0)
    for k, (gain, keep, feed, sigma) in enumerate(zip(*coefficients())):
        factor = keep + feed * gain * unet.kappa
        mean, variance = factor * mean + sigma * unet.theta[k], factor**2 * variance + sigma**2
    return -D * (variance + (mean - GOAL) ** 2)


# ---- a chapter's loop on this chain, and each of its steps by hand --------------------------


def rehearse(loop, config, monkeypatch, *more):
    """Runs a chapter's loop with the chain for a model.  -> gradients of its steps, its log.

    As one of two processes, of which the other has the same gradient.
    """
    pipe, steps, reference_unet = make_pipe(*START), [], make_pipe().unet
    chapter, add_up = SimpleNamespace(**loop.__globals__), training.total_gradients

    def total_gradients(params):
        add_up(params)
        for p in params:
            p.grad *= 2

    def optimizer(params, config):
        sgd = torch.optim.SGD(params, config.learning_rate)
        sgd.register_step_pre_hook(lambda *_: steps.append([p.grad.clone() for p in params]))
        return sgd

    def rollout(pipe, prompts, config, purpose, n=0, policy=None):
        assert purpose == "train"
        generator = torch.Generator().manual_seed(n)
        return draw(pipe, len(prompts), generator, config.eta, config.guidance_scale,
                    policy=policy)

    def score(reward, images, prompts, folder=None):
        return reward(SimpleNamespace(latents=torch.stack(images)[:, None]))

    @contextmanager
    def reference():
        tuned, pipe.unet = pipe.unet, reference_unet
        yield
        pipe.unet = tuned

    def get_reward(spec, config, flag="--reward"):
        return {"--reward": reward_of, "--gold": gold_of}[flag]

    monkeypatch.setitem(loop.__globals__, "get_prompts", lambda name: ["p", "q"])
    for place, name, double in (
            (chapter.models, "load_pipeline", lambda *names: pipe),
            (chapter.models, "trainable", lambda pipe, config: list(pipe.unet.parameters())),
            (chapter.models, "adamw", optimizer), (chapter.mdp, "rollout", rollout),
            (chapter.models, "make_reference", lambda pipe: reference),
            (chapter.rewards, "get_reward", get_reward), (chapter.rewards, "score", score),
            (training, "total_gradients", total_gradients), (chapter.runs, "Run", Notebook)):
        monkeypatch.setattr(place, name, double)
    run, _ = loop(config, *more)
    return steps, run.rows


class Notebook:
    """In the place of runs.Run: keeps what a loop notes and logs."""
    folder = None

    def __init__(self, config, method, look):
        self.config, self.rows, self.noted = config, [], {"kl_old": [], "clip_fraction": []}

    def rounds(self, pipe, *others):
        return range(self.config.rounds)

    def note(self, **columns):
        for name, values in columns.items():
            self.noted[name] += values.tolist()

    def log(self, n, **columns):
        means = {name: np.mean(values or [0]) for name, values in self.noted.items()}
        self.rows.append(columns | means)
        self.noted = {name: [] for name in self.noted}

    def finish(self, pipe):
        return {}


def step_weights_by_hand(config):
    _, _, feed, sigma = coefficients(config.eta)
    weight = sigma / feed.abs() if config.step_weight == "sigma" else torch.ones(T)
    return weight / weight.mean()


def by_hand(config, method, advantages):
    """Each step's gradient of −J, written out down to ∂J/∂μ, and each round's notes.

    method: "sf", "is" or "dpok"; advantages(trajectory, prompts, n) -> (B,1) or (B,T).
    """
    pipe, steps, rows = make_pipe(*START), [], []
    params = list(pipe.unet.parameters())
    eta, scale = config.eta, config.guidance_scale
    for n in range(config.rounds):
        prompts = training.prompts_of_round(["p", "q"], config, n)
        trajectory = draw(pipe, len(prompts), torch.Generator().manual_seed(n), eta, scale)
        pre, _ = means_and_log_probs(make_pipe(), trajectory, eta, scale)
        A = advantages(trajectory, prompts, n) * step_weights_by_hand(config)
        order, updates = torch.arange(len(prompts)), 1
        if method != "sf":
            updates = config.updates_per_round
            order = training.permutation(len(prompts), config.seed, "minibatches", n)
        rate = config.learning_rate * (1 - n / config.rounds if config.anneal else 1)
        kl_old, outside = [], []
        for pictures in order.tensor_split(updates):
            i, k = pairs_by_hand(pictures, config, n)
            means, log_probs = means_and_log_probs(pipe, trajectory, eta, scale)
            mean, a, sigma = means[i, k], A[i, k], coefficients(eta)[3][k].view(-1, 1, 1, 1)
            root = D if config.ratio == "per_dim" and method != "sf" else 1
            w = ((log_probs - trajectory.log_probs)[i, k] / root).exp()
            done = torch.where(a > 0, w > 1 + config.clip_range, w < 1 - config.clip_range)
            by_log_prob = a if method == "sf" else ~done * w * a / root
            by_mean = by_log_prob.view(-1, 1, 1, 1) * (trajectory.latents[i, k + 1] - mean)
            if method == "dpok":
                by_mean = config.alpha * by_mean - config.beta / root * (mean - pre[i, k])
            # A mean over pictures of a sum over steps; twice, for there are two processes.
            by_mean = -2 * T / len(i) * by_mean / sigma**2
            gradient = torch.autograd.grad(mean, params, by_mean.detach(), retain_graph=True)
            length = torch.cat([slope.flatten() for slope in gradient]).norm()
            shrink = min(1, config.max_grad_norm / length)
            steps.append([shrink * slope for slope in gradient])
            for p, slope in zip(params, steps[-1]):
                p.data -= rate * slope
            looked_at = a != 0 if method == "is" else a == a
            moved = (mean - trajectory.means[i, k]) / sigma
            kl_old.append(T / 2 * moved.square().sum((1, 2, 3))[looked_at])
            outside.append(((w - 1).abs() > config.clip_range)[looked_at])
        rows.append({"grad_norm": length.item(), "kl_old": 0, "clip_fraction": 0})
        if method != "sf":
            rows[-1] |= {"kl_old": torch.cat(kl_old).mean().item(),
                         "clip_fraction": torch.cat(outside).double().mean().item()}
    return steps, rows


def pairs_by_hand(pictures, config, n):
    """(picture, step) of all steps, or of a share that is drawn for each picture."""
    kept = max(1, round(config.timestep_fraction * T))
    pairs = [(i, k) for i in pictures.tolist()
             for k in training.permutation(T, config.seed, "timesteps", n, i)[:kept].tolist()]
    return torch.tensor(pairs).T


def check_loop(found, expected):
    (steps, rows), (steps_by_hand, rows_by_hand) = found, expected
    assert len(steps) == len(steps_by_hand), "steps of the optimizer"
    for number, (step, by_hand) in enumerate(zip(steps, steps_by_hand)):
        for name, slope, wanted in zip(("kappa", "theta", "listen"), step, by_hand):
            torch.testing.assert_close(
                slope, wanted, rtol=1e-4, atol=1e-6,
                msg=lambda text: f"step {number + 1}, gradient of {name}: {text}")
    for n, (row, wanted) in enumerate(zip(rows, rows_by_hand, strict=True)):
        for name in wanted:
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), f"round {n + 1}, {name}"
