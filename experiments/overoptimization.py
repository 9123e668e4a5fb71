"""What happens if nobody stops? Training on and on (DDPO, Figure 7; DPOK's reason for the KL).

A proxy that is optimized long enough is pleased in ways that nobody meant. In three parts:

    proxy    one prompt on image_reward for far too many rounds, with β = 0, 0.01 and 0.1
    noise    incompressibility: which pictures make the largest files?    (Figure 7, left)
    writing  "n shapes" on vlm_strict: the diffusion model learns to write the number, and the
             vision-language model believes it; without and with a KL term  (Figure 7, right)

    hindsight's best = the round at which gold's mean over the last five rounds is highest

It looks at gold of all rounds, so it is no rule for stopping. early_stopping.py has one that could
be used, for runs whose weights are kept on the way: here those of the part "proxy".

RUN `python experiments/overoptimization.py`: 30 minutes on two CPU cores; `--only writing`: 10. It
prints and starts commands (you can type the same), leaves out finished runs, and refuses one with
other settings. Flags behind a lone -- are passed on: `--only proxy -- --prompts "four stars"`.
EXPECT gold to fall at β = 0 while the proxy rises; incompressibility to crowd the picture with
stars, for this model knows no noise; and more and more digits, beside numbers of shapes that get no
better. The KL term does not keep the digits out: writing costs few nats.
WRITES run folders runs/overoptimization_*/, and in runs/ the pictures overoptimization.png (proxy
and gold against path KL, a dot at hindsight's best), _noise.png and _writing.png (films; the latter
shows first of all pictures where the trick has worked), and _writing_curves.png.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import commands, figures, flags, reward_models, runs, training  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

PROXY_BETAS = (0.0, 0.01, 0.1)
WRITING_BETAS = (0.0, 0.03)
PROMPTS = 4  # of a round of the writing
SHOWN = 4  # prompts in the film of the writing, for each β


@dataclass(frozen=True)
class Config:
    only: Literal["proxy", "noise", "writing"] | None = None  # one part of the three
    rounds: int = 50  # rounds of each run: far too many
    samples_per_prompt: int = 48  # pictures of a round, of one prompt; writing: of four together
    learning_rate: float = 2e-3  # of AdamW, twice chapter 4's
    reward: str = "image_reward"  # the proxy that is optimized too far
    gold: str = "alignment"  # what is really meant
    seed: int = 0  # seed of everything
    name: str = "overoptimization"  # runs and pictures are called NAME_...
    out: str = "runs"  # folder of all runs


OWN = ("--beta", "--value", "--rounds", "--samples-per-prompt", "--learning-rate", "--reward",
       "--gold", "--seed", "--name", "--out")
OF_WRITING = ("--prompts", "--prompts-per-round", "--film-pictures")


def check(config, passed_on):
    """ValueError for what the part "writing" cannot do."""
    if config.only not in (None, "writing"):
        return
    if config.samples_per_prompt % PROMPTS or config.samples_per_prompt < 2 * PROMPTS:
        raise ValueError(f"--samples-per-prompt must be a multiple of {PROMPTS}, at least "
                         f"{2 * PROMPTS}: the part writing shares them among {PROMPTS} prompts")
    for word in passed_on:
        name = word.partition("=")[0].replace("_", "-")
        if name in OF_WRITING:
            raise ValueError(f"{name} behind -- : the part writing has its own; choose --only "
                             "proxy or --only noise")


def commands_of(config, passed_on):
    """Part -> {a run's name: its command}: one for each β, and one for the noise."""
    shared = ["--gold", config.gold, "--rounds", str(config.rounds), "--learning-rate",
              str(config.learning_rate), "--seed", str(config.seed)]
    one_prompt = [*shared, "--samples-per-prompt", str(config.samples_per_prompt)]
    numbers = [*shared, "--prompts", "count", "--prompts-per-round", str(PROMPTS),
               "--samples-per-prompt", str(config.samples_per_prompt // PROMPTS),
               "--film-pictures", "32"]
    proxy, writing = {}, {}
    for beta in PROXY_BETAS:
        proxy[f"{config.name}_beta_{beta:g}"] = [
            "04_dpok.py", "--reward", config.reward, "--beta", str(beta), "--keep-every", "5",
            *one_prompt, *passed_on]
    noise = {f"{config.name}_noise": [
        "04_dpok.py", "--reward", "incompressibility", "--beta", "0", "--no-value", *one_prompt,
        *passed_on]}
    for beta in WRITING_BETAS:
        writing[f"{config.name}_writing_beta_{beta:g}"] = [
            "04_dpok.py", "--reward", "vlm_strict", "--beta", str(beta), "--no-value", *numbers,
            *passed_on]
    return {"proxy": proxy, "noise": noise, "writing": writing}


def running_mean(values, window=5):
    """The mean of each value and those before it, `window` of them at most."""
    means = []
    for i in range(len(values)):
        latest = values[max(0, i - window + 1):i + 1]
        means.append(sum(latest) / len(latest))
    return means


def hindsights_best(gold, window=5):
    """Index of gold at which its running mean is highest."""
    means = running_mean(gold, window)
    return means.index(max(means))


def describe(label, rows, reward, gold, window=5):
    """One sentence: where a run ended, and where it was best, as one sees in hindsight."""
    golds = [row["gold"] for row in rows]
    best = hindsights_best(golds, window)
    highest, _ = training.mean_se(golds[max(0, best - window + 1):best + 1])
    last_reward, _ = training.mean_se([row["reward"] for row in rows[-window:]])
    last_gold, _ = training.mean_se(golds[-window:])
    return (f"{label}: over the last {len(golds[-window:])} of {len(rows)} rounds {reward} is "
            f"{last_reward:.3f}, {gold} {last_gold:.3f}, at {rows[-1]['kl']:.0f} nats; "
            f"in hindsight {gold} was best, {highest:.3f}, at round {best + 1}.")


def draw_proxy(config, names):
    """Proxy and gold against path KL.  -> label: (rows, hindsight's best)"""
    lines = {}
    for beta, name in zip(PROXY_BETAS, names):
        rows = runs.read_rows(Path(config.out, name, "metrics.csv"))
        label = f"β = {beta:g}"
        lines[label] = (rows, hindsights_best([row["gold"] for row in rows]))
        print(describe(label, rows, config.reward, config.gold))
    path = Path(config.out, f"{config.name}.png")
    figures.overoptimization(path, lines, {"reward": config.reward, "gold": config.gold},
                             "Training on and on; dots: hindsight's best round by gold")
    print(f"Proxy and gold against path KL: {path}")
    return lines


def draw_noise(config, names):
    (name,) = names
    path = Path(config.out, f"{config.name}_noise.png")
    figures.frame(path, Path(config.out, name, "film.png"),
                  "Paid for incompressibility, from top to bottom")
    print(f"What incompressibility pays for: {path}")


def draw_writing(config, names):
    """The films side by side, and the curves.  -> β: (queries, share with the right digit)"""
    folders = [Path(config.out, name) for name in names]
    films = [runs.read_film(folder) for folder in folders]
    digits = {}
    for beta, folder, (prompts, frames) in zip(WRITING_BETAS, folders, films):
        shares = [written_shares(images, prompts) for images in frames.values()]
        digits[beta] = list(frames), [asked_for for asked_for, _ in shares]
        rows = runs.read_rows(folder / "metrics.csv")
        print(describe(f"β = {beta:g}", rows, "vlm_strict", config.gold))
        print(f"β = {beta:g}: the number is written in {shares[0][0]:.0%} of {len(prompts)} "
              f"pictures at first, in {shares[-1][0]:.0%} in the end; any digit in "
              f"{shares[0][1]:.0%} and {shares[-1][1]:.0%}.")

    film = Path(config.out, f"{config.name}_writing.png")
    vlm = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))["vlm"]
    draw_films(film, films, reward_models.load_vlm(vlm, "cpu"))
    curves = Path(config.out, f"{config.name}_writing_curves.png")
    draw_curves(curves, folders, digits, config.gold)
    print(f"The films: {film}; the curves: {curves}")
    return digits


