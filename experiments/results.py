"""Every number in one place: runs what is missing, writes small CSV files, renders README.md.

    python experiments/results.py            runs what is missing in runs/results/ (some hours)
    python experiments/results.py --render   only writes the tables of the CSV files into README.md

A CSV file starts with lines "# title: ...", "# command: ...", "# seeds: ...", "# device: ...",
"# date: ...": the table in README.md shows them. Tables in before/ are older, and marked so.
"""
import csv
import datetime
import math
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import early_stopping, overoptimization, prompt_alignment  # noqa: E402
from experiments import samples, sweep, tables, tune  # noqa: E402
from support import commands, flags, runs, training  # noqa: E402

ev = import_module("05_eval")  # Config, commands_of

RAW = ("model", "seed", "split", "family", "prompt", "reward", "gold", "aesthetic", "diversity")
SHOWN = ("model", "reward", "gold", "gold bias", "gold unseen", "path_kl", "diversity")
KL_BOUNDS = (100, 1000, math.inf)  # of early stopping, in nats; infinite: labels alone
PENALTIES = {"(none: chapter 4's)": "", "--kl mse": "_mse", "--kl reward": "_reward",
             "--target-kl 10": "_target"}
VARIANCES = {"(none: five prompts)": "",
             "--prompts bias --prompts-per-round 1 --samples-per-prompt 64": "_bias"}
FIGURES = {"sweep": "dpok_sweep", "samples": "samples", "frontier/frontier": "frontier",
           "overoptimization": "overoptimization",
           "overoptimization_noise": "overoptimization_noise",
           "overoptimization_writing": "overoptimization_writing",
           "overoptimization_writing_curves": "overoptimization_writing_curves",
           "eval_seeds/queries": "eval_queries", "eval_seeds/best_of_n": "eval_best_of_n",
           "eval_seeds/same_seeds": "eval_same_seeds"}


@dataclass(frozen=True)
class Config:
    render: bool = False  # run nothing, only write the tables into README.md
    out: str = "runs/results"  # folder of the runs


def chapter(out, name, script):
    """A chapter's defaults, a run a seed: what it was before and after, and has gained."""
    seeds = {seed: f"{name}_seed{seed}" for seed in (0, 1, 2)}
    wanted = {run: [script, "--seed", str(seed)] for seed, run in seeds.items()}
    commands.train_missing(wanted, out)
    return [{"seed": seed, "seconds": round(tables.summary_of(out / run)["seconds"])}
            | tables.gains_of(out / run) for seed, run in seeds.items()]


def penalties(out):
    """What chapter 4's other leashes end with."""
    wanted = {f"penalties{name}": ["experiments/penalties.py", *(words.split() if name else [])]
              for words, name in PENALTIES.items()}
    commands.train_missing(wanted, out, jobs=2)
    return [{"flags": words, "seed": 0} | tables.ends_of(out / f"penalties{name}")
            for words, name in PENALTIES.items()]


def variance(out):
    """The variance of the gradient with three baselines, relative to the second."""
    rows = []
    for words, name in VARIANCES.items():
        folder = out / f"variance{name}"
        if not (folder / "variance.csv").is_file():
            own = words.split() if name else []
            commands.start(["experiments/variance.py", *own, "--out", str(folder)])
        row = {"flags": words, "seed": 0}
        for line in read_csv(folder / "variance.csv"):
            row[line["advantage"]] = line["relative"]
        rows.append(row)
    return rows


def evaluation(folder, *words):
    """Chapter 5's table: the columns that its text speaks of."""
    if not (folder / "table.csv").is_file():
        commands.start(["05_eval.py", *words, "--out", str(folder)])
    return [{name: row[name] for name in SHOWN} for row in read_csv(folder / "table.csv")]


def claims(folder):
    """Chapter 5's claims; every picture's values, from which a test finds each verdict again."""
    pictures = [{name: row[name] for name in RAW} for row in read_csv(folder / "samples.csv")
                if not row["model"].startswith("best of")]
    runs.write_rows(HERE / "raw" / "eval_seeds.csv", pictures)
    return read_csv(folder / "claims.csv")


def frontier(out):
    """Chapter 5's methods, each trained on one prompt, under the curve that none can beat."""
    wanted = ev.commands_of(ev.Config(prompts="bias", prompts_per_round=1, samples_per_prompt=80))
    commands.train_missing(wanted, out / "train", jobs=2)
    trained = [str(out / "train" / name) for name in wanted]
    commands.start(["experiments/frontier.py", "--runs", *trained, "--out", str(out)])
    return read_csv(out / "table.csv")


