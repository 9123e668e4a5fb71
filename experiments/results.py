"""Every number in one place: runs what is missing, writes small CSV files, renders README.md.

    python experiments/results.py            runs what is missing in runs/results/ (some hours)
    python experiments/results.py --render   only writes the tables of the CSV files into README.md

A CSV file starts with lines "# title: ...", "# command: ...", "# seeds: ...", "# device: ...",
"# date: ...": the table in README.md shows them. Tables in before/ are older, and marked so.
"""
import csv
import datetime
import json
import math
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import early_stopping, overoptimization  # noqa: E402
from experiments import prompt_alignment, samples, tune  # noqa: E402
from support import commands, flags, runs, tables, training  # noqa: E402

ev = import_module("05_eval")  # Config, commands_of

SEEDS = (0, 1, 2)
SEEDS_OF_CLAIMS = (0, 1, 2, 3, 4)
SEEDS_OF_SIDES = (0,)  # of questions beside the road
RAW = ("model", "seed", "split", "family", "prompt", "reward", "gold", "aesthetic", "diversity")
KL_BOUNDS = (100, 1000, math.inf)  # of early stopping, in nats; infinite: labels alone
PENALTIES = {"exact": (), "mse": ("--kl", "mse"), "reward": ("--kl", "reward"),
             "target": ("--target-kl", "10")}
VARIANCES = {"tasks": (), "bias": ("--prompts", "bias", "--prompts-per-round", "1",
                                   "--samples-per-prompt", "64")}
SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3)
CHAPTERS = {"ddpo_defaults": "03_ddpo.py", "dpok_defaults": "04_dpok.py"}
TITLES = {"ddpo_defaults": "03 as it comes: alignment on 128 pictures from fresh noise",
          "dpok_defaults": "04 as it comes: \"four stars\" on 128 pictures from fresh noise",
          "dpok_sweep": "04 with other β: path KL in nats, learned reward and alignment at the end",
          "eval_quick": "05, the quick tour: far too little training to conclude anything",
          "tuning": "Settings of chapter 5's methods: learned reward on 200 pictures of other "
                    "prompts, one seed; the first of each method is the one chosen",
          "eval_seeds": "05 with five seeds and the chosen settings: 1600 queries a training",
          "eval_claims": "05 with five seeds: 95 % intervals over seeds and pictures (unseen: "
                         "seeds and prompts), p after Holm's correction",
          "eval_prices": "05 with five seeds: learned reward at equal queries and at equal UNet "
                         "evaluations",
          "eval_best_of_n": "Best of n of the pretrained model's pictures, on the seen prompts",
          "tiny_sd": "The tiny model, and its rewards",
          "frontier": "\"four stars\": reward and gold at the KL that no method can have less "
                      "of, and at most",
          "early_stopping": "Gold (alignment) of the round that is kept, by method: mean ± s.e. "
                            "over five training seeds; prices in queries and labels",
          "penalties": "04 with other leashes: path KL in nats, learned reward and alignment",
          "variance": "Variance of the gradient after 20 rounds, relative to that with r − mean "
                      "of others",
          "overoptimization": "\"four stars\" on image_reward for 50 rounds: on 128 pictures "
                              "from fresh noise, and gold's best five rounds in hindsight",
          "samples": "The slides' rewards: on 128 pictures from fresh noise",
          "prompt_alignment": "Trained on vlm_alignment: its mean in training, by family",
          "writing": "Paid for vlm_strict on \"n shapes\": on 128 pictures from fresh noise, and "
                     "shares of the film's 32 pictures"}
FIGURES = ("samples.png", "prompt_alignment.png", "prompt_alignment_film.png",
           "overoptimization_noise.png", "overoptimization_writing.png",
           "overoptimization_writing_curves.png")


@dataclass(frozen=True)
class Config:
    render: bool = False  # run nothing, only write the tables into README.md
    out: str = "runs/results"  # folder of the runs


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    if not config.render:
        for name, script in CHAPTERS.items():
            measure_chapter(name, script, Path(config.out))
        measure_sweep(Path(config.out))
        measure_evaluation(Path(config.out), "eval_quick", ["05_eval.py", "--quick"])
        measure_tuning(Path(config.out))
        measure_seeds(Path(config.out))
        for measure in (measure_frontier, measure_early_stopping, measure_penalties,
                        measure_variance, measure_overoptimization, measure_slides):
            measure(Path(config.out))
    render(HERE / "README.md")


