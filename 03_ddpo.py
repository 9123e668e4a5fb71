"""03 · DDPO: policy gradients for diffusion models (Black et al., ICLR 2024, arXiv 2305.13301).

WHAT YOU LEARN. Chapter 1 made the sampler a policy with exact log-probabilities, chapter 2 made
rewards. Here they meet: draw pictures, score them, and make the denoising steps that led to the
good ones more likely. Two estimators of one gradient:

    J(θ)  = E_{c, x_0 ~ p_θ}[ r(x_0, c) ]                                    what we want to raise
    ∇J    = E[ Σ_t ∇log p_θ(x_{t−1}|x_t, c) · A ]                                       (DDPO_SF)
    ∇J    ≈ E[ Σ_t w_t · ∇log p_θ(x_{t−1}|x_t, c) · A ],   w_t = p_θ/p_old              (DDPO_IS)

SF, the score function estimator (REINFORCE), is right for one update per round of samples. IS,
importance sampling, reuses a round for several updates, kept near p_old by PPO's clipping:

    J_IS  = E[ Σ_t min(w_t·A, clip(w_t, 1−ε, 1+ε)·A) ]

(≈, because w_t corrects the step but not how often the state x_t is met.) A, the advantage, is the
reward minus what the same prompt's other pictures got, over the spread of the round's rewards: a
positive factor before ∇J.

A STEP THAT SHOUTS. For a model that predicts ε, ∇log p = (c_t/σ_t)·z·∇ε with z the step's own noise
and c_t = ∂μ/∂ε. The weight |c_t|/σ_t is about 1 at every step but the second-to-last, where it is
8.3 (T = 10): one late step, which can no longer move a shape, supplies most of the gradient's norm
(128, against 57 at the last step and 7 to 16 at the others, for 128 pictures of the tiny model).
`--step-weight sigma` multiplies each step's term by σ_t/|c_t| (mean 1). That departs from the
paper: the sum is no longer ∇J, only its terms with other positive weights; `--step-weight none` is
the paper. Measured gains of sigma and none: 0.27 and 0.20 (20 rounds, seed 0), 0.31 and 0.24 (30
rounds, seed 1), each ± 0.04.

HOW TO RUN. `python 03_ddpo.py` teaches the tiny model to put shapes where the prompt says ("a blue
star on the left"): 30 rounds, 3840 reward queries, 109 to 139 s on two CPU cores, 0.8 GB.
Expect alignment on fresh seeds to rise from 0.70 ± 0.04 to about 0.98 ± 0.01. Then try
`--prompts bias` ("four stars", at first a yellow circle), `--prompts count` (harder), or
`--reward compressibility`. Pictures, curve and the tuned model are in runs/.

DEPARTURES. Log-probs are summed over the latent and the ratio is exact; `--ratio per_dim` is the
published code's, which averages, so that its clip of 1e-4 is one of 0.194 to 5.147 on the true
ratio of Stable Diffusion's 16384 numbers (`equivalent_clip`). Baseline and scale leave the sample
itself out, and the scale is the round's; `--baseline running` is the paper's, of the prompt's last
rewards, the sample's included. Where --advantage-clip bites it is a bias in both. `--step-weight
sigma` as above. The tiny model is trained whole, at a learning rate of 1e-4; the paper's 1e-5 is
for the full model.

EXERCISES. (1) Fine-tune with --reward compressibility, then score alignment: what was the price?
(2) Take torch.minimum out of ddpo_is_objective. Which test fails, and what does training do?
(3) Give SF two updates a round (delete the check) and watch kl in metrics.csv. (4) Why may the
baseline hold any picture's reward but the sample's own?
"""
import csv
import json
import math
import re
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from tqdm import tqdm

from tiny_sd import figures, shapes

