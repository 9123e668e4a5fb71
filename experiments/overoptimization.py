"""What happens if nobody stops? Training on and on (DDPO, Figure 7; DPOK's reason for the KL).

A proxy that is optimized long enough is pleased in ways that nobody meant. Chapter 4 is run on one
prompt for far too many rounds, with β = 0, 0.01 and 0.1, and at twice its learning rate. Then once
for incompressibility, without KL term and value function: which pictures make the largest files?

    early stop = the round at which gold's mean over the last five rounds is highest

Only gold can say when to stop, and gold is what one usually does not have. The path KL is known.

RUN `python experiments/overoptimization.py`: 20 minutes on two CPU cores. It prints and starts four
commands (you can type the same), leaves out finished runs, and refuses one with other settings.
Flags behind a lone -- are passed on: `--rounds 100 -- --prompts "three red squares"`.
EXPECT gold to fall at β = 0 while the proxy rises, and incompressibility to crowd the picture with
stars: the full model ends in noise, this one knows none.
WRITES run folders runs/overoptimization_*/, the plot runs/overoptimization.png (proxy and gold
against path KL, a dot at the early stop), and runs/overoptimization_noise.png, a film of the noise.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, figures, flags, runs, training  # noqa: E402

BETAS = (0.0, 0.01, 0.1)


@dataclass(frozen=True)
class Config:
    rounds: int = 50  # rounds of each run: far too many
    samples_per_prompt: int = 48  # pictures per round
    learning_rate: float = 2e-3  # of AdamW, twice chapter 4's
    reward: str = "image_reward"  # the proxy that is optimized too far
    gold: str = "alignment"  # what is really meant
    seed: int = 0  # seed of everything
    name: str = "overoptimization"  # runs and pictures are called NAME_...
    out: str = "runs"  # folder of all runs


OWN = ("--beta", "--value", "--rounds", "--samples-per-prompt", "--learning-rate", "--reward",
       "--gold", "--seed", "--name", "--out")


def commands_of(config, passed_on):
    """A run's name -> its command: one for each β, and the noise."""
    shared = ["--gold", config.gold, "--rounds", str(config.rounds), "--samples-per-prompt",
              str(config.samples_per_prompt), "--learning-rate", str(config.learning_rate),
              "--seed", str(config.seed), *passed_on]
    wanted = {}
    for beta in BETAS:
        wanted[f"{config.name}_beta_{beta:g}"] = [
            "04_dpok.py", "--reward", config.reward, "--beta", str(beta), *shared]
    wanted[f"{config.name}_noise"] = [
        "04_dpok.py", "--reward", "incompressibility", "--beta", "0", "--no-value", *shared]
    return wanted


def early_stop(gold, window=5):
    """Index of gold at which its mean over the last `window` rounds is highest."""
    means = []
    for i in range(len(gold)):
        latest = gold[max(0, i - window + 1):i + 1]
        means.append(sum(latest) / len(latest))
    return means.index(max(means))


def describe(label, rows, config, window=5):
    """One sentence: where a run ended, and where it should have stopped."""
    gold = [row["gold"] for row in rows]
    reward = [row["reward"] for row in rows]
    stop = early_stop(gold, window)
    best, _ = training.mean_se(gold[max(0, stop - window + 1):stop + 1])
    last_reward, _ = training.mean_se(reward[-window:])
    last_gold, _ = training.mean_se(gold[-window:])
    return (f"{label}: over the last {len(gold[-window:])} of {len(rows)} rounds {config.reward} "
            f"is {last_reward:.3f}, {config.gold} {last_gold:.3f}, at {rows[-1]['kl']:.0f} nats; "
            f"{config.gold} was best, {best:.3f}, at round {stop + 1}.")


def main(argv=None):
    own, passed_on = commands.split_flags(argv, OWN)
    config = flags.parse(Config, __doc__, own)
    wanted = commands_of(config, passed_on)
    commands.train_missing(wanted, config.out)

    lines = {}
    for beta in BETAS:
        rows = runs.read_rows(Path(config.out, f"{config.name}_beta_{beta:g}", "metrics.csv"))
        label = f"β = {beta:g}"
        lines[label] = (rows, early_stop([row["gold"] for row in rows]))
        print(describe(label, rows, config))
    path = Path(config.out, f"{config.name}.png")
    figures.overoptimization(path, lines, {"reward": config.reward, "gold": config.gold},
                             "Training on and on; dots: where early stopping would stop")
    film = Path(config.out, f"{config.name}_noise.png")
    figures.frame(film, Path(config.out, f"{config.name}_noise", "film.png"),
                  "Paid for incompressibility, from top to bottom")
    print(f"Proxy and gold against path KL: {path}; the film: {film}")
    return lines


if __name__ == "__main__":
    flags.run(main)
