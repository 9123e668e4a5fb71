"""05 · Evaluation: who is better, at what price.

WHAT YOU LEARN. A reward that went up proves little: every method here can raise it. So we look at
what it cost (reward queries, nats), and at what we *meant*, the gold reward, on which nothing was
trained. We look at variety, and at prompts that were never trained. And we ask whether a difference
is larger than chance. Prompts, queries, learned reward, adapters and learning rate are the same:

    RWR, SFT            supervised: pretrained pictures, weighted or the best fifth (experiments/)
    DDPO_SF, DDPO_IS    chapter 3's two estimators
    DPOK, DPOK_no_KL    chapter 4, and the same with β = 0
    best of n           no training: draw n pretrained pictures, keep the best, at as many queries;
                        it may choose x_T, training cannot, and it pays for every picture

    mean ± s.e. = x̄ ± s/√N      path KL = E[Σ_t KL_t], in nats
    diversity   = mean_{j≠i} (1 − cos(f_i, f_j)), f CLIP's embedding of one prompt's pictures
    KL(best of n ‖ one draw) ≤ log n − (n−1)/n                         (Beirami et al., 2401.01879)

RUN `python 05_eval.py`. It prints and starts each command that has no finished run yet, then looks
at run folders only, and writes runs/eval/index.html: table, claims and figures on one page.
`--quick` is a tour of two minutes, `--seeds 3` trains each method three times, `--runs A B`
compares any run folders, `--ballot` asks people and `--votes FILES` counts them. EXPECT best of n
to be ahead in the reward that it was chosen by. samples.csv has a line per picture.
DEPARTURES. Intervals are over pictures, each averaged over the training seeds: with one seed,
"holds" is said of these runs, not of the methods. Ten intervals of 95 % are printed: one in two
evaluations will miss somewhere by chance. No method is tuned, and other defaults are each script's.
EXERCISES. (1) Which method is best per nat? (2) Evaluate chapter 3's default run: `--prompts
location --runs runs/ddpo_is_alignment_location`. (3) Vote twice: do you agree with yourself?
"""
import math
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from support import ballot, commands, figures, flags, models, runs, tables, training
from support.measures import Measures
from support.prompts import families

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # RewardFlags, get_reward, score, QUESTION
dpok = import_module("04_dpok")  # step_means, path_kl

METHODS = {  # method -> its command; to it come the flags of SHARED
    "RWR": "experiments/sft.py --weights rwr --gold GOLD",
    "SFT": "experiments/sft.py --weights sparse --gold GOLD",
    "DDPO_SF": "03_ddpo.py --estimator sf",
    "DDPO_IS": "03_ddpo.py --estimator is",
    "DPOK": "04_dpok.py --gold GOLD",
    "DPOK_no_KL": "04_dpok.py --gold GOLD --beta 0"}
RL_AHEAD = "RL is above supervised fine-tuning at equal queries"
CARRIED_OVER = "Gains carry over to unseen combinations"
CLAIMS = (  # sentence, the model that it says is ahead, the other one, in what, on which prompts
    (RL_AHEAD, "DDPO_IS", "SFT", "reward", "seen"),
    (RL_AHEAD, "DDPO_IS", "RWR", "reward", "seen"),
    (RL_AHEAD, "DPOK", "SFT", "reward", "seen"),
    (RL_AHEAD, "DPOK", "RWR", "reward", "seen"),
    ("Importance sampling is above the score function", "DDPO_IS", "DDPO_SF", "reward", "seen"),
    ("The score function is above RWR on a fixed set", "DDPO_SF", "RWR", "reward", "seen"),
    ("With the KL term gold ends higher", "DPOK", "DPOK_no_KL", "gold", "seen"),
    ("With the KL term diversity ends higher", "DPOK", "DPOK_no_KL", "diversity", "seen"),
    (CARRIED_OVER, "DDPO_IS", "pretrained", "gold", "unseen"),
    (CARRIED_OVER, "DPOK", "pretrained", "gold", "unseen"))
