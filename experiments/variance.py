"""What does V take off the gradient's variance?

    E[ ∇log p_θ(a_t|s_t)·(r − b(s_t)) ] = E[ ∇log p_θ(a_t|s_t)·r ]     for every baseline b(s_t)

So a baseline changes the gradient's noise only. The variance of a round's gradient g is estimated
from G groups of its pictures, summed over all weights: g_i is the gradient of group i, Var the
variance of their mean. The baselines tie the groups together a little, so it is an estimate.

    Var = (Σ_i ‖g_i‖² − ‖Σ_i g_i‖²/G) / (G − 1) / G

RUN `python experiments/variance.py`: chapter 4's training on five prompts, with one round more, at
whose start it measures the variance with r alone, with r − mean of the prompt's other pictures, and
with r − V(x_t, z, t) less the others' mean, which is chapter 4's. Four minutes on two CPU cores.
EXPECT the others' mean to take off most of it; that V takes off more, three seeds could not show.
TRY `--rounds 5`, or one prompt: `--prompts bias --prompts-per-round 1 --samples-per-prompt 64`.
WRITES variance.csv in --out, and there a run folder like chapter 4's.
"""
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, runs, training  # noqa: E402

mdp = import_module("01_mdp")  # policy_at, log_prob
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # ddpo_sf_objective, mean_of_others, step_pairs, step_weights
dpok = import_module("04_dpok")  # Config, Value, value_advantage, train


@dataclass(frozen=True)
class Config(dpok.Config):
    prompts: str = "tasks"  # a shape family, animals, tasks, ..., a file, or one prompt
    groups: int = 16  # G, the groups of pictures that the variance is estimated from
    prompts_per_round: int = 5  # prompts per round, in turn from shuffled passes
    samples_per_prompt: int = 16  # pictures of each; the others' mean is the baseline
    out: str = "runs/variance"  # folder of variance.csv and of the run


SD = dpok.SD


def gradient(pipe, params, trajectory, advantage, pictures, config, n):
    """g = ∇E[ Σ_t α·log p_θ(x_{t−1}|x_t, z)·A ] of these pictures, at θ = θ_old.  -> (weights,)"""
    root = ddpo.ratio_root(pipe, config)
    i, k = ddpo.step_pairs(pictures, config, n)
    scale = config.alpha * config.num_steps / len(i)
    for i, k in training.batches(i, k, config.train_batch_size):
        mean, std = mdp.policy_at(pipe, trajectory, i, k, config)
        action = trajectory.latents[i, k + 1]
        log_prob = mdp.log_prob(action, mean, std) / root
        J = ddpo.ddpo_sf_objective(log_prob, advantage[i, k])
        J = J.sum() * scale
        J.backward()
    training.total_gradients(params)
    g = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return g


def gradient_variance(pipe, params, trajectory, advantage, config, n):
    """Var = (Σ_i ‖g_i‖² − ‖Σ_i g_i‖²/G) / (G − 1) / G, of the reward's term alone.  -> float

    advantage: (B,T). Only sums are kept, because a gradient may be large.
    """
    B, G = len(advantage), config.groups
    total, squares = 0.0, 0.0
    for first in range(G):
        pictures = torch.arange(first, B, G)  # every G-th: each group has a share of every prompt
        g = gradient(pipe, params, trajectory, advantage, pictures, config, n)
        total = total + g
        squares = squares + g.square().sum()
    return ((squares - total.square().sum() / G) / (G - 1) / G).item()


ADVANTAGES = ("r", "r − mean of others", "r − V, less others' mean")


class Probe(dpok.Value):
    """V; at the start of the last round it measures what each advantage does to the gradient."""

    def __init__(self, probes, reward, pipe, config):
        super().__init__(pipe, config)
        probes.append(self)
        self.reward, self.pipe = reward, pipe
        self.register_buffer("n", torch.tensor(0))  # the round; what is a buffer survives a resume
        self.register_buffer("variances", torch.zeros(len(ADVANTAGES), dtype=torch.float64))

    def fit(self, trajectory, r, n):
        super().fit(trajectory, r, n)
        self.n += 1

    def predict(self, trajectory):
        V, n = super().predict(trajectory), self.n.item()
        if n == self.config.rounds - 1:
            prompts = trajectory.prompts
            r = rewards.score(self.reward, trajectory.images, prompts)
            r_steps = r[:, None].to(V).expand_as(V)
            advantages = (
                r_steps,
                r_steps - ddpo.mean_of_others(r_steps, prompts),
                dpok.value_advantage(r, V, prompts))
            weight = ddpo.step_weights(self.pipe, self.config)
            params = [p for p in self.pipe.unet.parameters() if p.requires_grad]
            for k, A in enumerate(advantages):
                self.variances[k] = gradient_variance(
                    self.pipe, params, trajectory, A * weight, self.config, n)
        return V


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    pictures = config.prompts_per_round * config.samples_per_prompt
    if config.groups > pictures:
        raise ValueError(f"--groups: at most {pictures}, the pictures of a round")
    reward = rewards.get_reward(config.reward, config)
    if not config.resume:
        config = replace(config, rounds=config.rounds + 1)
    probes = []
    dpok.train(config, partial(Probe, probes, reward))
    variances = dict(zip(ADVANTAGES, probes[0].variances.tolist()))
    print(f"\nVariance of the gradient after {config.rounds - 1} rounds, by advantage; relative to "
          "r − mean of others")
    rows = []
    for name, variance in variances.items():
        relative = variance / variances["r − mean of others"]
        rows.append({"advantage": name, "variance": f"{variance:.3g}",
                     "relative": f"{relative:.2f}"})
        print("{advantage:26}{variance:>12}{relative:>9}".format(**rows[-1]))
    runs.write_rows(Path(config.out, "variance.csv"), rows)
    return variances


if __name__ == "__main__":
    flags.run(main)
