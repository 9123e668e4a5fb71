"""05 · Evaluation: who is better, at what price.

WHAT YOU LEARN. A reward that went up proves little: every method here can raise it. So we look at
what it cost (reward queries, UNet evaluations, nats), and at what we *meant*, the gold reward, on
which nothing was trained; at variety, and at prompts that were never trained. Each method has the
settings that were best for it among equally many (experiments/tune.py, on other prompts). And we
ask whether a difference would come back with the next training: seeds are the unit.

    RWR                 supervised, on the present model's pictures, weighted (DDPO)
    SFT                 supervised, on the best fifth of the pretrained model's (DPOK, Figure 1a)
    DDPO_SF, DDPO_IS    chapter 3's two estimators
    DPOK, DPOK_no_KL    chapter 4, and the same with β = 0
    best of n           no training: the best of n pretrained pictures. It may choose x_T, training
                        cannot, and it pays n queries for every picture that it delivers

    path KL   = E[Σ_t KL_t], in nats;  intervals: support/significance.py
    diversity = mean_{j≠i} (1 − cos(f_i, f_j)), f CLIP's embedding of one prompt's pictures
    KL(best of n ‖ one draw) ≤ log n − (n−1)/n                         (Beirami et al., 2401.01879)

RUN `python 05_eval.py`. It prints and starts each command that has no finished run yet, then looks
at run folders only, and writes runs/eval/index.html. `--seeds 5` trains five times: claims are
judged only where there are several seeds. `--quick` is a tour of two minutes, `--runs A B` compares
any run folders, `--ballot` asks people and `--votes FILES` counts them. EXPECT best of n to be
ahead in the reward that it was chosen by. DEPARTURES. Only learning rate and updates are tuned.
EXERCISES. (1) Which method is best per nat? (2) Evaluate chapter 3's default run: `--prompts
location --runs runs/ddpo_is_alignment_location`. (3) Vote twice: do you agree with yourself?
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from support import (ballot, commands, figures, flags, models, prices, runs, significance, tables,
                     training)
from support.measures import Measures
from support.prompts import families

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score, QUESTION
dpok = import_module("04_dpok")  # step_means, path_kl

METHODS = {  # method -> its command; to it come the flags of TUNED and SHARED
    "RWR": "experiments/sft.py --data fresh --weights rwr --gold GOLD",
    "SFT": "experiments/sft.py --data fixed --weights sparse --gold GOLD",
    "DDPO_SF": "03_ddpo.py --estimator sf --updates-per-round 1",
    "DDPO_IS": "03_ddpo.py --estimator is",
    "DPOK": "04_dpok.py --gold GOLD",
    "DPOK_no_KL": "04_dpok.py --gold GOLD --beta 0"}
TUNED = {  # method -> (learning rate, updates per round), as experiments/tuning.csv has them
    "RWR": (1e-5, 2), "SFT": (3e-3, 2), "DDPO_SF": (2e-3, 1), "DDPO_IS": (1e-3, 5),
    "DPOK": (3e-3, 20), "DPOK_no_KL": (3e-3, 20)}  # the last: DPOK's, so that only β differs
CLAIMS = {  # sentence -> in what, on which prompts, and pairs of models: is the first one ahead?
    "RL is above supervised fine-tuning at equal queries": ("reward", "seen", (
        ("DDPO_IS", "SFT"), ("DDPO_IS", "RWR"), ("DPOK", "SFT"), ("DPOK", "RWR"))),
    "RL is above supervised fine-tuning in alignment": ("gold", "seen", (("DPOK", "SFT"),)),
    "RL is above supervised fine-tuning in quality": ("aesthetic", "seen", (("DPOK", "SFT"),)),
    "Importance sampling is above the score function": (
        "reward", "seen", (("DDPO_IS", "DDPO_SF"),)),
    "The score function is above RWR": ("reward", "seen", (("DDPO_SF", "RWR"),)),
    "With the KL term gold ends higher": ("gold", "seen", (("DPOK", "DPOK_no_KL"),)),
    "With the KL term diversity ends higher": ("diversity", "seen", (("DPOK", "DPOK_no_KL"),)),
    "Gains carry over to unseen combinations": ("gold", "unseen", (
        ("DDPO_IS", "pretrained"), ("DPOK", "pretrained")))}
SHARED = ("model", "reward", "prompts", "rounds", "prompts_per_round", "samples_per_prompt",
          "num_steps", "eta", "guidance_scale", "lora_rank", "lora_targets")  # of every command


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    runs: tuple[str, ...] = ()  # compare these run folders; default: train and compare METHODS
    prompts: str = "tasks"  # trained on: tasks, tasks_sd, or whatever chapter 3 takes
    reward: str = "image_reward"  # what all are trained on
    gold: str = "alignment"  # what is meant
    others: tuple[str, ...] = ("aesthetic", "incompressibility")  # measured only; the last is kB
    rounds: int = 20  # rounds of training
    prompts_per_round: int = 5  # prompts per round
    samples_per_prompt: int = 16  # pictures of each of them
    tuned: bool = True  # tuned learning rate and updates per round, not each script's
    lora_rank: int = 16  # rank of the adapters, for all methods
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # layers with adapters
    samples: int = 50  # pictures a model and prompt family, of seen and unseen prompts each
    best_of: int = 64  # the largest n of best of n
    seeds: int = 1  # trainings of each method; claims need at least two, better five
    jobs: int = 1  # trainings side by side
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    quick: bool = False  # a tour of two minutes: too little training to conclude anything
    ballot: bool = False  # write ballot.html, on which people compare DPOK with SFT or two --runs
    votes: tuple[str, ...] = ()  # JSON files that raters downloaded from ballot.html: count them
    seed: int = 0  # seed of the evaluation's noise and of the first training run
    out: str | None = None  # all goes here; default: runs/eval, or quick or eval_runs with the flag
    sd: bool = False  # the published settings for the full model become the defaults


QUICK = dict(rounds=4, samples_per_prompt=4, samples=12, best_of=4)
SD = {name: dpok.SD[name] for name in (  # as chapter 4 has them, for all methods
    "model", "gold", "clip", "aesthetic_weights", "image_reward_weights", "samples_per_prompt",
    "lora_rank", "lora_targets", "num_steps", "guidance_scale", "batch_size", "dtype")}
SD |= dict(prompts="tasks_sd", others=("incompressibility",), vlm="llava-hf/llava-1.5-7b-hf",
           rounds=400, tuned=False, best_of=8, reward_batch_size=8)


def diversity_values(f):
    """v_i = N·d − (N−1)·d_{−i},  d = mean_{i≠j} (1 − cos(f_i, f_j)), d_{−i} without picture i.

    (N,D) -> (N,), N ≥ 3. These are the jackknife's pseudo-values: their mean is d, the diversity,
    and their s/√N is its standard error, although each distance belongs to two pictures.
    """
    N = len(f)
    if N < 3:  # of fewer pictures there is no such thing
        return torch.full((N,), math.nan)
    f = f.double() / f.double().norm(dim=1, keepdim=True)
    own = (1 - f @ f.T).sum(1)  # Σ_j of picture i's distances; that to itself is 0
    total = own.sum()
    d = total / (N * (N - 1))
    d_without = (total - 2 * own) / ((N - 1) * (N - 2))
    return N * d - (N - 1) * d_without


def best_of_n_kl(n):
    """KL(best of n ‖ one draw) ≤ log n − (n − 1)/n, in nats; equal where no two rewards tie."""
    return math.log(n) - (n - 1) / n


def command_of(method, config, seed):
    """The command of one training: script, flag, value, ...: what a reader could type."""
    words = [config.gold if word == "GOLD" else word for word in METHODS[method].split()]
    words += ["--sd"] if config.sd else []
    words += flags.words_of(config, SHARED) + flags.changed_words(config, rewards.RewardFlags)
    words += ["--eval-samples", str(max(2, min(40, config.samples)))]
    words += ["--keep-every", str(max(1, config.rounds // 4))]  # for experiments/early_stopping.py
    if config.tuned:
        learning_rate, updates = TUNED[method]
        words += ["--learning-rate", str(learning_rate), "--updates-per-round", str(updates)]
    return [*words, "--seed", str(seed)]


def commands_of(config):
    """Name of a run -> its command, for each seed and method."""
    table = {}
    for i in range(config.seeds):
        for method in METHODS:
            table[f"{method}_seed{i}"] = command_of(method, config, config.seed + i)
    return table


def plan(config):
    """What a model draws, one dict per picture: family, split (seen ones first), prompt.

    Of each prompt in a split equally many, at least 4 where --samples (of a family) allows it.
    """
    rows = []
    for s, split in enumerate(("seen", "unseen")):
        prompts = {family: both[s] for family, both in families(config.prompts).items()}
        P = min(max(map(len, prompts.values())), max(1, config.samples // 4))  # of a family
        K = max(2, config.samples // max(1, P))  # pictures of each
        for family, own in prompts.items():
            for prompt in dict.fromkeys(training.spread_evenly(own, P)):
                rows += [{"family": family, "split": split, "prompt": prompt}] * K
    return rows


def draw(pipe, requests, config, k=0):
    """Pictures on the comparison's noise: the same for every model, drawn by no training."""
    prompts = [row["prompt"] for row in requests]
    return mdp.rollout(pipe, prompts, config, noise=(config.seed, "compare", k))


