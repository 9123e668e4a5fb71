"""What if we only imitate good pictures? RWR (DDPO), and DPOK's Figure 1a.

Draw pictures, score them, and train on them as in pretraining, the good ones weighted more:

    J   = −E_{x_0 ~ q}[ w·‖ε_θ(x_t, t, z) − ε‖²/D + β·‖ε_θ(x_t, t, z) − ε_pre(x_t, t, z)‖²/D ]
    w_i = exp(r_i/τ)/Z, of mean 1 for each prompt                          (RWR, --weights rwr)
    w_i = 1[r_i among the prompt's best share]/share         (sparse RWR, --weights sparse)

`--data fixed` is DPOK's Figure 1a: q = p_pre. A round adds as many pictures of the pretrained model
as one of RL draws, and forgets none; what the tuned model draws meanwhile is only looked at.
`--data fresh` is RWR as DDPO has it: q = p_θ as the round begins, and earlier rounds are forgotten.
A pass is K updates, together on as many noisy pictures as RL has pairs of picture and step in a
round; RL makes one pass a round. Without --beta, those whose weight is 0 are left out: they have no
gradient.

RUN `python experiments/sft.py`: three minutes on two CPU cores. EXPECT less gold than chapter 4's
run, for more nats. TRY `--data fresh`, `--weights sparse`, or `--beta 1`. WRITES a run folder like
chapter 4's.
DEPARTURES. DDPO's β is our 1/τ; its sparse weights are 1[r ≥ C], here each prompt's best share.
DPOK weights by r itself. The loss is of ε also where v or x_0 is predicted.
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

mdp = import_module("01_mdp")  # rollout, forward_process, predict_noise, x0_and_noise, ...
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # step_means, path_kl, evaluate


@dataclass(frozen=True)
class Config(rewards.RewardFlags, runs.TrainFlags):
    reward: str = "image_reward"  # a name of chapter 2, a sum such as a=1,b=0.2, or file.py:name
    gold: str = "alignment"  # what is really meant: measured, never optimized
    prompts: str = "bias"  # a shape family, animals, tasks, ..., a file, or one prompt
    weights: Literal["rwr", "sparse"] = "rwr"  # exp(r/τ)/Z, or the best share alone
    data: Literal["fresh", "fixed"] = "fixed"  # the present model's pictures, or the pretrained's
    temperature: float = 0.3  # τ of rwr, in units of the reward
    keep: float = 0.2  # the share of each prompt's pictures that sparse keeps
    beta: float = 0.0  # pull toward the pretrained model's predictions
    rounds: int = 20  # rounds of draw, score, update
    prompts_per_round: int = 1  # prompts per round, in turn from shuffled passes
    samples_per_prompt: int = 64  # pictures of each of them
    updates_per_round: int = 2  # optimizer steps per round (K) and pass
    passes: int = 1  # passes of K updates a round; RL makes one
    learning_rate: float = 1e-3  # of AdamW
    max_grad_norm: float = 100.0  # a longer gradient is scaled down to this norm
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # adapters' layers


SD = flags.published("experiments.sft")


def rwr_weights(reward, prompts, temperature):
    """w_i = exp(r_i/τ)/Z, Z so that each prompt's weights have mean 1   (RWR).  (B,) -> (B,)"""
    weights = torch.empty(len(reward), dtype=torch.float64)
    for prompt in set(prompts):  # each by itself: no prompt is to be worth more than another
        rows = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
        weights[rows] = (reward[rows].double() / temperature).softmax(0) * len(rows)
    return weights


def sparse_weights(reward, prompts, keep):
    """w_i = 1[r_i among the prompt's best share]/share: mean 1   (sparse RWR).  (B,) -> (B,)"""
    weights = torch.zeros(len(reward), dtype=torch.float64)
    for prompt in set(prompts):
        rows = torch.tensor([i for i, other in enumerate(prompts) if other == prompt])
        n = max(1, round(keep * len(rows)))
        best = reward[rows].argsort(descending=True, stable=True)[:n]
        weights[rows[best]] = len(rows) / n
    return weights


def sft_objective(eps_pred, eps, weight, eps_pre, beta):
    """J = −E[ w·‖ε_θ − ε‖²/D + β·‖ε_θ − ε_pre‖²/D ].   (N,C,H,W), same, (N,), same, β -> ()"""
    imitation = mdp.denoising_loss(eps_pred, eps, weight)
    drift = mdp.denoising_loss(eps_pred, eps_pre)
    return -(imitation + beta * drift)


