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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, figures, flags, runs  # noqa: E402

REWARDS = ("aesthetic", "compressibility", "incompressibility")
OWN = ("--reward", "--prompts", "--rounds", "--name", "--out")


@dataclass(frozen=True)
class Config:
    prompts: str = "color"  # what to draw: a prompt set of chapter 3, a file, or one prompt
    rounds: int = 24  # rounds of each run
    name: str = "samples"  # runs are called NAME_REWARD, and the sheet NAME.png
    out: str = "runs"  # folder of all runs


def main(argv=None):
    own, passed_on = commands.split_flags(argv, OWN)
    config = flags.parse(Config, __doc__, own)
    shared = ["--prompts", config.prompts, "--rounds", str(config.rounds), *passed_on]
    wanted = {f"{config.name}_{reward}": ["03_ddpo.py", "--reward", reward, *shared]
              for reward in REWARDS}
    commands.train_missing(wanted, config.out)
    rows, pictures = [], {}
    for reward, name in zip(REWARDS, wanted):
        folder = Path(config.out, name)
        rows.append({"run": name} | tables.gains_of(folder))
        prompts, frames = runs.read_film(folder)
        frames = list(frames.values())  # from 0 reward queries to the last
        pictures.setdefault("pretrained", frames[0])  # of all runs the same
        pictures["{}\n{reward before} → {reward after}".format(reward, **rows[-1])] = frames[-1]
    print(f"\n{tables.as_text(rows)}")
    path = Path(config.out, f"{config.name}.png")
    figures.sheet(path, list(pictures.values()), list(pictures), prompts)
    print(f"On pictures from fresh noise, with standard errors of the gain. The sheet: {path}")
    return rows


if __name__ == "__main__":
    flags.run(main)
