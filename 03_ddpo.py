"""03 · DDPO: policy gradients for diffusion models (Black et al., ICLR 2024, arXiv 2305.13301).

WHAT YOU LEARN. Chapter 1 made the sampler a policy with exact log-probabilities, chapter 2 made
rewards. Here they meet: draw pictures, score them, and make the denoising steps that led to the
good ones more likely. First by REINFORCE (`reinforce`), one update for each round of pictures; then
with importance sampling and PPO's clip (`train`), several updates for each round.

    J(θ) = E_{c, x_0 ~ p_θ}[ r(x_0, c) ]                                     what we want to raise
    ∇J   ∝ E_{c, p_θ(x_{0:T}|c)}[ Σ_t ∇log p_θ(x_{t−1}|x_t, c) · A ]                     (DDPO_SF)
    J_IS = E_{c, p_old(x_{0:T}|c)}[ Σ_t min(w_t·A, clip(w_t, 1−ε, 1+ε)·A) ]     (DDPO_IS, clipped)

A, the advantage, is the reward minus the mean of the same prompt's other pictures, divided by the
round's standard deviation. After a round's first update its pictures are those of an older policy,
p_old. The ratio w_t = p_θ/p_old corrects the probability of a step for that, but not that of
reaching its state. At θ = θ_old J_IS has REINFORCE's gradient. The clip stops the gradient of a
step whose ratio has gone far enough; it does not hold θ back. The log has means over a round's
updates, each before its step: `clip_fraction` of the ratios outside 1 ± ε, `kl_old` from p_old.
As chapter 1's `noise_weight` says, one step dominates: ∇log p = −(κ_t/σ_t)·zᵀ∇ε_θ, z = (a_t−μ)/σ.
`--step-weight sigma` multiplies each step's term by σ_t/κ_t (mean 1): not ∇J, but all have a say.

RUN `python 03_ddpo.py`: the tiny model learns to put shapes where the prompt says. EXPECT alignment
to gain 0.25 on fresh noise, in 3 minutes on two cores. TRY `--estimator sf`, `--prompts bias`.
DEPARTURES. Step weights (the paper has `none`); the exact ratio (the published one, `per_dim`, is
its D-th root: a clip of 1e-4 lets the exact one go from 0.19 to 5.1 where D = 16384); the others'
mean as baseline (the paper's is `running`); a learning rate that falls (the paper's is constant).
EXERCISES. (1) Train on compressibility, then run `02_rewards.py --model RUN`: what was the price?
(2) Take min out of the objective: which test fails? (3) Why may a baseline contain any reward but
the sample's own? (4) What is w_t of a flow-matching model? See `experiments/flow.py`.
"""
import math
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

from support import flags, models, runs, training
from support.prompts import get_prompts

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, noise_weight
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score


@dataclass(frozen=True)
class PolicyGradient(rewards.RewardFlags, runs.TrainFlags):
    """What this chapter and the next have in common."""
    clip_range: float = 0.2  # ε of PPO's clip
    ratio: Literal["exact", "per_dim"] = "exact"  # exp(Δ log p), or exp(Δ log p / D)
    step_weight: Literal["none", "sigma"] = "sigma"  # none: the paper; sigma: σ_t/κ_t
    timestep_fraction: float = 1.0  # share of a picture's steps to train on, at random


@dataclass(frozen=True)
class Config(PolicyGradient):
    reward: str = "alignment"  # a name of chapter 2, a sum such as a=1,b=0.2, or file.py:name
    prompts: str = "location"  # a shape family, animals, tasks, ..., a file, or one prompt
    estimator: Literal["sf", "is"] = "is"  # score function (REINFORCE), importance sampling
    rounds: int = 40  # rounds of sample, score, update
    prompts_per_round: int = 8  # prompts per round, in turn from shuffled passes
    samples_per_prompt: int = 8  # pictures of each; the others' mean is the baseline
    updates_per_round: int = 2  # optimizer steps per round, K; 1 with --estimator sf
    learning_rate: float = 2e-4  # of AdamW
    anneal: bool = True  # the learning rate falls to 0 in a straight line
    max_grad_norm: float = 1000.0  # a longer gradient is scaled down to this norm
    lora_rank: int = 0  # rank of LoRA; 0 trains all weights
    lora_targets: tuple[str, ...] = models.ATTENTION  # layers with adapters
    baseline: Literal["leave_one_out", "running"] = "leave_one_out"  # subtracted from r
    advantage_clip: float = 5.0  # advantages are cut to ± this


SD = flags.published("03_ddpo")

# ---- advantages -----------------------------------------------------------------------------


