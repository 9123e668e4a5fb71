"""How fast are a round, two processes, and learning?

RUN `python tests/benchmark.py` on an idle machine with two cores (3 minutes); `--parts learning`
trains as 03_ddpo.py does by itself, for each of `--seeds`.

Each process has one thread. A round's seconds are CPU seconds, which other work on the machine
changes less than the clock's; those of learning are the clock's, without the looks on fresh noise.
"""
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support import flags, runs  # noqa: E402

EPOCH = ("--num-steps 20 --guidance-scale 5 --prompts-per-round 4 --samples-per-prompt 16 "
         "--updates-per-round 4 --ratio per_dim --clip-range 1e-4 "
         "--step-weight none --baseline running --learning-rate 3e-4")
SHORT_LOOKS = "--eval-samples 2 --film-pictures 1"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ("processes", "round")  # and learning, which takes longer
    model: str = "tiny_sd"  # of the part "round"
    seeds: int = 1  # of the part "learning": 0, 1, ...


def start(command):
    """Runs a command of Python's.  -> what it printed, its CPU seconds"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def train(words, *before):
    """03_ddpo.py with these flags.  -> rows of metrics.csv and of fresh.csv, its CPU seconds"""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--out", folder, "--name", "run", *words.split()]
        _, seconds = start([sys.executable, *before, str(ROOT / "03_ddpo.py"), *words])
        metrics = runs.read_rows(Path(folder, "run", "metrics.csv"))
        fresh = runs.read_rows(Path(folder, "run", "fresh.csv"))
    return metrics, fresh, seconds


def processes(config):
    """Rounds of 128 pictures an hour of 03_ddpo.py, in one process with one thread and in two."""
    hourly = []
    for N, before in ((1, ()), (2, TORCHRUN)):
        metrics, _, _ = train(f"--rounds 7 --samples-per-prompt 16 {SHORT_LOOKS}", *before)
        seconds = median(row["seconds"] for row in metrics[1:])  # the first one takes memory
        hourly.append(3600 / seconds)
        print(f"{N} process(es) with one thread: {hourly[-1]:.0f} rounds an hour", flush=True)
    print(f"two do {hourly[1] / hourly[0]:.2f} times the rounds of one", flush=True)


def one_round(config):
    """CPU seconds of a round: of eight rounds less those of four, which draws as many looks."""
    totals = []
    for rounds in (4, 8):
        words = f"{EPOCH} {SHORT_LOOKS} --rounds {rounds} --model {config.model}"
        *_, seconds = train(words)
        totals.append(seconds)
    ours = (totals[1] - totals[0]) / 4
    print(f"a round (64 pictures, 20 steps, guidance, 4 updates): {ours:.1f} CPU s", flush=True)


def learning(config):
    """Alignment on fresh noise after each quarter of the rounds, and the seconds until then."""
    for seed in range(config.seeds):
        metrics, fresh, _ = train(f"--seed {seed}")
        for look in fresh:
            seconds = sum(row["seconds"] for row in metrics if row["queries"] <= look["queries"])
            print(f"seed {seed}, 03_ddpo.py: {look['reward']:.3f} after {look['queries']:.0f} "
                  f"queries and {seconds:.0f} s", flush=True)


PARTS = {"processes": processes, "round": one_round, "learning": learning}


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    for part in config.parts:
        if part not in PARTS:
            raise ValueError(f"--parts {part}: the parts are {', '.join(PARTS)}")
        PARTS[part](config)


if __name__ == "__main__":
    flags.run(main)
