"""03 · DDPO: policy gradients for diffusion models (Black et al., ICLR 2024, arXiv 2305.13301).

WHAT YOU LEARN. Chapter 1 made the sampler a policy with exact log-probabilities, chapter 2 made
rewards. Here they meet: draw pictures, score them, and make the denoising steps that led to the
good ones more likely. Two estimators of one gradient:

    J(θ) = E_{c, x_0 ~ p_θ}[ r(x_0, c) ]                                     what we want to raise
    ∇J   = E_{p_θ(x_{0:T}|c)}[ Σ_t ∇log p_θ(x_{t−1}|x_t, c) · A ]                       (DDPO_SF)
    J_IS = E_{p_old(x_{0:T}|c)}[ Σ_t min(w_t·A, clip(w_t, 1−ε, 1+ε)·A) ],  w_t = p_θ/p_old (DDPO_IS)

SF, the score function estimator (REINFORCE), is right for one update per round of samples. IS,
importance sampling, reuses a round for several updates. Its gradient is ∇J at θ = θ_old, and PPO's
clip keeps θ near there; w_t corrects one step's probability, not how often p_θ reaches its state.
A, the advantage, is the reward minus the mean of the same prompt's other pictures, over the spread.

ONE STEP DOMINATES. ∇log p = −(κ_t/σ_t)·zᵀ∇ε_θ, z the step's own noise. With 10 steps, chapter 1's
κ_t/σ_t is about 8 at the second-to-last step and 1 at all others: that late step supplies most of
the gradient. `--step-weight sigma` multiplies each step's term by σ_t/κ_t (mean 1); the sum is then
no longer ∇J, but all steps have a say.

RUN `python 03_ddpo.py`: the tiny model learns to put shapes where the prompt says. EXPECT alignment
to gain 0.26 on fresh noise, in three minutes on two cores. TRY `--prompts bias`, `--estimator sf`
or `--reward compressibility`. DEPARTURES from the paper: step weights (`none` is the paper); the
exact ratio of densities (`--ratio per_dim` is the published code's: the exact one's D-th root); the
leave-one-out baseline (`--baseline running` is the paper's); no inner epochs: a pair of picture and
step is used once. EXERCISES. (1) Train on compressibility, then run `02_rewards.py --model RUN`:
what was the price? (2) Take min out of the objective: which test fails? (3) Why may a baseline hold
any reward but the sample's own?
"""
import math
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from support import flags, models, parallel, plan, runs, training
from support.prompts import get_prompts

mdp = import_module("01_mdp")  # rollout, policy_at, log_prob, kl_divergence, noise_weight
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score