def measure_chapter(name, script, out):
    """The chapter's defaults, a run a seed, all its columns before and after training."""
    wanted = {f"{name}_seed{seed}": [script, "--seed", str(seed)] for seed in SEEDS}
    commands.train_missing(wanted, out)
    rows = []
    for seed, run in zip(SEEDS, wanted):
        summary = json.loads(Path(out, run, "evaluation.json").read_text(encoding="utf-8"))
        row = {"seed": seed}
        for column, value in summary.items():
            if isinstance(value, dict):
                for part in ("before", "after", "gain", "gain_se"):
                    row[f"{column} {part}"] = round(value[part], 4)
            else:
                row[column] = round(value)
        rows.append(row)
    write(name, [script, "--seed", "SEED"], SEEDS, rows)


def measure_sweep(out):
    """What each β ends with, from the sweep's run folders."""
    command = ["experiments/sweep.py"]
    commands.start([*command, "--out", str(out), "--name", "sweep"])
    rows = []
    for beta in SWEEP:
        folder = out / f"sweep_beta_{beta:g}"
        summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        row = {"beta": beta}
        for column in ("kl", "reward", "gold"):
            row[column] = round(summary[column]["after"], 4)
            row[f"{column} error"] = round(summary[column]["after_se"], 4)
        rows.append(row)
    write("dpok_sweep", command, (0,), rows)


def measure_evaluation(out, name, command, seeds=(0,)):
    """Chapter 5's table: the columns that its text speaks of."""
    folder = out / name
    if not (folder / "table.csv").is_file():
        commands.start([*command, "--out", str(folder)])
    models = {}
    for cell in tables.read_csv(folder / "table.csv"):
        if cell["column"] in ("reward", "gold", "gold bias", "gold unseen", "path_kl", "diversity"):
            row = models.setdefault(cell["model"], {"model": cell["model"]})
            row[cell["column"]] = round(float(cell["mean"]), 4)
            row[cell["column"] + " error"] = round(float(cell["standard_error"]), 4)
    rows = list(models.values())
    write(name, command, seeds, rows)
    return folder


def measure_tuning(out):
    """The settings that chapter 5's methods were given, and those that they were chosen from."""
    command = ["experiments/tune.py", "--jobs", "2"]
    commands.start([*command, "--out", str(out / "tuning")])
    write("tuning", command, (100,), tune.read_rows(out / "tuning"))


def measure_seeds(out):
    """Chapter 5 with five seeds: tables, claims, figures, and every picture's values."""
    command = ["05_eval.py", "--seeds", "5", "--jobs", "2"]
    folder = measure_evaluation(out, "eval_seeds", command, SEEDS_OF_CLAIMS)
    for file in ("claims", "prices", "best_of_n"):
        rows = [rounded(row) for row in tables.read_csv(folder / f"{file}.csv")]
        write(f"eval_{file}", command, SEEDS_OF_CLAIMS, rows)
    pictures = []
    for row in tables.read_csv(folder / "samples.csv"):
        if not row["model"].startswith("best of"):
            pictures.append(rounded({name: row[name] for name in RAW}))
    (HERE / "raw").mkdir(exist_ok=True)
    tables.write_csv(HERE / "raw" / "eval_seeds.csv", pictures)
    for name in ("queries", "evaluations", "best_of_n", "same_seeds"):
        shutil.copy(folder / f"{name}.png", HERE / "figures" / f"eval_{name}.png")


def rounded(row):
    """A line of a CSV file, its numbers with four decimals; p-values keep all of theirs."""
    short = {}
    for name, text in row.items():
        is_number = "." in text and name not in ("p", "holm", "prompt", "what")
        short[name] = f"{float(text):.4f}" if is_number else text
    return short


def measure_frontier(out):
    """Chapter 5's methods, each trained on one prompt, under the curve that none can beat."""
    methods = ev.Config(prompts="bias", prompts_per_round=1, samples_per_prompt=80)
    folder, wanted = out / "frontier", ev.commands_of(methods)
    commands.train_missing(wanted, folder / "train", jobs=2)
    command = ["experiments/frontier.py", "--runs"]
    commands.start([*command, *[str(folder / "train" / name) for name in wanted], "--out",
                    str(folder)])
    rows = [rounded(row) for row in tables.read_csv(folder / "table.csv")]
    write("frontier", [*command, "RUNS"], (0,), rows)
    shutil.copy(folder / "frontier.png", HERE / "figures" / "frontier.png")


