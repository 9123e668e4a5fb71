"""05 · Evaluation: who is better, at what price, and when it goes wrong.

WHAT YOU LEARN. A reward that went up proves little: every method here can raise it. What counts is
what it cost (reward queries, nats from the pretrained model), what it did to what we *meant* (the
gold reward, which nothing was trained on), to variety, to other qualities, and to prompts that were
never trained; and whether a difference is larger than chance. The same prompts, the same number of
reward queries and the same learned reward for all:

    RWR        pretrained pictures, weighed by exp(r/τ)/Z            supervised (DPOK, Figure 1a)
    SFT        the best fifth of the same pictures (sparse RWR)      supervised
    DDPO_SF    REINFORCE: one update a round       chapter 3's estimators, in chapter 4's loop
    DDPO_IS    importance sampling: several updates a round
    DPOK       the same with a KL term and a value function
    best of n  no training: draw n pretrained pictures, keep the best, at as many queries (n ≥ 2)

    mean ± s.e. = x̄ ± s/√N      path KL = E[Σ_t KL_t], in nats
    diversity = mean_i (1 − mean_{j≠i} cos(f_i, f_j)), f CLIP's embedding of one prompt's pictures;
                every picture is in all these means, so deviations count twice in its s.e.
    KL of best of n ≤ log n − (n−1)/n                            (Beirami et al., arXiv 2401.01879)

HOW TO RUN. `python 05_eval.py` trains what is missing in runs/eval/train/, evaluates everything on
noise that no training saw, and writes runs/eval/index.html: table, claims and figures on one page.
23 minutes from nothing on two CPU cores, two when the runs are there. `--quick` is a tour of three
minutes in runs/quick/, `--seeds 3` trains every method three times, `--runs A B` evaluates any run
folders of chapters 3 and 4. People are asked with `--ballot` and counted with `--votes`.

    samples.csv, samples_long.csv   one line a picture: what all means and intervals are made of
    table.md, table.csv, embeddings.safetensors     the table; what "diversity" was computed from
    differences.csv, claims.md                      what is beyond chance, in figures and in words

DEPARTURES. DPOK's SFT weighs by the reward itself; here RWR weighs by its exponential, and SFT
keeps the best fifth. Standard errors are over pictures, each averaged over the training seeds: they
leave out what other seeds would change.

EXERCISES. (1) Which method is best per nat rather than per query? (2) Evaluate chapter 3's default
run with --runs: what does training on the gold reward itself give? (3) Vote on your own ballot,
then have somebody else do it: how far do two raters agree?
"""
import csv
import json
import math
import secrets
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from tiny_sd import ballot, figures, shapes
from tiny_sd import reward_models as nets

mdp = import_module("01_mdp")  # load_pipeline, rollout, kl_divergence, ...
rewards = import_module("02_rewards")  # Models, get_reward, score, QUESTION
ddpo = import_module("03_ddpo")  # at_least, mean_se
dpok = import_module("04_dpok")  # train, step_means, pretrained, per_step, TASKS

METHODS = {  # what of chapter 4's Config makes each method; all else is the same
    "RWR": dict(method="sft", sft_weights="rwr"),
    "SFT": dict(method="sft", sft_weights="sparse"),
    "DDPO_SF": dict(method="ddpo", updates_per_round=1),
    "DDPO_IS": dict(method="ddpo"),
    "DPOK": dict(method="dpok")}
BETAS = (0.0, 0.01, 0.1)  # of the runs that go on far too long


