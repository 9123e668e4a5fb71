"""Which estimator raises DDPO's own rewards most with equal queries? (DDPO, Figure 4)

Chapter 3's two estimators beside reward-weighted regression, on three rewards that need no prompt,
without a KL term. Each pays 1,600 reward queries:

    DDPO_IS, DDPO_SF    03_ddpo.py: importance sampling, score function, 25 rounds
    RWR, sparse RWR     sft.py --data fresh: one to four large rounds, as DDPO has them; weights are
                        exp(r/τ)/Z, or 5 for the best fifth of each prompt's pictures and 0 for the
                        others. With so few rounds its learning rate stays, where chapter 3's falls

Each method has the best of its four settings (`tune.py --experiment ddpo_rewards`). The
claims are DDPO's: importance sampling is above score functions, and these are above RWR, on each
reward: six claims, corrected by Holm, with an interval over seeds.

RUN `python experiments/ddpo_rewards.py --seeds 5`: 60 trainings, two hours on two CPU cores; what
is finished is kept. EXPECT neither to hold on all three rewards. `--methods DDPO_IS` makes DDPO's
samples alone.
WRITES run folders in --out, queries.csv with every look at fresh noise, table.csv, claims.csv,
queries.png, and samples.png: what each reward makes of the same noise.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, figures, flags, runs, training  # noqa: E402

ev = import_module("05_eval")  # difference, judge

METHODS = {
    "DDPO_IS": "03_ddpo.py --estimator is --rounds 25",
    "DDPO_SF": "03_ddpo.py --estimator sf --rounds 25",
    "RWR": "experiments/sft.py --data fresh --weights rwr --lora-rank 0 --prompts-per-round 20",
    "sparse RWR": "experiments/sft.py --data fresh --weights sparse --lora-rank 0 "
                  "--prompts-per-round 20"}
RWR = (  # all make as many updates, of as many noisy pictures
    "--rounds 4 --samples-per-prompt 20 --updates-per-round 40 --learning-rate 1e-4",
    "--rounds 4 --samples-per-prompt 20 --updates-per-round 40 --learning-rate 4e-4",
    "--rounds 2 --samples-per-prompt 40 --updates-per-round 80 --learning-rate 2e-4",
    "--rounds 1 --samples-per-prompt 80 --updates-per-round 160 --learning-rate 2e-4")
SETTINGS = {
    "DDPO_IS": ("--learning-rate 1e-4", "--learning-rate 2e-4", "--learning-rate 4e-4",
                "--learning-rate 2e-4 --updates-per-round 4"),
    "DDPO_SF": ("--learning-rate 1e-4", "--learning-rate 2e-4", "--learning-rate 4e-4",
                "--learning-rate 8e-4"),
    "RWR": RWR,
    "sparse RWR": RWR}
CHOSEN = {  # places in SETTINGS: what tune.py has chosen
    "DDPO_IS": 2, "DDPO_SF": 2, "RWR": 0, "sparse RWR": 0}
TEMPERATURES = {  # τ: the spread of a prompt's pretrained pictures
    "compressibility": 0.08, "incompressibility": 0.08, "aesthetic": 0.4}
CLAIMS = (("DDPO_IS", "DDPO_SF"), ("DDPO_SF", "RWR"))  # the first is above the second
Reward = Literal["compressibility", "incompressibility", "aesthetic"]
Method = Literal["DDPO_IS", "DDPO_SF", "RWR", "sparse RWR"]


@dataclass(frozen=True)
class Config:
    rewards: tuple[Reward, ...] = ("compressibility", "incompressibility", "aesthetic")
    methods: tuple[Method, ...] = tuple(METHODS)  # what is trained
    prompts: str = "color"  # what to draw: a prompt set of chapter 3, a file, or one prompt
    seeds: int = 1  # trainings of each; claims need two, better five
    seed: int = 10  # of the first of them
    jobs: int = 2  # trainings side by side
    out: str = "runs/ddpo_rewards"  # folder of the runs and of what is written
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for every training


def command_of(method, reward, seed, setting=None, prompts="color"):
    """The command of one training, with its method's chosen setting or another one."""
    words = METHODS[method].split()
    words += (setting or SETTINGS[method][CHOSEN[method]]).split()
    if method == "RWR":
        words += ["--temperature", str(TEMPERATURES[reward])]
    return [*words, "--reward", reward, "--prompts", prompts, "--seed", str(seed)]


def train(config):
    """Trains what is missing.  -> for each seed: reward -> method -> its looks at fresh noise"""
    wanted, places = {}, {}
    for seed in range(config.seed, config.seed + config.seeds):
        for reward in config.rewards:
            for method in config.methods:
                name = runs.clean(f"{reward} {method} seed{seed}")
                command = command_of(method, reward, seed, prompts=config.prompts)
                wanted[name] = [*command, *config.flags]
                places[name] = seed - config.seed, reward, method
    commands.train_missing(wanted, config.out, config.jobs)
    readings = [{reward: {} for reward in config.rewards} for _ in range(config.seeds)]
    for name, (k, reward, method) in places.items():
        looks = runs.read_rows(Path(config.out, name, "fresh.csv"))  # RWR's have gold and KL, too
        readings[k][reward][method] = [
            {column: look[column] for column in ("queries", "reward", "reward_se")}
            for look in looks]
    return readings


def alone(readings, reward):
    """The readings with this reward alone, in the same form."""
    return [{reward: of_seed[reward]} for of_seed in readings]


def claims(readings, config):
    """DDPO's claims, judged together: a line for each reward and pair."""
    rows, differences = [], []
    for reward in config.rewards:
        for a, b in CLAIMS:
            if {a, b} <= set(config.methods):
                d = [ev.difference(of_seed, "reward", "the end", a, b)
                     for of_seed in alone(readings, reward)]
                rows.append({"claim": f"{a} is above {b} on {reward}", "column": "reward",
                             "at": "the end", "a": a, "b": b})
                differences.append(np.array(d))
    return ev.judge(rows, differences)


def draw_samples(config):
    """The same noise in each column: the pretrained model, and what DDPO_IS makes of it."""
    rows = {}
    for reward in config.rewards:
        folder = Path(config.out, runs.clean(f"{reward} DDPO_IS seed{config.seed}"))
        gains = tables.gains_of(folder)
        prompts, frames = runs.read_film(folder)
        first, *_, last = frames.values()
        rows.setdefault("pretrained", first)  # of all runs the same
        rows[f"{reward}\n{gains['reward before']} → {gains['reward after']}"] = last
    figures.sheet(Path(config.out, "samples.png"), list(rows.values()), list(rows), prompts)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    readings = train(config)
    out = Path(config.out)
    runs.write_rows(out / "queries.csv", evaluation.rows_of(readings, config.seed))
    evaluation.draw_curves(out / "queries.png", readings, {"reward": "reward"})
    if "DDPO_IS" in config.methods:
        draw_samples(config)
    table = [{"method": method} for method in config.methods]
    for reward in config.rewards:
        ends = evaluation.at_the_end(alone(readings, reward), "reward")
        for row in table:
            row[reward] = evaluation.cell(*training.mean_se(ends[row["method"]]))
    print(evaluation.as_text(table))
    judged = claims(readings, config) if config.seeds > 1 else []
    (out / "claims.csv").unlink(missing_ok=True)
    if judged:
        runs.write_rows(out / "claims.csv", [evaluation.rounded(claim) for claim in judged])
        print("\n".join(evaluation.sentence_of(claim) for claim in judged))
    runs.write_rows(out / "table.csv", table)  # last: where it is, all is
    return table


if __name__ == "__main__":
    flags.run(main)
