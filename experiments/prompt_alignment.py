"""Does a vision-language model teach the model to draw what the prompt says? DDPO's alignment.

The reward asks a vision-language model what is going on in the picture, and compares its answer
with the prompt (chapter 2's vlm_alignment): no person labels anything. DDPO trained on animals with
three activities; the tiny world's families of prompts are numbers, pairs and places.

RUN `python experiments/prompt_alignment.py`: 3 minutes on two CPU cores. It prints and starts one
command for each family (you can type the same), leaves out those whose run is finished, and refuses
a finished run that was made with other settings. Flags behind a lone -- are passed on to chapter 3:

    python experiments/prompt_alignment.py --families color location --name two -- --vlm judge

EXPECT a small rise from a high start, most for the family that starts lowest. BERTScore's recall
takes little off for one wrong word, so a picture that is half wrong is still paid well.
WRITES runs/prompt_alignment_FAMILY/ for each family (run folders as chapter 3's).
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, flags  # noqa: E402

Family = Literal["color", "count", "composition", "location", "bias"]


@dataclass(frozen=True)
class Config:
    families: tuple[Family, ...] = ("count", "composition", "location")  # families of prompts
    rounds: int = 16  # rounds of each run
    prompts_per_round: int = 12  # prompts of a round
    samples_per_prompt: int = 8  # pictures of each prompt in each round
    name: str = "prompt_alignment"  # runs are called NAME_FAMILY
    out: str = "runs"  # folder of all runs
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 3


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    folders = {family: Path(config.out, f"{config.name}_{family}") for family in config.families}
    words = commands.words_of(config, ("rounds", "prompts_per_round", "samples_per_prompt"))
    wanted = {folder.name: ["03_ddpo.py", "--reward", "vlm_alignment", "--prompts", family, *words,
                            *config.flags] for family, folder in folders.items()}
    commands.train_missing(wanted, config.out)
    rows = [{"family": family} | tables.gains_of(folder) for family, folder in folders.items()]
    print(f"\nOn pictures from fresh noise:\n{tables.as_text(rows)}")
    return rows


if __name__ == "__main__":
    flags.run(main)