@dataclass(frozen=True)
class Config(rewards.Models):
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, or a name on the Hugging Face hub
    runs: tuple[str, ...] = ()  # evaluate these run folders; default: train and compare METHODS
    prompts: str = "tasks"  # trained on: tasks, tasks_sd, or whatever chapter 4 takes
    reward: str = "image_reward"  # what all are trained on
    gold: str = "alignment"  # what is meant
    others: tuple[str, ...] = ("aesthetic", "incompressibility")  # measured only; the last is kB
    rounds: int = 20  # rounds of training
    prompts_per_round: int = 5  # prompts a round
    samples_per_prompt: int = 16  # pictures of each of them
    long_rounds: int = 50  # rounds of the runs that go on far too long; 0 leaves them out
    long_samples: int = 48  # pictures a round of theirs
    samples: int = 50  # pictures a model and prompt family, seen and unseen prompts each
    seeds: int = 1  # training runs of each method
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none
    batch_size: int = 64  # pictures a UNet call; memory, not result
    quick: bool = False  # a tour of three minutes: too little training, and figures that say so
    ballot: bool = False  # write ballot.html, on which people compare DPOK with SFT or two --runs
    votes: tuple[str, ...] = ()  # JSON files that raters downloaded from ballot.html: count them
    seed: int = 0  # seed of the evaluation's noise and of the first training run
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one
    out: str | None = None  # all goes here; default: runs/eval, or quick or eval_runs with the flag


@dataclass(frozen=True)
class Tour(Config):  # the defaults of --quick
    rounds: int = 4
    samples_per_prompt: int = 4
    long_rounds: int = 8
    long_samples: int = 16
    samples: int = 12


# ---- statistics -----------------------------------------------------------------------------


def paired_bootstrap(difference, seed=0, draws=10000, level=0.95):
    """Mean of N paired differences, and the interval that holds `level` of its bootstrap means.

    Pictures from the same noise are compared with each other, so what is common to both drops out.
    A difference is beyond chance where the interval leaves out 0.
    """
    N = len(difference)
    generator = torch.Generator().manual_seed(seed)
    means = difference[torch.randint(N, (draws, N), generator=generator)].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(means))
    return difference.mean().item(), low.item(), high.item()


def novelty(f):
    """1 − mean_{j≠i} cos(f_i, f_j) of each picture i; its mean is diversity.  (N,D) -> (N,)"""
    f = f.double() / f.double().norm(dim=1, keepdim=True)
    return 1 - ((f @ f.T).sum(1) - 1) / (len(f) - 1)


def best_of_n_kl(n):
    """KL(best of n ‖ one draw) ≤ log n − (n − 1)/n, in nats; equal where no two rewards tie."""
    return math.log(n) - (n - 1) / n


def early_stop(gold, window=5):
    """Index of gold at which its mean over the last `window` rounds is highest."""
    parts = [gold[max(0, i - window + 1):i + 1] for i in range(len(gold))]
    means = [sum(part) / len(part) for part in parts]
    return max(range(len(gold)), key=means.__getitem__)


# ---- training what is missing ---------------------------------------------------------------


def jobs(config):
    """name -> chapter 4's Config of every run that the comparison needs."""
    shared = dict(model=config.model, reward=config.reward, gold=config.gold, eta=config.eta,
                  guidance_scale=config.guidance_scale, num_steps=config.num_steps,
                  batch_size=config.batch_size, eval_samples=min(40, config.samples),
                  device=config.device,
                  out=f"{config.out}/train",
                  **{name: getattr(config, name) for name in rewards.Models.__annotations__})
    compared = dict(prompts=config.prompts, rounds=config.rounds,
                    prompts_per_round=config.prompts_per_round,
                    samples_per_prompt=config.samples_per_prompt)
    runs = {f"{name}_seed{i}": dict(compared, seed=config.seed + i, **how)
            for i in range(config.seeds) for name, how in METHODS.items()}
    if config.long_rounds:
        last = dpok.get_prompts(config.prompts)[-1] + " "  # the space: a prompt, even of one word
        long = dict(prompts=last, rounds=config.long_rounds,
                    samples_per_prompt=config.long_samples, learning_rate=2e-3, seed=config.seed)
        runs |= {f"long_beta_{beta:g}": dict(long, beta=beta) for beta in BETAS}
        runs["noise"] = {**long, "method": "ddpo"}
        shared_noise = {**shared, "reward": "incompressibility"}
    return {name: dpok.Config(**(shared_noise if name == "noise" else shared), **how, name=name)
            for name, how in runs.items()}