@dataclass(frozen=True)
class Config(rewards.RewardFlags, flags.TrainFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    reward: str = "alignment"  # chapter 2's, a sum like alignment=1,aesthetic=0.2, or file.py:name
    prompts: str = "location"  # a shape family, animals, activities, tasks, a file, or one prompt
    estimator: Literal["sf", "is"] = "is"  # score function (REINFORCE), importance sampling (PPO)
    rounds: int = 30  # rounds of sample, score, update
    prompts_per_round: int = 8  # prompts per round, drawn in turn from shuffled passes
    samples_per_prompt: int = 16  # pictures of each of them; the others' mean is the baseline
    updates_per_round: int | None = None  # optimizer steps per round (K); default: sf 1, is 2
    num_steps: int = 10  # denoising steps T
    timestep_fraction: float = 1.0  # share of each picture's steps to train on, drawn at random
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-4  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 1000.0  # a longer gradient is scaled down to this norm
    clip_range: float = 0.2  # ε of PPO's clip
    ratio: Literal["exact", "per_dim"] = "exact"  # exp(Δ log p), or the published exp(Δ log p / D)
    step_weight: Literal["none", "sigma"] = "sigma"  # none: the paper; sigma: steps of equal size
    baseline: Literal["leave_one_out", "running"] = "leave_one_out"  # what is subtracted from r
    advantage_clip: float = 5.0  # advantages are cut to ± this
    lora_rank: int = 0  # rank of LoRA; 0 trains all weights
    lora_targets: tuple[str, ...] = models.ATTENTION  # layers with adapters
    seed: int = 0  # seed of everything
    sd: bool = False  # the published settings for the full model become the defaults


SD = dict(  # DDPO's, for the aesthetic score; LoRA and its learning rate are the later code's
    model="CompVis/stable-diffusion-v1-4", reward="aesthetic", prompts="animals",
    clip="openai/clip-vit-large-patch14",
    aesthetic_weights="trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    rounds=200, prompts_per_round=256, samples_per_prompt=1, updates_per_round=4, batch_size=8,
    train_batch_size=4, dtype="bfloat16", checkpointing=True, num_steps=50, guidance_scale=5.0,
    learning_rate=3e-4, lora_rank=4,
    max_grad_norm=50.0,  # the published 1 is of a mean over T = 50 steps; here they are summed
    clip_range=1e-4, ratio="per_dim", step_weight="none", baseline="running")

# ---- the estimators -------------------------------------------------------------------------


def ddpo_sf_objective(log_prob, advantage):
    """J = E[ Σ_t log p_θ(x_{t−1}|x_t, c) · A ]   (DDPO_SF): its term of each (picture, step).

    (N,), (N,) -> (N,). Its value means nothing; its gradient is the estimator.
    """
    assert log_prob.shape == advantage.shape, (log_prob.shape, advantage.shape)
    return log_prob * advantage


def ddpo_is_objective(log_prob, old_log_prob, advantage, clip_range):
    """J = E[ Σ_t min(w·A, clip(w, 1−ε, 1+ε)·A) ],  w = p_θ/p_old   (DDPO_IS): its terms.

    (N,), (N,), (N,), ε -> (N,). min keeps the two corrective sides: a ratio that has left the band
    the wrong way still has a gradient that pulls it back.
    """
    assert log_prob.shape == old_log_prob.shape == advantage.shape, log_prob.shape
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.minimum(ratio * advantage, clipped * advantage)


def equivalent_clip(clip_range, power):
    """(1 − ε)^p, (1 + ε)^p: where a ratio lies in 1 ± ε, its p-th power lies in this band.

    p = D goes from the published per-dimension ratio to the exact one, p = 1/D the other way.
    """
    return (1 - clip_range) ** power, (1 + clip_range) ** power


def print_clip(config, D):
    """Says what --clip-range on the ratio in use means for the other one."""
    power, other = D, "exact"
    if config.ratio == "exact":
        power, other = 1 / D, "per_dim"
    low, high = equivalent_clip(config.clip_range, power)
    print(f"clip ±{config.clip_range:g} on the {config.ratio} ratio: {low:.6g} to {high:.6g} "
          f"on the {other} one")


def step_weights(scheduler, config):
    """(σ_t/κ_t) / mean(σ/κ), κ_t = |∂μ_θ/∂ε|: step weights `sigma`, or all 1.  -> (T,)"""
    scheduler.set_timesteps(config.num_steps)
    if config.step_weight == "none":
        return torch.ones(len(scheduler.timesteps))
    weight = 1 / mdp.noise_weight(scheduler, scheduler.timesteps, config.eta)  # 0 where σ = 0
    return (weight / weight.mean()).float()


# ---- advantages -----------------------------------------------------------------------------


def mean_of_others(values, prompts):
    """mean_{j≠i, same prompt} v_j, for each picture i.   (B,...), B strings -> (B,...)"""
    assert len(values) == len(prompts), (values.shape, len(prompts))
    means = torch.empty_like(values)
    for i, prompt in enumerate(prompts):
        others = [j for j, other in enumerate(prompts) if other == prompt and j != i]
        if not others:
            raise ValueError("--samples-per-prompt must be at least 2: the others are the baseline")
        means[i] = values[others].mean(0)
    return means


def leave_one_out_advantage(reward, prompts):
    """A_i = (r_i − mean_{j≠i, same prompt} r_j) / std_j r_j.   (B,), B strings -> (B,) float64

    The baseline leaves r_i out, so it does not bend the expected update. The spread, one number for
    the whole round, includes it: a bias of order 1/B in the update's length and, where rewards have
    outliers, in its direction. (Leaving r_i out there too would shrink rare successes.)
    """
    r = reward.double() - reward.double().mean()  # changes nothing but the rounding
    scale = r.std(unbiased=False)
    return (r - mean_of_others(r, prompts)) / (scale if scale > 1e-6 else 1)


def running_advantage(reward, prompts, history, keep=32, min_count=16):
    """A_i = (r_i − mean) / std over the prompt's last `keep` rewards, this round's included.

    DDPO's per-prompt statistics; with fewer than min_count rewards, those of the whole round, as in
    the published code. They hold r_i itself, which shrinks E[A·∇log p] a little. `history`, prompt
    -> list of floats, is changed in place.
    """
    for value, prompt in zip(reward.tolist(), prompts):
        history[prompt] = [*history.get(prompt, []), value][-keep:]
    A = torch.empty(len(prompts), dtype=torch.float64)
    for i, prompt in enumerate(prompts):
        known = reward.double()
        if len(history[prompt]) >= min_count:
            known = torch.tensor(history[prompt], dtype=torch.float64)
        scale = known.std(unbiased=False)
        A[i] = (reward[i] - known.mean()) / (scale if scale > 1e-6 else 1)
    return A


def advantages(reward, prompts, history, config):
    """The advantage of each picture by --baseline, cut to ± --advantage-clip.  (B,) -> (B,)"""
    if config.baseline == "running":
        A = running_advantage(reward, prompts, history)
    else:
        A = leave_one_out_advantage(reward, prompts)
    return A.clamp(-config.advantage_clip, config.advantage_clip).float()


# ---- the loop -------------------------------------------------------------------------------


def check(config):
    """ValueError for flags that contradict each other, before any work is done."""
    runs.check_folder(config)
    if config.baseline == "leave_one_out" and config.samples_per_prompt < 2:
        raise ValueError("--samples-per-prompt must be at least 2: the others are the baseline")
    samples = config.prompts_per_round * config.samples_per_prompt
    if updates(config) > samples:
        raise ValueError(f"--updates-per-round: at most {samples}, the pictures of a round")
    if config.estimator == "sf" and updates(config) != 1:
        raise ValueError("--estimator sf is valid for one update per round: --updates-per-round 1")


def updates(config):
    """K, the optimizer steps per round."""
    return config.updates_per_round or {"sf": 1, "is": 2}[config.estimator]


def accumulate(pipe, trajectory, advantage, pictures, config, n):
    """Adds −∇J of some pictures of round n to the gradients, and nothing else.  -> statistics

    advantage: (B,T). clip_fraction and kl_old compare the policy before this step with the one
    that drew the pictures, where A is not 0; the log has those of a round's last update.
    """
    B, T = advantage.shape
    D = trajectory.latents[0, 0].numel()
    all_i, all_k = training.step_pairs(pictures, T, config, n)
    share = 1 / len(all_i)
    # Where all pictures of a prompt got the same reward, A is 0 and their pairs add nothing.
    useful = (advantage[all_i, all_k].abs() > 1e-9).cpu()
    all_i, all_k = all_i[useful], all_k[useful]
    share_of_useful = 1 / max(1, len(all_i))
    stats = {"clip_fraction": 0.0, "kl_old": 0.0}
    for i, k in training.batches(all_i, all_k, config.train_batch_size):
        mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
        log_prob = mdp.log_prob(trajectory.latents[i, k + 1], mean, std)
        old_log_prob = trajectory.log_probs[i, k]
        kl_old = mdp.kl_divergence(trajectory.means[i, k], mean, std)
        if config.ratio == "per_dim":
            log_prob, old_log_prob = log_prob / D, old_log_prob / D
        if config.estimator == "sf":
            J = ddpo_sf_objective(log_prob, advantage[i, k])
        else:
            J = ddpo_is_objective(log_prob, old_log_prob, advantage[i, k], config.clip_range)
        # E[Σ_t …], a mean over pictures and a sum over steps, is T times the mean over all pairs.
        loss = -J.sum() * T * share
        slope, = torch.autograd.grad(loss, log_prob)
        if slope.any():  # else all are clipped flat: no need to go back through the UNet
            log_prob.backward(slope)
        outside = ((log_prob - old_log_prob).exp() - 1).abs() > config.clip_range
        stats["clip_fraction"] += outside.sum().item() * share_of_useful
        stats["kl_old"] += kl_old.sum().item() * T * share_of_useful
    return parallel.total_of(stats)


def evaluate(pipe, prompts, reward, config):
    """Rewards and pictures on noise that training never draws: the same before and after."""
    prompts = training.spread_evenly(prompts, config.eval_samples)
    trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "evaluate", 0))
    r = rewards.score(reward, trajectory.images, prompts, config.out)
    return {"prompts": prompts, "images": trajectory.images, "reward": r}


