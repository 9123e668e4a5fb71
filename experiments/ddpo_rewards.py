"""Which estimator learns DDPO's own rewards from the fewest queries? (DDPO, Figure 4)

Chapter 3's two estimators beside reward-weighted regression, on three rewards that need no prompt,
without a KL term, each with the same number of reward queries:

    DDPO_IS, DDPO_SF    03_ddpo.py: importance sampling, score function
    RWR, sparse RWR     sft.py --data fresh: few large rounds, as DDPO has them; the weights are
                        exp(r/τ)/Z, or the best fifth of each prompt alone

All pay 1,600 queries. Each method has its own tuned settings (SETTINGS; `--tune` trains them all on a seed of their own and
prints what they reach). The claims are DDPO's: importance sampling is above score functions, and
these are above RWR, on each reward; six claims, corrected by Holm, with an interval over seeds.

RUN `python experiments/ddpo_rewards.py --seeds 5 --jobs 2`: about a minute a training on one CPU
core; what is finished is kept. WRITES run folders in --out, queries.csv with every look at fresh
noise, claims.csv, and queries.png.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, figures, flags, runs  # noqa: E402

ev = import_module("05_eval")  # interval, holm, verdict

SCRIPTS = {"DDPO_IS": "03_ddpo.py --estimator is --rounds 25",
           "DDPO_SF": "03_ddpo.py --estimator sf --rounds 25",
           "RWR": "experiments/sft.py --data fresh --weights rwr",
           "sparse RWR": "experiments/sft.py --data fresh --weights sparse"}
IS = ("--learning-rate 1e-4", "--learning-rate 2e-4", "--learning-rate 4e-4",
      "--learning-rate 2e-4 --updates-per-round 4")
SF = ("--learning-rate 1e-4", "--learning-rate 2e-4", "--learning-rate 4e-4",
      "--learning-rate 8e-4")
LARGE = "--lora-rank 0 --prompts-per-round 8 --samples-per-prompt"
RWR = (f"{LARGE} 50 --rounds 4 --learning-rate 1e-4 --passes 4",
       f"{LARGE} 50 --rounds 4 --learning-rate 1e-4 --passes 16",
       f"{LARGE} 100 --rounds 2 --learning-rate 1e-4 --passes 16",
       f"{LARGE} 200 --rounds 1 --learning-rate 1e-4 --passes 16")
SETTINGS = {"DDPO_IS": IS, "DDPO_SF": SF, "RWR": RWR, "sparse RWR": RWR}
CHOSEN = {"DDPO_IS": 1, "DDPO_SF": 2, "RWR": 1, "sparse RWR": 1}  # places in SETTINGS
CLAIMS = (("DDPO_IS", "DDPO_SF"), ("DDPO_SF", "RWR"))  # the first is above the second
Reward = Literal["compressibility", "incompressibility", "aesthetic"]


@dataclass(frozen=True)
class Config:
    rewards: tuple[Reward, ...] = ("compressibility", "incompressibility", "aesthetic")
    prompts: str = "color"  # what to draw: a prompt set of chapter 3, a file, or one prompt
    seeds: int = 1  # trainings of each; claims need two, better five
    seed: int = 10  # of the first of them
    tune: bool = False  # train every one of SETTINGS, with a seed that no claim uses
    jobs: int = 1  # trainings side by side
    out: str = "runs/ddpo_rewards"  # folder of the runs and of what is written
    flags: tuple[str, ...] = ()  # further flags of every training


def commands_of(config):
    """(reward, method, setting, seed) -> the name of its run; and name -> command."""
    names, wanted = {}, {}
    for reward in config.rewards:
        for method, settings in SETTINGS.items():
            places = range(len(settings)) if config.tune else [CHOSEN[method]]
            for place in places:
                for seed in range(config.seed, config.seed + config.seeds):
                    name = f"{reward}_{method.replace(' ', '_')}_{place}_seed{seed}"
                    names[reward, method, place, seed] = name
                    wanted[name] = [*SCRIPTS[method].split(), *settings[place].split(),
                                    "--reward", reward, "--prompts", config.prompts,
                                    "--seed", str(seed), *config.flags]
    return names, wanted


def looks_of(config, names):
    """A line for each look at fresh noise: reward, method, setting, seed, queries, mean, error."""
    rows = []
    for (reward, method, place, seed), name in names.items():
        setting = SETTINGS[method][place]
        for look in runs.read_rows(Path(config.out, name, "fresh.csv")):
            rows.append({"reward": reward, "method": method, "setting": setting, "seed": seed,
                         "queries": look["queries"], "mean": look["reward"],
                         "error": look["reward_se"]})
    return rows


def ends(looks, reward, method, setting=None):
    """The last mean of each seed.  -> (S,)"""
    last = {}
    for look in looks:
        if (look["reward"], look["method"]) == (reward, method):
            if setting in (None, look["setting"]):
                last[look["seed"]] = look["mean"]
    return np.array(list(last.values()))


def claims(looks, config):
    """DDPO's claims with interval, corrected p and verdict, a line for each reward and pair."""
    rows = []
    for reward in config.rewards:
        for a, b in CLAIMS:
            d = ends(looks, reward, a) - ends(looks, reward, b)
            rows.append({"claim": f"{a} is above {b}", "a": a, "b": b, "column": reward,
                         "at": "the end"} | ev.interval(d))
    for row, p in zip(rows, ev.holm([row["p"] for row in rows])):
        row["holm"], row["verdict"] = p, ev.verdict(row["mean"], p)
    return rows


def draw(path, looks, config):
    """Reward against queries, a panel a reward and a line a method; bands: s.d. over seeds."""
    figure = figures.Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for ax, reward in zip(figure.subplots(1, len(config.rewards), squeeze=False)[0],
                          config.rewards):
        for k, method in enumerate(SCRIPTS):
            at = {}
            for look in looks:
                if (look["reward"], look["method"]) == (reward, method):
                    at.setdefault(look["queries"], []).append(look["mean"])
            mean = np.array([np.mean(values) for values in at.values()])
            spread = np.array([np.std(values) for values in at.values()])
            ax.plot(list(at), mean, evaluation.DASHES[k], marker=".", label=method)
            ax.fill_between(list(at), mean - spread, mean + spread, alpha=0.12)
        ax.set(xlabel="reward queries", title=reward)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    names, wanted = commands_of(config)
    commands.train_missing(wanted, config.out, config.jobs)
    looks = looks_of(config, names)
    out = Path(config.out)
    runs.write_rows(out / "queries.csv", looks)
    rows = []
    for reward, method, place, seed in names:
        if seed == config.seed:
            setting = SETTINGS[method][place]
            values = ends(looks, reward, method, setting)
            mean, error = evaluation.mean_se(values)
            rows.append({"reward": reward, "method": method, "setting": setting,
                         "seeds": len(values), "at the end": evaluation.cell(mean, error)})
    print(tables.as_text(rows))
    if not config.tune:
        draw(out / "queries.png", looks, config)
    if config.seeds > 1 and not config.tune:
        judged = claims(looks, config)
        runs.write_rows(out / "claims.csv", [evaluation.rounded(claim) for claim in judged])
        print("\n".join(evaluation.sentence_of(claim) for claim in judged))
    return rows


if __name__ == "__main__":
    flags.run(main)