def train_missing(wanted):
    """Trains the jobs that have no finished run; ValueError if one was made with other settings."""
    missing = []
    for name, job in wanted.items():
        folder = Path(job.out, name)
        if (folder / "model" / "model_index.json").is_file():
            saved, now = json.loads((folder / "config.json").read_text()), asdict(job)
            for key in set(now) - {"out", "device", "batch_size", "eval_samples"}:
                value = list(now[key]) if isinstance(now[key], tuple) else now[key]
                if saved.get(key) != value:
                    raise ValueError(f"--out: {folder} was trained with {key} = {saved.get(key)}, "
                                     f"not {value}; remove it or choose another --out")
        else:
            missing.append(name)
    for i, name in enumerate(missing):
        folder = Path(wanted[name].out, name)
        if folder.exists():  # cut short: never deleted, only moved out of the way
            folder.rename(next(path for k in range(10**6) if not (
                path := folder.with_name(f"{name}-unfinished-{k}")).exists()))
        print(f"training {name}, {i + 1} of {len(missing)}")
        dpok.train(wanted[name])


def read_metrics(folder):
    """metrics.csv of a run as a list of dicts of numbers; [] where there is none."""
    path = Path(folder, "metrics.csv")
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


# ---- evaluating a model ---------------------------------------------------------------------

UNSEEN_SD = dict(color=["A green colored cat"], count=["Four birds in the park"],
                 composition=["A cat and a cup"], location=["A lion on the moon"], bias=[])


def plan(config):
    """(family, "seen" or "unseen", prompt) of each picture that a model draws; seen ones first."""
    sd = config.prompts == "tasks_sd"
    families = {config.prompts: (dpok.get_prompts(config.prompts), [])}
    if config.prompts in ("tasks", "tasks_sd"):
        families = {name: ([pair[sd]], UNSEEN_SD[name] if sd else
                           shapes.prompts_of(name, held_out=True))
                    for name, pair in dpok.TASKS.items()}
    return [(family, split, prompts[i * len(prompts) // config.samples
                                    if len(prompts) > config.samples else i % len(prompts)])
            for k, split in enumerate(("seen", "unseen"))
            for family, prompts in ((name, both[k]) for name, both in families.items()) if prompts
            for i in range(config.samples)]


class Measures:
    """All that is measured of pictures: rewards by name, what is said of them, CLIP's embedding."""

    def __init__(self, config):
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        flags = {config.reward: "--reward", config.gold: "--gold"}
        self.rewards = {name: rewards.get_reward(name, config, device, flags.get(name, "--others"))
                        for name in (config.reward, config.gold, *config.others)}
        self.ask = nets.Judge() if config.vlm == "judge" else nets.Llava(config.vlm, device)
        self.clip = nets.load_clip(config.clip).to(device)
        self.out = config.out

    @torch.no_grad()
    def __call__(self, images, prompts):
        values = {name: rewards.score(reward, images, prompts, self.out).tolist()
                  for name, reward in self.rewards.items()}
        values["description"] = self.ask(images, [rewards.QUESTION] * len(images))
        size, embeddings = self.clip.config.vision_config.image_size, []
        for i in range(0, len(images), 64):
            pixels = nets.clip_pixels(images[i:i + 64], size, self.clip.device)
            embeddings.append(self.clip.get_image_features(pixel_values=pixels).pooler_output.cpu())
        return values, torch.cat(embeddings)


def draw(pipe, prompts, config, seed):
    """Trajectories on the evaluation's noise: the same for every model, seen by no training."""
    return mdp.rollout(pipe, prompts, config.num_steps, config.eta, config.guidance_scale,
                       seed=mdp.FRESH + 2**30 + seed, batch_size=config.batch_size)