def draw_films(path, films, ask):
    """A row for each frame; columns: some prompts for each β; below: who sees how many shapes."""
    prompts, first = films[0]
    shown = telling(prompts, list(first.values())[-1])
    names = [prompts[i] for i in shown]
    strips, captions, columns = [], [], []
    for beta in WRITING_BETAS:
        columns += [f"{name}\nβ = {beta:g}" for name in names]
    for frame in zip(*[frames.values() for _, frames in films]):  # of each β, at equal queries
        row, below = [], []
        for images in frame:
            row += [images[i] for i in shown]
            below += verdicts(ask, [images[i] for i in shown], names)
        strips.append(row)
        captions.append(below)
    rows = [f"{queries} queries" for queries in films[0][1]]
    figures.sheet(path, strips, rows, columns, None, captions)


def telling(prompts, images):
    """Places of SHOWN pictures, first those with the right number written and another drawn."""
    fooled, others = [], []
    for i, (prompt, digit, objects) in enumerate(zip(prompts, judge.read(images),
                                                     judge.see(images))):
        (group,) = shapes.parse(prompt)
        is_trick = digit == group.count != len(objects)
        (fooled if is_trick else others).append(i)
    places = training.spread_evenly(fooled, SHOWN)[:len(fooled)]
    return sorted(places + training.spread_evenly(others, SHOWN)[:SHOWN - len(places)])