def evaluate(pipe, reference, requests, measures, config):
    """All measures of one model's pictures, a dict per picture, and the pictures."""
    trajectory = draw(pipe, requests, config)
    with reference():
        reference_means = dpok.step_means(pipe, trajectory, config)
    kl = dpok.path_kl(pipe, trajectory, reference_means, config).sum(1).tolist()
    return measures.rows(requests, trajectory.images, kl), trajectory.images


def best_of_n(affordable, pipe, requests, measures, config):
    """n -> what evaluate gives, of the best by reward of n pretrained pictures for each request."""
    sizes = {2**k for k in range(32)} | set(affordable)  # the values of n that are measured
    prompts = [row["prompt"] for row in requests]
    best_images, best_r, found = [None] * len(requests), [-math.inf] * len(requests), {}
    for k in tqdm(range(config.best_of), "best of n", leave=False):
        images = draw(pipe, requests, config, k).images  # k = 0: the same noise as all other models
        r = rewards.score(measures.rewards["reward"], images, prompts, config.out)
        for i in range(len(requests)):
            if r[i] > best_r[i]:
                best_r[i], best_images[i] = r[i], images[i]
        if k + 1 in sizes:
            kl = [best_of_n_kl(k + 1)] * len(requests)
            found[k + 1] = measures.rows(requests, best_images, kl), list(best_images)
    return found


