"""Every number in one place: runs what is missing, writes small CSV files, renders README.md.

    python experiments/results.py            runs what is missing in runs/results/ (half an hour)
    python experiments/results.py --render   only writes the tables of the CSV files into README.md

A CSV file starts with lines "# title: ...", "# command: ...", "# seeds: ...", "# device: ...",
"# date: ...": the table in README.md shows them. Tables in before/ are older, and marked so.
"""
import csv
import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from support import commands, flags, tables  # noqa: E402

SEEDS = (0, 1, 2)
SWEEP = (0.0, 0.01, 0.03, 0.1, 0.3)
CHAPTERS = {"ddpo_defaults": "03_ddpo.py", "dpok_defaults": "04_dpok.py"}
TITLES = {"ddpo_defaults": "03 as it comes: alignment on 128 pictures from fresh noise",
          "dpok_defaults": "04 as it comes: \"four stars\" on 128 pictures from fresh noise",
          "dpok_sweep": "04 with other β: path KL in nats, learned reward and alignment at the end",
          "eval_quick": "05, the quick tour: far too little training to conclude anything"}


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
        measure_quick_tour(Path(config.out))
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
    write(HERE / f"{name}.csv", TITLES[name], f"python {script} --seed SEED", SEEDS, rows)


def measure_sweep(out):
    """What each β ends with, from the sweep's run folders."""
    commands.start(["experiments/sweep.py", "--out", str(out), "--name", "sweep"])
    rows = []
    for beta in SWEEP:
        folder = out / f"sweep_beta_{beta:g}"
        summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        row = {"beta": beta}
        for column in ("kl", "reward", "gold"):
            row[column] = round(summary[column]["after"], 4)
            row[f"{column} error"] = round(summary[column]["after_se"], 4)
        rows.append(row)
    write(HERE / "dpok_sweep.csv", TITLES["dpok_sweep"], "python experiments/sweep.py", (0,), rows)


def measure_quick_tour(out):
    folder = out / "quick"
    if not (folder / "table.csv").is_file():
        commands.start(["05_eval.py", "--quick", "--out", str(folder)])
    models = {}
    for cell in tables.read_csv(folder / "table.csv"):
        if cell["column"] in ("reward", "gold", "gold unseen", "path_kl", "diversity"):
            row = models.setdefault(cell["model"], {"model": cell["model"]})
            row[cell["column"]] = round(float(cell["mean"]), 4)
            row[cell["column"] + " error"] = round(float(cell["standard_error"]), 4)
    rows = list(models.values())
    write(HERE / "eval_quick.csv", TITLES["eval_quick"], "python 05_eval.py --quick", (0,), rows)


def write(path, title, command, seeds, rows):
    """A CSV file that says what made it; one with the same rows keeps its device and date."""
    cells = [[str(value) for value in row.values()] for row in rows]
    if path.is_file() and read(path)[1][1:] == cells:
        return
    device = f"CPU, threads: {torch.get_num_threads()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    head = {"title": title, "command": command, "seeds": ", ".join(map(str, seeds)),
            "device": device, "date": datetime.date.today().isoformat()}
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
