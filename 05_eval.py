"""05 · Evaluation: who is better, and at what price.

WHAT YOU LEARN. A reward that went up proves little: every method here can raise it. So we measure
what we *meant*, the gold reward, on which nothing was trained; how much the pictures differ; and
prompts that no training saw. We count what it cost: reward queries, UNet evaluations, and nats of
path KL, E[Σ_t KL_t]. And we ask whether a difference would come back with the next training.

    RWR, SFT            supervised: the present model's pictures, weighted by reward (DDPO), or
                        the best fifth of the pretrained model's (DPOK, Figure 1a)
    DDPO_SF, DDPO_IS    chapter 3's two estimators
    DPOK, DPOK_no_KL    chapter 4, and the same with β = 0
    best of n           no training: the best of n pretrained pictures, n queries for each

Each training seed has evaluation noise of its own, the same for all models. So the differences of
two models, one number a seed, are independent, and tell of other seeds, on these same prompts.

    d̄ ± t_{S−1}·s/√S,  d_s = a_s − b_s the difference in seed s, of S seeds  (Student's interval)
    p̃_(j) = max_{i ≤ j} min(1, (m − i + 1)·p_(i)),  p_(1) ≤ … ≤ p_(m), for m claims (Holm 1979)
    KL(best of n ‖ one draw) ≤ log n − (n − 1)/n                 (Beirami et al., arXiv 2401.01879)

RUN `python 05_eval.py`. It prints and starts each command that has no finished run yet, then looks
at run folders only, and writes runs/eval/index.html. EXPECT best of n to be ahead in the reward
that it chose by. TRY `--seeds 5` for verdicts, `--quick` for a short tour, and `--runs A B` to
compare any run folders. DEPARTURES. Only learning rate and updates per round are tuned
(experiments/tune.py). EXERCISES. (1) Which method is best per nat? (2) Evaluate chapter 3's run:
`--prompts location --runs runs/ddpo_is_alignment_location`.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
from scipy import stats
from tqdm import tqdm

from support import commands, evaluation, flags, models, runs, training
from support.measures import Measures
from support.prompts import families

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # step_means, path_kl

METHODS = {  # method -> its script and flags, and its tuned learning rate and updates per round
    "RWR": ("experiments/sft.py --data fresh --weights rwr", 1e-5, 2),
    "SFT": ("experiments/sft.py --data fixed --weights sparse", 3e-3, 2),
    "DDPO_SF": ("03_ddpo.py --estimator sf --no-anneal", 2e-3, 1),
    "DDPO_IS": ("03_ddpo.py --estimator is --no-anneal", 1e-3, 5),
    "DPOK": ("04_dpok.py", 3e-3, 20),
    "DPOK_no_KL": ("04_dpok.py --beta 0", 3e-3, 20)}  # DPOK's, so that only β differs
CLAIMS = (  # a sentence; in what, on which prompts, which model should be above which
    ("RL is above supervised fine-tuning", "reward", "seen", "DDPO_IS", "SFT"),
    ("RL is above supervised fine-tuning", "reward", "seen", "DDPO_IS", "RWR"),
    ("RL is above supervised fine-tuning", "reward", "seen", "DPOK", "SFT"),
    ("RL is above supervised fine-tuning", "reward", "seen", "DPOK", "RWR"),
    ("RL is above supervised fine-tuning", "gold", "seen", "DPOK", "SFT"),
    ("RL is above supervised fine-tuning", "aesthetic", "seen", "DPOK", "SFT"),
    ("Importance sampling is above score functions", "reward", "seen", "DDPO_IS", "DDPO_SF"),
    ("The score function is above RWR", "reward", "seen", "DDPO_SF", "RWR"),
    ("With the KL term gold is higher", "gold", "seen", "DPOK", "DPOK_no_KL"),
    ("With the KL term diversity is higher", "diversity", "seen", "DPOK", "DPOK_no_KL"),
    ("Gains carry over to unseen prompts", "gold", "unseen", "DDPO_IS", "pretrained"),
    ("Gains carry over to unseen prompts", "gold", "unseen", "DPOK", "pretrained"))
SHARED = (  # flags of every training
    "model", "reward", "prompts", "rounds", "prompts_per_round", "samples_per_prompt",
    "num_steps", "eta", "guidance_scale", "lora_rank", "lora_targets", "seed")


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the hub
    runs: tuple[str, ...] = ()  # compare these run folders; default: train and compare METHODS
    prompts: str = "tasks"  # trained on: tasks, tasks_sd, or what chapter 3 takes
    reward: str = "image_reward"  # what all are trained on
    gold: str = "alignment"  # what is meant
    others: tuple[str, ...] = ("aesthetic", "incompressibility")  # only measured
    rounds: int = 20  # rounds of training
    prompts_per_round: int = 5  # prompts per round
    samples_per_prompt: int = 16  # pictures of each of them
    lora_rank: int = 16  # rank of the adapters, for all methods
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # with adapters
    samples: int = 50  # pictures of each prompt family, of seen and unseen prompts each
    best_of: tuple[int, ...] = (2, 6, 25)  # n; 6 pay about a training's queries
    seeds: int = 1  # trainings of each method; verdicts need two, better five
    jobs: int = 1  # trainings side by side
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    quick: bool = False  # a short tour: too little training to conclude anything
    seed: int = 0  # of the first training and its evaluation's noise; the next has 1 more
    out: str | None = None  # default: runs/eval; with a flag runs/quick or runs/eval_runs
    sd: bool = False  # the published settings for the full model become the defaults


QUICK = dict(rounds=4, samples_per_prompt=4, samples=12, best_of=(2, 4))
SD = flags.published("05_eval")

# ---- is a difference more than chance? ------------------------------------------------------


def paired_interval(a, b):
    """d̄ ± t_{S−1}·s/√S and p = 2·P(T_{S−1} > |d̄|·√S/s),  d = a − b.  (S,), (S,) -> a dict

    At 95 %. s is the standard deviation of d; where it is 0, seeds say nothing of others: p = 1.
    """
    d = a - b
    S = len(d)
    t = stats.t(S - 1)
    mean = d.mean()
    error = d.std(ddof=1) / S**0.5
    half = t.ppf(0.975) * error
    p = 1.0
    if error > 0:
        p = 2 * t.sf(abs(mean) / error)
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p}


def holm(p):
    """p̃_(j) = max_{i ≤ j} min(1, (m − i + 1)·p_(i)),  p_(1) ≤ … ≤ p_(m).   (m,) -> (m,)

    If all claims with p̃ ≤ 0.05 are told, one or more is wrong in at most 5 % of comparisons.
    """
    p = np.asarray(p)
    m = len(p)
    order = p.argsort()
    factors = np.arange(m, 0, -1)
    largest = np.maximum.accumulate(factors * p[order])
    adjusted = np.empty(m)
    adjusted[order] = largest.clip(max=1)
    return adjusted


def verdict(difference, p, level=0.05):
    """holds: d̄ > 0 and p̃ ≤ α;  fails: d̄ < 0 and p̃ ≤ α;  else it cannot be told."""
    if p > level:
        return "cannot be told"
    return "holds" if difference > 0 else "fails"


def diversity(f):
    """d_i = mean_{j≠i} (1 − cos(f_i, f_j)),  f CLIP's embeddings of one prompt's pictures.

    (N,D) -> (N,). Their mean is the diversity: the mean distance of two pictures.
    """
    N = len(f)
    f = f / f.norm(dim=1, keepdim=True)
    distance = 1 - f @ f.T  # of a picture to itself: 0
    return distance.sum(1) / (N - 1)


def best_of_n_kl(n):
    """KL(best of n ‖ one draw) ≤ log n − (n − 1)/n, in nats; equal where no two rewards tie."""
    return math.log(n) - (n - 1) / n


# ---- trainings and their pictures -----------------------------------------------------------


def command_of(method, config):
    """The command of one training: script, flag, value, ...: what a reader could type."""
    command, learning_rate, updates = METHODS[method]
    words = command.split()
    if words[0] != "03_ddpo.py":  # which measures no gold
        words += ["--gold", config.gold]
    if config.sd:
        words += ["--sd"]
    else:
        words += ["--learning-rate", str(learning_rate)]
        words += ["--updates-per-round", str(updates)]
    words += commands.words_of(config, SHARED)
    words += commands.changed_words(config, rewards.RewardFlags)
    kept = max(1, config.rounds // 4)  # weights for experiments/early_stopping.py
    return [*words, "--keep-every", str(kept), "--eval-samples", "40"]


def commands_of(config):
    """Name of a run -> its command, for each method."""
    seed = config.seed
    return {f"{method}_seed{seed}": command_of(method, config) for method in METHODS}


def train(config):
    """Model -> the folder of its training; trains with config.seed what is missing."""
    if config.runs:
        return runs.labels(config.runs)
    out = Path(config.out, "train")
    wanted = commands_of(config)
    commands.train_missing(wanted, out, config.jobs)
    return {method: out / name for method, name in zip(METHODS, wanted)}


# ---- pictures, and what is measured of them -------------------------------------------------


def plan(config):
    """What each model draws, a dict for each picture: seed, family, split, prompt; seen first.

    --samples pictures of a family, at least 4 of each prompt where that allows it.
    """
    requests = []
    for place, split in enumerate(("seen", "unseen")):
        for family, prompts in families(config.prompts).items():
            most = max(1, config.samples // 4)
            chosen = training.spread_evenly(prompts[place], most)
            chosen = dict.fromkeys(chosen)  # each once
            for prompt in chosen:
                request = {"seed": config.seed, "family": family, "split": split, "prompt": prompt}
                K = config.samples // len(chosen)
                requests += [request] * max(2, K)
    return requests


def draw(pipe, requests, config, k=0):
    """Pictures on the noise of config.seed: the same for every model, drawn by no training."""
    prompts = [request["prompt"] for request in requests]
    return mdp.rollout(pipe, prompts, config, "compare", k)


def evaluate(pipe, reference, requests, measures, config):
    """All measures of one model's pictures, a dict for each, and the pictures."""
    trajectory = draw(pipe, requests, config)
    with reference():
        reference_means = dpok.step_means(pipe, trajectory, config)
    kl = dpok.path_kl(pipe, trajectory, reference_means, config)
    images = trajectory.images
    return measures.rows(requests, images, kl.sum(1)), images


