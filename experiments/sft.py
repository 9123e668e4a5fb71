"""What if we only imitate good pictures? RWR (DDPO), and DPOK's Figure 1a.

Draw pictures, score them, and train on them as in pretraining, the good ones weighted more:

    J   = −E_{x_0 ~ q}[ w·‖ε_θ(x_t, t, z) − ε‖²/D + β·‖ε_θ(x_t, t, z) − ε_pre(x_t, t, z)‖²/D ]
    w_i = exp(r_i/τ)/Z, of mean 1 for each prompt                          (RWR, --weights rwr)
    w_i = 1[r_i among the prompt's best share]/share         (sparse RWR, --weights sparse)

`--data fixed` is DPOK's Figure 1a: q = p_pre. A round adds as many pictures of the pretrained model
as one of RL draws, and forgets none; what the tuned model draws meanwhile is only looked at.
`--data fresh` is RWR as DDPO has it: q = p_θ as the round begins. Its updates learn from what this
model draws and from nothing earlier; the noise is that of chapter 3's and 4's rounds.
Either way an update learns from as many noisy pictures as RL's has pairs of picture and step.

RUN `python experiments/sft.py`: three minutes on two CPU cores. EXPECT less gold than chapter 4's
run, for more nats. TRY `--data fresh`, `--weights sparse`, or `--beta 1`. WRITES a run folder like
chapter 4's.
DEPARTURES. DDPO's β is our 1/τ, and nothing pulls its RWR towards ε_pre. Its sparse weights are
1[r ≥ C], here each prompt's best share. DPOK weights by r itself. The loss is of ε also where v or
x_0 is predicted.
"""
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import flags, models, parallel, plan, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout, forward_process, predict_noise, x0_and_noise, ...
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # step_means, path_kl, evaluate, SD