def mean_of_others(values, prompts):
    """mean_{j≠i, same prompt} v_j, for each picture i.   (B,...), B strings -> (B,...)"""
    assert len(values) == len(prompts)
    means = torch.empty_like(values)
    for i, prompt in enumerate(prompts):
        others = [j for j, other in enumerate(prompts) if other == prompt]
        others.remove(i)
        means[i] = values[others].mean(0)
    return means


def spread(values):
    """s = √(mean (v − v̄)²), and 1 where all are equal.   (N,) -> ()"""
    s = values.std(unbiased=False)
    return s if s > 1e-6 else 1.0


def leave_one_out_advantage(r, prompts):
    """A_i = (r_i − mean_{j≠i, same prompt} r_j) / std_j r_j.   (B,), B strings -> (B,) float64

    The baseline leaves r_i out, so it adds no bias. The spread, one number for the whole round,
    contains r_i: a bias of order 1/B.
    """
    r = r.double()
    r = r - r.mean()  # so that large rewards lose no digits
    difference = r - mean_of_others(r, prompts)
    return difference / spread(r)


def running_advantage(r, prompts, history, keep=32, min_count=16):
    """A_i = (r_i − mean) / std over the prompt's last `keep` rewards, this round's included.

    DDPO's per-prompt statistics; below min_count rewards, those of the whole round, as published.
    They contain r_i, which shrinks E[A·∇log p] a little. `history` (prompt -> rewards) is changed.
    """
    r = r.double()
    for value, prompt in zip(r.tolist(), prompts):
        known = history.get(prompt, [])
        history[prompt] = [*known, value][-keep:]
    A = torch.empty_like(r)
    for i, prompt in enumerate(prompts):
        known = r
        if len(history[prompt]) >= min_count:
            known = r.new_tensor(history[prompt])
        center = known.mean()
        scale = spread(known)
        A[i] = (r[i] - center) / scale
    return A


def advantages(r, prompts, history, config):
    """The advantage of each picture by --baseline, cut to ± --advantage-clip.  (B,) -> (B,1)"""
    if config.baseline == "running":
        A = running_advantage(r, prompts, history)
    else:
        A = leave_one_out_advantage(r, prompts)
    limit = config.advantage_clip
    return A.clamp(-limit, limit)[:, None]


# ---- the gradient's terms: (picture, step) pairs --------------------------------------------


def step_weights(pipe, config):
    """(σ_t/κ_t) / mean(σ/κ), κ_t = |∂μ_θ/∂ε|: step weights `sigma`, or all 1.  -> (T,)"""
    models.set_timesteps(pipe.scheduler, config.num_steps)
    t = pipe.scheduler.timesteps
    weight = 1 / mdp.noise_weight(pipe.scheduler, t, config.eta)
    if config.step_weight == "none":
        weight = torch.ones_like(weight)
    weight = weight / weight.mean()
    return weight.float().to(pipe.device)


def step_pairs(pictures, config, n):
    """(picture, step) of all steps that these pictures are trained on: index tensors (M,), (M,).

    A timestep_fraction below 1 keeps that share of the T steps, drawn anew for each picture.
    """
    T = config.num_steps
    kept = max(1, round(config.timestep_fraction * T))
    steps = training.permutations(pictures, T, config.seed, "timesteps", n)
    i = pictures.repeat_interleave(kept)
    k = steps[:, :kept].flatten()
    return i, k


def check(config, needs_others):
    """ValueError for flags that contradict each other, before any work is done."""
    pictures = config.prompts_per_round * config.samples_per_prompt
    if needs_others and config.samples_per_prompt < 2:
        raise ValueError("--samples-per-prompt must be at least 2: the others are the baseline")
    if config.updates_per_round > pictures:
        raise ValueError(f"--updates-per-round: at most {pictures}, the pictures of a round")


def evaluate(pipe, prompts, reward, config, policy=mdp.policy):
    """Rewards and pictures on noise that training never draws: the same at each call."""
    prompts = training.spread_evenly(prompts, config.eval_samples)
    trajectory = mdp.rollout(pipe, prompts, config, "evaluate", policy=policy)
    images = trajectory.images
    r = rewards.score(reward, images, prompts)
    return {"prompts": prompts, "images": images, "reward": r}


# ---- REINFORCE ------------------------------------------------------------------------------


def ddpo_sf_objective(log_prob, advantage):
    """J = E[ Σ_t log p_θ(x_{t−1}|x_t, c) · A ]   (DDPO_SF): its term of each (picture, step).

    (N,), (N,) -> (N,). Its value means nothing, and is not J(θ); its gradient is the estimator.
    """
    assert log_prob.shape == advantage.shape
    return log_prob * advantage