def difference(by_model, a, b, metric, split="seen"):
    """Mean, interval and p of a − b, over seeds and pictures (or unseen prompts); None without."""
    if a not in by_model or b not in by_model or metric not in by_model[a][0]:
        return None
    x, strata = tables.values_of(by_model[a], metric, split)
    y, _ = tables.values_of(by_model[b], metric, split)
    if len(x) == 0 or x.shape[1:] != y.shape[1:]:
        return None
    interval = significance.hierarchical_bootstrap(x, y, strata if split == "unseen" else None)
    names = {"a": a, "b": b, "metric": metric, "split": split}
    return names | interval | dict(zip(("seeds", "prompts", "pictures"), x.shape))


def claims(by_model):
    """The slides' claims with their figures; one that fails is a finding, and says so."""
    found = []
    for sentence, (metric, split, pairs) in CLAIMS.items():
        for a, b in pairs:
            row = difference(by_model, a, b, metric, split)
            if row:
                found.append({"claim": sentence, **row})
    for row, p in zip(found, significance.holm([row["p"] for row in found])):
        row |= {"holm": p, "verdict": significance.verdict(row["low"], row["high"], p)}
    return found


def train_all(config):
    """(label, seed, folder) of each run to compare; trains those of METHODS that are missing."""
    if config.runs:
        return [(label, 0, folder) for label, folder in runs.labels(config.runs).items()]
    wanted, out = commands_of(config), Path(config.out, "train")
    commands.train_missing(wanted, out, config.jobs)
    return [(*name.split("_seed"), out / name) for name in wanted]