def evaluate(label, seed, path, base, asked, measures, config):
    """Rows (a dict a picture) and embeddings of one model, on noise that no training ever saw."""
    pipe = mdp.load_pipeline(path, config.device)
    prompts = [prompt for _, _, prompt in asked]
    run = draw(pipe, prompts, config, config.seed)
    with dpok.pretrained(pipe, base):
        pre_means, std = dpok.step_means(pipe, run, config)
    kl = dpok.per_step(mdp.kl_divergence, run.means, pre_means, std).sum(1).tolist()
    return as_rows(label, seed, asked, run.images, kl, measures)


def best_of_n(n, base_path, asked, measures, config):
    """The same of the pretrained model's best pictures: the highest of n rewards each."""
    pipe = mdp.load_pipeline(base_path, config.device)
    prompts, best = [prompt for _, _, prompt in asked], None
    for k in tqdm(range(n), f"best of {n}", leave=False):
        images = draw(pipe, prompts, config, config.seed + 1000 * k).images  # k = 0: the same noise
        r = rewards.score(measures.rewards[config.reward], images, prompts, config.out).tolist()
        new = list(zip(r, images))
        best = new if best is None else [max(a, b, key=lambda v: v[0]) for a, b in zip(best, new)]
    images = [image for _, image in best]
    return as_rows(f"best of {n}", 0, asked, images, [best_of_n_kl(n)] * len(asked), measures)


def evaluate_long(wanted, base, measures, config):
    """label -> rows of the runs that went on too long, on the one prompt that they trained on."""
    rows = {}
    for name, job in wanted.items():
        if name.startswith("long"):
            (prompt,), label = dpok.get_prompts(job.prompts), f"long β={job.beta:g}"
            asked = [("long", "seen", prompt)] * config.samples
            rows[label] = evaluate(label, 0, f"{job.out}/{name}/model", base, asked, measures,
                                   config)[0]
    return rows


def as_rows(label, seed, asked, images, kl, measures):
    """All measures of one model's pictures -> rows, CLIP embeddings (N,D), the pictures."""
    values, embeddings = measures(images, [prompt for _, _, prompt in asked])
    rows = [dict(model=label, seed=seed, family=family, split=split, prompt=prompt, picture=i,
                 path_kl=kl[i], **{name: column[i] for name, column in values.items()})
            for i, (family, split, prompt) in enumerate(asked)]
    for group in by_prompt(rows).values():  # novel among the same prompt's pictures
        new = novelty(embeddings[group]).tolist() if len(group) > 1 else [math.nan]
        for i, value in zip(group, new):
            rows[i]["novelty"] = value
    return rows, embeddings, images