SHARED = ("model", "reward", "prompts", "rounds", "prompts_per_round", "samples_per_prompt",
          "num_steps", "eta", "guidance_scale", "batch_size", "learning_rate", "lora_rank",
          "lora_targets", "device")  # fields that every command gets as flags


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
    learning_rate: float = 1e-3  # of AdamW, for all methods
    lora_rank: int = 16  # rank of the adapters, for all methods
    lora_targets: tuple[str, ...] = (*models.ATTENTION, "conv1", "conv2")  # layers with adapters
    samples: int = 50  # pictures a model and prompt family, of seen and unseen prompts each
    seeds: int = 1  # training runs of each method
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    batch_size: int = 64  # pictures per UNet call; memory, not result
    quick: bool = False  # a tour of two minutes: too little training to conclude anything
    ballot: bool = False  # write ballot.html, on which people compare DPOK with SFT or two --runs
    votes: tuple[str, ...] = ()  # JSON files that raters downloaded from ballot.html: count them
    seed: int = 0  # seed of the evaluation's noise and of the first training run
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one
    out: str | None = None  # all goes here; default: runs/eval, or quick or eval_runs with the flag
    sd: bool = False  # the published settings for the full model become the defaults


QUICK = dict(rounds=4, samples_per_prompt=4, samples=12)
SD = {name: dpok.SD[name] for name in (  # as chapter 4 has them, for all methods
    "model", "gold", "clip", "aesthetic_weights", "image_reward_weights", "samples_per_prompt",
    "learning_rate", "lora_rank", "lora_targets", "num_steps", "guidance_scale", "batch_size")}
SD |= dict(prompts="tasks_sd", others=("incompressibility",), vlm="llava-hf/llava-1.5-7b-hf",
           rounds=400)


def paired_bootstrap(difference, seed=0, draws=10000, level=0.95):
    """Mean of N paired differences, and the interval that holds `level` of its bootstrap means.

    Pictures from the same noise are compared with each other, so what is common to both drops out.
    A difference is beyond chance where the interval leaves out 0.
    """
    N = len(difference)
    chosen = training.random_stream(seed, "bootstrap").integers(N, size=(draws, N))
    means = difference[torch.from_numpy(chosen)].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(means))
    return difference.mean().item(), low.item(), high.item()


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


def verdict(low, high):
    """What an interval of a difference says of the claim that the difference is above 0."""
    if low > 0:
        return "holds"
    return "FAILS" if high < 0 else "cannot be told from chance"


def commands_of(config):
    """Name of a run -> its command: script, flag, value, ...: what a reader could type."""
    shared = ["--sd"] if config.sd else []
    shared += ["--eval-samples", str(max(2, min(40, config.samples)))]
    for name in SHARED:
        shared += flags.as_words(name, getattr(config, name))
    for field in fields(rewards.RewardFlags):
        value = getattr(config, field.name)
        if value != field.default:
            shared += flags.as_words(field.name, value)
    table = {}
    for i in range(config.seeds):
        for method, command in METHODS.items():
            words = [config.gold if word == "GOLD" else word for word in command.split()]
            table[f"{method}_seed{i}"] = [*words, *shared, "--seed", str(config.seed + i)]
    return table


def plan(config):
    """What a model draws, one dict per picture: family, split (seen ones first), prompt."""
    rows = []
    for split in ("seen", "unseen"):
        for family, (seen, unseen) in families(config.prompts).items():
            prompts = seen if split == "seen" else unseen
            for prompt in training.spread_evenly(prompts, config.samples):
                rows.append({"family": family, "split": split, "prompt": prompt})
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


def best_of_n(n, pipe, requests, measures, config):
    """The same of the pretrained model's best pictures: the highest reward of n each."""
    prompts = [row["prompt"] for row in requests]
    best_images, best_r = [None] * len(requests), [-math.inf] * len(requests)
    for k in tqdm(range(n), f"best of {n}", leave=False):
        images = draw(pipe, requests, config, k).images  # k = 0: the same noise as all other models
        r = rewards.score(measures.rewards["reward"], images, prompts, config.out)
        for i in range(len(requests)):
            if r[i] > best_r[i]:
                best_r[i], best_images[i] = r[i], images[i]
    kl = [best_of_n_kl(n)] * len(requests)
    return measures.rows(requests, best_images, kl), best_images


