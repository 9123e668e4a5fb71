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
WRITES the run folder runs/prompt_alignment/ and its prompts, runs/prompt_alignment_FAMILIES.txt.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

LAST = 4  # rounds of the table's last column
Family = Literal["color", "count", "composition", "location", "bias"]


@dataclass(frozen=True)
class Config:
    families: tuple[Family, ...] = ("count", "composition", "location")  # families of prompts
    prompts_per_family: int = 4  # prompts of each family, evenly spaced among all of it
    rounds: int = 48  # rounds of the run
    samples_per_prompt: int = 8  # pictures of each prompt in each round
    name: str = "prompt_alignment"  # the run's folder, and how the file of its prompts begins
    out: str = "runs"  # folder of all runs
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 3


def rows_of(folder, families):
    """A line for each family: its pictures' mean reward in the first round and in the last."""
    settings = SimpleNamespace(**models.read_config(folder))
    rewards = {}  # (family, round) -> of its pictures
    for row in runs.read_rows(folder / "pictures.csv"):
        n = int(row["round"]) - 1
        prompt = training.prompts_of_round(list(families), settings, n)[int(row["picture"])]
        rewards.setdefault((families[prompt], n), []).append(row["reward"])
    rows = []
    for family in dict.fromkeys(families.values()):
        last = []
        for n in range(settings.rounds)[-LAST:]:
            last += rewards[family, n]
        rows.append({"family": family,
                     "first round": tables.rounded(*training.mean_se(rewards[family, 0])),
                     "last four rounds": tables.rounded(*training.mean_se(last))})
    return rows


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    families = {}  # prompt -> its family
    for family in config.families:
        for prompt in training.spread_evenly(get_prompts(family), config.prompts_per_family):
            families[prompt] = family
    folder = Path(config.out, config.name)
    # Other prompts have another file: so a run that has learned from them is refused.
    file = Path(f"{folder}_{'_'.join(config.families)}_{config.prompts_per_family}.txt")
    command = ["03_ddpo.py", "--reward", "vlm_alignment", "--prompts", str(file),
               "--prompts-per-round", str(len(families)),
               *commands.words_of(config, ("samples_per_prompt", "rounds")), *config.flags]
    commands.settings_of(command)  # a wrong flag is refused before the file is written
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(families) + "\n", encoding="utf-8")
    commands.train_missing({config.name: command}, config.out)
    rows = rows_of(folder, families)
    print(f"\nMean of vlm_alignment in training:\n{tables.as_text(rows)}")
    return rows


if __name__ == "__main__":
    flags.run(main)
