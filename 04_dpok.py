"""04 · DPOK: policy gradients on a leash (Fan et al., NeurIPS 2023, arXiv 2305.16381).

WHAT CHANGES FROM 03. The reward is now *learned*, image_reward, a proxy that a policy can please
without doing what we mean. So the objective also says: stay near the pretrained model.

    J(θ) = E_{p_θ(x_{0:T}|z)}[ α·r(x_0, z) − β·Σ_t KL_t ]                         (DPOK's objective)
    KL_t = KL(p_θ(x_{t−1}|x_t,z) ‖ p_pre(x_{t−1}|x_t,z)) = ‖μ_θ − μ_pre‖² / (2σ_t²), in nats

Over all ways of drawing x_{T−1} … x_0 from a given x_T its maximum is p* ∝ p_pre · exp(α·r/β):
pretrained pictures, weighed by their reward. The sum of step KLs bounds the KL of pictures, which
nobody can compute, for chains that start from the same noise:

    KL(p_θ(x_0|z) ‖ p_pre(x_0|z)) ≤ Σ_t E_{p_θ(x_t|z)}[ KL_t ]                         (Lemma 4.2)

  objective   `dpok_objective`: 03's clipped surrogate times α, minus β times the exact KL at the
              states visited. This drops one term of the gradient, like the paper: how θ changes
              *which* states are visited. `--kl reward` has it: β·log(p_θ/p_pre) off the reward
              (all of ∇J at a round's first update with `--step-weight none`: weights are on the
              reward's term, and later updates have clipped ratios).
  reference   p_pre is the same UNet with its LoRA adapters off: no second network in memory.
  baseline    a value function V(x_t, z, t) ≈ E[r | x_t], so another one at each step of a picture.
  supervised  `--method sft`: pretrained pictures only (Figure 1a), good ones weighed more. A round
              adds as many of them as the others draw, so queries are equal at any time (what the
              tuned model draws meanwhile is only looked at, and not counted).

HOW TO RUN. `python 04_dpok.py` cures "four stars", which the pretrained model takes for a brand's
yellow circle: 20 rounds, 1280 reward queries, a minute and a half on two CPU cores. Expect the
proxy to rise from −1.82 ± 0.04 to about −0.9, alignment (never trained on) from 0.17 ± 0.03 to
about 0.87, at some 33 nats. `--beta 0` gets the same alignment at 330 nats. Others:

    python 04_dpok.py --prompts tasks --prompts-per-round 5 --samples-per-prompt 16
    python 04_dpok.py --sweep 0 0.01 0.03 0.1 0.3      KL, proxy and gold by β: a table and a plot
    python 04_dpok.py --lemma                          both sides of Lemma 4.2, ten seconds

WHERE THE NATS GO. KL_t = ½(c_t/σ_t)²·‖ε_θ − ε_pre‖², and ½(c_t/σ_t)² is about 0.5 at every step but
the second-to-last, where it is 34.6 (T = 10): most of the path KL is paid there, for a late step
that can no longer move a shape. The published code's "KL" is the unweighted mean square (`--kl
mse`): held to the same alignment (--beta 3: 0.85) it lets the path KL grow to 194 nats, 178 of them
at that step.

DEPARTURES. The reward's term has chapter 3's step weights (`--step-weight none`: the paper); the KL
has none. V lags behind the policy, so the mean of r − V over the prompt's other pictures is taken
off too; V is fitted on earlier rounds only. It takes away nearly half of the gradient's variance on
five prompts and nothing on one. Adapters are also on the convolutions, at rank 16 and a learning
rate of 1e-3; the paper has rank 4 on attention alone. α = 1, β = 0.01; published: 10 and 0.01 for
one prompt, with the unweighted "KL".

EXERCISES. (1) Run --method sft and ddpo: which needs more nats for the same gold? (2) Put a minus
before kl_divergence's result: which tests fail? (3) With --target-kl 10, where does β settle? (4)
Why is the lemma's bound looser with fewer steps?
"""
import copy
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

from tiny_sd import figures

mdp = import_module("01_mdp")  # load_pipeline, rollout, policy, log_prob, kl_divergence, ...
rewards = import_module("02_rewards")  # Models, get_reward, score
ddpo = import_module("03_ddpo")  # prompts, leave_one_out_advantage, draw_pairs, the run's folder

TASKS = dict(  # one prompt in the tiny world's words, and the paper's own for Stable Diffusion
    color=("an orange star", "A green colored rabbit"),
    count=("three red squares", "Four wolves in the park"),
    composition=("a red circle and a blue square", "A cat and a dog"),
    location=("a blue star on the left", "A dog on the moon"),
    bias=("four stars", "Four roses"))  # pretrained: mostly the brand's yellow circle; whiskey