def measure_early_stopping(out):
    """What a rule would have kept of the five seeds' trainings, under three bounds on the KL."""
    folder = out / "early_stopping"
    runs_of_claims = sorted((out / "eval_seeds" / "train").glob("*_seed?"))
    command = ["experiments/early_stopping.py", "--runs"]
    if not (folder / "early_stopping.png").is_file():  # it is written last
        commands.start([*command, *map(str, runs_of_claims), "--out", str(folder)])
    write("early_stopping", [*command, "runs/eval/train/*_seed?"], SEEDS_OF_CLAIMS,
          rows_of_stopping(tables.read_csv(folder / "early_stopping.csv")))


def rows_of_stopping(lines):
    """A line for each method: gold of the pretrained model, of the end, of hindsight and of rules.

    Means over training seeds, each with its s.e.; the price in queries and labels.
    """
    methods = {}
    for line in lines:
        row = {name: float(line[name]) for name in ("round", "queries", "labels_mean", "path_kl",
                                                    "gold")}
        method = line["run"].rpartition("_seed")[0]
        methods.setdefault(method, {}).setdefault(line["run"], []).append(row)
    rows = []
    for method, trainings in methods.items():
        trainings = list(trainings.values())
        golds = {"pretrained": [t[0]["gold"] for t in trainings],
                 "end": [t[-1]["gold"] for t in trainings],
                 "hindsight": [t[early_stopping.hindsights_best(t)]["gold"] for t in trainings]}
        prices = {"end": [t[-1]["queries"] for t in trainings]}
        for bound in KL_BOUNDS:
            stops = [early_stopping.stop_by_rule(t, bound) for t in trainings]
            golds[f"rule, {bound:g} nats"] = [t[k]["gold"] for t, (k, _) in zip(trainings, stops)]
            prices[f"rule, {bound:g} nats"] = [
                early_stopping.price(t, m, early_stopping.Config.labels)
                for t, (_, m) in zip(trainings, stops)]
        row = {"method": method}
        for name, values in golds.items():
            mean, error = training.mean_se(values)
            row |= {name: f"{mean:.3f} ± {error:.3f}"}
        row |= {f"price: {name}": round(training.mean_se(p)[0]) for name, p in prices.items()}
        rows.append(row)
    return rows


def measure_penalties(out):
    """Chapter 4's other leashes."""
    rows = []
    for name, flags_of_it in PENALTIES.items():
        command = ["experiments/penalties.py", *flags_of_it]
        wanted = {f"penalties_{name}_seed{seed}": [*command, "--seed", str(seed)]
                  for seed in SEEDS_OF_SIDES}
        commands.train_missing(wanted, out, jobs=2)
        for seed, run in zip(SEEDS_OF_SIDES, wanted):
            summary = json.loads((out / run / "evaluation.json").read_text(encoding="utf-8"))
            row = {"flags": " ".join(flags_of_it) or "(none: chapter 4's)", "seed": seed}
            for column in ("kl", "reward", "gold"):
                row[column] = round(summary[column]["after"], 4)
                row[f"{column} error"] = round(summary[column]["after_se"], 4)
            rows.append(row)
    write("penalties", ["experiments/penalties.py", "FLAGS"], SEEDS_OF_SIDES, rows)


def measure_variance(out):
    """The variance of the gradient with three baselines."""
    rows = []
    for name, flags_of_it in VARIANCES.items():
        for seed in SEEDS_OF_SIDES:
            folder = out / f"variance_{name}_seed{seed}"
            command = ["experiments/variance.py", *flags_of_it, "--seed", str(seed)]
            if not (folder / "variance.csv").is_file():
                commands.start([*command, "--out", str(folder)])
            row = {"flags": " ".join(flags_of_it) or "(none: five prompts)", "seed": seed}
            for line in tables.read_csv(folder / "variance.csv"):
                row[line["advantage"]] = round(float(line["relative"]), 3)
            rows.append(row)
    write("variance", ["experiments/variance.py", "FLAGS"], SEEDS_OF_SIDES, rows)


