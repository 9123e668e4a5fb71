"""05 · Evaluation: who is better, and at what price.

WHAT YOU LEARN. A reward that went up proves little: every method here can raise it. So we measure
what we *meant*, the gold reward, on which nothing was trained, and what it cost: reward queries,
UNet evaluations, and nats of path KL, E[Σ_t KL_t]. And we ask whether a difference would come back
with the next training. As in DPOK's experiments, each prompt has models of its own:

    SFT                 imitation of the best fifth of the pretrained pictures (DPOK, Figure 1a)
    DDPO_IS             chapter 3
    DPOK, DPOK_no_KL    chapter 4, and chapter 4 with β = 0 and settings of its own
    best of n           no training: the best of n pretrained pictures, n queries for each
    ceiling             the best fifth itself: what imitation would have if it were perfect

Models of one seed are read on the same noise, each seed on noise of its own. So the differences of
two models, one number a seed, are independent, and tell of other seeds, on these same prompts.

    d̄ ± t·s/√S,  d_k = a_k − b_k the difference in seed k, of S seeds          (Student's interval)
    p̃_(j) = max_{i ≤ j} min(1, (m − i + 1)·p_(i)),  p_(1) ≤ … ≤ p_(m), for m claims (Holm 1979)
    KL(best of n ‖ one draw) ≤ log n − (n − 1)/n                 (Beirami et al., arXiv 2401.01879)

RUN `python 05_eval.py`: one prompt, one seed. It starts each training that is not there yet, and
writes index.html in runs/eval/. EXPECT RL's reward to pass the ceiling, which imitation's does not;
after more rounds, DPOK_no_KL's gold to fall while its reward rises. TRY `--rounds 40`, `--seeds 5`,
`--quick`, `--runs A B`. DEPARTURES. Only learning rates, updates and SFT's passes are tuned.
EXERCISES. (1) Which method is best per nat? (2) Evaluate 03's run: `--runs RUN --prompts location`.
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats
from tqdm import tqdm

from support import commands, evaluation, flags, models, runs, training
from support.measures import Measures, means
from support.prompts import get_prompts

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score
dpok = import_module("04_dpok")  # step_means, path_kl

METHODS = {  # method -> its script and flags, and what tune.py has chosen
    "SFT": ("experiments/sft.py --data fixed --weights sparse",
            "--learning-rate 0.001 --passes 16"),
    "DDPO_IS": ("03_ddpo.py --prompts-per-round 1 --no-anneal",
                "--learning-rate 0.0003 --updates-per-round 20"),
    "DPOK": ("04_dpok.py", "--learning-rate 0.003 --updates-per-round 5"),
    "DPOK_no_KL": ("04_dpok.py --beta 0", "--learning-rate 0.001 --updates-per-round 5")}
CLAIMS = (  # a sentence; in what, read off where, and the first model is above the second
    ("RL is above imitation", "reward", "the end", "DPOK", "SFT"),
    ("RL is above a perfect copy of the best fifth", "reward", "the end", "DPOK", "ceiling"),
    ("With the KL term gold ends higher", "gold", "the end", "DPOK", "DPOK_no_KL"),
    ("With the KL term gold is higher at equal KL", "gold", "equal KL", "DPOK", "DPOK_no_KL"))
Method = Literal["SFT", "DDPO_IS", "DPOK", "DPOK_no_KL"]


@dataclass(frozen=True)
class Config(rewards.RewardFlags):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the hub
    runs: tuple[str, ...] = ()  # compare these run folders, and train nothing
    prompts: tuple[str, ...] = ("four stars",)  # each has its own models
    methods: tuple[Method, ...] = tuple(METHODS)  # what is trained
    reward: str = "image_reward"  # what all are trained on
    gold: str = "alignment"  # what is meant
    others: tuple[str, ...] = ("quality",)  # only measured
    rounds: int = 24  # of training; models are read after about 1/8, 1/4, 1/2 and all
    samples_per_prompt: int = 64  # pictures of a round, all of one prompt
    lora_rank: int = 16  # rank of the adapters, for all methods
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # with adapters
    samples: int = 128  # pictures of each model on each prompt
    pool: int = 640  # pretrained pictures of each prompt, for best of n and the ceiling
    best_of: tuple[int, ...] = (4, 16, 64)  # n of best of n
    seeds: int = 1  # trainings of each method; verdicts take two, and tell little below five
    jobs: int = 2  # trainings side by side
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    quick: bool = False  # a short tour: one easier prompt, two methods, 640 queries
    seed: int = 0  # of the first training and evaluation; the next has 1 more
    out: str = "runs/eval"  # folder of the runs and of the page; with --quick runs/quick
    sd: bool = False  # the published settings for the full model become the defaults


QUICK = dict(prompts=("an orange star",), methods=("DDPO_IS", "DPOK"), rounds=10,
             samples=32, pool=320, out="runs/quick")
SD = flags.published("05_eval")

# ---- is a difference more than chance? ------------------------------------------------------


def interval(d):
    """d̄ ± t·s/√S and p = 2·P(T > |d̄|·√S/s),  T ~ Student's t_{S−1}.   (S,) -> a dict

    t is T's 97.5 % quantile. Where s, d's standard deviation, is 0, seeds say nothing: p = 1.
    """
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
    """holds: d̄ > 0 and p̃ ≤ level;  fails: d̄ < 0 and p̃ ≤ level;  else it cannot be told."""
    if p > level:
        return "cannot be told"
    return "holds" if difference > 0 else "fails"


# ---- best of n, trainings, and pictures of both ---------------------------------------------


def best_of_n_weights(r, n):
    """w_i = N·(F(r_i)^n − F(r_i⁻)^n) / m_i: how much more often best of n shows picture i.

    n draws with replacement from the N pictures. F(r_i), F(r_i⁻): share of pictures with a reward
    up to r_i, and below it; the m_i pictures with that very reward share evenly. (N,), n -> (N,)
    """
    N = len(r)
    _, place, m = r.unique(return_inverse=True, return_counts=True)
    last = m.cumsum(0).double()
    upto = (last / N) ** n
    below = ((last - m) / N) ** n
    w = N * (upto - below) / m
    return w[place]


def best_of_n_kl(n):
    """KL(best of n ‖ one draw) ≤ log n − (n − 1)/n, in nats; equal where no two rewards tie."""
    return math.log(n) - (n - 1) / n


def command_of(method, prompt, config, tuned=None):
    """The command of one training: script, flag, value, ...: what a reader could type."""
    command, chosen = METHODS[method]
    script, *words = command.split()
    words += ["--prompts", prompt]
    if not config.sd:  # that has published settings
        words += (tuned or chosen).split()
    words += commands.common_words(script, config)
    kept = max(1, config.rounds // 8)
    return [script, *words, "--keep-every", str(kept), "--eval-samples", "16"]


def train(configs):
    """Trains what is missing.  -> for each seed's config: (prompt, model) -> run folder"""
    found, wanted = [], {}
    out = Path(configs[0].out, "train")
    for config in configs:
        folders = {}
        methods = [] if config.runs else config.methods
        for prompt in config.prompts:
            for label, folder in runs.labels(config.runs).items():
                folders[prompt, label] = folder
            for method in methods:
                name = runs.clean(f"{method}_seed{config.seed}_{Path(prompt).stem}")
                if name in wanted:
                    raise ValueError(f"--prompts {prompt!r}: another one has the same folder")
                wanted[name] = command_of(method, prompt, config)
                folders[prompt, method] = out / name
        found.append(folders)
    commands.train_missing(wanted, out, configs[0].jobs)
    return found


