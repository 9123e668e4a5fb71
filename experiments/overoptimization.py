"""What happens if nobody stops? Training on and on (DDPO, Figure 7; DPOK's reason for the KL).

A proxy that is optimized long enough is pleased in ways that nobody meant. In two parts (what
incompressibility ends in, Figure 7, left, is a row of ddpo_rewards.py's samples):

    proxy    one prompt on image_reward for far too many rounds, with β = 0, 0.01 and 0.1
    writing  "n shapes" on vlm_strict: the diffusion model learns to write the number, and the
             vision-language model believes it; without and with a KL term  (Figure 7, right)

    hindsight's best = the round at which gold's mean over the last five rounds is highest

It looks at gold of all rounds, so it is no rule for stopping; early_stopping.py has one.

RUN `python experiments/overoptimization.py`: five trainings (not timed yet). It prints and starts
commands (you can type the same), leaves out finished runs, and refuses one with other settings.
Flags behind a lone -- are passed on: `--only proxy -- --prompts "four stars"`.
EXPECT gold to fall at β = 0 while the proxy rises; and more and more digits, beside numbers of
shapes that get no better. The KL term does not keep the digits out: writing costs few nats.
WRITES run folders runs/overoptimization_*/, and in runs/ for each part overoptimization_PART.png
(proxy and gold against reward queries, mean of five rounds, a dot at hindsight's best), and
overoptimization_writing_film.png (first of all prompts with which the trick has worked).
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, figures, flags, models  # noqa: E402
from support import reward_models, runs, training  # noqa: E402
from support.figures import Figure  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

BETAS = {"proxy": (0.0, 0.01, 0.1), "writing": (0.0, 0.03)}  # of each part's runs
PROMPTS = 4  # of a round of the writing
SHOWN = 4  # prompts in the film of the writing, for each β
WINDOW = 5  # rounds of a mean


@dataclass(frozen=True)
class Config:
    only: Literal["proxy", "writing"] | None = None  # one part of the two
    rounds: int = 50  # rounds of each run: far too many
    samples_per_prompt: int = 48  # pictures of a round; writing: a quarter for each of its prompts
    learning_rate: float = 2e-3  # of AdamW, twice chapter 4's
    reward: str = "image_reward"  # the proxy that is optimized too far
    gold: str = "alignment"  # what is really meant
    seed: int = 0  # seed of everything
    out: str = "runs"  # folder of all runs
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 4


def command_of(part, beta, config):
    """The command of a part's run with this β."""
    own, pictures = ["--reward", config.reward], config.samples_per_prompt
    if part == "writing":
        own = ["--reward", "vlm_strict", "--no-value", "--prompts", "count", "--prompts-per-round",
               str(PROMPTS), "--film-pictures", "32"]
        pictures //= PROMPTS
    shared = commands.words_of(config, ("gold", "rounds", "learning_rate", "seed"))
    return ["04_dpok.py", "--beta", str(beta), *own, *shared,
            "--samples-per-prompt", str(pictures), *config.flags]


def running_mean(values):
    """The mean of each value and those before it, WINDOW of them at most."""
    means = []
    for end in range(1, len(values) + 1):
        latest = values[max(0, end - WINDOW):end]
        means.append(sum(latest) / len(latest))
    return means


def hindsights_best(gold):
    """argmax_n (g_n + … + g_{n−4})/5, fewer at first: where gold's running mean is highest."""
    means = running_mean(gold)
    return means.index(max(means))


def draw_lines(path, panels):
    """Panels side by side, against reward queries.  panels: title -> {label: (x, y, dots)}

    dots: the places of dots on the line.
    """
    figure = Figure(figsize=(4 * len(panels), 3.4), dpi=110, layout="constrained")
    for ax, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, (x, y, dots) in lines.items():
            ax.plot(x, y, marker="o", markevery=dots, label=label)
        ax.set(xlabel="reward queries", title=title)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)