def draw_curves(path, folders, digits, gold):
    """Running means of proxy and gold, and writing, against reward queries: a line for each β."""
    proxies, golds, written = {}, {}, {}
    for (beta, (frames, shares)), folder in zip(digits.items(), folders):
        rows = runs.read_rows(folder / "metrics.csv")
        queries = [row["queries"] for row in rows]
        proxies[f"β = {beta:g}"] = queries, running_mean([row["reward"] for row in rows])
        golds[f"β = {beta:g}"] = queries, running_mean([row["gold"] for row in rows])
        written[f"β = {beta:g}"] = frames, shares
    panels = {"paid for: vlm_strict": proxies, f"meant: {gold}": golds,
              "share with the number written": written}
    figures.lines(path, panels, "reward queries", "Paid for what a vision-language model answers")


def written_shares(images, prompts):
    """Share of pictures with the digit that the prompt asks for, and with any digit."""
    right, some = [], []
    for digit, prompt in zip(judge.read(images), prompts, strict=True):
        (group,) = shapes.parse(prompt)
        right.append(digit == group.count)
        some.append(digit is not None)
    return sum(right) / len(right), sum(some) / len(some)


def verdicts(ask, images, prompts):
    """How many shapes the vision-language model says there are, and how many the judge counts."""
    questions = [judge.questions(prompt)[0][0] for prompt in prompts]
    lines = []
    for answer, objects, question in zip(ask(images, questions), judge.see(images), questions):
        lines.append(f"VLM: {answer}\njudge: {judge.answer(objects, question)}")
    return lines


DRAW = {"proxy": draw_proxy, "noise": draw_noise, "writing": draw_writing}


def main(argv=None):
    own, passed_on = commands.split_flags(argv, OWN)
    config = flags.parse(Config, __doc__, own)
    check(config, passed_on)
    parts = commands_of(config, passed_on)
    chosen = [config.only] if config.only else list(parts)
    wanted = {}
    for part in chosen:
        wanted |= parts[part]
    commands.train_missing(wanted, config.out)
    return {part: DRAW[part](config, list(parts[part])) for part in chosen}


if __name__ == "__main__":
    flags.run(main)
