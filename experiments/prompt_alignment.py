"""Does a vision-language model teach the model to draw what the prompt says? DDPO's alignment.

The reward asks a vision-language model what is going on in the picture, and compares its answer
with the prompt (chapter 2's vlm_alignment): no person labels anything. DDPO trained on animals with
three activities; the tiny world's families of prompts are numbers, pairs and places. The judge,
whom no training asks, says what was learned: its alignment before and after, on the same noise.

RUN `python experiments/prompt_alignment.py`: two minutes for each family on two CPU cores. It
prints and starts the commands (you can type the same), and leaves out those whose run is finished.
Flags behind a lone -- are passed on to chapter 3:

    python experiments/prompt_alignment.py --families color location --seeds 3 -- --vlm judge

EXPECT a rise where the judge starts low and the vision-language model tells right from wrong, as it
does of numbers; little for pairs, of which it overlooks one: BERTScore's recall takes little off
for one wrong word, so a picture that is half wrong is still paid well.
WRITES a run folder for each family and seed, and alignment.csv with both rewards, before and after.
"""
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import generalization, tables  # noqa: E402
from support import commands, evaluation, flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

ddpo = import_module("03_ddpo")  # Config
rewards = import_module("02_rewards")  # get_reward

Family = Literal["color", "count", "composition", "location", "bias"]


@dataclass(frozen=True)
class Config:
    families: tuple[Family, ...] = ("count", "composition", "location")  # families of prompts
    gold: str = "alignment"  # who says what was learned
    samples: int = 8  # pictures of each prompt that gold is measured on
    seeds: int = 1  # trainings of each family
    seed: int = 10  # of the first of them
    jobs: int = 1  # trainings side by side
    out: str = "runs/prompt_alignment"  # folder of the runs and of alignment.csv
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 3


def golds(family, seed, folder, config):
    """Gold of the family's prompts, before and after a training: means over pictures."""
    settings = ddpo.Config(seed=seed)
    gold = rewards.get_reward(config.gold, settings, flag="--gold")
    prompts = get_prompts(family)
    before = models.load_pipeline(models.read_config(folder)["model"])
    after, _ = models.load_run(folder)
    judged = [generalization.judge(pipe, prompts, gold, settings, config.samples).mean().item()
              for pipe in (before, after)]
    return dict(zip(("gold before", "gold after"), judged))


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    wanted, places = {}, {}
    for family in config.families:
        for seed in range(config.seed, config.seed + config.seeds):
            name = f"{family}_seed{seed}"
            wanted[name] = ["03_ddpo.py", "--reward", "vlm_alignment", "--prompts", family,
                            "--seed", str(seed), *config.flags]
            places[name] = family, seed
    commands.train_missing(wanted, config.out, config.jobs)
    rows = []
    for name, (family, seed) in places.items():
        folder = Path(config.out, name)
        proxy = tables.summary_of(folder)["reward"]
        row = {"family": family, "seed": seed, "proxy before": proxy["before"],
               "proxy after": proxy["after"]}
        rows.append(row | golds(family, seed, folder, config))
    runs.write_rows(Path(config.out, "alignment.csv"), [evaluation.rounded(row) for row in rows])
    table = []
    for family in config.families:
        row = {"family": family, "seeds": config.seeds}
        for name in ("proxy before", "proxy after", "gold before", "gold after"):
            values = [line[name] for line in rows if line["family"] == family]
            row[name] = evaluation.cell(*training.mean_se(values))
        table.append(row)
    print(f"\nOn pictures from fresh noise:\n{tables.as_text(table)}")
    return table


if __name__ == "__main__":
    flags.run(main)
