"""Does a vision-language model teach the model to draw what the prompt says? DDPO's alignment.

The reward asks a vision-language model what is going on in the picture, and compares its answer
with the prompt (chapter 2's vlm_alignment): no person labels anything. DDPO trained on animals with
three activities; the tiny world's families of prompts are numbers, pairs and places.

RUN `python experiments/prompt_alignment.py`: 3 minutes on two CPU cores. It prints and starts one
command (you can type the same), leaves it out if its run is finished, and refuses a finished run
that was made with other settings. Flags behind a lone -- are passed on to chapter 3:

    python experiments/prompt_alignment.py --families color location --name two -- --vlm judge

EXPECT a small rise from a high start, most for the family that starts lowest. BERTScore's recall
takes little off for one wrong word, so a picture that is half wrong is still paid well.
WRITES the run folder runs/prompt_alignment/, its prompts runs/prompt_alignment.txt, the plot
runs/prompt_alignment.png (reward by family of prompt against reward queries), and the film
runs/prompt_alignment_film.png: of each family the picture that changed most, for better or for
worse, the same noise in a row.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, figures, flags, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

WINDOW = 4  # rounds in a mean of the curves
Family = Literal["color", "count", "composition", "location", "bias"]


@dataclass(frozen=True)
class Config:
    families: tuple[Family, ...] = ("count", "composition", "location")  # families of prompts
    prompts_per_family: int = 4  # prompts of each family, evenly spaced among all of it
    rounds: int = 48  # rounds of the run
    samples_per_prompt: int = 8  # pictures of each prompt in each round
    name: str = "prompt_alignment"  # the run's folder, and how the pictures begin
    out: str = "runs"  # folder of all runs


OWN = ("--reward", "--prompts", "--film-pictures", "--rounds", "--prompts-per-round",
       "--samples-per-prompt", "--name", "--out")


def family_of_prompts(config):
    """Prompt -> its family, in the order of the run's prompts."""
    if not config.families:
        raise ValueError("--families takes at least one family of prompt")
    families = {}
    for family in config.families:
        for prompt in training.spread_evenly(get_prompts(family), config.prompts_per_family):
            families[prompt] = family
    return families


def write_prompts(path, prompts, folder):
    """The prompts as a file for --prompts; ValueError if a finished run was made with others."""
    if commands.is_finished(folder) and runs.read_film(folder)[0] != prompts:
        raise ValueError(f"{folder} was made with other --families or --prompts-per-family: move "
                         "it away, or choose another --name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")


def read_curves(folder, families):
    """Family -> (queries, mean reward of its pictures in the last WINDOW rounds)."""
    config = SimpleNamespace(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    pictures = runs.read_rows(Path(folder, "pictures.csv"))
    for n in range(config.rounds):
        prompts = training.prompts_of_round(list(families), config, n)
        of_round = [row for row in pictures if row["round"] == n + 1]
        for prompt, row in zip(prompts, of_round, strict=True):
            row["family"] = families[prompt]
    queries, curves = sorted({row["queries"] for row in pictures}), {}
    for family in dict.fromkeys(families.values()):
        means = []
        for n in range(1, config.rounds + 1):
            latest = [row["reward"] for row in pictures
                      if row["family"] == family and n - WINDOW < row["round"] <= n]
            means.append(sum(latest) / len(latest))
        curves[family] = queries, means
    return curves


def draw_film(path, folder, families):
    """Of each family the prompt whose picture has changed most, be it for better or for worse."""
    prompts, frames = runs.read_film(folder)
    first, *_, last = [torch.tensor(np.stack(images)).float() for images in frames.values()]
    changes = (last - first).abs().mean((1, 2, 3)).tolist()
    shown = []
    for family in dict.fromkeys(families.values()):
        own = [i for i, prompt in enumerate(prompts) if families[prompt] == family]
        shown.append(max(own, key=changes.__getitem__))
    rows = [[images[i] for images in frames.values()] for i in shown]
    figures.sheet(path, rows, [prompts[i] for i in shown], [f"{n} queries" for n in frames])


def main(argv=None):
    own, passed_on = commands.split_flags(argv, OWN)
    config = flags.parse(Config, __doc__, own)
    families = family_of_prompts(config)
    path = Path(config.out, config.name)  # the run; with endings: its prompts, plot and film
    command = ["03_ddpo.py", "--reward", "vlm_alignment", "--prompts", f"{path}.txt",
               "--prompts-per-round", str(len(families)), "--samples-per-prompt",
               str(config.samples_per_prompt), "--rounds", str(config.rounds),
               "--film-pictures", str(len(families)), *passed_on]
    commands.settings_of(command)  # a wrong flag is refused before the file is written
    write_prompts(Path(f"{path}.txt"), list(families), path)
    commands.train_missing({config.name: command}, config.out)

    curves = read_curves(path, families)
    print(f"\nMean reward of the first round, and of the last {WINDOW}:")
    for family, (_, means) in curves.items():
        print(f"{family:18}{means[0]:8.3f}  ->{means[-1]:8.3f}")
    lines = {}
    for family, (queries, means) in curves.items():
        lines[family] = queries, torch.tensor([means])
    figures.queries(f"{path}.png", lines, "vlm_alignment",
                    f"Reward by family of prompt, mean of {WINDOW} rounds")
    draw_film(f"{path}_film.png", path, families)
    print(f"The plot: {path}.png; the film: {path}_film.png")
    return curves


if __name__ == "__main__":
    flags.run(main)