def reinforce(config):
    """draw → score → advantage → one step along Σ_t ∇log p · A.  -> the run, its summary"""
    check(config, config.baseline == "leave_one_out")
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    optimizer = models.adamw(params, config)
    step_weight = step_weights(pipe, config)
    baseline = {}  # the running baseline's rewards, by prompt
    look = partial(evaluate, pipe, all_prompts, reward, config)
    run = runs.Run(config, "ddpo_sf", look)

    for n in run.rounds(pipe, optimizer, baseline):  # --resume restores these three
        training.set_rate(optimizer, config, n)
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, "train", n)
        r = rewards.score(reward, trajectory.images, prompts)
        A = advantages(r, prompts, baseline, config)
        A = A.to(step_weight) * step_weight  # (B,1)·(T,) -> (B,T)

        pictures = torch.arange(len(prompts))
        all_i, all_k = step_pairs(pictures, config, n)
        scale = config.num_steps / len(all_i)  # a mean over pictures, and a sum over steps
        for i, k in training.batches(all_i, all_k, config.train_batch_size):
            mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
            action = trajectory.latents[i, k + 1]
            log_prob = mdp.log_prob(action, mean, std)
            J = ddpo_sf_objective(log_prob, A[i, k])
            loss = -J.sum() * scale
            loss.backward()
        training.total_gradients(params)
        grad_norm = clip_grad_norm_(params, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        run.log(n, reward=r, grad_norm=grad_norm)

    return run, run.finish(pipe)


# ---- what changes with importance sampling: K updates of each round's pictures --------------


def ddpo_is_objective(log_prob, old_log_prob, advantage, clip_range):
    """J = E[ Σ_t min(w·A, clip(w, 1−ε, 1+ε)·A) ],  w = p_θ/p_old   (DDPO_IS): its terms.

    (N,), (N,), (N,), ε -> (N,). Outside the band on the side that A pushes to, min takes the
    clipped term, whose gradient is 0. On the other side it takes w·A, which pulls w back.
    """
    assert log_prob.shape == old_log_prob.shape
    assert log_prob.shape == advantage.shape
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(ratio * advantage, clipped * advantage)


def ratio_root(pipe, config):
    """1, or D with --ratio per_dim: Δ log p (and 04's KL) over D makes the ratio its D-th root."""
    if config.ratio == "exact":
        return 1
    return math.prod(models.latent_shape(pipe))


def train(config, policy=mdp.policy, advantages=advantages):
    """draw → score → advantage → K × (log-probs → objective → step).  -> the run, its summary"""
    check(config, config.baseline == "leave_one_out")
    T = config.num_steps
    clip_range = config.clip_range
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    optimizer = models.adamw(params, config)
    step_weight = step_weights(pipe, config)
    root = ratio_root(pipe, config)
    baseline = {}  # the running baseline's rewards, by prompt
    look = partial(evaluate, pipe, all_prompts, reward, config, policy)
    run = runs.Run(config, "ddpo_is", look)

    for n in run.rounds(pipe, optimizer, baseline):  # --resume restores these three
        training.set_rate(optimizer, config, n)
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, "train", n, policy)
        r = rewards.score(reward, trajectory.images, prompts)
        A = advantages(r, prompts, baseline, config)
        A = A.to(step_weight) * step_weight  # (B,1)·(T,) -> (B,T)

        B = len(prompts)
        order = training.permutation(B, config.seed, "minibatches", n)
        for pictures in order.tensor_split(config.updates_per_round):
            all_i, all_k = step_pairs(pictures, config, n)
            scale = T / len(all_i)  # a mean over pictures, and a sum over steps
            useful = A[all_i, all_k].abs() > 1e-9  # solved prompts teach nothing
            all_i, all_k = all_i[useful], all_k[useful]
            for i, k in training.batches(all_i, all_k, config.train_batch_size):
                mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
                action = trajectory.latents[i, k + 1]
                log_prob = mdp.log_prob(action, mean, std) / root
                old_log_prob = trajectory.log_probs[i, k] / root
                J = ddpo_is_objective(log_prob, old_log_prob, A[i, k], clip_range)
                loss = -J.sum() * scale
                loss.backward()
                old_mean = trajectory.means[i, k]
                kl_old = T * mdp.kl_divergence(old_mean, mean, std)
                ratio = (log_prob - old_log_prob).exp()
                outside = (ratio - 1).abs() > clip_range
                run.note(kl_old=kl_old, clip_fraction=outside)
            training.total_gradients(params)
            grad_norm = clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(n, reward=r, grad_norm=grad_norm)

    return run, run.finish(pipe)


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    loop = reinforce if config.estimator == "sf" else train
    run, summary = loop(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
