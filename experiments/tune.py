"""Which learning rate, and how many updates per round? Equally many settings for each method.

Who compares a tuned method with one that is not, compares the tuning. So each method of chapter 5
gets the same number of settings, with one seed each, at chapter 5's price. They are judged on
prompts and noise that no verdict ever looks at (`tuning` in support/prompts.py, and another seed):

    chosen = argmax over settings of E[ r ] after training, r the learned reward, on fresh noise

Eight settings are a grid that was fixed before, and two were chosen when its results were known,
where each method was best. DDPO_SF allows one update per round, so it has ten learning rates.
DPOK_no_KL is not tuned: it has DPOK's settings, so that β is all that differs.

RUN `python experiments/tune.py --jobs 2`: 50 trainings, 45 minutes on two CPU cores; what is
finished is kept, so it can be stopped anywhere and goes on from there. EXPECT RWR to be best where
it learns least, and small differences to be chance: each figure is of one seed.
WRITES run folders in --out, and tuning.csv with a line for each setting, best first.
"""
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, flags, tables  # noqa: E402

ev = import_module("05_eval")  # METHODS, command_of, Config

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
GRID = tuple((rate, updates) for rate in LEARNING_RATES for updates in (2, 20))
SETTINGS = {  # method -> (learning rate, updates per round): the grid, and two more
    "RWR": (*GRID, (3e-5, 2), (1e-5, 2)),
    "SFT": (*GRID, (1e-2, 2), (1e-2, 20)),
    "DDPO_SF": tuple((rate, 1) for rate in (1e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2,
                                            1.5e-3, 2.5e-3)),
    "DDPO_IS": (*GRID, (1e-3, 5), (3e-4, 5)),
    "DPOK": (*GRID, (1e-2, 2), (1e-2, 20))}


@dataclass(frozen=True)
class Config:
    rounds: int = 20  # rounds of each training, as in chapter 5
    seed: int = 100  # seed of everything; chapter 5's seeds begin at 0
    jobs: int = 1  # trainings side by side
    out: str = "runs/tuning"  # folder of the runs and of tuning.csv


def commands_of(config):
    """A run's name -> its command, for each method and setting."""
    shared = ev.Config(prompts="tuning", rounds=config.rounds, tuned=False)
    table = {}
    for method, settings in SETTINGS.items():
        for rate, updates in settings:
            table[f"{method}_lr{rate:g}_K{updates}"] = [
                *ev.command_of(method, shared, config.seed), "--learning-rate", str(rate),
                "--updates-per-round", str(updates), "--eval-samples", "200"]
    return table


def read_rows(out):
    """A line for each setting: what its training ended with, each method's best first."""
    rows = []
    for method, settings in SETTINGS.items():
        found = []
        for rate, updates in settings:
            folder = Path(out, f"{method}_lr{rate:g}_K{updates}")
            summary = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            reward = summary["reward"]
            found.append({"method": method, "learning rate": rate, "updates per round": updates,
                          "reward before": round(reward["before"], 4),
                          "reward after": round(reward["after"], 4),
                          "standard error": round(reward["after_se"], 4)})
        rows += sorted(found, key=lambda row: -row["reward after"])
    return rows


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    commands.train_missing(commands_of(config), config.out, config.jobs)
    rows = read_rows(config.out)
    tables.write_csv(Path(config.out, "tuning.csv"), rows)
    for row in rows:
        print("{method:10} learning rate {learning rate:<8g} updates {updates per round:<4} reward "
              "{reward before:+.3f} -> {reward after:+.3f} ± {standard error:.3f}".format(**row))
    return rows


if __name__ == "__main__":
    flags.run(main)