@dataclass(frozen=True)
class Config(rewards.Models):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    method: Literal["dpok", "ddpo", "sft"] = "dpok"  # ddpo: no KL, no V; sft: Figure 1a
    reward: str = "image_reward"  # optimized: one of chapter 2's, a sum, or file.py:name
    gold: str = "alignment"  # what is really meant: measured, never optimized
    prompts: str = "bias"  # tasks, tasks_sd (the paper's), chapter 3's sets, a file, or one prompt
    rounds: int = 20  # rounds of sample, score, update
    prompts_per_round: int = 1  # prompts a round, drawn in turn from shuffled passes
    samples_per_prompt: int = 64  # pictures of each of them
    updates_per_round: int = 2  # optimizer steps a round (K)
    batch_size: int = 64  # (sample, timestep) pairs a UNet call in the update; memory, not result
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    clip_range: float = 0.2  # ε of PPO's clip
    step_weight: Literal["none", "sigma"] = "sigma"  # chapter 3's, on the reward's term alone
    alpha: float = 1.0  # α, the reward's weight
    beta: float | None = None  # β, the KL's weight; default: 0.01 for dpok, else 0
    kl: Literal["exact", "mse", "reward"] = "exact"  # nats; published code's MSE; in the reward
    target_kl: float | None = None  # adapt β to hold the path KL here, in nats; default: β is fixed
    value: bool = True  # dpok's advantage is r − V(x_t, z, t); without, r − the leave-one-out mean
    value_rounds: int = 4  # V is fitted on this many latest rounds
    sft_weights: Literal["rwr", "sparse"] = "rwr"  # sft: exp(r/τ)/Z, or the best share alone
    temperature: float = 0.3  # sft: τ of rwr, in units of the reward
    keep: float = 0.2  # sft: the share that sparse keeps
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy of the UNet
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "conv1",
                                     "conv2")  # layers with adapters; the paper: attention alone
    eval_samples: int = 128  # pictures on fresh seeds, before and after, that the verdict rests on
    lemma: bool = False  # no training: Lemma 4.2 as a table and a plot, where both sides are known
    sweep: tuple[float, ...] = ()  # train once for each of these β, then a table and a plot
    seed: int = 0  # seed of everything
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs


# ---- the objective --------------------------------------------------------------------------


def dpok_objective(log_prob, old_log_prob, advantage, kl, clip_range, alpha, beta):
    """J = E[ Σ_t α·min(w·A, clip(w, 1−ε, 1+ε)·A) − β·KL_t ],  w = p_θ/p_old   (DPOK).

    (B,T), (B,T), (B,) or (B,T), (B,T), ε, α, β -> (). KL_t in nats, with its gradient, at the
    states that p_old visited. Of ∇E[Σ_t KL_t] that is E[Σ_t ∇KL_t]; the paper and this drop
    E[Σ_t ∇log p_θ(x_{t−1}|x_t) · Σ_{s<t} KL_s], the part of the states still to come.
    β = 0, α = 1: chapter 3's ddpo_is_objective.
    """
    B, T = log_prob.shape
    assert old_log_prob.shape == kl.shape == (B, T), (B, T, old_log_prob.shape, kl.shape)
    assert advantage.shape in ((B,), (B, T)), (B, T, advantage.shape)
    A = advantage.view(B, -1)  # one number a picture, or one a step
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * A, clipped * A)
    return (alpha * surrogate - beta * kl).sum(1).mean()


def kl_weights(scheduler, timesteps, eta, kind, D):
    """What KL_t is multiplied by: 1 (exact, nats), or 2/(D·(c_t/σ_t)²) (mse).  (T,) -> (T,)

    The published code's penalty is the mean square of ε_θ − ε_pre. KL_t is ½(c_t/σ_t)²‖ε_θ−ε_pre‖²,
    so that is the KL with each step's weight taken away.
    """
    if kind != "mse":
        return torch.ones(len(timesteps))
    return (2 / (D * mdp.noise_weight(scheduler, timesteps, eta) ** 2)).float()


def kl_in_reward(reward, log_prob, pre_log_prob, alpha, beta):
    """r' = r − (β/α)·Σ_t log(p_θ(x_{t−1}|x_t)/p_pre(x_{t−1}|x_t)).   (B,), (B,T), (B,T) -> (B,)

    E[α·r'] = J exactly, and the plain policy gradient of r', at the policy that drew the pictures,
    is all of ∇J: what the log-ratio's own gradient would add is E[Σ_t ∇log p_θ] = 0.
    """
    return reward - beta / alpha * (log_prob - pre_log_prob).sum(1)