def best_of_n(pipe, requests, measures, config):
    """"best of n" -> what evaluate gives, of the best by reward of n pretrained pictures each."""
    prompts = [request["prompt"] for request in requests]
    best_r = [-math.inf] * len(requests)
    best_images = [None] * len(requests)
    found = {}
    draws = max(config.best_of, default=0)
    for k in tqdm(range(draws), "best of n", leave=False):
        images = draw(pipe, requests, config, k).images  # k = 0: the noise of all models
        r = measures.score("reward", images, prompts)
        for i in range(len(requests)):
            if r[i] > best_r[i]:
                best_r[i] = r[i]
                best_images[i] = images[i]
        n = k + 1
        if n in config.best_of:
            kl = [best_of_n_kl(n)] * len(requests)
            rows = measures.rows(requests, best_images, kl)
            found[f"best of {n}"] = rows, list(best_images)
    return found


def evaluate_all(folders, measures, config):
    """Model -> what evaluate gives, all on the noise of config.seed."""
    requests = plan(config)
    machine = config.device, config.dtype
    pipe = models.load_pipeline(config.model, *machine)
    found = {}
    found["pretrained"] = evaluate(pipe, nullcontext, requests, measures, config)
    if not config.runs:
        seen = [request for request in requests if request["split"] == "seen"]
        found |= best_of_n(pipe, seen, measures, config)
    for model in tqdm(folders, f"seed {config.seed}", unit="model"):
        pipe, reference = models.load_run(folders[model], *machine)
        found[model] = evaluate(pipe, reference, requests, measures, config)
    return found