def compare(config):
    """Trains what is missing, evaluates all, writes tables, figures, claims and index.html."""
    requests = plan(config)
    Measures(config, rewards, diversity_values)  # a wrong flag fails before training,
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    models.encode_prompts(pipe, [row["prompt"] for row in requests])  # and so does an unknown word
    del pipe  # trainings need the memory
    folders = train_all(config)
    measures = Measures(config, rewards, diversity_values)
    pipe = models.load_pipeline(config.model, config.device, config.dtype)
    curves = runs.curves(folders, config.reward)
    rows, images, best = {}, {}, {}
    found = evaluate(pipe, nullcontext, requests, measures, config)
    rows["pretrained"], images["pretrained"] = found
    if not config.runs:
        seen = [row for row in requests if row["split"] == "seen"]
        affordable = prices.affordable(curves, len(seen), config)
        best = best_of_n(affordable, pipe, seen, measures, config)
        for n in affordable[2], affordable[5]:  # at as many queries, and as many UNet evaluations
            if n > 1 and n in best:
                rows[f"best of {n}"], images[f"best of {n}"] = best[n]
    for label, seed, folder in tqdm(folders, "evaluating", unit="model"):
        pipe, reference = models.load_run(folder, config.device, config.dtype)
        new_rows, drawn = evaluate(pipe, reference, requests, measures, config)
        rows.setdefault(label, []).extend(dict(row, seed=seed) for row in new_rows)
        images.setdefault(label, drawn)  # of several seeds, the first one's are shown
    found = claims(rows) if config.seeds > 1 and not (config.quick or config.runs) else []
    results = tables.write_evaluation(config, rows, best, curves, found)
    figures.evaluation(config, requests, rows, images, curves, results)
    return rows, results


def make_ballot(config, pairs_per_family=4):
    """ballot.html, on which people compare two models on the same noise, and its key."""
    if config.runs and len(config.runs) != 2:
        raise ValueError("--ballot compares two models: give --runs two folders, or none")
    ballot.check_new(config.out)
    requests, pictures = [], {}
    for seen, _ in families(config.prompts).values():
        for prompt in training.spread_evenly(seen, pairs_per_family):
            requests.append({"prompt": prompt})
    for label, seed, folder in train_all(config):
        if config.runs or (label in ("DPOK", "SFT") and int(seed) == 0):
            pipe, _ = models.load_run(folder, config.device, config.dtype)
            pictures[label] = draw(pipe, requests, config).images
    ballot.write(config.out, [row["prompt"] for row in requests], pictures)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD, QUICK)
    name = "quick" if config.quick else "eval_runs" if config.runs else "eval"
    config = replace(config, out=config.out or f"runs/{name}")
    if config.votes:
        return print(ballot.count_votes(config.votes, Path(config.out)))
    if config.ballot:
        return make_ballot(config)
    rows, results = compare(config)
    print(Path(config.out, "table.md").read_text(encoding="utf-8"))
    print("\n".join(tables.claim_lines(results["claims"])))
    print(f"\nAll of it on one page: {config.out}/index.html")
    return rows, results


if __name__ == "__main__":
    flags.run(main)