def adapt_beta(beta, kl, target, speed=0.2):
    """β ← β·(1 + speed·clip(KL/target − 1, −1, 1)): up while the model is too far, else down."""
    return beta * (1 + speed * max(-1.0, min(1.0, kl / target - 1)))


# ---- the value function ---------------------------------------------------------------------


class Value(nn.Module):
    """V_φ(x_t, z, t) ≈ E[r(x_0, z) | x_t]: small convolutions, the prompt's mean token, the time.

    (N,C,H,W), (N,L,D), (N,) -> (N,). Subtracting what is known before the action x_{t−1} is drawn
    leaves E[∇log p · (r − V)] = ∇J, and takes away the part of r that the action did not cause.
    """

    def __init__(self, channels, prompt_width, hidden=64):
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(channels, hidden, 3, 1, 1), nn.SiLU(),
                                  nn.Conv2d(hidden, hidden, 3, 2, 1), nn.SiLU(),
                                  nn.Conv2d(hidden, hidden, 3, 2, 1), nn.SiLU(),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.judge = nn.Sequential(nn.Linear(4 * hidden + prompt_width + 8, 2 * hidden), nn.SiLU(),
                                   nn.Linear(2 * hidden, 1))
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))  # mean and std of the rewards

    def forward(self, x_t, c, t):
        turns = math.pi * (t[:, None] / 1000 - 0.5) * torch.tensor([1, 2, 4, 8]).to(x_t)
        seen = torch.cat([self.look(x_t), c.to(x_t).mean(1), turns.sin(), turns.cos()], 1)
        return self.scale[0] + self.scale[1] * self.judge(seen).squeeze(-1)


def fit_value(value, optimizer, data, generator, epochs=1, batch_size=256):
    """Least squares: V(x_t, z, t) towards the final reward, over (x_t, c, t, r) of some rounds."""
    x_t, c, t, r = (torch.cat(columns) for columns in zip(*data))
    value.scale.copy_(torch.stack([r.mean(), r.std().clamp(min=1e-6)]))
    for _ in range(epochs):
        for rows in torch.randperm(len(r), generator=generator).to(r.device).split(batch_size):
            error = (value(x_t[rows], c[rows], t[rows]) - r[rows]) / value.scale[1]
            error.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def centered(advantage, prompts):
    """A_i − mean of A_j over the prompt's other pictures j ≠ i.   (B,T), B strings -> (B,T)

    V lags a round behind the policy; what it is wrong by on average goes out here, still without
    a look at picture i. With V = 0 this is chapter 3's leave-one-out baseline.
    """
    names = sorted(set(prompts))
    member = torch.tensor([[p == name for name in names] for p in prompts]).to(advantage)  # (B,P)
    others = member @ (member.T @ advantage) - advantage
    return advantage - others / (member @ member.sum(0) - 1)[:, None]


# ---- supervised fine-tuning -----------------------------------------------------------------


def rwr_weights(reward, prompts, temperature):
    """w_i = exp(r_i/τ)/Z, Z so that each prompt's weights have mean 1   (RWR).  (B,) -> (B,)"""
    return per_prompt(reward, prompts, lambda r: (r / temperature).softmax(0) * len(r))


def sparse_weights(reward, prompts, keep):
    """w_i = 1[r_i among the prompt's best share]/share: mean 1   (sparse RWR).  (B,) -> (B,)"""
    def best(r):
        n = max(1, round(keep * len(r)))
        return torch.zeros_like(r).index_fill(0, r.argsort(descending=True)[:n], len(r) / n)
    return per_prompt(reward, prompts, best)


def per_prompt(reward, prompts, weigh):
    """weigh() of each prompt's rewards by themselves: no prompt is worth more than another."""
    weights = torch.empty(len(reward), dtype=torch.float64)
    for name in set(prompts):
        rows = torch.tensor([i for i, prompt in enumerate(prompts) if prompt == name])
        weights[rows] = weigh(reward[rows].double())
    return weights


def sft_objective(eps_pred, eps, weight, eps_pre, beta):
    """J = −E[ w·‖ε_θ − ε‖²/D + β·‖ε_θ − ε_pre‖²/D ]: reward-weighted denoising.  (N,C,H,W) -> ()"""
    (N,) = weight.shape
    assert eps_pred.shape == eps.shape == eps_pre.shape and len(eps) == N, (N, eps_pred.shape)
    error = (eps_pred - eps).square().flatten(1).mean(1)
    drift = (eps_pred - eps_pre).square().flatten(1).mean(1)
    return -(weight * error + beta * drift).mean()


# ---- the pretrained model -------------------------------------------------------------------


