"""What does V take off the gradient's variance?

    E[ ∇log p_θ(a_t|s_t)·(r − b(s_t)) ] = E[ ∇log p_θ(a_t|s_t)·r ]     for every baseline b(s_t)

So a baseline changes the gradient's noise only. The variance of a round's gradient g is estimated
from G groups of its pictures, summed over all weights; each g_i is one group's, Var that of their
mean. The baselines tie the groups together a little, so it is an estimate.

    Var = (Σ_i ‖g_i‖² − ‖Σ_i g_i‖²/G) / (G − 1) / G

RUN `python experiments/variance.py`: trains like chapter 4 on five prompts, draws one more round,
and prints the variance with r alone, with r − mean of the prompt's other pictures, and with
r − V(x_t, z, t) less the others' mean, which is chapter 4's. Three minutes on two CPU cores.
EXPECT the others' mean to take off most of it, and V a smaller part of what is left, once it has
seen enough rounds. TRY `--rounds 5`, or one prompt: `--prompts bias --prompts-per-round 1
--samples-per-prompt 64`.
WRITES variance.csv in --out.
"""
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, tables, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
ddpo = import_module("03_ddpo")  # step_weights, mean_of_others
dpok = import_module("04_dpok")  # Value, step_means, accumulate, SD


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    reward: str = "image_reward"  # one of chapter 2's, a sum as in chapter 3, or file.py:name
    prompts: str = "tasks"  # a shape family, animals, activities, tasks, a file, or one prompt
    groups: int = 16  # G, the groups of pictures that the variance is estimated from
    rounds: int = 20  # rounds of training before that
    prompts_per_round: int = 5  # prompts per round, drawn in turn from shuffled passes
    samples_per_prompt: int = 16  # pictures of each of them; the others' mean is the baseline
    updates_per_round: int = 2  # optimizer steps per round (K), each on its share of the pictures
    num_steps: int = 10  # denoising steps T
    timestep_fraction: float = 1.0  # share of each picture's steps to train on, drawn at random
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 100.0  # a longer gradient is scaled down to this norm
    clip_range: float = 0.2  # ε of PPO's clip
    ratio: Literal["exact", "per_dim"] = "exact"  # exp(Δ log p), or the published exp(Δ log p / D)
    step_weight: Literal["none", "sigma"] = "sigma"  # none: the paper; sigma: each equally loud
    alpha: float = 1.0  # α, the reward's weight
    beta: float = 0.01  # β, the KL's weight
    value_rounds: int = 4  # V is fitted on this many latest rounds
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy of the UNet
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # layers with adapters
    seed: int = 0  # seed of everything
    checkpointing: bool = False  # keep few activations and compute them again: a third slower
    out: str = "runs/variance"  # folder of variance.csv
    train_batch_size: int = 64  # (picture, step) pairs per UNet call in training; memory only
    sd: bool = False  # chapter 4's settings for the full model become the defaults


SD = {name: value for name, value in dpok.SD.items() if name != "gold"}


def gradient_variance(pipe, params, trajectory, reference_means, advantage, config, n):
    """Var = (Σ_i ‖g_i‖² − ‖Σ_i g_i‖²/G) / (G − 1) / G, of the reward's term alone.  -> float

    advantage: (B,T). Only sums are kept, because a gradient may be large.
    """
    B, G = len(advantage), config.groups
    reward_only = replace(config, beta=0.0)
    total, squares = 0.0, 0.0
    for first in range(G):
        pictures = torch.arange(first, B, G)  # every G-th: each group has a share of every prompt
        dpok.accumulate(pipe, trajectory, reference_means, advantage, pictures, reward_only, n)
        g = torch.cat([p.grad.flatten() for p in params])
        total = total + g
        squares = squares + g.square().sum()
        for p in params:
            p.grad = None
    return ((squares - total.square().sum() / G) / (G - 1) / G).item()


def check(config):
    """ValueError for flags that contradict each other, before any work is done."""
    samples = config.prompts_per_round * config.samples_per_prompt
    if config.groups > samples:
        raise ValueError(f"--groups: at most {samples}, the pictures of a round")
    if config.updates_per_round > samples:
        raise ValueError(f"--updates-per-round: at most {samples}, the pictures of a round")


def train(config):
    """Chapter 4's rounds, then one more that is only looked at.  -> advantage -> variance"""
    check(config)
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config, config.device)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    weight = ddpo.step_weights(pipe.scheduler, config).to(pipe.device)
    params = models.trainable(pipe, config)
    reference = models.make_reference(pipe)
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    value = dpok.Value(pipe, config)

    for n in tqdm(range(config.rounds + 1), "training", unit="round"):
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, noise=(config.seed, "train", n))
        with reference():
            reference_means = dpok.step_means(pipe, trajectory, config)
        r = rewards.score(reward, trajectory.images, prompts)
        r_steps = r.float().to(pipe.device)[:, None].expand_as(trajectory.log_probs)
        A = r_steps - value.predict(trajectory)
        A = A - ddpo.mean_of_others(A, prompts)
        if n == config.rounds:
            break
        for pictures in training.minibatches(len(prompts), config.updates_per_round, config.seed,
                                             n):
            dpok.accumulate(pipe, trajectory, reference_means, A * weight, pictures, config, n)
            training.optimizer_step(optimizer, params, config)
        value.fit(trajectory, r, n)

    advantages = {
        "r": r_steps,
        "r − mean of others": r_steps - ddpo.mean_of_others(r_steps, prompts),
        "r − V, less others' mean": A,
    }
    variances = {}
    for name, advantage in advantages.items():
        variances[name] = gradient_variance(pipe, params, trajectory, reference_means,
                                            advantage * weight, config, n)
    return variances


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    variances = train(config)
    baseline = variances["r − mean of others"]
    print(f"\nVariance of the gradient after {config.rounds} rounds, by advantage; and relative to "
          "r − mean of others")
    rows = [{"advantage": name, "variance": variance, "relative": variance / baseline}
            for name, variance in variances.items()]
    for row in rows:
        print("{advantage:26}{variance:12.4g}{relative:9.2f}".format(**row))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    tables.write_csv(Path(config.out, "variance.csv"), rows)
    return variances


if __name__ == "__main__":
    flags.run(main)