def train(config):
    """sample → score → advantage → K × (accumulate, step) → log.  Returns the run, its summary."""
    check(config)
    all_prompts = get_prompts(config.prompts)
    film_prompts = training.spread_evenly(all_prompts, config.film_pictures)
    reward = rewards.get_reward(config.reward, config, config.device)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    scale = step_weights(pipe.scheduler, config).to(pipe.device)
    params = models.trainable(pipe, config)
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    K = updates(config)
    baseline = {}  # the running baseline's rewards, by prompt
    print_clip(config, math.prod(models.latent_shape(pipe)))
    before = evaluate(pipe, all_prompts, reward, config)
    run = runs.Run(config, f"ddpo_{config.estimator}")

    for n in run.rounds(pipe, optimizer, baseline):
        if run.is_film_due(n):
            run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "train", n))
        r = rewards.score(reward, trajectory.images, prompts, run.folder)
        A = advantages(r, prompts, baseline, config).to(pipe.device)[:, None]
        A = A * scale  # (B,T); no step weight is negative, so min keeps its sides

        for pictures in training.minibatches(len(prompts), K, config.seed, n):
            stats = accumulate(pipe, trajectory, A, pictures, config, n)
            stats |= training.optimizer_step(optimizer, params, config)
        run.log(n, reward=r, **stats)

    run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
    after = evaluate(pipe, all_prompts, reward, config)
    names = {"reward": config.reward}
    return run, run.finish(pipe, before, after, names)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    if config.plan:
        return plan.report(config)
    run, summary = train(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
