"""Every number in one place: runs what is missing, writes small CSV files, renders README.md.

    python experiments/results.py            runs what is missing in runs/results/ (half a day)
    python experiments/results.py --render   only writes the tables of the CSV files into README.md

A CSV file starts with lines "# title: ...", "# command: ...", "# seeds: ...", "# device: ...",
"# date: ...": the table in README.md shows them. Tables in before/ are older, and marked so.
"""
import csv
import datetime
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import flow, overoptimization, sweep, tables, tune  # noqa: E402
from support import commands, evaluation, flags, models, runs, training  # noqa: E402

FRESH = ("--seeds", "5", "--seed", "10")  # seeds that no tuning and no pilot used
VARIANCES = {"five prompts": "",
             "one prompt": "--prompts bias --prompts-per-round 1 --samples-per-prompt 64"}
SAMPLERS = {"chapter_3": "03_ddpo.py --rounds 60",
            "chapter_3_plain": "03_ddpo.py --rounds 60 --step-weight none",
            "ddim": "experiments/flow.py --sampler ddim",
            "sde": "experiments/flow.py",
            "constant": "experiments/flow.py --sampler constant",
            "cps": "experiments/flow.py --sampler cps",
            "cps_not_last": "experiments/flow.py --sampler cps --no-train-last",
            "cps_window": "experiments/flow.py --sampler cps --noise-steps 3"}
FIGURES = {"sweep": "dpok_sweep", "frontier/frontier": "frontier",
           "flow/sde_seed0/before_after": "flow",
           "overoptimization": "overoptimization_writing",
           "overoptimization_curves": "overoptimization_writing_curves",
           "eval_seeds/curves": "eval_curves", "eval_seeds/kl": "eval_kl",
           "eval_seeds/scores": "eval_scores", "eval_seeds/same_seeds": "eval_same_seeds",
           "prompt_alignment/location_seed10/before_after": "prompt_alignment",
           "ddpo_rewards/queries": "ddpo_rewards", "ddpo_rewards/samples": "samples",
           "ddpo_rewards/incompressibility_DDPO_SF_seed10/film": "overoptimization_noise"}


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


def samplers(out):
    """Chapter 3 and flow steps over three seeds: drawn as they were trained, and by the ODE."""
    rows, seeds = [], (0, 1, 2)
    wanted = {f"{name}_seed{seed}": [*words.split(), "--seed", str(seed)]
              for name, words in SAMPLERS.items() for seed in seeds}
    commands.train_missing(wanted, out, jobs=2)
    for name, words in SAMPLERS.items():
        found = {"before": [], "after": [], "gain": [], "after, by the ODE": []}
        for seed in seeds:
            folder = str(out / f"{name}_seed{seed}")
            r = flow.rewards_by_ode(models.load_pipeline(folder), flow.Config(seed=seed))
            own = tables.summary_of(folder)["reward"] | {"after, by the ODE": r.mean().item()}
            for column, values in found.items():
                values.append(own[column])
        row = {column: evaluation.cell(*training.mean_se(found[column])) for column in found}
        rows.append({"command": words} | row | {"worst seed": f"{min(found['after']):.2f}"})
    return rows


def start(file, *command):
    """The lines of a CSV file; first starts the command that writes it, unless it is there."""
    if not file.is_file():
        commands.start([*command, "--out", str(file.parent)])
    return read(file)[1]


def variance(out):
    """The variance of the gradient with three baselines, relative to the second, over seeds."""
    rows = []
    for prompts, words in VARIANCES.items():
        found = {}
        for seed in (0, 1, 2):
            folder = out / f"variance_{prompts.replace(' ', '_')}_seed{seed}"
            command = ("experiments/variance.py", *words.split(), "--seed", str(seed))
            for line in start(folder / "variance.csv", *command):
                found.setdefault(line["advantage"], []).append(float(line["relative"]))
        row = {"flags": words or "(none: five prompts)", "seeds": 3}
        rows.append(row | {advantage: evaluation.cell(*training.mean_se(values))
                           for advantage, values in found.items()})
    return rows