def read(pipe, reference, prompt, measures, config):
    """All measures of a model on a prompt, means and errors, and its pictures."""
    prompts = training.spread_evenly(get_prompts(prompt), config.samples)
    trajectory = mdp.rollout(pipe, prompts, config, "compare")  # the noise of all models
    with reference():
        reference_means = dpok.step_means(pipe, trajectory, config)
    kl = dpok.path_kl(pipe, trajectory, reference_means, config)
    columns = measures.columns(trajectory.images, prompts, kl.sum(1))
    return means(columns), trajectory.images


def read_pool(pipe, prompt, measures, config):
    """Model -> one reading: best of n, and the ceiling, from a pool of pretrained pictures."""
    prompts = get_prompts(prompt) * config.pool
    pool = mdp.rollout(pipe, prompts, config, "pool")
    columns = measures.rewards_of(pool.images, prompts)
    r = columns["reward"]
    ranks = r.argsort(descending=True).argsort()
    is_best = (ranks < len(r) / 5).double()
    found = {"ceiling": [means(columns, is_best / is_best.mean())]}
    for n in config.best_of:
        row = means(columns, best_of_n_weights(r, n))
        row["kl"] = best_of_n_kl(n)
        found[f"best of {n}"] = [row]
    return found


def read_all(folders, config, measures):
    """prompt -> model -> its readings, from 0 queries on, and prompt -> model -> pictures."""
    machine = config.device, config.dtype
    readings, images = {}, {}
    pipe = models.load_pipeline(config.model, *machine)
    for prompt in config.prompts:
        row, drawn = read(pipe, nullcontext, prompt, measures, config)
        row["queries"] = 0
        images[prompt] = {"pretrained": drawn}
        readings[prompt] = {"pretrained": [row]}
        if len(get_prompts(prompt)) == 1:
            readings[prompt] |= read_pool(pipe, prompt, measures, config)
    for (prompt, model), folder in tqdm(folders.items(), "reading", unit="run"):
        rows = list(readings[prompt]["pretrained"])
        for queries, weights in runs.kept_weights(folder).items():
            pipe, reference = models.load_run(weights, *machine)
            row, drawn = read(pipe, reference, prompt, measures, config)
            row["queries"] = queries
            rows.append(row)
        readings[prompt][model] = rows
        images[prompt][model] = drawn
    return readings, images