def predict_eps(pipe, x_t, t, prompt_embeds):
    """ε_θ(x_t, t, z), also where v or x_0 is predicted.  (N,C,H,W), (N,), (N,L,E) -> like x_t"""
    noise_pred = mdp.predict_noise(pipe.unet, x_t, t, prompt_embeds)
    alphas = pipe.scheduler.alphas_cumprod.to(t.device)
    alpha_t = mdp.column(alphas[t], x_t)
    _, eps = mdp.x0_and_noise(pipe.scheduler, noise_pred, alpha_t, x_t)
    return eps


def add(pictures, trajectory, r):
    """Appends the chains' x_0, prompts and rewards to what updates learn from."""
    x_0 = trajectory.latents[:, -1].clone()  # a view would keep the whole trajectory
    training.total(x_0)  # every process may learn from every picture
    pictures["x_0"] += x_0.cpu()
    pictures["prompts"] += trajectory.prompts
    pictures["r"] += r.tolist()


def objective(pipe, reference, pictures, weight, i, t, eps, config):
    """J of the pictures i at the times t with the noise ε.  (P,), (N,), (N,), (N,C,H,W) -> ()"""
    x_0 = torch.stack([pictures["x_0"][j] for j in i])
    prompts = [pictures["prompts"][j] for j in i]
    x_0, t, eps = (values.to(pipe.device) for values in (x_0, t, eps))
    x_t = mdp.forward_process(pipe.scheduler, x_0, t, eps)
    c = models.encode_prompts(pipe, prompts)
    eps_pred = predict_eps(pipe, x_t, t, c)
    eps_pre = eps_pred.detach()
    if config.beta:
        with torch.no_grad(), reference():
            eps_pre = predict_eps(pipe, x_t, t, c)
    return sft_objective(eps_pred, eps, weight[i].to(x_0), eps_pre, config.beta)


def train(config):
    """draw → score → weight → passes·K × (objective → step).  -> the run, its summary"""
    all_prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config)
    gold = rewards.get_reward(config.gold, config, flag="--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    optimizer = models.adamw(params, config)
    reference = models.make_reference(pipe)
    shape = models.latent_shape(pipe)
    num_timesteps = pipe.scheduler.config.num_train_timesteps
    pictures = {"x_0": [], "prompts": [], "r": []}  # what updates learn from
    look = partial(dpok.evaluate, pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, f"sft_{config.data}_{config.weights}", look)

    for n in run.rounds(pipe, optimizer, pictures):
        training.set_rate(optimizer, config, n)
        prompts = training.prompts_of_round(all_prompts, config, n)
        trajectory = mdp.rollout(pipe, prompts, config, "train", n)
        r = rewards.score(reward, trajectory.images, prompts)
        g = rewards.score(gold, trajectory.images, prompts)
        with reference():
            reference_means = dpok.step_means(pipe, trajectory, config)
        kl = dpok.path_kl(pipe, trajectory, reference_means, config).sum(1)

        if config.data == "fresh":
            pictures |= {"x_0": [], "prompts": [], "r": []}
            add(pictures, trajectory, r)
        else:
            with reference():
                drawn = mdp.rollout(pipe, prompts, config, "fixed set", n)
            r_drawn = rewards.score(reward, drawn.images, prompts)
            add(pictures, drawn, r_drawn)
        r_known = torch.tensor(pictures["r"], dtype=torch.float64)
        if config.weights == "rwr":
            weight = rwr_weights(r_known, pictures["prompts"], config.temperature)
        else:
            weight = sparse_weights(r_known, pictures["prompts"], config.keep)

        M = max(1, len(prompts) * config.num_steps // config.updates_per_round)
        for update in range(config.passes * config.updates_per_round):
            stream = training.random_stream(config.seed, "sft batches", n, update)
            rows = torch.from_numpy(stream.integers(len(weight), size=M))
            t = torch.from_numpy(stream.integers(num_timesteps, size=M))
            eps = training.gaussian((M, *shape), config.seed, "sft noise", n, update)
            j = torch.arange(M)
            if config.beta == 0:
                j = j[weight[rows] > 0]  # the others have no gradient, and cost nothing
            for j, i in training.batches(j, rows[j], config.train_batch_size):
                J = objective(pipe, reference, pictures, weight, i, t[j], eps[j], config)
                loss = -J * len(j) / M
                loss.backward()
            training.total_gradients(params)
            grad_norm = clip_grad_norm_(params, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        run.log(n, reward=r, grad_norm=grad_norm, gold=g, kl=kl)

    return run, run.finish(pipe)


def main(argv=None):
    config = runs.parse(Config, __doc__, argv, SD)
    run, summary = train(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
