"""Other leashes: three more ways to hold chapter 4's policy near the pretrained model.

`--kl mse` is the published code's "KL", the unweighted distance of the two predictions:

    w_t·KL_t = ‖ε_θ − ε_pre‖²,   w_t = 2/(κ_t/σ_t)²       (a sum over D, and a mean with per_dim)

`--kl reward` puts the KL into the reward. Each action is charged with the nats from its own step
on, because those of the steps before it were paid before it was drawn (causality):

    R_k = r − (β/α)·Σ_{s≥k} log(p_θ(a_s|s_s)/p_pre(a_s|s_s))
    ∇J  = E[ α·Σ_k ∇log p_θ(a_k|s_k)·R_k ]

That is all of ∇J, with the term that chapter 4 drops: how θ changes which states are visited (at a
round's first update, with --step-weight none). `--target-kl` moves β towards that path KL:

    β ← β·(1 + ⅕·clip(KL/target − 1, −1, 1))

RUN `python experiments/penalties.py --kl mse`, or `--target-kl 10`: two minutes each on two CPU
cores; all of chapter 4's flags are there. EXPECT mse to leave the step free at which most nats are
paid, so that the path KL grows several times further than chapter 4's, for the same gold; and
reward to pay more nats than chapter 4 at the same β, too.
WRITES a run folder like chapter 4's. Without its own two flags this script *is* chapter 4.
"""
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, noise_weight
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # check, step_weights, step_pairs, ratio_root
dpok = import_module("04_dpok")  # Config, dpok_objective, Value, value_advantage, path_kl, ...


@dataclass(frozen=True)
class Config(dpok.Config):
    kl: Literal["exact", "mse", "reward"] = "exact"  # chapter 4's; unweighted; in the reward
    target_kl: float | None = None  # β moves to hold the path KL here, in nats; default: β is fixed


SD = dpok.SD


def kl_weights(scheduler, config):
    """w_t = 2/(κ_t/σ_t)², which makes KL_t ‖ε_θ − ε_pre‖²; 1 for exact, 0 for reward.  -> (T,)"""
    models.set_timesteps(scheduler, config.num_steps)
    kappa = mdp.noise_weight(scheduler, scheduler.timesteps, config.eta)
    weights = {"mse": 2 / kappa**2, "exact": torch.ones_like(kappa)}
    return weights.get(config.kl, torch.zeros_like(kappa)).float()


def reward_to_go(r, log_prob, pre_log_prob, alpha, beta):
    """R_k = r − (β/α)·Σ_{s≥k} log(p_θ(a_s|s_s)/p_pre(a_s|s_s)).  (B,), (B,T), (B,T) -> (B,T)

    k and s count steps as they are taken: k = 0 is the action that leaves x_T.
    """
    assert log_prob.shape == pre_log_prob.shape and len(r) == len(log_prob)
    log_ratio = log_prob - pre_log_prob
    to_go = log_ratio.flip(1).cumsum(1).flip(1)
    return r[:, None] - beta / alpha * to_go


def pre_log_probs(pipe, trajectory, reference_means, config):
    """log p_pre(x_{t−1}|x_t, z) of the actions that were taken.  -> (B,T)"""
    _, _, sigma = mdp.ddim_coefficients(pipe.scheduler, trajectory.timesteps, config.eta)
    sigma = mdp.column(sigma, reference_means)
    log_prob = torch.zeros_like(trajectory.log_probs)
    for i in training.mine(len(log_prob)).tolist():
        actions = trajectory.latents[i, 1:]
        log_prob[i] = mdp.log_prob(actions, reference_means[i], sigma)
    training.total(log_prob)
    return log_prob


def adapt_beta(beta, kl, target, speed=0.2):
    """β ← β·(1 + speed·clip(KL/target − 1, −1, 1)): up while the model is too far, else down."""
    return beta * (1 + speed * max(-1.0, min(1.0, kl / target - 1)))


def train(config):
    """Chapter 4's loop with another leash.  -> the run, its summary"""
    if config.target_kl and config.beta == 0:
        raise ValueError("--target-kl moves β by a factor: it needs --beta above 0")
    ddpo.check(config, needs_others=True)
    T, clip_range, alpha = config.num_steps, config.clip_range, config.alpha
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config)
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    optimizer = models.adamw(params, config)
    reference = models.make_reference(pipe)
    step_weight = ddpo.step_weights(pipe, config)
    kl_weight = kl_weights(pipe.scheduler, config).to(pipe.device)
    root = ddpo.ratio_root(pipe, config)
    baseline = dpok.Value(pipe, config)
    leash = {"beta": config.beta}
    look = partial(dpok.evaluate, pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, f"penalty_{config.kl}", look)

    for n in run.rounds(pipe, optimizer, baseline, leash):
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, "train", n)
        with reference():
            reference_means = dpok.step_means(pipe, trajectory, config)
        r = rewards.score(reward, trajectory.images, prompts)
        g = rewards.score(gold, trajectory.images, prompts)
        V = baseline.predict(trajectory)
        if config.kl == "reward":
            log_prob = trajectory.log_probs
            pre_log_prob = pre_log_probs(pipe, trajectory, reference_means, config)
            R = reward_to_go(r.to(V), log_prob, pre_log_prob, alpha, leash["beta"])
            V = V + r.to(V)[:, None] - R  # so that r − V becomes R − V
        A = dpok.value_advantage(r, V, prompts)
        A = A.to(step_weight) * step_weight  # (B,T)
        beta = leash["beta"] * kl_weight  # (T,)

        order = training.permutation(len(prompts), config.seed, "minibatches", n)
        for pictures in order.tensor_split(config.updates_per_round):
            i, k = ddpo.step_pairs(pictures, config, n)
            scale = T / len(i)
            for i, k in training.batches(i, k, config.train_batch_size):
                mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
                action = trajectory.latents[i, k + 1]
                log_prob = mdp.log_prob(action, mean, std) / root
                old_log_prob = trajectory.log_probs[i, k] / root
                kl = mdp.kl_divergence(mean, reference_means[i, k], std) / root
                J = dpok.dpok_objective(
                    log_prob, old_log_prob, A[i, k], kl, clip_range, alpha, beta[k])
                loss = -J.sum() * scale
                loss.backward()
            training.total_gradients(params)
            grad_norm = clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        baseline.fit(trajectory, r, n)
        kl = dpok.path_kl(pipe, trajectory, reference_means, config).sum(1)
        run.log(n, reward=r, grad_norm=grad_norm, gold=g, kl=kl,
                beta=torch.full_like(kl, leash["beta"]))
        if config.target_kl:
            leash["beta"] = adapt_beta(leash["beta"], kl.mean().item(), config.target_kl)

    return run, run.finish(pipe)


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    run, summary = train(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