def stopping(out, trained):
    """What is kept of each method's trainings, by the rule with three bounds and in hindsight."""
    if not (out / "early_stopping.png").is_file():  # it is written last
        folders = map(str, sorted(trained.glob("*_seed?")))
        commands.start(["experiments/early_stopping.py", "--runs", *folders, "--out", str(out)])
    methods = {}  # method -> run -> its rounds
    for line in read_csv(out / "early_stopping.csv"):
        row = {name: float(line[name]) for name in ("queries", "labels_mean", "path_kl", "gold")}
        method = line["run"].rpartition("_seed")[0]
        methods.setdefault(method, {}).setdefault(line["run"], []).append(row)
    return [{"method": method} | row_of_stopping(list(found.values()))
            for method, found in methods.items()]


def row_of_stopping(trainings):
    """Gold and price of each way to stop, over some trainings' rounds."""
    labels = early_stopping.Config.labels
    golds = {"pretrained": [t[0]["gold"] for t in trainings],
             "end": [t[-1]["gold"] for t in trainings],
             "hindsight": [t[early_stopping.hindsights_best(t)]["gold"] for t in trainings]}
    prices = {"end": [t[-1]["queries"] for t in trainings]}
    for bound in KL_BOUNDS:
        name = f"rule, {bound:g} nats"
        stops = [early_stopping.stop_by_rule(t, bound) for t in trainings]
        golds[name] = [t[k]["gold"] for t, (k, _) in zip(trainings, stops)]
        prices[name] = [early_stopping.price(t, m, labels) for t, (_, m) in zip(trainings, stops)]
    row = {name: "{:.3f} ± {:.3f}".format(*training.mean_se(values))
           for name, values in golds.items()}
    for name, values in prices.items():
        row[f"price: {name}"] = round(sum(values) / len(values))
    return row


# ---- CSV files with a head, and README.md ---------------------------------------------------


def read_csv(path):
    """The lines of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(name, rows):
    """A CSV file's new rows, device and date; its title, command and seeds stay what they are."""
    path = HERE / f"{name}.csv"
    head, (_, *old) = read(path)
    if old == [[str(value) for value in row.values()] for row in rows]:
        return
    head["device"] = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        head["device"] = torch.cuda.get_device_name()
    head["date"] = datetime.date.today().isoformat()
    runs.write_rows(path, rows)
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
    title = head.pop("title")
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *rows)]
    made = "; ".join(f"{key}: {value}" for key, value in head.items())
    return "\n".join([f"**{title}**", "", *lines, "", f"`{path.name}`. {made}."])


def render(readme, tables_in=HERE):
    """README.md with each table between its marks <!-- NAME.csv --> and <!-- end --> made anew."""
    parts = readme.read_text(encoding="utf-8").split("<!-- ")
    for i, part in enumerate(parts):
        name, _, _ = part.partition(" -->")
        if name.endswith(".csv"):
            parts[i] = f"{name} -->\n{table(tables_in / name)}\n"
    readme.write_text("<!-- ".join(parts), encoding="utf-8")


TABLES = {  # CSV file -> a function of the folder of all runs, which gives its lines
    "ddpo_defaults": lambda out: chapter(out, "ddpo_defaults", "03_ddpo.py"),
    "dpok_defaults": lambda out: chapter(out, "dpok_defaults", "04_dpok.py"),
    "dpok_sweep": lambda out: sweep.main(["--out", str(out)]),
    "eval_quick": lambda out: evaluation(out / "eval_quick", "--quick"),
    "tuning": lambda out: tune.main(["--jobs", "2", "--out", str(out / "tuning")]),
    "eval_seeds": lambda out: evaluation(out / "eval_seeds", "--seeds", "5", "--jobs", "2"),
    "eval_claims": lambda out: claims(out / "eval_seeds"),
    "frontier": lambda out: frontier(out / "frontier"),
    "early_stopping": lambda out: stopping(out / "early_stopping", out / "eval_seeds" / "train"),
    "penalties": penalties,
    "variance": variance,
    "samples": lambda out: samples.main(["--out", str(out)]),
    "prompt_alignment": lambda out: prompt_alignment.main(["--out", str(out)]),
    "overoptimization": lambda out: overoptimization.main(
        ["--only", "proxy", "--out", str(out)])["proxy"],
    "writing": lambda out: overoptimization.main(
        ["--only", "writing", "--out", str(out)])["writing"]}


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = Path(config.out)
    if not config.render:
        for name, rows_of in TABLES.items():
            write(name, rows_of(out))
        overoptimization.main(["--only", "noise", "--out", str(out)])
        for source, name in FIGURES.items():
            shutil.copy(out / f"{source}.png", HERE / "figures" / f"{name}.png")
    render(HERE / "README.md")


if __name__ == "__main__":
    flags.run(main)