def claims(rows):
    """The slides' claims with their figures; one that fails is a finding, and says so."""
    found = []
    for claim, metric, split, a, b in CLAIMS:
        means = evaluation.seed_means(rows, metric, split)
        if a in means and b in means:
            row = {"claim": claim, "metric": metric, "split": split, "a": a, "b": b}
            row |= paired_interval(means[a], means[b])
            found.append(row)
    adjusted = holm([row["p"] for row in found])
    for row, p in zip(found, adjusted):
        row["holm"] = p
        row["verdict"] = verdict(row["mean"], p)
    return found


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD, QUICK)
    name = "quick" if config.quick else "eval_runs" if config.runs else "eval"
    config = replace(config, out=config.out or f"runs/{name}")
    plan(config)  # what is wrong in a flag fails here, before training
    flags.make_folder(config.out)
    measures = Measures(config, rewards, diversity)
    seeds = 1 if config.runs else config.seeds
    configs = [replace(config, seed=config.seed + i) for i in range(seeds)]
    folders = [train(of_seed) for of_seed in configs]
    rows, images = {}, {}
    for of_seed, trained in zip(configs, folders):
        found = evaluate_all(trained, measures, of_seed)
        for model, (measured, drawn) in found.items():
            rows.setdefault(model, []).extend(measured)
            images.setdefault(model, drawn)  # the first seed's are shown
    judged = []
    if seeds > 1 and not config.quick:
        judged = claims(rows)
    lines = evaluation.write(config, rows, judged, folders, images)
    print("\n".join(lines))
    print(f"All of it on one page: {config.out}/index.html")
    return rows, judged


if __name__ == "__main__":
    flags.run(main)
