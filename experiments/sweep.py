"""What does β buy? Chapter 4 again and again, each time with another price of a nat.

    J(θ) = E[ α·r(x_0, z) − β·Σ_t KL_t ]                                          (DPOK's objective)

A small β lets the policy go wherever the proxy is high, a large one keeps it at the pretrained
model. Between them the same reward queries buy different pairs of proxy and KL; and gold, which is
never trained on, says where the proxy stops being worth its nats.

RUN `python experiments/sweep.py`: 6 minutes on two CPU cores. It prints and starts one command for
each β (you can type the same), leaves out those whose run is finished, and refuses a finished run
that was made with other settings. Flags behind a lone -- are passed on to chapter 4:

    python experiments/sweep.py --betas 0 0.01 0.1 --name short -- --rounds 10 --prompts tasks

EXPECT the path KL at β = 0 to be several times that at chapter 4's β, for the same gold.
WRITES runs/sweep_beta_B/ for each β (run folders as chapter 4's) and the plot runs/sweep.png.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, figures, flags  # noqa: E402


@dataclass(frozen=True)
class Config:
    betas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3)  # chapter 4 is run with each of these β
    name: str = "sweep"  # runs are called NAME_beta_B, and the plot NAME.png
    out: str = "runs"  # folder of all runs


def check(config):
    """ValueError for a --betas that makes no sweep."""
    different = set()
    for beta in config.betas:
        different.add(f"{beta:g}")
    if len(different) < 2 or len(different) < len(config.betas):
        raise ValueError("--betas takes two or more different values of β")


def commands_of(config, passed_on):
    """A run's name -> its command, for each β."""
    runs = {}
    for beta in config.betas:
        runs[f"{config.name}_beta_{beta:g}"] = ["04_dpok.py", "--beta", str(beta), *passed_on]
    return runs


def read_row(folder):
    """(β/α, path KL, proxy, gold) that a run ended with; the last three are (mean, s.e.)."""
    settings = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    summary = json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))
    row = [settings["beta"] / settings["alpha"]]
    for column in ("kl", "reward", "gold"):
        row.append((summary[column]["after"], summary[column]["after_se"]))
    return row, summary


def print_table(rows, summary):
    """One line for each β.  summary: of any run; what is said of the pretrained model is in all."""
    proxy, gold = summary["reward"], summary["gold"]
    print(f"\nAt {summary['queries']} reward queries each, on pictures from fresh noise, mean ± "
          f"standard error\npretrained: {proxy['title']} {proxy['before']:.3f}, "
          f"{gold['title']} {gold['before']:.3f}")
    print(f"{'β/α':>8}{'path KL, nats':>18}{proxy['title']:>20}{gold['title']:>20}")
    for ratio, kl, *values in rows:
        line = f"{ratio:8.3g}" + "{:10.1f} ± {:5.1f}".format(*kl)
        for value in values:
            line += "{:12.3f} ± {:.3f}".format(*value)
        print(line)


def main(argv=None):
    own, passed_on = commands.split_flags(argv, ("--beta", "--name", "--out"))
    config = flags.parse(Config, __doc__, own)
    check(config)
    runs = commands_of(config, passed_on)
    commands.train_missing(runs, config.out)

    rows = []
    for name in runs:
        row, summary = read_row(Path(config.out, name))
        rows.append(row)
    print_table(rows, summary)
    path = Path(config.out, f"{config.name}.png")
    figures.sweep(path, rows, (summary["reward"]["title"], summary["gold"]["title"]))
    print(f"The plot: {path}")
    return rows


if __name__ == "__main__":
    flags.run(main)
