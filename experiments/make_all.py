"""Remake everything in tiny_sd/ from nothing: python experiments/make_all.py

Runs the stages of make_tiny_sd.py and make_rewards.py one after the other (you can type the same),
takes their times, and keeps what they measure in experiments/tiny_sd.csv. It overwrites the shipped
weights. Two hours at most on one CPU core (OMP_NUM_THREADS=1).
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from experiments import results  # noqa: E402
from support import commands, flags, tables  # noqa: E402

STAGES = {"experiments/make_tiny_sd.py": ("vae", "unet", "refine", "measure"),
          "experiments/make_rewards.py": ("clip", "aesthetic", "image_reward", "vlm", "measure")}


@dataclass(frozen=True)
class Config:
    csv: str = str(HERE / "tiny_sd.csv")  # where the times and qualities go
    seed: int = 0  # seed of everything


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    if not Path(config.csv).parent.is_dir():
        raise ValueError(f"--csv {config.csv}: there is no such folder")
    measured = HERE.parent / "tiny_sd" / "measured.csv"  # every stage adds its lines
    measured.unlink(missing_ok=True)
    times = []
    for script, stages in STAGES.items():
        for stage in stages:
            started = time.perf_counter()
            commands.start([script, "--only", stage, "--seed", str(config.seed)])
            minutes = (time.perf_counter() - started) / 60
            times.append({"measured": f"minutes of {stage}", "value": round(minutes, 1)})
    total = sum(row["value"] for row in times)
    times.append({"measured": "minutes in all", "value": round(total)})
    results.write(Path(config.csv), "The tiny model, and its rewards",
                  "python experiments/make_all.py", (config.seed,),
                  times + tables.read_csv(measured))
    measured.unlink()


if __name__ == "__main__":
    flags.run(main)