def difference(by_model, a, b, metric, split="seen"):
    """Mean of a − b over pictures from the same noise, with its interval; None if there is none."""
    if a not in by_model or b not in by_model:
        return None
    x = tables.picture_means(by_model[a], metric, split)
    y = tables.picture_means(by_model[b], metric, split)
    if len(x) == 0 or len(x) != len(y):
        return None
    mean, low, high = paired_bootstrap(x - y)
    return dict(a=a, b=b, metric=metric, split=split, mean=mean, low=low, high=high,
                verdict=verdict(low, high), pairs=len(x))


def claims(by_model):
    """The slides' claims with their figures; one that fails is a finding, and says so."""
    found = []
    for sentence, a, b, metric, split in CLAIMS:
        row = difference(by_model, a, b, metric, split)
        if row:
            found.append({"claim": sentence, **row})
    return found


def train_all(config):
    """(label, seed, folder) of each run to compare; trains those of METHODS that are missing."""
    if config.runs:
        return [(label, 0, folder) for label, folder in runs.labels(config.runs).items()]
    wanted, out = commands_of(config), Path(config.out, "train")
    commands.train_missing(wanted, out)
    return [(*name.split("_seed"), out / name) for name in wanted]


def compare(config):
    """Trains what is missing, evaluates all, writes tables, figures, claims and index.html."""
    requests = plan(config)
    measures = Measures(config, rewards, diversity_values)  # a wrong flag fails before training
    pipe = models.load_pipeline(config.model, config.device)
    models.encode_prompts(pipe, [row["prompt"] for row in requests])  # and so does an unknown word
    folders = train_all(config)
    rows, images = {}, {}
    found = evaluate(pipe, nullcontext, requests, measures, config)
    rows["pretrained"], images["pretrained"] = found
    if not config.runs:
        seen = [row for row in requests if row["split"] == "seen"]
        queries = config.rounds * config.prompts_per_round * config.samples_per_prompt
        n = max(2, queries // len(seen))
        rows[f"best of {n}"], images[f"best of {n}"] = best_of_n(n, pipe, seen, measures, config)
    for label, seed, folder in tqdm(folders, "evaluating", unit="model"):
        pipe, reference = models.load_run(folder, config.device)
        new_rows, drawn = evaluate(pipe, reference, requests, measures, config)
        rows.setdefault(label, []).extend(dict(row, seed=seed) for row in new_rows)
        images.setdefault(label, drawn)  # of several seeds, the first one's are shown
    summaries = {label: tables.summarize(found, config) for label, found in rows.items()}
    found = [] if config.quick else claims(rows)
    tables.write_evaluation(config.out, rows, summaries, found)
    figures.evaluation(config, requests, rows, summaries, images, found,
                       runs.curves(folders, config.reward))
    return rows, summaries, found


def make_ballot(config, pairs_per_family=4):
    """ballot.html, on which people compare two models on the same noise, and its key."""
    if config.runs and len(config.runs) != 2:
        raise ValueError("--ballot compares two models: give --runs two folders, or none")
    ballot.check_new(config.out)
    few = plan(replace(config, samples=pairs_per_family))
    requests = [row for row in few if row["split"] == "seen"]
    pictures = {}
    for label, seed, folder in train_all(config):
        if config.runs or (label in ("DPOK", "SFT") and int(seed) == 0):
            pipe, _ = models.load_run(folder, config.device)
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
    rows, summaries, found = compare(config)
    print(Path(config.out, "table.md").read_text(encoding="utf-8"))
    print("\n".join(tables.claim_lines(found)))
    print(f"\nAll of it on one page: {config.out}/index.html")
    return rows, summaries, found


if __name__ == "__main__":
    flags.run(main)
