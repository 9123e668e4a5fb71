"""Remake everything in tiny_sd/ from nothing: python experiments/make_all.py

Runs the stages of make_tiny_sd.py and make_rewards.py one after the other (you can type the same),
takes their times, and keeps what they measure in experiments/tiny_sd.csv. It overwrites the shipped
weights. Two hours at most on one CPU core (OMP_NUM_THREADS=1).
"""
import csv
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import make_rewards, make_tiny_sd, results  # noqa: E402
from support import commands, flags  # noqa: E402

PARTS = {"experiments/make_tiny_sd.py": make_tiny_sd.PARTS,
         "experiments/make_rewards.py": make_rewards.PARTS}
MEASURED = HERE.parent / "tiny_sd" / "measured.csv"  # every part adds its lines


@dataclass(frozen=True)
class Config:
    seed: int = 0  # seed of everything


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    MEASURED.unlink(missing_ok=True)
    rows, total = [], 0
    for script, parts in PARTS.items():
        for part in parts:
            started = time.perf_counter()
            commands.start([script, "--only", part, "--seed", str(config.seed)])
            minutes = (time.perf_counter() - started) / 60
            rows.append([f"minutes of {part}", round(minutes, 1)])
            total += minutes
    rows.append(["minutes in all", round(total)])
    with open(MEASURED, encoding="utf-8", newline="") as file:
        rows += csv.reader(file)
    results.write("tiny_sd", [{"measured": name, "value": value} for name, value in rows])
    MEASURED.unlink()


if __name__ == "__main__":
    flags.run(main)