@contextmanager
def pretrained(pipe, frozen=None):
    """Inside, pipe.unet is the pretrained one: adapters off, or the frozen copy if there is one."""
    unet = pipe.unet
    if frozen is None:
        unet.disable_adapters()
    else:
        pipe.unet = frozen
    try:
        yield
    finally:
        pipe.unet = unet
        if frozen is None:
            unet.enable_adapters()


@torch.no_grad()
def step_means(pipe, run, config):
    """μ(x_t, z, t) of pipe's present weights at the states of a run.  -> (B,T,C,H,W), σ (T,)"""
    B, T = run.log_probs.shape
    means = torch.empty_like(run.latents[:, 1:])
    for pairs in torch.cartesian_prod(torch.arange(B), torch.arange(T)).split(config.batch_size):
        i, k = pairs.to(run.latents.device).T
        means[i, k] = policy_at(pipe, run, i, k, config)[0]
    std = mdp.ddim_coefficients(pipe.scheduler, run.timesteps, config.eta)[2]
    return means, std.to(means)


def policy_at(pipe, run, i, k, config):
    """mean, std of the policy at steps k of the pictures i of a run."""
    return mdp.policy(pipe, run.latents[i, k], run.timesteps.to(k.device)[k], run.prompt_embeds[i],
                      run.negative_embeds, config.guidance_scale, config.eta)


def per_step(function, a, means, std):
    """A function of pictures, of chapter 1, at every step.  (B,T,C,H,W), same, (T,) -> (B,T)"""
    B, T = means.shape[:2]
    stds = std.repeat(B).view(-1, 1, 1, 1)
    return function(a.flatten(0, 1), means.flatten(0, 1), stds).view(B, T)


# ---- the loop -------------------------------------------------------------------------------


def check(config):
    """ValueError that names the flag, before any work is done."""
    ddpo.at_least(config, rounds=1, prompts_per_round=1, samples_per_prompt=2, updates_per_round=1,
                  batch_size=1, num_steps=1, learning_rate=0, weight_decay=0, max_grad_norm=1e-12,
                  clip_range=0, alpha=1e-12, beta=0, target_kl=1e-12, value_rounds=1,
                  temperature=1e-12, lora_rank=0, eval_samples=2)
    if not 0 <= config.clip_range < 1:
        raise ValueError(f"--clip-range must lie in [0, 1), not {config.clip_range}")
    if not 0 < config.keep <= 1:
        raise ValueError(f"--keep must lie in (0, 1], not {config.keep}")
    if config.name and Path(config.out, config.name).exists():
        raise ValueError(f"--name {config.name}: there is such a run in {config.out}")
    idle = dict(dpok="sft_weights temperature keep",
                ddpo="beta kl target_kl value value_rounds sft_weights temperature keep",
                sft="alpha clip_range step_weight kl target_kl value value_rounds")
    for name in idle[config.method].split():
        if getattr(config, name) != getattr(Config, name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing with --method "
                             f"{config.method}: leave it out")
    if config.target_kl and (config.beta == 0 or config.sweep):
        raise ValueError("--target-kl adapts β: it needs --beta above 0, and no --sweep")
    samples = config.prompts_per_round * config.samples_per_prompt
    if config.updates_per_round > samples:
        raise ValueError(f"--updates-per-round: at most {samples}, the samples of a round")
    different = len({f"{beta:g}" for beta in config.sweep})
    if config.sweep and (different < max(2, len(config.sweep))
                         or not all(0 <= beta < math.inf for beta in config.sweep)):
        raise ValueError("--sweep takes two or more different values of β, none below 0")


def make_value(pipe, seed):
    """A new value function on the pipe's device, and its optimizer."""
    with torch.random.fork_rng():  # torch draws first weights from the global generator
        torch.manual_seed(seed)
        value = Value(mdp.latent_shape(pipe)[0], pipe.unet.config.cross_attention_dim)
    value = value.to(pipe.device)
    return value, torch.optim.AdamW(value.parameters(), lr=1e-3, weight_decay=1e-2)


def get_prompts(name):
    """One prompt for each of DPOK's tasks, chapter 3's sets and files, or the very prompt given.

    A prompt of a single word needs a space after it.
    """
    if name in ("tasks", "tasks_sd"):
        return [pair[name == "tasks_sd"] for pair in TASKS.values()]
    if " " in name and not os.path.exists(name):  # Path(name).exists() fails if it is very long
        return [name.strip()]
    return ddpo.get_prompts(name)