def fresh(out, script, raw, *words):
    """The table of a script over fresh seeds; the numbers behind it go to raw/."""
    lines = start(out / "table.csv", script, *words)
    for file in raw:
        shutil.copy(out / file, HERE / "raw" / f"{out.name}_{file}")
    return lines


def frontier(out, trained):
    """Chapter 5's trainings on "four stars" under the curve that none can beat."""
    folders = map(str, sorted(trained.glob("*_seed10_four_stars")))
    return start(out / "table.csv", "experiments/frontier.py", "--prompts", "four stars", "--runs",
                 *folders)


def quality(out, tuned):
    """Gold and quality of trainings of the tuning, some of which have collapsed."""
    rows = []
    for k, prompt in enumerate(tune.PROMPTS):
        folders = map(str, sorted(tuned.glob(f"*_{k}_seed100")))
        command = ("05_eval.py", "--prompts", prompt, "--samples", "64", "--runs", *folders)
        lines = start(out / str(k) / "table.csv", *command)
        rows += [{"prompt": prompt} | line for line in lines]
    return rows


# ---- CSV files with a head, and README.md ---------------------------------------------------


def read(path):
    """A CSV file's head, if it has one, and its rows: dicts of text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return head, list(csv.DictReader(lines[len(head):]))


def write(name, rows):
    """A CSV file's new rows, device and date; its title, command and seeds stay what they are."""
    path = HERE / f"{name}.csv"
    head, old = read(path) if path.is_file() else ({"title": name}, [])
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


TABLES = {  # CSV file -> a function of the folder of all runs, which gives its lines
    "ddpo_defaults": lambda out: chapter(out, "ddpo_defaults", "03_ddpo.py"),
    "dpok_defaults": lambda out: chapter(out, "dpok_defaults", "04_dpok.py"),
    "dpok_sweep": lambda out: sweep.main(["--out", str(out)]),
    "flow": lambda out: samplers(out / "flow"),
    "variance": variance,
    "eval_quick": lambda out: start(out / "eval_quick" / "table.csv", "05_eval.py", "--quick"),
    "tuning": lambda out: tune.main(["--out", str(out / "tuning")]),
    "quality": lambda out: quality(out / "quality", out / "tuning"),
    "eval_seeds": lambda out: fresh(
        out / "eval_seeds", "05_eval.py", ("readings.csv", "rounds.csv"), *FRESH, "--rounds", "40",
        "--prompts", "an orange star", "four stars"),
    "eval_claims": lambda out: read(out / "eval_seeds" / "claims.csv")[1],
    "ddpo_rewards_tuning": lambda out: tune.main([
        "--experiment", "ddpo_rewards", "--out", str(out / "ddpo_rewards_tuning")]),
    "ddpo_rewards": lambda out: fresh(
        out / "ddpo_rewards", "experiments/ddpo_rewards.py", ("queries.csv",), *FRESH),
    "ddpo_rewards_claims": lambda out: read(out / "ddpo_rewards" / "claims.csv")[1],
    "generalization": lambda out: fresh(
        out / "generalization", "experiments/generalization.py", ("prompts.csv",), *FRESH),
    "prompt_alignment": lambda out: fresh(
        out / "prompt_alignment", "experiments/generalization.py", ("prompts.csv",), "--reward",
        "vlm_alignment", "--prompts", "count", "composition", "location", "--seeds", "3"),
    "frontier": lambda out: frontier(out / "frontier", out / "eval_seeds" / "train"),
    "early_stopping": lambda out: start(
        out / "early_stopping" / "table.csv", "experiments/early_stopping.py", "--comparison",
        str(out / "eval_seeds")),
    "writing": lambda out: overoptimization.main(["--out", str(out)])}


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = Path(config.out)
    if not config.render:
        for name, rows_of in TABLES.items():
            write(name, rows_of(out))
        for source, name in FIGURES.items():
            shutil.copy(out / f"{source}.png", HERE / "figures" / f"{name}.png")
    render(HERE / "README.md")


if __name__ == "__main__":
    flags.run(main)