# ---- from readings to verdicts --------------------------------------------------------------


def at_kl(rounds, kl, column):
    """A column where a training's path KL first came to kl: on the line between two rounds."""
    x, y = [], []
    for row in rounds:
        if not x or row["kl"] > x[-1]:  # a training may come back
            x.append(row["kl"])
            y.append(row[column])
    return np.interp(kl, x, y)


def difference(rows, column, at, a, b):
    """d = a − b of one seed, the mean over prompts: at the end, or at the same path KL.

    rows: prompt -> model -> readings, or its rounds. The same path KL is the largest both came to.
    """
    found = []
    for of_model in rows.values():
        rows_a, rows_b = of_model[a], of_model[b]
        value_a = rows_a[-1][column]
        value_b = rows_b[-1][column]
        if at == "equal KL":
            kl_a = max(row["kl"] for row in rows_a)
            kl_b = max(row["kl"] for row in rows_b)
            kl = min(kl_a, kl_b)
            value_a = at_kl(rows_a, kl, column)
            value_b = at_kl(rows_b, kl, column)
        found.append(value_a - value_b)
    return np.mean(found)


def judge(rows, differences):
    """Adds interval, corrected p, verdict, and the seeds that would tell, to each claim's row.

    differences: for each row its d, one number a seed. All rows together are Holm's family.
    """
    for row, d in zip(rows, differences):
        row |= interval(d)
        row["seeds_needed"] = evaluation.seeds_needed(d, 0.05 / len(rows))
    adjusted = holm([row["p"] for row in rows])
    for row, p in zip(rows, adjusted):
        row |= {"holm": p, "verdict": verdict(row["mean"], p)}
    return rows


def claims(readings, rounds):
    """The slides' claims, judged.   readings, rounds: of each seed -> a row for each claim"""
    of_all = set.intersection(*map(set, readings[0].values()))  # models that all prompts have
    rows, differences = [], []
    for claim, column, at, a, b in CLAIMS:
        if {a, b} <= of_all:
            seeds = rounds if at == "equal KL" else readings
            d = [difference(of_seed, column, at, a, b) for of_seed in seeds]
            rows.append({"claim": claim, "column": column, "at": at, "a": a, "b": b})
            differences.append(np.array(d))
    return judge(rows, differences)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv, SD, QUICK)
    for prompt in config.prompts:
        get_prompts(prompt)  # a file that is not there fails here, before training
    flags.make_folder(config.out)
    measures = Measures(config, rewards)
    seeds = 1 if config.runs else config.seeds
    configs = [replace(config, seed=config.seed + k) for k in range(seeds)]
    folders = train(configs)
    found = [read_all(*of_seed, measures) for of_seed in zip(folders, configs)]
    readings, images = zip(*found)
    rounds = [evaluation.rounds_of(of_seed) for of_seed in folders]
    judged = []
    if seeds > 1 and not config.quick:
        judged = claims(readings, rounds)
    print(evaluation.write(config, readings, rounds, judged, folders[0], images[0]))
    return readings, judged


if __name__ == "__main__":
    flags.run(main)