def compare(part, folders, config):
    """Draws proxy and gold as a part's trainings go on.  folders: β -> run  -> a line for each β"""
    rows, films = [], {}
    reward = models.read_config(folders[0.0])["reward"]
    of_reward, of_gold, of_number = {}, {}, {}
    panels = {f"paid for: {reward}": of_reward, f"meant: {config.gold}": of_gold}
    for beta, folder in folders.items():
        rounds = runs.read_rows(folder / "metrics.csv")
        queries = [line["queries"] for line in rounds]
        gold = [line["gold"] for line in rounds]
        best = hindsights_best(gold)
        highest = training.mean_se(gold[max(0, best + 1 - WINDOW):best + 1])
        row = {"beta": beta, "run": folder.name} | tables.gains_of(folder)
        row["hindsight's best round"] = best + 1
        row["gold over the five rounds up to it"] = evaluation.cell(*highest)
        rows.append(row)
        label = f"β = {beta:g}, {row['kl after']} nats"
        of_reward[label] = queries, running_mean([line["reward"] for line in rounds]), [best]
        of_gold[label] = queries, running_mean(gold), [best]
        if part == "writing":
            prompts, frames = runs.read_film(folder)
            films[f"β = {beta:g}"] = frames
            shares = [written_shares(images, prompts) for images in frames.values()]
            row["number written before"], row["any digit before"] = shares[0]
            row["number written after"], row["any digit after"] = shares[-1]
            of_number[label] = list(frames), [right for right, _ in shares], []
            panels["the number is written"] = of_number
    start = Path(config.out, f"overoptimization_{part}")
    draw_lines(f"{start}.png", panels)
    if part == "writing":
        ask = reward_models.load_vlm(models.read_config(folders[0.0])["vlm"], "cpu")
        draw_films(f"{start}_film.png", prompts, films, ask)
    return rows


def draw_films(path, prompts, films, ask):
    """A row for each frame; columns: some prompts for each β; below: who sees how many shapes."""
    first = next(iter(films.values()))
    shown = telling(prompts, list(first.values())[-1])
    names = [prompts[i] for i in shown]
    questions = [judge.questions(name)[0][0] for name in names]
    strips, captions = [], []
    for queries in first:
        strip, below = [], []
        for frames in films.values():
            images = [frames[queries][i] for i in shown]
            strip += images
            answers = zip(ask(images, questions), judge.see(images), questions)
            below += [f"VLM: {answer}\njudge: {judge.answer(objects, question)}"
                      for answer, objects, question in answers]
        strips.append(strip)
        captions.append(below)
    columns = [f"{name}\n{label}" for label in films for name in names]
    times = [f"{queries} queries" for queries in first]
    figures.sheet(path, strips, times, columns, None, captions)


def telling(prompts, images):
    """Places of SHOWN pictures, first those with the right number written and another drawn."""
    fooled, others = [], []
    for i, (digit, objects) in enumerate(zip(judge.read(images), judge.see(images))):
        (group,) = shapes.parse(prompts[i])
        found = others
        if digit == group.count != len(objects):
            found = fooled
        found.append(i)
    missing = max(0, SHOWN - len(fooled))
    return training.spread_evenly(fooled + others[:missing], SHOWN)


def written_shares(images, prompts):
    """Share of pictures with the digit that the prompt asks for, and with any digit."""
    digits = judge.read(images)
    right = [digit == shapes.parse(prompt)[0].count for digit, prompt in zip(digits, prompts)]
    N = len(digits)
    return round(sum(right) / N, 2), round(1 - digits.count(None) / N, 2)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    wanted, folders = {}, {}
    for part in [config.only] if config.only else BETAS:
        folders[part] = {}
        for beta in BETAS[part]:
            name = f"overoptimization_{part}_beta_{beta:g}"
            folders[part][beta] = Path(config.out, name)
            wanted[name] = command_of(part, beta, config)
    commands.train_missing(wanted, config.out)
    rows = {}
    for part in folders:
        rows[part] = compare(part, folders[part], config)
        print(f"\n{part}, on pictures from fresh noise:\n{evaluation.as_text(rows[part])}")
    print(f"The pictures: {config.out}/overoptimization_*.png")
    return rows


if __name__ == "__main__":
    flags.run(main)