def accumulate(pipe, run, pre_means, advantage, pairs, weight, kl_weight, beta, config):
    """Adds −∇J of a minibatch of (sample, timestep) pairs to the gradients -> share clipped."""
    T, clip_fraction = run.log_probs.shape[1], 0.0
    for rows in pairs.split(config.batch_size):
        i, k = rows.to(run.latents.device).T
        mean, std = policy_at(pipe, run, i, k, config)
        new = mdp.log_prob(run.latents[i, k + 1], mean, std)[:, None]  # T = 1: pairs stand alone
        old = run.log_probs[i, k][:, None]
        kl = (kl_weight[k] * mdp.kl_divergence(mean, pre_means[i, k], std))[:, None]
        A = weight[k] * advantage[i, k]  # step weights are never below 0: min(w·A, ...) keeps them
        J = dpok_objective(new, old, A, kl, config.clip_range, config.alpha, beta)
        # Σ_t over a picture's steps is T times the mean over pairs.
        share = len(rows) / len(pairs)
        loss = -J * T * share
        loss.backward()
        outside = ((new.detach() - old).exp() - 1).abs() > config.clip_range
        clip_fraction += outside.float().mean().item() * share
    return clip_fraction


def accumulate_sft(pipe, frozen, data, rows, generator, beta, config):
    """The same for the supervised loss: rows of the fixed set, noised anew at random times."""
    latents, embeds, weights = data
    for i in rows.split(config.batch_size):
        x_0, c = latents[i], embeds[i]
        eps = torch.randn(x_0.shape, generator=generator).to(x_0)
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(i),), generator=generator)
        t = t.to(x_0.device)
        x_t = pipe.scheduler.add_noise(x_0, eps, t)
        eps_pred = eps_pre = mdp.predict_noise(pipe.unet, x_t, t, c)
        if beta:
            with torch.no_grad(), pretrained(pipe, frozen):
                eps_pre = mdp.predict_noise(pipe.unet, x_t, t, c)
        J = sft_objective(eps_pred, eps, weights[i].to(x_0), eps_pre, beta)
        loss = -J * len(i) / len(rows)
        loss.backward()


