"""Does a gain carry over to prompts that no training saw? (DDPO)

A family's prompts are divided at random into two halves, again for each seed ("A and B" stays with
"B and A"). Chapter 3 trains with its own defaults on the one; then both are judged on fresh noise,
the same before and after, by the reward that was paid and by gold, what is meant. With the means
over seeds

    share = gold's gain on the new half / its gain on the trained half,

if the latter is beyond two errors.

RUN `python experiments/generalization.py --seeds 5`: two minutes a training on two CPU cores.
EXPECT the gain to carry over whole. A new prompt of the family has each of its words in common
with trained ones: so it speaks for this family's prompts, and for no new words. TRY DDPO's
prompt alignment, where a vision-language model says what it sees: `--reward vlm_alignment --prompts
count composition location --out runs/vlm`. Flags behind a lone -- are passed on to chapter 3.
WRITES in --out the run folders and their prompts' files, prompts.csv (each prompt of each training)
and table.csv.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, evaluation, flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout
rewards = import_module("02_rewards")  # get_reward, score
ddpo = import_module("03_ddpo")  # Config


@dataclass(frozen=True)
class Config:
    prompts: tuple[str, ...] = ("location",)  # families, each divided: chapter 3's sets, or files
    reward: str = "alignment"  # what is trained on
    gold: str = "alignment"  # what is meant
    samples: int = 8  # pictures of each prompt, before and after
    seeds: int = 1  # trainings of each family; an interval needs two, better five
    seed: int = 10  # of the first of them
    jobs: int = 2  # trainings side by side
    out: str = "runs/generalization"  # folder of the runs and of what is written
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 3


def halves(family, seed):
    """A family's prompts in two halves, by lot.  -> {"trained": prompts, "new": prompts}"""
    alike = {}
    for prompt in get_prompts(family):
        alike.setdefault(frozenset(prompt.split(" and ")), []).append(prompt)
    groups = list(alike.values())
    order = training.permutation(len(groups), seed, "halves").tolist()
    middle = len(groups) // 2
    if not middle:
        raise ValueError(f"--prompts {family}: one prompt has no halves")
    return {"trained": [prompt for i in order[:middle] for prompt in groups[i]],
            "new": [prompt for i in order[middle:] for prompt in groups[i]]}


def judge(pipe, prompts, judges, config, samples):
    """Each prompt's mean by each judge, on noise that training never draws.  -> {name: (P,)}"""
    drawn = [prompt for prompt in prompts for _ in range(samples)]
    images = mdp.rollout(pipe, drawn, config, "compare").images
    return {name: rewards.score(reward, images, drawn).view(-1, samples).mean(1).tolist()
            for name, reward in judges.items()}


def rows_of(family, folder, config):
    """A line for each prompt: which half, and what both judges say before and after."""
    saved = models.read_config(folder)
    settings = ddpo.Config(**{name: value for name, value in saved.items() if name != "method"})
    judges = {"reward": rewards.get_reward(config.reward, settings),
              "gold": rewards.get_reward(config.gold, settings, flag="--gold")}
    before = models.load_pipeline(settings.model)
    after, _ = models.load_run(folder)
    rows = []
    for half, prompts in halves(family, settings.seed).items():
        first, last = (judge(pipe, prompts, judges, settings, config.samples)
                       for pipe in (before, after))
        for k, prompt in enumerate(prompts):
            row = {"family": family, "seed": settings.seed, "half": half, "prompt": prompt}
            for name in judges:
                row |= {f"{name} before": first[name][k], f"{name} after": last[name][k]}
            rows.append(row)
    return rows


def means(rows, family, half, column):
    """The mean of a column over one half's prompts in each seed.  -> (S,)"""
    of_seed = {}
    for row in rows:
        if (row["family"], row["half"]) == (family, half):
            of_seed.setdefault(row["seed"], []).append(row[column])
    return np.array([np.mean(values) for values in of_seed.values()])


def table_of(rows, config):
    """A line for each family and half; the share of gold's gain that carries over."""
    table = []
    for family in config.prompts:
        gains = {}
        for half in ("trained", "new"):
            line = {"family": Path(family).stem, "half": half, "seeds": config.seeds}
            for name in ("reward", "gold"):
                before, after = (means(rows, family, half, f"{name} {when}")
                                 for when in ("before", "after"))
                gains[name, half] = after - before
                for label, values in (("before", before), ("gain", after - before)):
                    line[f"{name} {label}"] = evaluation.cell(*training.mean_se(values))
            table.append(line | {"share": ""})
        mean, error = training.mean_se(gains["gold", "trained"])
        if mean > 2 * error:  # else the share would be of nearly nothing
            new, trained = gains["gold", "new"], gains["gold", "trained"]
            share = new.mean() / mean
            _, error = training.mean_se(new - share * trained)  # of a ratio of means
            table[-1]["share"] = evaluation.cell(share, error / mean)
    return table


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    out = Path(config.out)
    flags.make_folder(out)
    rewards.get_reward(config.gold, ddpo.Config(), flag="--gold")  # a wrong name fails here
    wanted, families = {}, {}
    for family in config.prompts:
        for seed in range(config.seed, config.seed + config.seeds):
            name = runs.clean(f"{Path(family).stem}_seed{seed}")
            file, trained = out / f"{name}.txt", "\n".join(halves(family, seed)["trained"])
            if file.is_file() and file.read_text(encoding="utf-8") != trained:
                raise ValueError(f"{file} has other prompts: move it away, or choose another --out")
            file.write_text(trained, encoding="utf-8")
            wanted[name] = ["03_ddpo.py", "--reward", config.reward, "--prompts", str(file),
                            "--seed", str(seed), *config.flags]
            families[name] = family
    commands.train_missing(wanted, out, config.jobs)
    rows = []
    for name, family in families.items():
        rows += rows_of(family, out / name, config)
    runs.write_rows(out / "prompts.csv", rows)
    table = table_of(rows, config)
    runs.write_rows(out / "table.csv", table)
    print(evaluation.as_text(table))
    return table


if __name__ == "__main__":
    flags.run(main)
