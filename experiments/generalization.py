"""Does a gain carry over to prompts that no training saw? (DDPO: it generalizes)

A family's prompts are divided by lot into two halves, anew for each seed. Chapter 3 trains with its
own defaults on the one; then both are judged on fresh noise, the same before and after:

    share = gain on the other half / gain on the trained half

RUN `python experiments/generalization.py --seeds 5 --jobs 2`: two minutes a training on two CPU
cores. EXPECT most of the gain to carry over, for a prompt of this family has each of its words in
common with trained ones. It speaks for this family's prompts, and for no new words. WRITES run
folders and the prompts' files in --out, prompts.csv (each prompt of each seed) and table.csv.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # Config
ev = import_module("05_eval")  # interval


@dataclass(frozen=True)
class Config:
    prompts: str = "location"  # what is divided: a prompt set of chapter 3, or a file
    samples: int = 8  # pictures of each prompt, before and after
    seeds: int = 1  # trainings; an interval needs two, better five
    seed: int = 10  # of the first of them
    jobs: int = 1  # trainings side by side
    out: str = "runs/generalization"  # folder of the runs and of what is written


def halves(config, seed):
    """The prompts in two halves, by lot.  -> {"trained": prompts, "new": prompts}"""
    prompts = get_prompts(config.prompts)
    order = training.permutation(len(prompts), seed, "halves").tolist()
    middle = len(prompts) // 2
    return {"trained": [prompts[i] for i in order[:middle]],
            "new": [prompts[i] for i in order[middle:]]}


def judge(pipe, prompts, reward, settings, samples):
    """The mean reward of each prompt's pictures, on noise that training never draws.  -> (P,)"""
    drawn = [prompt for prompt in prompts for _ in range(samples)]
    images = mdp.rollout(pipe, drawn, settings, "compare").images
    return rewards.score(reward, images, drawn).view(len(prompts), samples).mean(1)


def rows_of(config, seed, folder):
    """A line for each prompt: which half, and its reward before and after."""
    settings = ddpo.Config(seed=seed)
    reward = rewards.get_reward(settings.reward, settings)
    before = models.load_pipeline(settings.model)
    after, _ = models.load_run(folder)
    rows = []
    for half, prompts in halves(config, seed).items():
        r = [judge(pipe, prompts, reward, settings, config.samples) for pipe in (before, after)]
        for prompt, first, last in zip(prompts, *r):
            rows.append({"seed": seed, "half": half, "prompt": prompt,
                         "before": first.item(), "after": last.item()})
    return rows


def gains(rows, half):
    """The mean gain of one half's prompts in each seed.  -> (S,)"""
    of_seed = {}
    for row in rows:
        if row["half"] == half:
            of_seed.setdefault(row["seed"], []).append(row["after"] - row["before"])
    return np.array([np.mean(values) for values in of_seed.values()])


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = Path(config.out)
    flags.make_folder(out)
    wanted = {}
    for seed in range(config.seed, config.seed + config.seeds):
        file = out / f"seed{seed}.txt"
        file.write_text("\n".join(halves(config, seed)["trained"]), encoding="utf-8")
        wanted[f"seed{seed}"] = ["03_ddpo.py", "--prompts", str(file), "--seed", str(seed)]
    commands.train_missing(wanted, out, config.jobs)
    rows = []
    for seed in range(config.seed, config.seed + config.seeds):
        rows += rows_of(config, seed, out / f"seed{seed}")
    runs.write_rows(out / "prompts.csv", rows)
    table = []
    for half in ("trained", "new"):
        d = gains(rows, half)
        mean, error = training.mean_se(d)
        table.append({"prompts": half, "seeds": len(d), "gain": evaluation.cell(mean, error)})
    share = gains(rows, "new") / gains(rows, "trained")
    mean, error = training.mean_se(share)
    table.append({"prompts": "share that carries over", "seeds": len(share),
                  "gain": evaluation.cell(mean, error)})
    runs.write_rows(out / "table.csv", table)
    print(tables.as_text(table))
    if config.seeds > 1:
        print("At 95 %: {low:.2f} to {high:.2f}".format(**ev.interval(share)))
    return rows


if __name__ == "__main__":
    flags.run(main)