def by_prompt(rows):
    """(prompt, seed) -> indices of the rows that have them."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["prompt"], row["seed"]].append(i)
    return groups


# ---- the table, from the rows ---------------------------------------------------------------


def per_picture(rows, metric, split="seen", family=None):
    """A metric of each picture, averaged over the training seeds, which share the noise.  (N,)

    These are independent, so errors and intervals are made of them. Only novelties are not: a mean
    of pair distances moves by 2·(v_i − m) with picture i, m its prompt's mean (Hájek's projection),
    so each is returned as m + 2·(v_i − m); their mean stays.
    """
    found, prompts = defaultdict(list), {}
    for row in rows:
        if row["split"] == split and family in (None, row["family"]):
            found[row["picture"]].append(row[metric])
            prompts[row["picture"]] = row["prompt"]
    values = torch.tensor([sum(v) / len(v) for _, v in sorted(found.items())], dtype=torch.float64)
    if metric == "novelty":
        for prompt in set(prompts.values()):
            own = torch.tensor([other == prompt for _, other in sorted(prompts.items())])
            values[own] = values[own].mean() + 2 * (values[own] - values[own].mean())
    return values


def summarize(rows, config):
    """column -> (mean, s.e., N) of one model; N pictures, or prompts (distinct)."""
    seen, kinds = [row for row in rows if row["split"] == "seen"], defaultdict(list)
    for (prompt, _), group in by_prompt(seen).items():
        kinds[prompt].append(len({seen[i]["description"] for i in group}))
    novelties = per_picture(rows, "novelty")
    table = {"reward": per_picture(rows, config.reward), "gold": per_picture(rows, config.gold),
             **{f"gold {family}": per_picture(rows, config.gold, family=family)
                for family in dict.fromkeys(row["family"] for row in seen)},
             "gold unseen": per_picture(rows, config.gold, "unseen"),
             **{name: per_picture(rows, name) for name in config.others},
             "path KL": per_picture(rows, "path_kl"),
             "diversity": novelties[~novelties.isnan()],
             "distinct": [sum(n) / len(n) for n in kinds.values()]}
    return {name: (*ddpo.mean_se(v), len(v)) for name, v in table.items() if len(v)}


def difference(by_model, a, b, metric, split="seen"):
    """Mean of a − b over pictures from the same noise, with its interval; None if there is none."""
    if not (a in by_model and b in by_model):
        return None
    x, y = (per_picture(by_model[name], metric, split) for name in (a, b))
    if len(x) == 0 or len(x) != len(y) or (x - y).isnan().any():
        return None
    mean, low, high = paired_bootstrap(x - y)
    return dict(metric=metric, split=split, a=a, b=b, mean=mean, low=low, high=high,
                beyond_chance=low > 0 or high < 0, pairs=len(x))


def differences(by_model, config):
    """`difference` for each pair of models, in proxy, gold and diversity, seen and unseen."""
    names, metrics = list(by_model), (config.reward, config.gold, "novelty")
    found = [difference(by_model, a, b, metric, split) for i, b in enumerate(names)
             for a in names[i + 1:] for metric in metrics for split in ("seen", "unseen")]
    return [row for row in found if row]


# ---- claims ---------------------------------------------------------------------------------


def verdict(low, high):
    """What an interval of a difference says of the claim that the difference is above 0."""
    return "holds" if low > 0 else "FAILS" if high < 0 else "cannot be told from chance"


def claims(by_model, long, config):
    """The slides' claims as sentences with figures; one that fails is a finding, and says so."""
    lines = []

    def say(text, a, b, metric, split="seen"):
        if d := difference(by_model, a, b, metric, split):
            lines.append("{}: {} ({a} − {b}, {metric}: {mean:+.3f}, 95 % interval {low:+.3f} to "
                         "{high:+.3f}, {pairs} pairs).".format(
                             text, verdict(d["low"], d["high"]), **d))

    for rl in ("DDPO_IS", "DPOK"):
        for supervised in ("SFT", "RWR"):
            say("RL is above supervised fine-tuning at equal queries", rl, supervised,
                config.reward)
    say("Importance sampling is above the score function per query", "DDPO_IS", "DDPO_SF",
        config.reward)
    say("The score function is above RWR per query", "DDPO_SF", "RWR", config.reward)
    say("With the KL term gold ends above that of training without it", "DPOK", "DDPO_IS",
        config.gold)
    say("With the KL term diversity ends above that of training without it", "DPOK", "DDPO_IS",
        "novelty")
    for metric, lost in ((config.gold, "gold"), ("novelty", "diversity")):
        for beta in BETAS[1:]:
            say(f"Trained too long, the KL term keeps {lost} that β = 0 loses",
                f"long β={beta:g}", "long β=0", metric)
    for name in ("DDPO_IS", "DPOK"):
        say("What is learned carries over to unseen combinations", name, "pretrained",
            config.gold, "unseen")
    for beta, rows in long.items():
        gold = [row["gold"] for row in rows]
        stop, end = early_stop(gold), slice(-5, None)
        lines.append(
            f"Trained for {len(rows)} rounds with β = {beta:g}: over the last five {config.reward} "
            f"is {ddpo.mean_se([row['reward'] for row in rows[end]])[0]:.3f}, {config.gold} "
            f"{ddpo.mean_se(gold[end])[0]:.3f} at {rows[-1]['kl']:.0f} nats; {config.gold} was "
            f"best, {ddpo.mean_se(gold[max(0, stop - 4):stop + 1])[0]:.3f}, at round {stop + 1}.")
    return lines


