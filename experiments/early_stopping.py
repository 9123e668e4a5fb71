"""When should training stop? A rule that one could use, beside what hindsight would choose.

The path KL says how far a model has gone, and costs no label; gold says whether it still does what
is meant, and costs one for each picture. Rounds n = 0, 1, ..., N are the pretrained model and those
after which chapter 5 has read a training, the last one too. KL_n and g_n, gold's mean, are of the
pictures that training draws next, at the end of those that it drew last; gold_n, the truth, is what
chapter 5 has read on other noise, and no rule knows it.

    m = min{n ≥ 1 : KL_n > bound}, or N + 1 where there is none
    the rule:  training stops at round min(m, N), and k = argmax_{n < m} g_n is kept
    price = queries_{min(m, N)} + labels·m      (beyond the bound nothing is labeled)
    hindsight's best = argmax_{n ≤ N} gold_n

Hindsight is no rule: it has seen all of training, and the truth. Its figure is chosen on the very
pictures that it is measured on, so it is too high; those of the rule and of the end are not.

RUN `python experiments/early_stopping.py` after `python 05_eval.py`, whose files it reads: DDPO has
no line, for chapter 3 logs no gold. EXPECT the labels to undo the damage of a training without
a KL term, and elsewhere to end about where training ends, at a higher price; and a bound of 100
nats to stop most trainings too early, for path KL, which is only an upper bound, often grows
without harm. TRY `--comparison runs/quick`. WRITES table.csv in --out. A label counts as one
more reward query.
"""
import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import evaluation, flags, runs, training  # noqa: E402


@dataclass(frozen=True)
class Config:
    comparison: str = "runs/eval"  # folder of chapter 5's readings.csv and rounds.csv
    kl_bound: tuple[float, ...] = (100.0, 1000.0, math.inf)  # path KL, in nats, that ends training
    out: str = "runs/early_stopping"  # folder of table.csv


# ---- the mathematics ------------------------------------------------------------------------


def stop_by_rule(rounds, bound):
    """k = argmax_{n < m} g_n,  m = min{n ≥ 1 : KL_n > bound} or N + 1.  -> k, m; rounds: dicts

    k is the earliest of equals. What follows m counts for nothing, even if its KL is lower again.
    """
    m = 1
    while m < len(rounds) and rounds[m]["kl"] <= bound:
        m += 1
    g = [row["labels"] for row in rounds[:m]]
    return g.index(max(g)), m


def price(rounds, m, labels):
    """price = queries_{min(m, N)} + labels·m: what was paid when training stopped."""
    N = len(rounds) - 1
    return rounds[min(m, N)]["queries"] + labels * m


def hindsights_best(rounds):
    """argmax_{n ≤ N} gold_n, the earliest of equals; gold_n itself is too high, being chosen."""
    gold = [row["gold"] for row in rounds]
    return gold.index(max(gold))


# ---- chapter 5's files ----------------------------------------------------------------------


def read(folder, name):
    """Training (seed, prompt, model) -> its lines of a CSV file, in order, as numbers."""
    path, found = Path(folder, name), {}
    if not path.is_file():
        raise ValueError(f"--comparison {folder}: there is no {name} of chapter 5")
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            training_of_row = row["seed"], row["prompt"], row["model"]
            numbers = {column: float(row[column]) for column in ("kl", "gold", "queries")
                       if row[column]}  # best of n has no queries
            found.setdefault(training_of_row, []).append(numbers)
    return found


def with_labels(readings, rounds):
    """What is known of each reading: KL_n and g_n of the next round's pictures, and gold_n."""
    found = []
    for row in readings:
        later = [drawn for drawn in rounds if drawn["queries"] > row["queries"]]
        drawn = later[0] if later else rounds[-1]
        found.append(row | {"kl": drawn["kl"], "labels": drawn["gold"]})
    return found


def ways_to_stop(rounds, labels, bounds):
    """Way to stop -> the true gold of what it keeps, and what was paid."""
    all_paid = rounds[-1]["queries"]
    kept = {"pretrained": (0, 0), "end": (-1, all_paid),
            "hindsight": (hindsights_best(rounds), all_paid)}
    for bound in bounds:
        k, m = stop_by_rule(rounds, bound)
        kept[f"rule, {bound:g} nats"] = k, price(rounds, m, labels)
    return {way: (rounds[k]["gold"], paid) for way, (k, paid) in kept.items()}


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    readings = read(config.comparison, "readings.csv")
    found = {}  # model -> way -> seed -> gold and price on each prompt
    for (seed, prompt, model), rounds in read(config.comparison, "rounds.csv").items():
        known = with_labels(readings[seed, prompt, model], rounds)
        labels = rounds[0]["queries"]  # as many pictures as each round draws
        for way, numbers in ways_to_stop(known, labels, config.kl_bound).items():
            of_way = found.setdefault(model, {}).setdefault(way, {})
            of_way.setdefault(seed, []).append(numbers)
    table = []
    for model, of_model in found.items():
        table.append({"model": model})
        for way, of_way in of_model.items():
            gold, paid = np.mean(list(of_way.values()), 1).T  # over prompts, one number a seed
            table[-1][way] = evaluation.cell(*training.mean_se(gold))
            table[-1][f"{way}: price"] = f"{paid.mean():.0f}"
    flags.make_folder(config.out)
    runs.write_rows(Path(config.out, "table.csv"), table)
    print(evaluation.as_text(table))
    print("Gold ± standard error over seeds; prices in queries. Hindsight's gold is too high.")
    return table


if __name__ == "__main__":
    flags.run(main)