def measure_overoptimization(out):
    """Training on and on: proxy and gold of each β at the end, and in hindsight."""
    command = ["experiments/overoptimization.py", "--only", "proxy"]
    commands.start([*command, "--out", str(out)])
    rows = []
    for beta in overoptimization.PROXY_BETAS:
        folder = out / f"overoptimization_beta_{beta:g}"
        golds = [row["gold"] for row in runs.read_rows(folder / "metrics.csv")]
        means = overoptimization.running_mean(golds)
        best = overoptimization.hindsights_best(golds)
        rows.append({"beta": beta} | row_of_run(folder) | {
            "hindsight's best round": best + 1, "hindsight's gold": round(means[best], 4)})
    write("overoptimization", command, (0,), rows)
    shutil.copy(out / "overoptimization.png", HERE / "figures" / "overoptimization.png")


def measure_slides(out):
    """The slides' pictures: DDPO's samples, prompt alignment, noise, and a model that writes."""
    command = ["experiments/samples.py"]
    commands.start([*command, "--out", str(out)])
    rows = [row_of_run(out / f"samples_{reward}") for reward in samples.REWARDS]
    write("samples", command, (0,), rows)

    command = ["experiments/prompt_alignment.py"]
    commands.start([*command, "--out", str(out)])
    families = prompt_alignment.family_of_prompts(prompt_alignment.Config())
    rows = []
    for family, (_, means) in prompt_alignment.read_curves(
            out / "prompt_alignment", families).items():
        rows.append({"family": family, "first round": round(means[0], 4),
                     "last four rounds": round(means[-1], 4)})
    write("prompt_alignment", command, (0,), rows)

    command = ["experiments/overoptimization.py", "--only", "writing"]
    commands.start([*command, "--out", str(out)])
    rows = []
    for beta in overoptimization.WRITING_BETAS:
        folder = out / f"overoptimization_writing_beta_{beta:g}"
        prompts, frames = runs.read_film(folder)
        frames = list(frames.values())
        row = {"beta": beta} | row_of_run(folder)
        for name, images in (("before", frames[0]), ("after", frames[-1])):
            asked_for, some = overoptimization.written_shares(images, prompts)
            row |= {f"number written {name}": round(asked_for, 2), f"any digit {name}":
                    round(some, 2)}
        rows.append(row)
    write("writing", command, (0,), rows)

    commands.start(["experiments/overoptimization.py", "--only", "noise", "--out", str(out)])
    for name in FIGURES:
        shutil.copy(out / name, HERE / "figures" / name)
    shutil.copy(out / "sweep.png", HERE / "figures" / "dpok_sweep.png")


def row_of_run(folder):
    """What a run was before and after training, on fresh noise, and what it gained."""
    summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    row = {"run": folder.name, "queries": summary["queries"]}
    for column in ("reward", "gold", "kl"):
        if column in summary:
            for part in ("before", "after", "gain", "gain_se"):
                row[f"{column} {part}"] = round(summary[column][part], 4)
    return row


def write(name, command, seeds, rows):
    """A CSV file that says what made it; one with the same rows keeps its device and date."""
    path = HERE / f"{name}.csv"
    cells = [[str(value) for value in row.values()] for row in rows]
    if path.is_file() and read(path)[1][1:] == cells:
        return
    device = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    head = {"title": TITLES[name], "command": " ".join(["python", *command]),
            "seeds": ", ".join(map(str, seeds)), "device": device,
            "date": datetime.date.today().isoformat()}
    tables.write_csv(path, rows)
    comments = "".join(f"# {key}: {value}\n" for key, value in head.items())
    path.write_text(comments + path.read_text(encoding="utf-8"), encoding="utf-8")


def read(path):
    """A CSV file's head as a dict, and its rows as lists of cells, the first of them the names."""
    head, lines = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            key, _, value = line[2:].partition(": ")
            head[key] = value
        else:
            lines.append(line)
    return head, list(csv.reader(lines))


def table(path):
    """A CSV file as Markdown, under what made it."""
    head, (names, *rows) = read(path)
    lines = [f"**{head.pop('title')}**", ""]
    lines += tables.markdown(names, rows)
    made = "; ".join(f"{key}: {value}" for key, value in head.items())
    return "\n".join([*lines, "", f"`{path.name}`. {made}."])


def render(readme, tables_in=HERE):
    """README.md with each table between its marks <!-- NAME.csv --> and <!-- end --> made anew."""
    text = readme.read_text(encoding="utf-8")
    parts = text.split("<!-- ")
    for i, part in enumerate(parts):
        name, _, _ = part.partition(" -->")
        if name.endswith(".csv"):
            parts[i] = f"{name} -->\n{table(tables_in / name)}\n"
    readme.write_text("<!-- ".join(parts), encoding="utf-8")


if __name__ == "__main__":
    flags.run(main)