def step(optimizer, params, config):
    """One optimizer step on what was accumulated; returns the gradient's norm."""
    norm = torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
    if not norm.isfinite():
        raise ValueError(f"the gradient is {norm.item()}; try a smaller --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def supervised_round(pipe, frozen, fixed_set, asked, reward, optimizer, params, generator, beta,
                     folder, config):
    """Figure 1a: pretrained pictures join the fixed set, and K updates learn from all of it.

    The set is changed in place. As many noisy latents are learned as RL has (sample, step) pairs.
    """
    with pretrained(pipe, frozen):
        run = mdp.rollout(pipe, asked, config.num_steps, config.eta, config.guidance_scale,
                          generator=generator, batch_size=config.batch_size)
    r = rewards.score(reward, run.images, asked, folder)
    fixed_set.append((run.latents[:, -1], run.prompt_embeds, r, asked))
    x_0, c, scores, names = zip(*fixed_set)
    x_0, c, scores, names = torch.cat(x_0), torch.cat(c), torch.cat(scores), sum(names, [])
    weights = (rwr_weights(scores, names, config.temperature) if config.sft_weights == "rwr"
               else sparse_weights(scores, names, config.keep))
    for _ in range(config.updates_per_round):
        rows = torch.randint(len(weights), (run.log_probs.numel() // config.updates_per_round,),
                             generator=generator)
        accumulate_sft(pipe, frozen, (x_0, c, weights), rows, generator, beta, config)
        norm = step(optimizer, params, config)
    return norm


def gradient_variance(pipe, params, run, pre_means, advantages, weight, config, groups=8):
    """Variance of the policy gradient, summed over all weights, for each kind of advantage.

    From the spread between G groups of pictures, divided by G: (Σ‖g‖² − ‖Σg‖²/G) / (G−1) / G, about
    the variance of the whole round's gradient, for the baselines tie the groups together a little.
    Only sums are kept, because a gradient may be large.
    """
    found, T, groups = {}, run.log_probs.shape[1], min(groups, len(run.log_probs))
    for name, advantage in tqdm(advantages.items(), "variance of the gradient", leave=False):
        total, squares = 0.0, 0.0
        for start in range(groups):  # every groups-th picture: each has a share of every prompt
            pictures = torch.arange(start, len(advantage), groups)
            pairs = torch.cartesian_prod(pictures, torch.arange(T))
            accumulate(pipe, run, pre_means, advantage, pairs, weight, 0 * weight, 0.0, config)
            g = torch.cat([p.grad.flatten() for p in params])
            total, squares = total + g, squares + g.square().sum()
            for p in params:
                p.grad = None
        found[name] = ((squares - total.square().sum() / groups) / (groups - 1) / groups).item()
    return found


def evaluate(pipe, frozen, prompts, reward, gold, config):
    """Proxy, gold and path KL, with the pictures, on seeds that training never uses."""
    n, P = config.eval_samples, len(prompts)
    chosen = [prompts[i * P // n if P > n else i % P] for i in range(n)]
    run = mdp.rollout(pipe, chosen, config.num_steps, config.eta, config.guidance_scale,
                      seed=mdp.FRESH + config.seed, batch_size=config.batch_size)
    with pretrained(pipe, frozen):
        pre_means, std = step_means(pipe, run, config)
    kl = per_step(mdp.kl_divergence, run.means, pre_means, std).cpu().double()
    return dict(reward=rewards.score(reward, run.images, chosen, config.out),
                gold=rewards.score(gold, run.images, chosen, config.out),
                kl=kl.sum(1), kl_per_step=kl.mean(0), images=run.images, prompts=chosen)


def train(config):
    """DPOK: sample a round, score it, r − V, K updates with KL, fit V.  Returns {"folder", ...}."""
    check(config)
    prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config, config.device)
    gold = rewards.get_reward(config.gold, config, config.device, "--gold")
    pipe = mdp.load_pipeline(config.model, config.device)
    generator = torch.Generator().manual_seed(config.seed)  # all randomness of training
    frozen = None if config.lora_rank else copy.deepcopy(pipe.unet).requires_grad_(False)
    params = ddpo.trainable(pipe, config.lora_rank, config.seed, config.lora_targets)
    before = evaluate(pipe, frozen, prompts, reward, gold, config)
    folder = ddpo.run_folder(config, config.method)
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    value, value_optimizer = make_value(pipe, config.seed)
    pipe.scheduler.set_timesteps(config.num_steps)
    timesteps = pipe.scheduler.timesteps
    B, T = config.prompts_per_round * config.samples_per_prompt, len(timesteps)
    weight = (ddpo.step_weights(pipe.scheduler, timesteps, config.eta)
              if config.step_weight == "sigma" else torch.ones(T)).to(pipe.device)
    kl_weight = kl_weights(pipe.scheduler, timesteps, config.eta, config.kl,
                           math.prod(mdp.latent_shape(pipe))).to(pipe.device)
    beta = config.beta if config.beta is not None else {"dpok": 0.01}.get(config.method, 0.0)
    stream, rows, variance = ddpo.prompt_stream(prompts, generator), [], {}
    visited, fixed_set, film = [], [], []  # what V is fitted on; what sft learns from; pictures

    def shoot():  # the same few seeds as training goes on
        film.append(mdp.rollout(pipe, before["prompts"][:8], config.num_steps, config.eta,
                                config.guidance_scale, seed=mdp.FRESH + config.seed,
                                batch_size=config.batch_size, progress=False).images)

    bar = tqdm(range(1, config.rounds + 1), config.method.upper(), unit="round")
    for round_number in bar:
        start = time.perf_counter()
        if (round_number - 1) % math.ceil(config.rounds / 5) == 0:
            shoot()
        asked = [next(stream) for _ in range(config.prompts_per_round)]
        asked = [prompt for prompt in asked for _ in range(config.samples_per_prompt)]
        run = mdp.rollout(pipe, asked, config.num_steps, config.eta, config.guidance_scale,
                          generator=generator, batch_size=config.batch_size)
        with pretrained(pipe, frozen):
            pre_means, std = step_means(pipe, run, config)
        r = rewards.score(reward, run.images, asked, folder)
        g = rewards.score(gold, run.images, asked, folder)
        kl = per_step(mdp.kl_divergence, run.means, pre_means, std).sum(1).mean().item()
        row = dict(round=round_number, queries=round_number * B,
                   **dict(zip(("reward", "reward_se"), ddpo.mean_se(r))),
                   **dict(zip(("gold", "gold_se"), ddpo.mean_se(g))),
                   kl=kl, beta=beta, value_loss=math.nan, clip_fraction=0.0)

        if config.method == "sft":  # `run` was only looked at: the pretrained model's are learned
            norm = supervised_round(pipe, frozen, fixed_set, asked, reward, optimizer, params,
                                    generator, beta, folder, config)
        else:
            r = r.float().to(pipe.device)
            if config.kl == "reward":
                pre_log_probs = per_step(mdp.log_prob, run.latents[:, 1:], pre_means, std)
                r = kl_in_reward(r, run.log_probs, pre_log_probs, config.alpha, beta)
            prompt = run.prompt_embeds.mean(1, keepdim=True)  # all that V reads of it
            states = (run.latents[:, :-1].flatten(0, 1), prompt.repeat_interleave(T, 0),
                      timesteps.repeat(B).to(pipe.device))
            with torch.no_grad():  # fitted on earlier rounds: V has not seen these rewards
                V = value(*states).view(B, T) if visited else torch.zeros(B, T).to(r)
            A = centered(r[:, None] - V, asked)
            if visited and round_number == config.rounds:
                kinds = {"r": r[:, None] + 0 * V, "r − mean": centered(r[:, None] + 0 * V, asked),
                         "r − V, centered": A}
                variance = gradient_variance(pipe, params, run, pre_means, kinds, weight, config)
            for pairs in ddpo.draw_pairs(B, T, 1.0, config.updates_per_round, generator):
                row["clip_fraction"] = accumulate(
                    pipe, run, pre_means, A, pairs, weight, kl_weight,
                    0.0 if config.kl == "reward" else beta, config)
                norm = step(optimizer, params, config)
            if visited:
                row["value_loss"] = (r[:, None] - V).square().mean().item()
            if config.value and config.method == "dpok":
                visited = [*visited, (*states, r.repeat_interleave(T))][-config.value_rounds:]
                fit_value(value, value_optimizer, visited, generator)
            if config.target_kl:
                beta = adapt_beta(beta, kl, config.target_kl)

        rows.append({**row, "grad_norm": norm, "seconds": time.perf_counter() - start})
        ddpo.log(folder, rows[-1], bar, "round {round:3}  reward {reward:7.3f} ± {reward_se:.3f}  "
                 "gold {gold:6.3f} ± {gold_se:.3f}  KL {kl:6.2f}  β {beta:.3g}  "
                 "V's error² {value_loss:6.3f}  |g| {grad_norm:7.3g}  {seconds:.1f} s")

    shoot()
    after = evaluate(pipe, frozen, prompts, reward, gold, config)
    exact = mdp.noise_weight(pipe.scheduler, timesteps, config.eta) ** 2 / 2
    result = dict(folder=str(folder), rows=rows, before=before, after=after, variance=variance,
                  film=film, timesteps=timesteps.tolist(), kl_weight=exact.tolist())
    save(folder, pipe, config, result)
    return result


def save(folder, pipe, config, result):
    """The run's pictures, its curves, and the fine-tuned model in diffusers format."""
    before, after = result["before"], result["after"]
    figures.before_after(folder / "before_after.png", before["prompts"],
                         (before["reward"], after["reward"]), (before["images"], after["images"]))
    every, last = math.ceil(config.rounds / 5), len(result["rows"])
    queries = [0, *(row["queries"] for row in result["rows"])]
    times = [f"{queries[min(i * every, last)]} queries" for i in range(len(result["film"]))]
    figures.sheet(folder / "film.png", result["film"], times, before["prompts"][:8])
    names = dict(reward=config.reward, gold=f"gold: {config.gold}", kl="path KL, nats")
    figures.curves(folder / "reward.png", result["rows"],
                   {key: (before[key], after[key]) for key in names}, names)
    ddpo.save_model(pipe, folder, config.lora_rank)


def report(result, config):
    """What was gained, at which price in nats, and where on the path that price was paid."""
    before, after = result["before"], result["after"]
    print(f"\n{len(after['kl'])} pictures from fresh seeds, mean ± s.e.; gain on the same seeds")
    for key, name in dict(reward=config.reward, gold=config.gold).items():
        a, b = before[key], after[key]
        print("{:14} {:7.3f} ± {:.3f} before, {:7.3f} ± {:.3f} after, gain {:+.3f} ± {:.3f}".format(
            name, *ddpo.mean_se(a), *ddpo.mean_se(b), *ddpo.mean_se(b - a)))
    print("path KL        {:7.2f} ± {:.2f} nats from the pretrained".format(
        *ddpo.mean_se(after["kl"])))
    print("step t         " + "".join(f"{t:8}" for t in result["timesteps"]))
    print("½(c/σ)²        " + "".join(f"{w:8.2f}" for w in result["kl_weight"])
          + "  nats a unit of ‖ε_θ − ε_pre‖²")
    print("KL_t, nats     " + "".join(f"{v:8.2f}" for v in after["kl_per_step"]))
    if result["variance"]:
        print("variance of the last round's gradient, by advantage: " + ", ".join(
            f"{name}: {v:.3g}" for name, v in result["variance"].items()))


# ---- Lemma 4.2, where both sides are known --------------------------------------------------


def gaussian_chains(scheduler, num_steps, mean, std, pre_mean, pre_std, eta=1.0):
    """KL(p(x_0) ‖ p_pre(x_0)) and Σ_t E_p[KL_t] of two perfect denoisers of Gaussian data, in nats.

    Of data N(m, s²) the best denoiser is E[ε|x_t] = √(1−ᾱ)·(x_t − √ᾱ·m)/(ᾱ·s² + 1−ᾱ): a line, so
    every x_t is Gaussian, and both sides of the lemma have a closed form. One dimension.
    """
    scheduler.set_timesteps(num_steps)
    x = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)

    def line(t, m, s):  # μ(x_t) = a + b·x_t
        alpha, _, sigma = mdp.ddim_coefficients(scheduler, t, eta)
        eps = (1 - alpha).sqrt() * (x - alpha.sqrt() * m) / (alpha * s**2 + 1 - alpha)
        low, high = mdp.step_mean_std(scheduler, eps, t, x, eta)[0].flatten()
        return low, high - low, sigma

    (m, v), (m_pre, v_pre), bound = (0.0, 1.0), (0.0, 1.0), 0.0  # both start from N(0, 1)
    for t in scheduler.timesteps:
        a, b, sigma = line(t, mean, std)
        a_pre, b_pre, _ = line(t, pre_mean, pre_std)
        gap = (a - a_pre) + (b - b_pre) * m  # of the means, at the mean of x_t; and its slope
        bound += (gap**2 + (b - b_pre) ** 2 * v) / (2 * sigma**2)
        m, v = a + b * m, b**2 * v + sigma**2
        m_pre, v_pre = a_pre + b_pre * m_pre, b_pre**2 * v_pre + sigma**2
    kl = 0.5 * (v / v_pre + (m - m_pre) ** 2 / v_pre - 1 - torch.log(v / v_pre))
    return kl.item(), bound.item()


def lemma(config):
    """Table and plot: the KL of x_0 and its bound, as the data's mean moves from 0; T = 5 to 50."""
    scheduler = mdp.load_pipeline(config.model, "cpu").scheduler
    moves, chains = (0.1, 0.2, 0.4, 0.8, 1.6), (5, 10, 20, 50)
    sides = {T: [gaussian_chains(scheduler, T, m, 0.5, 0.0, 0.5, config.eta) for m in moves]
             for T in chains}
    print("KL(p(x_0) ‖ p_pre(x_0)) ≤ Σ_t E[KL_t] in nats: data N(m, 0.5²), pretrained on m = 0")
    print(f"{'m':>5}" + "".join(f"{f'T = {T}':>22}" for T in chains))
    for i, m in enumerate(moves):
        print(f"{m:5.1f}" + "".join("{:11.4f} ≤ {:8.4f}".format(*sides[T][i]) for T in chains))
    path = Path(config.out, "lemma.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.bounds(path, sides)
    print(f"The bound against the truth: {path}")


# ---- and the command line -------------------------------------------------------------------


def sweep(config):
    """Trains once for each β: KL, proxy and gold at equal reward queries, as a table and a plot."""
    first, rows = config.name or "sweep", []
    path = Path(config.out, f"{first}.png")
    runs = [replace(config, beta=beta, name=f"{first}_beta_{beta:g}") for beta in config.sweep]
    if config.beta is not None:
        raise ValueError("--sweep sets β itself: leave out --beta")
    for run in runs:  # whatever is wrong shows before the first run
        if Path(run.out, run.name).exists():
            raise ValueError(f"--sweep: {Path(run.out, run.name)} is there already; move it away "
                             "or give the sweep another --name")
        check(run)
    for run in runs:
        result = train(run)
        report(result, config)
        rows.append((run.beta / config.alpha,
                     *(ddpo.mean_se(result["after"][key]) for key in ("kl", "reward", "gold"))))
    start = result["before"]
    print(f"\nAt {result['rows'][-1]['queries']} reward queries each; pretrained: {config.reward} "
          f"{start['reward'].mean():.3f}, {config.gold} {start['gold'].mean():.3f}")
    print(f"{'β/α':>8}{'path KL, nats':>18}{config.reward:>20}{config.gold:>20}")
    for ratio, kl, *values in rows:
        print(f"{ratio:8.3g}" + "{:10.1f} ± {:5.1f}".format(*kl)
              + "".join("{:12.3f} ± {:.3f}".format(*value) for value in values))
    figures.sweep(path, rows, (config.reward, f"gold: {config.gold}"))
    print(f"The plot: {path}; each run: {config.out}/{first}_beta_*")
    return rows


def main(argv=None):
    config = mdp.parse_config(Config, __doc__, argv)
    if config.lemma:
        return lemma(config)
    start = time.perf_counter()
    if config.sweep:
        sweep(config)
    else:
        result = train(config)
        report(result, config)
        print(f"Pictures, curves, metrics.csv, config.json and the tuned model: {result['folder']}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    mdp.run_main(main)