@dataclass(frozen=True)
class Config(rewards.RewardFlags, flags.TrainFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    reward: str = "image_reward"  # one of chapter 2's, a sum as in chapter 3, or file.py:name
    gold: str = "alignment"  # what is really meant: measured, never optimized
    prompts: str = "bias"  # a shape family, animals, activities, tasks, a file, or one prompt
    weights: Literal["rwr", "sparse"] = "rwr"  # exp(r/τ)/Z, or the best share alone
    data: Literal["fresh", "fixed"] = "fixed"  # the present model's pictures, or the pretrained's
    temperature: float = 0.3  # τ of rwr, in units of the reward
    keep: float = 0.2  # the share of each prompt's pictures that sparse keeps
    beta: float = 0.0  # pull towards the pretrained model's predictions
    rounds: int = 20  # rounds of draw, score, update
    prompts_per_round: int = 1  # prompts per round, drawn in turn from shuffled passes
    samples_per_prompt: int = 64  # pictures of each of them
    updates_per_round: int = 2  # optimizer steps per round (K)
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-3  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 100.0  # a longer gradient is scaled down to this norm
    lora_rank: int = 16  # rank of LoRA; 0 trains all weights, beside a frozen copy of the UNet
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # layers with adapters
    seed: int = 0  # seed of everything
    sd: bool = False  # chapter 4's settings for the full model become the defaults


RL_ONLY = ("max_grad_norm", "clip_range", "ratio", "step_weight", "alpha", "beta")
SD = {name: value for name, value in dpok.SD.items() if name not in RL_ONLY}


def rwr_weights(reward, prompts, temperature):
    """w_i = exp(r_i/τ)/Z, Z so that each prompt's weights have mean 1   (RWR).  (B,) -> (B,)"""
    weights = torch.empty(len(reward), dtype=torch.float64)
    for prompt in set(prompts):  # each by itself: no prompt is to be worth more than another
        rows = torch.tensor([i for i in range(len(prompts)) if prompts[i] == prompt])
        weights[rows] = (reward[rows].double() / temperature).softmax(0) * len(rows)
    return weights


def sparse_weights(reward, prompts, keep):
    """w_i = 1[r_i among the prompt's best share]/share: mean 1   (sparse RWR).  (B,) -> (B,)"""
    weights = torch.zeros(len(reward), dtype=torch.float64)
    for prompt in set(prompts):
        rows = torch.tensor([i for i in range(len(prompts)) if prompts[i] == prompt])
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
    """ε_θ(x_t, t, z), also of a model that predicts v or x_0.  (N,C,H,W), (N,), (N,L,D)"""
    noise_pred = mdp.predict_noise(pipe.unet, x_t, t, prompt_embeds)
    alpha_t = pipe.scheduler.alphas_cumprod.to(x_t)[t].view(-1, 1, 1, 1)
    return mdp.x0_and_noise(pipe.scheduler, noise_pred, alpha_t, x_t)[1]


def draw_pictures(pipe, reference, own, config, n):
    """The trajectory that round n learns from, by --data; own: what the present model drew."""
    if config.data == "fresh":
        return own
    with reference():
        return mdp.rollout(pipe, own.prompts, config, noise=(config.seed, "fixed set", n))


@dataclass
class PictureSet:
    """Finished pictures x_0 (C,H,W) with their prompts and rewards: what updates learn from."""
    x_0: list = field(default_factory=list)
    prompts: list = field(default_factory=list)
    rewards: torch.Tensor = torch.empty(0, dtype=torch.float64)

    def add(self, trajectory, r):
        self.x_0 += trajectory.latents[:, -1].clone()  # a view would keep the whole trajectory
        self.prompts += trajectory.prompts
        self.rewards = torch.cat([self.rewards, r])

    def weights(self, config):
        if config.weights == "rwr":
            return rwr_weights(self.rewards, self.prompts, config.temperature)
        return sparse_weights(self.rewards, self.prompts, config.keep)


def accumulate(pipe, reference, pictures, config, n, update):
    """Adds −∇J of one update of round n to the gradients; M rows, drawn with replacement."""
    pairs = config.prompts_per_round * config.samples_per_prompt * config.num_steps
    M = max(1, pairs // config.updates_per_round)
    stream = training.random_stream(config.seed, "sft batches", n, update)
    all_rows = torch.from_numpy(stream.integers(len(pictures.x_0), size=M))
    all_t = torch.from_numpy(stream.integers(pipe.scheduler.config.num_train_timesteps, size=M))
    all_eps = training.gaussian((M, *pictures.x_0[0].shape), config.seed, "sft noise", n, update)
    weight = pictures.weights(config)
    for batch in parallel.share(M, config.train_batch_size):
        rows = all_rows[batch]
        x_0 = torch.stack([pictures.x_0[i] for i in rows]).to(pipe.device)
        c = models.encode_prompts(pipe, [pictures.prompts[i] for i in rows])
        t, eps = all_t[batch].to(x_0.device), all_eps[batch].to(x_0)
        x_t = mdp.forward_process(pipe.scheduler, x_0, t, eps)
        eps_pred = predict_eps(pipe, x_t, t, c)
        eps_pre = eps_pred.detach()
        if config.beta:
            with torch.no_grad(), reference():
                eps_pre = predict_eps(pipe, x_t, t, c)
        J = sft_objective(eps_pred, eps, weight[rows].to(x_0), eps_pre, config.beta)
        loss = -J * len(rows) / M
        loss.backward()


def train(config):
    """draw → score → weight → K × (accumulate, step) → log.  Returns the run and its summary."""
    runs.check_folder(config)
    all_prompts = get_prompts(config.prompts)
    film_prompts = training.spread_evenly(all_prompts, config.film_pictures)
    reward = rewards.get_reward(config.reward, config, config.device)
    gold = rewards.get_reward(config.gold, config, config.device, "--gold")
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    params = models.trainable(pipe, config)
    reference = models.make_reference(pipe)
    optimizer = torch.optim.AdamW(params, config.learning_rate, weight_decay=config.weight_decay)
    pictures = PictureSet()
    before = dpok.evaluate(pipe, all_prompts, reward, gold, reference, config)
    run = runs.Run(config, f"sft_{config.data}_{config.weights}")

    for n in run.rounds(pipe, optimizer, pictures):
        if run.is_film_due(n):
            run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
        prompts = training.prompts_of_round(all_prompts, config, n)
        with run.looking() if config.data == "fixed" else nullcontext():
            own = mdp.rollout(pipe, prompts, config, noise=(config.seed, "train", n))
            r = rewards.score(reward, own.images, prompts, run.folder)
        with run.looking(), reference():
            reference_means = dpok.step_means(pipe, own, config)
            g = rewards.score(gold, own.images, prompts, run.folder)

        drawn = draw_pictures(pipe, reference, own, config, n)
        if config.data == "fresh":
            pictures = PictureSet()  # earlier rounds are forgotten
            r_drawn = r
        else:
            r_drawn = rewards.score(reward, drawn.images, prompts, run.folder)
        pictures.add(drawn, r_drawn)
        for update in range(config.updates_per_round):
            accumulate(pipe, reference, pictures, config, n, update)
            stats = training.optimizer_step(optimizer, params, config)
        stats |= {"gold": g, "kl": dpok.path_kl(pipe, own, reference_means, config).sum(1)}
        run.log(n, reward=r, **stats)

    run.add_to_film(mdp.rollout(pipe, film_prompts, config, (config.seed, "film", 0)))
    after = dpok.evaluate(pipe, all_prompts, reward, gold, reference, config)
    names = {"reward": config.reward, "gold": f"gold: {config.gold}", "kl": "path KL, nats"}
    return run, run.finish(pipe, before, after, names)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD)
    if config.plan:
        chains = 2 if config.data == "fixed" else 1  # a second one, of the pretrained model
        return plan.report(config, reference=True, guided=False, chains=chains)
    run, summary = train(config)
    runs.report(run, summary)
    return run


if __name__ == "__main__":
    flags.run(main)