# ---- everything together --------------------------------------------------------------------


def table_lines(summaries, extra):
    """The table as Markdown: mean ± standard error; extra: queries and seconds by model."""
    columns = list(dict.fromkeys(column for table in summaries.values() for column in table))
    counts = {c: sorted({table[c][2] for table in summaries.values() if c in table})
              for c in columns}
    head = [f"{c} (N = {'/'.join(map(str, counts[c]))})" for c in columns]
    lines = ["| Model | " + " | ".join(head) + " | reward queries | training, s |",
             "|" + " --- |" * (len(columns) + 3)]
    for name, table in summaries.items():
        cells = [("{:.3f} ± {:.3f}".format(*table[c][:2]) if c in table else "–") for c in columns]
        if name.startswith("best of"):  # the only KL that is not measured
            cells[columns.index("path KL")] = "≤ {:.3f}".format(table["path KL"][0])
        lines.append("| {} | {} | {:.0f} | {:.0f} |".format(name, " | ".join(cells), *extra[name]))
    return lines


def write_csv(path, rows):
    """One line a dict; no file without rows, not even an earlier one."""
    if not rows:
        return path.unlink(missing_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


FIGURES = dict(
    same_seeds="Same noise in each column (DPOK, Figure 2): one row a model. Only best of n chose, "
               "from that noise and others.",
    scores="Mean ± standard error of the proxy and of what it does not know (DPOK, Figure 3).",
    queries="Reward of freshly drawn pictures against reward queries (DDPO's curves).",
    overoptimization="Proxy and gold against path KL, trained on and on; dots: early stopping.",
    noise="Paid for incompressibility for too long, from top to bottom: the same seeds.",
    generalization="Gold on --prompts (seen) and on combinations that no training saw (unseen).")


def given_runs(config):
    """label -> model of each folder of --runs; ValueError unless each holds a finished run."""
    for folder in config.runs:
        if not Path(folder, "model", "model_index.json").is_file():
            raise ValueError(f"--runs {folder}: no finished run; its model/ is missing")
    folders = [Path(folder).resolve() for folder in config.runs]
    if len(set(folders)) < len(folders):
        raise ValueError("--runs: a folder is given twice")
    names = [folder.name.replace("|", "_") for folder in folders]  # two may have one name
    return {name if names.count(name) == 1 and name != "pretrained" else folder: f"{folder}/model"
            for name, folder in zip(names, config.runs)}


def compare(config):
    """Trains what is missing, evaluates everything, writes tables, figures, claims, index.html."""
    out, wanted = Path(config.out), {} if config.runs else jobs(config)
    asked, measures = plan(config), Measures(config)  # whatever is wrong shows before training
    base = mdp.load_pipeline(config.model, config.device)
    mdp.encode_prompts(base, [prompt for _, _, prompt in asked])
    base = base.unet.requires_grad_(False)
    given = given_runs(config)
    out.mkdir(parents=True, exist_ok=True)
    train_missing(wanted)
    models = [("pretrained", 0, config.model)]
    models += [(label, 0, path) for label, path in given.items()]
    models += [(name.rpartition("_seed")[0], job.seed - config.seed, f"{job.out}/{name}/model")
               for name, job in wanted.items() if "_seed" in name]
    budget = config.rounds * config.prompts_per_round * config.samples_per_prompt
    n = max(2, budget // sum(split == "seen" for _, split, _ in asked))
    rows, vectors, pictures, curves, extra = {}, {}, {}, defaultdict(list), {}
    seeds = 1 if config.runs else config.seeds
    for label, seed, path in tqdm(models, "evaluating", unit="model"):
        got = evaluate(label, seed, path, base, asked, measures, config)
        keep(got, label, rows, vectors, pictures)
        metrics = read_metrics(Path(path).parent) if label != "pretrained" else []
        settings = Path(path).with_name("config.json")  # only equal rewards share an axis
        if metrics and json.loads(settings.read_text()).get("reward") == config.reward:
            curves[label].append(metrics)
        seconds = sum(value for row in metrics for key, value in row.items()
                      if key == "seconds" or key.endswith("_s")) / seeds
        extra[label] = (metrics[-1]["queries"] if metrics else 0,
                        extra.get(label, (0, 0))[1] + seconds)
    if not config.runs:
        only_seen = [a for a in asked if a[1] == "seen"]
        label = f"best of {n}"
        got = best_of_n(n, config.model, only_seen, measures, config)
        keep(got, label, rows, vectors, pictures)
        extra[label] = n * len(only_seen), 0

    long_rows = evaluate_long(wanted, base, measures, config)
    summaries = {label: summarize(rows[label], config) for label in rows}
    long = {job.beta: read_metrics(Path(job.out, name)) for name, job in wanted.items()
            if name.startswith("long")}
    table, said = table_lines(summaries, extra), claims(rows | long_rows, long, config)
    write_csv(out / "samples.csv", [row for label in rows for row in rows[label]])
    write_csv(out / "samples_long.csv", [row for part in long_rows.values() for row in part])
    write_csv(out / "table.csv", [
        dict(model=label, column=column, mean=m, standard_error=e, N=count)
        for label, summary in summaries.items() for column, (m, e, count) in summary.items()])
    write_csv(out / "differences.csv", differences(rows, config))
    save_file({label: torch.cat(v) for label, v in vectors.items()}, out / "embeddings.safetensors")
    (out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    (out / "claims.md").write_text("".join(f"- {line}\n" for line in said), encoding="utf-8")

    draw_figures(out, asked, rows, summaries, pictures, curves, long, config)
    note = (f"<p>{'Measured' if config.runs else 'Trained on'}: {config.reward}; meant: "
            f"{config.gold}. Mean ± standard error.</p>")
    quick = "<p><b>A quick tour: far too little training to conclude anything.</b></p>"
    figures.page(out / "index.html", table, said, FIGURES, quick * config.quick + note)
    return summaries, said


def draw_figures(out, asked, rows, summaries, pictures, curves, long, config):
    """The figures of FIGURES: what goes into each; tiny_sd/figures.py draws it."""
    for name in FIGURES:  # an earlier call's must not end up on this one's page
        (out / f"{name}.png").unlink(missing_ok=True)
    quick = "QUICK TOUR, far too little training: " * config.quick
    show = [i for i, (_, split, _) in enumerate(asked) if split == "seen"]
    show = [i for k, i in enumerate(show) if k % config.samples < 2][:12]  # two of each family
    grid, path = [[images[i] for i in show] for images in pictures.values()], out / "same_seeds.png"
    figures.sheet(path, grid, list(pictures), [asked[i][2] for i in show])
    figures.frame(path, path, quick + "The same noise in each column")

    names = {"reward": f"reward: {config.reward}", "gold": f"gold: {config.gold}"}
    panels = {names.get(column, column): {
        model: table[column] for model, table in summaries.items() if column in table}
        for column in ("reward", "gold", *config.others[:1], "diversity")}
    panels = {name: models for name, models in panels.items() if models}
    figures.bars(out / "scores.png", panels, quick + "Mean ± standard error on the seen prompts")

    groups = defaultdict(dict)
    for model in rows:
        if not model.startswith("best of"):  # which has no picture of an unseen prompt
            golds = defaultdict(list)
            for row in rows[model]:
                golds[f"{row['family']}\n{row['split']}"].append(row[config.gold])
            groups[model] = {name: ddpo.mean_se(values) for name, values in golds.items()}
    figures.groups(out / "generalization.png", groups, config.gold,
                   quick + "Seen prompts, and combinations that no training saw")

    lines = {}
    for model in filter(curves.get, curves):
        runs = [[row["reward"] for row in run] for run in curves[model]]
        lines[model] = ([row["queries"] for row in curves[model][0]], torch.tensor(
            [[ddpo.mean_se(r[max(0, i - 2):i + 1])[0] for i in range(len(r))] for r in runs]))
    if lines:
        figures.queries(out / "queries.png", lines, config.reward,
                        quick + "Reward against reward queries, mean of three rounds")
    if long:
        figures.overoptimization(
            out / "overoptimization.png",
            {f"β = {beta:g}": (run, early_stop([row["gold"] for row in run]))
             for beta, run in long.items()}, dict(reward=config.reward, gold=config.gold),
            quick + "Training on and on; dots: where early stopping would stop")
        figures.frame(out / "noise.png", out / "train" / "noise" / "film.png",
                      quick + "Paid for incompressibility, from top to bottom")


def keep(got, label, rows, vectors, pictures):
    """Adds what as_rows returned to the model's; of several seeds the first one's pictures stay."""
    for store, value in zip((rows, vectors), got):
        store.setdefault(label, []).extend(value if store is rows else [value])
    pictures.setdefault(label, got[2])


def write_ballot(config, pairs_per_family=4):
    """ballot.html: two models on the same noise, for raters; ballot_key.json: which is which."""
    out = Path(config.out)
    if (out / "ballot_key.json").exists():  # votes on it may be under way
        raise ValueError(f"--ballot: there is one in {out}; move ballot_key.json away first")
    if config.runs and len(config.runs) != 2:
        raise ValueError("--ballot compares two models: give --runs two folders, or none")
    duel = given_runs(config)
    if not duel:
        pair = {name: jobs(config)[f"{name}_seed0"] for name in ("DPOK", "SFT")}
        train_missing({job.name: job for job in pair.values()})
        duel = {name: f"{job.out}/{job.name}/model" for name, job in pair.items()}
    out.mkdir(parents=True, exist_ok=True)
    asked = [a for i, a in enumerate(plan(config))
             if a[1] == "seen" and i % config.samples < pairs_per_family]
    prompts = [prompt for _, _, prompt in asked]
    ours, theirs = (draw(mdp.load_pipeline(path, config.device), prompts, config,
                         config.seed).images for path in duel.values())
    pairs = [dict(prompt=p, a=a, b=b) for p, a, b in zip(prompts, ours, theirs)]
    # Not config.seed: who knows the seed knows the sides.
    page, key = ballot.make_ballot(pairs, secrets.randbits(64), tuple(duel))
    (out / "ballot.html").write_text(page, encoding="utf-8")
    (out / "ballot_key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    print(f"For raters, {len(pairs)} pairs: {out}/ballot.html; not for them: {out}/ballot_key.json"
          f"\nCount what they send back: python 05_eval.py --out {out} --votes votes_*.json")


def main(argv=None):
    config = mdp.parse_config(Config, __doc__, argv)
    start = time.perf_counter()
    if config.quick:
        config = mdp.parse_config(Tour, __doc__, argv)
    out = "runs/quick" if config.quick else "runs/eval_runs" if config.runs else "runs/eval"
    config = replace(config, out=config.out or out)
    ddpo.at_least(config, rounds=1, prompts_per_round=1, samples_per_prompt=2, long_rounds=0,
                  long_samples=2, samples=2, seeds=1, num_steps=1, batch_size=1)
    if config.votes:
        return print(ballot.count_votes(config.votes, Path(config.out)))
    if config.ballot:
        return write_ballot(config)
    summaries, said = compare(config)
    print(Path(config.out, "table.md").read_text(encoding="utf-8"))
    print("\n".join(said))
    print(f"\nAll of it on one page: {config.out}/index.html; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    mdp.run_main(main)