mdp = import_module("01_mdp")  # load_pipeline, rollout, step_log_prob, noise_weight, ...
rewards = import_module("02_rewards")  # Models, get_reward, score

ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog
kangaroo""".split()
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


@dataclass(frozen=True)
class Config(rewards.Models):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    reward: str = "alignment"  # chapter 2's, a sum like alignment=1,aesthetic=0.2, or file.py:name
    prompts: str = "location"  # a shape family, animals, activities, or a file, a prompt a line
    estimator: Literal["sf", "is"] = "is"  # score function (REINFORCE), importance sampling (PPO)
    rounds: int = 30  # rounds of sample, score, update
    prompts_per_round: int = 8  # different prompts a round, drawn in turn from shuffled passes
    samples_per_prompt: int = 16  # pictures of each of them; their mean is the baseline
    updates_per_round: int | None = None  # optimizer steps a round (K); default: 1 for sf, 2 for is
    batch_size: int = 64  # (sample, timestep) pairs a UNet call in the update; memory, not result
    num_steps: int = 10  # denoising steps T
    timestep_fraction: float = 1.0  # share of each sample's steps to train on, drawn at random
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    learning_rate: float = 1e-4  # of AdamW
    weight_decay: float = 1e-4  # of AdamW
    max_grad_norm: float = 1.0  # the gradient is scaled down to this norm
    clip_range: float = 0.2  # ε of PPO's clip
    ratio: Literal["exact", "per_dim"] = "exact"  # exp(Δ log p), or the published exp(Δ log p / D)
    step_weight: Literal["none", "sigma"] = "sigma"  # none: the paper; sigma: each equally loud
    baseline: Literal["leave_one_out", "running"] = "leave_one_out"  # what is subtracted from r
    advantage_clip: float = 5.0  # advantages are cut to ± this
    lora_rank: int = 0  # 0 trains all weights; else the rank of LoRA on the attention projections
    eval_samples: int = 128  # pictures on fresh seeds, before and after, that the verdict rests on
    seed: int = 0  # seed of everything
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs


# ---- the estimators -------------------------------------------------------------------------


def ddpo_sf_objective(log_prob, advantage, step_weight=1.0):
    """J = E[ Σ_t log p_θ(x_{t−1}|x_t, c) · A ]   (DDPO_SF).   (B,T), (B,) -> ()

    Its value means nothing; its gradient is the estimator. step_weight: a number or (B,T).
    """
    B, T = log_prob.shape
    assert advantage.shape == (B,), (log_prob.shape, advantage.shape)
    return (step_weight * log_prob * advantage[:, None]).sum(1).mean()


def ddpo_is_objective(log_prob, old_log_prob, advantage, clip_range, step_weight=1.0):
    """J = E[ Σ_t min(w·A, clip(w, 1−ε, 1+ε)·A) ],  w = p_θ/p_old   (DDPO_IS).

    (B,T), (B,T), (B,), ε -> (). min keeps the two corrective sides: a ratio that has left the band
    the wrong way still has a gradient that pulls it back. step_weight: a number or (B,T).
    """
    B, T = log_prob.shape
    assert old_log_prob.shape == (B, T) and advantage.shape == (B,), (B, T, advantage.shape)
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * advantage[:, None], clipped * advantage[:, None])
    return (step_weight * surrogate).sum(1).mean()


def approx_kl(log_prob, old_log_prob):
    """KL(p_old ‖ p_θ) ≈ E[ Σ_t (w − 1 − log w) ], in nats a picture: unbiased, never negative."""
    log_ratio = log_prob - old_log_prob
    return (log_ratio.exp() - 1 - log_ratio).sum(1).mean()


def equivalent_clip(clip_range, power):
    """(1 − ε)^p, (1 + ε)^p: the band that a ratio in 1 ± ε leaves to the ratio's p-th power.

    p = D goes from the published per-dimension ratio to the exact one, p = 1/D the other way.
    """
    return (1 - clip_range) ** power, (1 + clip_range) ** power


def step_weights(scheduler, timesteps, eta):
    """(σ_t/c_t) / mean(σ/c), c_t = |∂μ/∂ε|: step weights `sigma`.  (T,) -> (T,); 0 where σ = 0"""
    weight = 1 / mdp.noise_weight(scheduler, timesteps, eta)
    return (weight / weight.mean()).float()


# ---- advantages -----------------------------------------------------------------------------


def leave_one_out_advantage(reward, prompts):
    """A_i = (r_i − mean_{j≠i, same prompt} r_j) / std_{j≠i} r_j.   (B,), B strings -> (B,) float64

    Baseline (over i's prompt) and scale (over the round) are made of the *other* samples, so both
    are independent of sample i: the estimator's mean stays each prompt's ∇J times a positive
    factor, alike for all prompts up to 1/B. ValueError where a prompt has only one sample.
    """
    B, names = len(prompts), sorted(set(prompts))
    assert reward.shape == (B,), (reward.shape, B)
    r = reward.double() - reward.double().mean()  # changes nothing but the rounding
    prompt = torch.tensor([names.index(p) for p in prompts], device=r.device)
    count = prompt.bincount()[prompt]
    if (count < 2).any():
        raise ValueError("--samples-per-prompt: leave_one_out needs at least 2 for every prompt")
    baseline = (torch.zeros(len(names)).to(r).index_add(0, prompt, r)[prompt] - r) / (count - 1)
    mean, square = (r.sum() - r) / (B - 1), ((r**2).sum() - r**2) / (B - 1)
    scale = (square - mean**2).clamp(min=0).sqrt()
    return (r - baseline) / torch.where(scale > 1e-6, scale, 1)


def running_advantage(reward, prompts, history, keep=64):
    """A_i = (r_i − mean) / std over the prompt's last `keep` rewards, this round's included.

    DDPO's per-prompt statistics. They hold r_i itself: its share in the mean shrinks E[A·∇log p],
    its share in the std bends it a little, and a prompt's first sample gets 0. `history`, prompt ->
    list of floats, is changed in place.
    """
    for value, prompt in zip(reward.tolist(), prompts):
        history[prompt] = [*history.get(prompt, []), value][-keep:]
    past = [torch.tensor(history[prompt], dtype=torch.float64) for prompt in prompts]
    mean = torch.stack([values.mean() for values in past]).to(reward.device)
    std = torch.stack([values.std(unbiased=False) for values in past]).to(reward.device)
    return (reward.double() - mean) / torch.where(std > 1e-6, std, 1)


# ---- prompts --------------------------------------------------------------------------------


def get_prompts(name):
    """A prompt set by name, or the lines of a text file; ValueError names what is wrong."""
    if name in shapes.FAMILIES:
        return shapes.prompts_of(name)
    animals = [("an " if animal[0] in "aeiou" else "a ") + animal for animal in ANIMALS]
    if name == "animals":
        return animals
    if name == "activities":
        return [f"{animal} {activity}" for animal in animals for activity in ACTIVITIES]
    if not Path(name).is_file():
        known = ", ".join([*shapes.FAMILIES, "animals", "activities"])
        raise ValueError(f"--prompts {name}: no such file, and no prompt set; those are {known}")
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {name}: not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {name}: the file has no prompt in it")
    return prompts


def prompt_stream(prompts, generator):
    """Endless shuffled passes over the prompts."""
    while True:
        for i in torch.randperm(len(prompts), generator=generator).tolist():
            yield prompts[i]


# ---- the loop -------------------------------------------------------------------------------


def at_least(config, **least):
    """ValueError that names the first flag whose value is too small, infinite or no number.

    The seed must leave room for mdp.FRESH in the 32 bits that torch reads.
    """
    if not 0 <= config.seed < 2**30:
        raise ValueError(f"--seed must lie in [0, 2³⁰), not {config.seed}")
    for field, low in least.items():
        value, flag = getattr(config, field), "--" + field.replace("_", "-")
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"{flag} must be at least {low}, not {value}")


def check(config):
    """ValueError that names the flag, before any work is done."""
    at_least(config, rounds=1, prompts_per_round=1, samples_per_prompt=1, updates_per_round=1,
             batch_size=1, num_steps=1, lora_rank=0, eval_samples=2, learning_rate=0,
             weight_decay=0, max_grad_norm=1e-12, clip_range=0, advantage_clip=0)
    if not 0 < config.timestep_fraction <= 1:
        raise ValueError(f"--timestep-fraction must lie in (0, 1], not {config.timestep_fraction}")
    if config.clip_range >= 1:
        raise ValueError(f"--clip-range must lie in [0, 1), not {config.clip_range}")
    if config.name and Path(config.out, config.name).exists():
        raise ValueError(f"--name {config.name}: there is such a run in {config.out}")
    if config.estimator == "sf" and config.updates_per_round not in (None, 1):
        raise ValueError("--estimator sf is valid for one update per round: --updates-per-round 1")
    if config.baseline == "leave_one_out" and config.samples_per_prompt < 2:
        raise ValueError("--samples-per-prompt must be at least 2 for --baseline leave_one_out")
    pairs = config.prompts_per_round * config.samples_per_prompt
    if updates(config) > pairs:
        raise ValueError(f"--updates-per-round: at most {pairs}, the samples of a round, not "
                         f"{updates(config)}")


def updates(config):
    """K, the optimizer steps a round."""
    return config.updates_per_round or {"sf": 1, "is": 2}[config.estimator]


def run_folder(config, method):
    """A new folder runs/<name>/ with config.json; never one that is there already."""
    base = f"{method}_{config.reward}_{Path(config.prompts).stem}"
    base = config.name or re.sub(r"[^\w=.,-]+", "_", base)  # a file's path has slashes
    folder, i = Path(config.out, base), 1
    while folder.exists():
        folder, i = Path(config.out, f"{base}-{i + 1}"), i + 1
    folder.mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps(asdict(config), indent=2))
    return folder


def trainable(pipe, lora_rank, seed, targets=("to_q", "to_k", "to_v", "to_out.0")):
    """The parameters to train: all of the UNet's, or LoRA's on its attention projections."""
    pipe.unet.requires_grad_(lora_rank == 0)
    if lora_rank:
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(targets))
        with torch.random.fork_rng():  # peft draws its first weights from the global generator
            torch.manual_seed(seed)
            try:
                pipe.unet.add_adapter(lora)
            except ValueError as error:
                raise ValueError(f"--lora-targets: {error}") from error
    return [p for p in pipe.unet.parameters() if p.requires_grad]


def draw_pairs(samples, steps, fraction, updates, generator):
    """Shuffled (sample, timestep) index pairs in `updates` minibatches: a list of (M,2) tensors."""
    kept = max(1, round(fraction * steps))
    timestep = torch.rand(samples, steps, generator=generator).argsort(1)[:, :kept].flatten()
    pairs = torch.stack([torch.arange(samples).repeat_interleave(kept), timestep], 1)
    return pairs[torch.randperm(len(pairs), generator=generator)].tensor_split(updates)


def update(pipe, optimizer, params, run, advantage, minibatch, weight, config):
    """One optimizer step on a minibatch of (sample, timestep) pairs; returns what happened.

    clip_fraction and kl compare the policy *before* this step with the one that drew the samples.
    """
    T, D = run.log_probs.shape[1], run.latents[0, 0].numel() if config.ratio == "per_dim" else 1
    sums = dict(clip_fraction=0.0, kl=0.0)
    for pairs in minibatch.split(config.batch_size):
        i, k = pairs.to(run.latents.device).T
        log_prob = mdp.step_log_prob(
            pipe, run.latents[i, k], run.latents[i, k + 1], run.timesteps.to(k.device)[k],
            run.prompt_embeds[i], run.negative_embeds, config.guidance_scale, config.eta)
        old_log_prob = run.log_probs[i, k]
        new, old = log_prob[:, None] / D, old_log_prob[:, None] / D  # T = 1: pairs stand alone
        if config.estimator == "sf":
            J = ddpo_sf_objective(new, advantage[i], weight[k][:, None])
        else:
            J = ddpo_is_objective(new, old, advantage[i], config.clip_range, weight[k][:, None])
        # Σ_t over a picture's steps is T times the mean over pairs.
        share = len(pairs) / len(minibatch)
        loss = -J * T * share
        loss.backward()
        with torch.no_grad():
            outside = ((new - old).exp() - 1).abs() > config.clip_range
            sums["clip_fraction"] += outside.float().mean().item() * share
            kl = approx_kl(log_prob[:, None], old_log_prob[:, None])
            sums["kl"] += kl.item() * T * share
    norm = torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
    if not norm.isfinite():
        raise ValueError(f"the gradient is {norm.item()}; try a smaller --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return {**sums, "grad_norm": norm.item()}


def evaluate(pipe, prompts, reward, config):
    """Rewards and pictures on seeds that training never uses: the same before and after."""
    n, P = config.eval_samples, len(prompts)
    chosen = [prompts[i * P // n if P > n else i % P] for i in range(n)]
    run = mdp.rollout(pipe, chosen, config.num_steps, config.eta, config.guidance_scale,
                      seed=mdp.FRESH + config.seed, batch_size=config.batch_size)
    return rewards.score(reward, run.images, chosen, config.out), run.images, chosen


def train(config):
    """DDPO: sample a round, score it, advantages, K updates.  Returns {"folder", "rows", ...}."""
    check(config)
    prompts = get_prompts(config.prompts)
    reward = rewards.get_reward(config.reward, config, config.device)
    pipe = mdp.load_pipeline(config.model, config.device)
    generator = torch.Generator().manual_seed(config.seed)  # all randomness of training
    before, pictures_before, shown = evaluate(pipe, prompts, reward, config)
    folder = run_folder(config, f"ddpo_{config.estimator}")
    params = trainable(pipe, config.lora_rank, config.seed)
    optimizer = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
    stream, history, rows, queries = prompt_stream(prompts, generator), {}, [], 0
    pipe.scheduler.set_timesteps(config.num_steps)
    timesteps = pipe.scheduler.timesteps
    weight = (step_weights(pipe.scheduler, timesteps, config.eta) if config.step_weight == "sigma"
              else torch.ones(len(timesteps))).to(pipe.device)

    D = math.prod(mdp.latent_shape(pipe))
    if config.estimator == "is":
        power, other = (1 / D, "per_dim") if config.ratio == "exact" else (D, "exact")
        band = "{:.6g} to {:.6g}".format(*equivalent_clip(config.clip_range, power))
        print(f"clip ±{config.clip_range:g} on the {config.ratio} ratio: {band} on the {other} one")

    bar = tqdm(range(config.rounds), "DDPO", unit="round")
    for round_number in bar:
        clock = [time.perf_counter()]
        asked = [next(stream) for _ in range(config.prompts_per_round)]
        asked = [prompt for prompt in asked for _ in range(config.samples_per_prompt)]
        run = mdp.rollout(pipe, asked, config.num_steps, config.eta, config.guidance_scale,
                          generator=generator, batch_size=config.batch_size)
        clock.append(time.perf_counter())

        r = rewards.score(reward, run.images, asked, folder)
        queries += len(r)
        A = (leave_one_out_advantage(r, asked) if config.baseline == "leave_one_out"
             else running_advantage(r, asked, history))
        A = A.clamp(-config.advantage_clip, config.advantage_clip).float().to(pipe.device)
        clock.append(time.perf_counter())

        minibatches = draw_pairs(len(asked), len(timesteps), config.timestep_fraction,
                                 updates(config), generator)
        for minibatch in minibatches:
            last = update(pipe, optimizer, params, run, A, minibatch, weight, config)
        clock.append(time.perf_counter())

        seconds = [b - a for a, b in zip(clock, clock[1:])]
        rows.append(dict(round=round_number + 1, queries=queries,
                         **dict(zip(("reward", "reward_se"), mean_se(r))), **last,
                         **dict(zip(("sample_s", "reward_s", "update_s"), seconds))))
        log(folder, rows[-1], bar, "round {round:3}  reward {reward:7.3f} ± {reward_se:.3f}  "
            "clipped {clip_fraction:4.0%}  KL {kl:7.4f}  |g| {grad_norm:8.3g}  "
            "sample {sample_s:.1f} s  reward {reward_s:.1f} s  update {update_s:.1f} s")

    after, pictures_after, _ = evaluate(pipe, prompts, reward, config)
    result = dict(folder=str(folder), rows=rows, before=before, after=after, queries=queries)
    save(folder, pipe, config, result, (pictures_before, pictures_after), shown)
    return result


def mean_se(values):
    """x̄, s/√N of N numbers; NaN for the error of a single one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else values.sum() * math.nan
    return values.mean().item(), error.item()


def log(folder, row, bar, line):
    """One line on the screen, one in metrics.csv, whose first line names the columns."""
    with open(Path(folder, "metrics.csv"), "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if row["round"] == 1:
            writer.writeheader()
        writer.writerow(row)
    bar.write(line.format(**row))


def save(folder, pipe, config, result, pictures, prompts):
    """The run's pictures and curve, and the fine-tuned model in diffusers format."""
    ends = result["before"], result["after"]
    figures.before_after(folder / "before_after.png", prompts, ends, pictures)
    figures.curves(folder / "reward.png", result["rows"], {"reward": ends},
                   {"reward": config.reward})
    save_model(pipe, folder, config.lora_rank)


def save_model(pipe, folder, lora_rank):
    """The tuned model in diffusers format, its adapters merged into its weights."""
    if lora_rank:
        pipe.unet.fuse_lora()
        pipe.unet.unload_lora()
    pipe.save_pretrained(Path(folder, "model"))


def main(argv=None):
    config = mdp.parse_config(Config, __doc__, argv)
    start = time.perf_counter()
    result = train(config)
    before, after = result["before"], result["after"]
    print(f"\n{config.reward} on {len(before)} pictures from fresh seeds, mean ± s.e.: " +
          "{:.3f} ± {:.3f} before, {:.3f} ± {:.3f} after".format(*mean_se(before), *mean_se(after)))
    print("gain {:+.3f} ± {:.3f} (same seeds), ".format(*mean_se(after - before))
          + f"{result['queries']} queries, {time.perf_counter() - start:.0f} s")
    print(f"Pictures, curve, metrics.csv, config.json and the tuned model: {result['folder']}")


if __name__ == "__main__":
    mdp.run_main(main)
