"""How fast are a UNet call, a round, learning, and two processes? Beside TRL's DDPOTrainer.

RUN `python tests/benchmark.py` on an idle machine with two cores (`--parts` chooses), and to
compare with TRL 0.23.1, in an environment of its own (tests/benchmark_trl.py; half an hour more):

    python tests/benchmark.py --trl OTHER_VENV/bin/python

All but the last part counts CPU seconds of one thread, which other work on the machine changes less
than the clock's.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import mean, median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support import flags, models, runs  # noqa: E402

LEARNING_RATES = ("3e-5", "1e-4", "3e-4")  # of TRL; the last is its default
LEARNED = 0.95  # alignment, mean of three rounds
EPOCH = ("--num-steps 20 --guidance-scale 5 --prompts-per-round 4 --samples-per-prompt 16 "
         "--updates-per-round 4 --reward compressibility --ratio per_dim --clip-range 1e-4 "
         "--step-weight none --baseline running --learning-rate 3e-4").split()
LOOKS = "--eval-samples 2 --film-pictures 1".split()


@dataclass(frozen=True)
class Config:
    parts: tuple[str, ...] = ("unet", "epoch", "learning", "processes")  # what to measure
    model: str = "tiny_sd"  # of the parts "unet" and "epoch"
    trl: str | None = None  # the Python of an environment that has TRL 0.23.1
    rounds: int = 5  # of the part "epoch"; the first is not counted


def milliseconds(call, repeats=5):
    """CPU milliseconds of a call, the fastest of some; it is called once before."""
    call()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return 1000 * min(times)


def unet_table(model):
    """Milliseconds a latent of a UNet call, and of one with its way back; of an optimizer step."""
    print("UNet, CPU ms a latent  forward  and backward")
    for name in ("as it is", "channels_last", "compiled"):
        unet = models.load_pipeline(model, "cpu").unet
        width = unet.config.cross_attention_dim
        if name == "channels_last":
            unet.to(memory_format=torch.channels_last)
        if name == "compiled":
            unet.compile()
        for B in (16, 64, 128, 256):
            x, prompt_embeds = torch.randn(B, 4, 8, 8), torch.randn(B, 77, width)

            def forward():
                return unet(x, 500, encoder_hidden_states=prompt_embeds).sample

            started = time.perf_counter()
            with torch.no_grad():
                without = milliseconds(forward)
            both = milliseconds(lambda: forward().sum().backward())
            seconds = time.perf_counter() - started
            print(f"{name:14} B {B:4}  {without / B:8.2f}  {both / B:11.2f}   ({seconds:.0f} s in "
                  "all)", flush=True)
    params = list(unet.parameters())
    for fused in (False, True):
        step = torch.optim.AdamW(params, 1e-9, fused=fused).step
        print(f"AdamW, fused={fused}: {milliseconds(step):.1f} ms a step")


def train_timed(words, is_enough=lambda rewards: False):
    """03_ddpo.py with these flags  -> CPU seconds and mean reward after each round, two lists."""
    seconds, rewards = [], []
    log, started = runs.Run.log, []

    class Enough(Exception):
        pass

    def timed_log(run, n, **values):
        log(run, n, **values)
        seconds.append(time.process_time() - started[0])
        rewards.append(values["reward"].mean().item())
        if is_enough(rewards):
            raise Enough

    def timed_rounds(run, *owned):
        started.append(time.process_time())
        return rounds(run, *owned)

    rounds = runs.Run.rounds
    runs.Run.log, runs.Run.rounds = timed_log, timed_rounds
    folder = tempfile.mkdtemp()
    try:
        import_module("03_ddpo").main([*words, *LOOKS, "--device", "cpu", "--out", folder])
    except Enough:
        pass
    finally:
        runs.Run.log, runs.Run.rounds = log, rounds
        shutil.rmtree(folder)
    return seconds, rewards


def train_trl(python, *words):
    """The same of TRL."""
    done = subprocess.run([python, str(ROOT / "tests/benchmark_trl.py"), *words], text=True,
                          capture_output=True)
    if done.returncode:
        raise ValueError(f"--trl {python}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [row["seconds"] for row in rows], [row["reward"] for row in rows]


def a_round(seconds):
    """The median round; the first, in which memory is taken, is left out."""
    return median(after - before for before, after in zip(seconds, seconds[1:]))


def epoch(config):
    rounds = ["--rounds", str(config.rounds), "--model", config.model]
    seconds, _ = train_timed([*EPOCH, *rounds])
    ours = a_round(seconds)
    print(f"an epoch (64 pictures, 20 steps, guidance, 4 updates): {ours:.1f} CPU s")
    if config.trl:
        folder = str(models.find_folder(config.model, "model_index.json"))
        seconds, _ = train_trl(config.trl, "--rounds", str(config.rounds), "--model", folder)
        theirs = a_round(seconds)
        print(f"TRL's DDPOTrainer: {theirs:.1f} CPU s; ours is {ours / theirs:.2f} of it",
              flush=True)


def has_learned(rewards):
    return len(rewards) > 2 and mean(rewards[-3:]) >= LEARNED


def learning(config):
    seconds, rewards = train_timed([], has_learned)
    needed = seconds[-1]
    print(f"03_ddpo.py: alignment {mean(rewards[-3:]):.3f} after {128 * len(rewards)} queries and "
          f"{needed:.0f} CPU s", flush=True)
    for rate in LEARNING_RATES if config.trl else ():
        words = ("--part", "learning", "--learning-rate", rate, "--rounds", "1000")
        seconds, rewards = train_trl(config.trl, *words, "--seconds", str(3 * needed))
        best = max(mean(rewards[n:n + 3]) for n in range(len(rewards) - 2))
        print(f"TRL at {rate}: alignment {mean(rewards[-3:]):.3f} (best {best:.3f}) after "
              f"{128 * len(rewards)} queries and {seconds[-1]:.0f} CPU s", flush=True)


def processes():
    """Rounds an hour of 03_ddpo.py in one process with one thread, and in two of them."""
    hourly = []
    folder = tempfile.mkdtemp()
    for N, start in ((1, [sys.executable]),
                     (2, [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        words = [str(ROOT / "03_ddpo.py"), "--rounds", "7", *LOOKS, "--out", folder, "--name"]
        subprocess.run([*start, *words, str(N)], check=True, capture_output=True)
        with open(Path(folder, str(N), "metrics.csv"), encoding="utf-8") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        hourly.append(3600 / median(seconds[1:]))
        print(f"{N} process(es) with one thread: {hourly[-1]:.0f} rounds an hour", flush=True)
    print(f"two do {hourly[1] / hourly[0]:.2f} times the rounds of one")
    shutil.rmtree(folder)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    torch.set_num_threads(1)
    if "unet" in config.parts:
        unet_table(config.model)
    if "epoch" in config.parts:
        epoch(config)
    if "learning" in config.parts:
        learning(config)
    if "processes" in config.parts:
        processes()


if __name__ == "__main__":
    flags.run(main)
