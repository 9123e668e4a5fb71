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
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, flags, runs  # noqa: E402

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


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    shared = ev.Config(prompts="tuning", rounds=config.rounds, seed=config.seed)
    wanted, found = {}, {}
    for method, settings in SETTINGS.items():
        for rate, updates in settings:
            command = ev.command_of(method, shared)
            for flag, value in (("--learning-rate", rate), ("--updates-per-round", updates),
                                ("--eval-samples", 200)):
                command[command.index(flag) + 1] = str(value)
            name = f"{method}_lr{rate:g}_K{updates}"
            wanted[name] = command
            found[name] = {"method": method, "learning rate": rate, "updates per round": updates}
    commands.train_missing(wanted, config.out, config.jobs)
    for name, row in found.items():
        row |= tables.gains_of(Path(config.out, name), ["reward"])
    methods = list(SETTINGS)
    rows = sorted(found.values(), key=lambda row: (
        methods.index(row["method"]), -float(row["reward after"])))
    runs.write_rows(Path(config.out, "tuning.csv"), rows)
    print(tables.as_text(rows))
    return rows


if __name__ == "__main__":
    flags.run(main)
