"""What does each reward make of the same noise? DDPO's samples: three rewards, one sheet.

    row 1    the pretrained model
    row 2-4  chapter 3 on aesthetic, on compressibility and on incompressibility

All else is equal: the prompts, the number of reward queries, and in each column of the sheet the
noise of every step. So the columns show what the reward alone has changed.

RUN `python experiments/samples.py`: 5 minutes on two CPU cores. It prints and starts one command
for each reward (you can type the same), leaves out those whose run is finished, and refuses a
finished run that was made with other settings. Flags behind a lone -- are passed on to chapter 3:

    python experiments/samples.py --prompts location --name places -- --film-pictures 6
    python experiments/samples.py --prompts animals --rounds 200 --name full -- --sd

EXPECT compressibility to leave nothing but the ground, and incompressibility to add shapes and
digits. The twin of the aesthetic score learned to rate warm grounds highest (make_rewards.py), but
its network is pleased more easily by blue and green shapes: a proxy, and optimized too far.
WRITES runs/samples_REWARD/ for each reward (run folders as chapter 3's) and the sheet
runs/samples.png, with the mean reward before → after training, on fresh noise, beside each row.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, figures, flags, runs  # noqa: E402

REWARDS = ("aesthetic", "compressibility", "incompressibility")


@dataclass(frozen=True)
class Config:
    prompts: str = "color"  # what to draw: a prompt set of chapter 3, a file, or one prompt
    rounds: int = 24  # rounds of each run
    name: str = "samples"  # runs are called NAME_REWARD, and the sheet NAME.png
    out: str = "runs"  # folder of all runs
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 3


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    shared = ["--prompts", config.prompts, "--rounds", str(config.rounds), *config.flags]
    folders = {reward: Path(config.out, f"{config.name}_{reward}") for reward in REWARDS}
    wanted = {folder.name: ["03_ddpo.py", "--reward", reward, *shared]
              for reward, folder in folders.items()}
    commands.train_missing(wanted, config.out)
    rows, pictures = [], {}
    for reward, folder in folders.items():
        row = {"run": folder.name} | tables.gains_of(folder)
        rows.append(row)
        prompts, frames = runs.read_film(folder)
        first, *_, last = frames.values()
        pictures.setdefault("pretrained", first)  # of all runs the same
        pictures[f"{reward}\n{row['reward before']} → {row['reward after']}"] = last
    print(f"\n{tables.as_text(rows)}")
    path = Path(config.out, f"{config.name}.png")
    figures.sheet(path, list(pictures.values()), list(pictures), prompts)
    print(f"On pictures from fresh noise, with standard errors of the gain. The sheet: {path}")
    return rows


if __name__ == "__main__":
    flags.run(main)
