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
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, parallel, plan, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, noise_weight
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # step_weights, mean_of_others
dpok = import_module("04_dpok")  # Config, dpok_objective, Value, step_means, path_kl, evaluate


@dataclass(frozen=True)
class Config(dpok.Config):
    kl: Literal["exact", "mse", "reward"] = "exact"  # chapter 4's; unweighted; in the reward
    target_kl: float | None = None  # β moves to hold the path KL here, in nats; default: β is fixed


def mse_weights(scheduler, config):
    """w_t = 2/(κ_t/σ_t)²: what turns KL_t into ‖ε_θ − ε_pre‖² (or v, or x_0).  -> (T,)"""
    scheduler.set_timesteps(config.num_steps)
    return 2 / mdp.noise_weight(scheduler, scheduler.timesteps, config.eta).float() ** 2


def reward_to_go(r, log_prob, pre_log_prob, alpha, beta):
    """R_k = r − (β/α)·Σ_{s≥k} log(p_θ(a_s|s_s)/p_pre(a_s|s_s)).  (B,), (B,T), (B,T) -> (B,T)

    k and s count steps as they are taken: k = 0 is the action that leaves x_T.
    """
    assert log_prob.shape == pre_log_prob.shape and len(r) == len(log_prob), log_prob.shape
    log_ratio = log_prob - pre_log_prob
    to_go = log_ratio.flip(1).cumsum(1).flip(1)
    return r[:, None] - beta / alpha * to_go


def pre_log_probs(pipe, trajectory, reference_means, config):
    """log p_pre(x_{t−1}|x_t, z) of the actions that were taken.  -> (B,T)"""
    std = mdp.ddim_coefficients(pipe.scheduler, trajectory.timesteps, config.eta)[2]
    log_prob = torch.empty_like(trajectory.log_probs)
    for k in range(log_prob.shape[1]):
        log_prob[:, k] = mdp.log_prob(trajectory.latents[:, k + 1], reference_means[:, k],
                                      std[k].to(log_prob).view(1, 1, 1, 1))
    return log_prob


def adapt_beta(beta, kl, target, speed=0.2):
    """β ← β·(1 + speed·clip(KL/target − 1, −1, 1)): up while the model is too far, else down."""
    return beta * (1 + speed * max(-1.0, min(1.0, kl / target - 1)))


def check(config):
    """Chapter 4's check, and ValueError for a β that cannot be adapted."""
    dpok.check(config)
    if config.target_kl and config.beta == 0:
        raise ValueError("--target-kl moves β by a factor: it needs --beta above 0")


def accumulate(pipe, trajectory, reference_means, advantage, betas, pictures, config, n):
    """Chapter 4's accumulate, with a β for each step.  advantage: (B,T), betas: (T,)"""
    B, T = advantage.shape
    D = trajectory.latents[0, 0].numel()
    all_i, all_k = training.step_pairs(pictures, T, config, n)
    share = 1 / len(all_i)
    stats = {"clip_fraction": 0.0, "kl_old": 0.0}
    for i, k in training.batches(all_i, all_k, config.train_batch_size):
        mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
        log_prob = mdp.log_prob(trajectory.latents[i, k + 1], mean, std)
        old_log_prob = trajectory.log_probs[i, k]
        kl_old = mdp.kl_divergence(trajectory.means[i, k], mean, std)
        kl = mdp.kl_divergence(mean, reference_means[i, k], std)
        if config.ratio == "per_dim":
            log_prob, old_log_prob, kl = log_prob / D, old_log_prob / D, kl / D
        J = dpok.dpok_objective(log_prob, old_log_prob, advantage[i, k], kl, config.clip_range,
                                config.alpha, betas[k])
        loss = -J.sum() * T * share
        loss.backward()
        outside = ((log_prob - old_log_prob).exp() - 1).abs() > config.clip_range
        stats["clip_fraction"] += outside.sum().item() * share
        stats["kl_old"] += kl_old.sum().item() * T * share
    return parallel.total_of(stats)


def train(config):
    """Chapter 4's loop with another leash.  Returns the run and its summary."""
    check(config)
    all_prompts = get_prompts(config.prompts)
    film_prompts = training.spread_evenly(all_prompts, config.film_pictures)
    reward = rewards.get_reward(config.reward, config, config.device)
    gold = rewards.get_reward(config.gold, config, config.device, "--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    weight = ddpo.step_weights(pipe.scheduler, config).to(pipe.device)
    kl_weight = torch.ones_like(weight)
    if config.kl == "mse":
        kl_weight = mse_weights(pipe.scheduler, config).to(pipe.device)
    if config.kl == "reward":
        kl_weight = torch.zeros_like(weight)
    params = models.trainable(pipe, config)
    reference = models.make_reference(pipe)
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    value = dpok.Value(pipe, config)
    leash = {"beta": config.beta}
    before = dpok.evaluate(pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, f"penalty_{config.kl}")

    for n in run.rounds(pipe, optimizer, value, leash):
        if run.is_film_due(n):
            run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "train", n))
        with reference():
            reference_means = dpok.step_means(pipe, trajectory, config)
        r = rewards.score(reward, trajectory.images, prompts, run.folder)
        g = rewards.score(gold, trajectory.images, prompts, run.folder)
        R = r.float().to(pipe.device)[:, None]
        if config.kl == "reward":
            pre_log_prob = pre_log_probs(pipe, trajectory, reference_means, config)
            R = reward_to_go(R[:, 0], trajectory.log_probs, pre_log_prob, config.alpha,
                             leash["beta"])
        A = R - value.predict(trajectory)  # V is fitted to r; the nats to come are the others' mean
        A = A - ddpo.mean_of_others(A, prompts)
        A = A * weight

        for pictures in training.minibatches(len(prompts), config.updates_per_round, config.seed,
                                             n):
            stats = accumulate(pipe, trajectory, reference_means, A, leash["beta"] * kl_weight,
                               pictures, config, n)
            stats |= training.optimizer_step(optimizer, params, config)
        if config.value:
            value.fit(trajectory, r, n)
        kl = dpok.path_kl(pipe, trajectory, reference_means, config).sum(1)
        run.log(n, reward=r, **stats, gold=g, kl=kl, **leash)
        if config.target_kl:
            leash["beta"] = adapt_beta(leash["beta"], kl.mean().item(), config.target_kl)

    run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
    after = dpok.evaluate(pipe, all_prompts, reward, gold, reference, config)
    names = {"reward": config.reward, "gold": f"gold: {config.gold}", "kl": "path KL, nats"}
    return run, run.finish(pipe, before, after, names)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, dpok.SD)
    if config.plan:
        return plan.report(config, reference=True, value=True)
    run, summary = train(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
