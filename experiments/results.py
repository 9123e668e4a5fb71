"""Every number in one place: runs what is missing, writes small CSV files, renders README.md.

    python experiments/results.py            runs what is missing in runs/results/ (some hours)
    python experiments/results.py --render   only writes the tables of the CSV files into README.md

A CSV file starts with lines "# title: ...", "# command: ...", "# seeds: ...", "# device: ...",
"# date: ...": the table in README.md shows them. Tables in before/ are older, and marked so.
"""
import csv
import datetime
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import overoptimization, prompt_alignment, samples  # noqa: E402
from experiments import sweep, tables, tune  # noqa: E402
from support import commands, flags, runs  # noqa: E402

ev = import_module("05_eval")  # Config, commands_of

RAW = ("model", "seed", "split", "family", "prompt", "reward", "gold", "aesthetic", "diversity")
SHOWN = ("model", "reward", "gold", "gold bias", "gold unseen", "path_kl", "diversity")
VARIANCES = {"five prompts": "",
             "one prompt": "--prompts bias --prompts-per-round 1 --samples-per-prompt 64"}
FIGURES = {"sweep": "dpok_sweep", "samples": "samples", "frontier/frontier": "frontier",
           "overoptimization_proxy": "overoptimization",
           "overoptimization_noise_beta_0/film": "overoptimization_noise",
           "overoptimization_writing_film": "overoptimization_writing",
           "overoptimization_writing": "overoptimization_writing_curves",
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
    return [{"seed": seed} | tables.gains_of(out / run) for seed, run in seeds.items()]


def start(file, *command):
    """The lines of a CSV file; first starts the command that writes it, unless it is there."""
    if not file.is_file():
        commands.start([*command, "--out", str(file.parent)])
    return read(file)[1]


def variance(out):
    """The variance of the gradient with three baselines, relative to the second."""
    rows = []
    for prompts, words in VARIANCES.items():
        file = out / f"variance_{prompts.replace(' ', '_')}" / "variance.csv"
        row = {"flags": words or "(none: five prompts)", "seed": 0}
        for line in start(file, "experiments/variance.py", *words.split()):
            row[line["advantage"]] = line["relative"]
        rows.append(row)
    return rows


def evaluation(folder, *words):
    """Chapter 5's table: the columns that its text speaks of."""
    lines = start(folder / "table.csv", "05_eval.py", *words)
    return [{name: line[name] for name in SHOWN} for line in lines]


def claims(folder):
    """Chapter 5's claims; every picture's values, from which a test finds each verdict again."""
    pictures = [{name: row[name] for name in RAW} for row in read(folder / "samples.csv")[1]
                if not row["model"].startswith("best of")]
    runs.write_rows(HERE / "raw" / "eval_seeds.csv", pictures)
    return read(folder / "claims.csv")[1]


def frontier(out):
    """Chapter 5's methods, each trained on one prompt, under the curve that none can beat."""
    wanted = ev.commands_of(ev.Config(prompts="bias", prompts_per_round=1, samples_per_prompt=80))
    commands.train_missing(wanted, out / "train", jobs=2)
    trained = [str(out / "train" / name) for name in wanted]
    return start(out / "table.csv", "experiments/frontier.py", "--runs", *trained)


def stopping(out, trained):
    """What is kept of each method's trainings, by the rule with three bounds and in hindsight."""
    folders = map(str, sorted(trained.glob("*_seed?")))
    return start(out / "table.csv", "experiments/early_stopping.py", "--kl-bound", "100", "1000",
                 "inf", "--runs", *folders)


# ---- CSV files with a head, and README.md ---------------------------------------------------


def read(path):
    """A CSV file's head, if it has one, and its rows: dicts of text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return head, list(csv.DictReader(lines[len(head):]))


def write(name, rows):
    """A CSV file's new rows, device and date; its title, command and seeds stay what they are."""
    path = HERE / f"{name}.csv"
    head, old = read(path)
    if old == [{key: str(value) for key, value in row.items()} for row in rows]:
        return
    head["device"] = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        head["device"] = torch.cuda.get_device_name()
    head["date"] = datetime.date.today().isoformat()
    runs.write_rows(path, rows)
    comments = "".join(f"# {key}: {value}\n" for key, value in head.items())
    path.write_text(comments + path.read_text(encoding="utf-8"), encoding="utf-8")


def table(path):
    """A CSV file as Markdown, under what made it."""
    head, rows = read(path)
    title = head.pop("title")
    cells = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
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


def overoptimized(out, part):
    return overoptimization.main(["--only", part, "--out", str(out)])[part]


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
    "variance": variance,
    "samples": lambda out: samples.main(["--out", str(out)]),
    "prompt_alignment": lambda out: prompt_alignment.main(["--out", str(out)]),
    "overoptimization": lambda out: overoptimized(out, "proxy"),
    "writing": lambda out: overoptimized(out, "writing")}


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = Path(config.out)
    if not config.render:
        for name, rows_of in TABLES.items():
            write(name, rows_of(out))
        overoptimized(out, "noise")
        for source, name in FIGURES.items():
            shutil.copy(out / f"{source}.png", HERE / "figures" / f"{name}.png")
    render(HERE / "README.md")


if __name__ == "__main__":
    flags.run(main)
