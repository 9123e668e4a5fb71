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
and gold against reward queries, mean of five rounds, a dot at hindsight's best), _noise.png and
_writing.png (films; the latter shows pictures first where the trick has worked).
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, figures, flags, models, reward_models, runs, training  # noqa: E402
from support.figures import Figure  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

PROXY_BETAS = (0.0, 0.01, 0.1)
WRITING_BETAS = (0.0, 0.03)
PROMPTS = 4  # of a round of the writing
SHOWN = 4  # prompts in the film of the writing, for each β
WINDOW = 5  # rounds of a mean


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


def commands_of(config, passed_on):
    """Part -> {a run's name: its command}: one for each β, and one for the noise."""
    shared = commands.words_of(config, ("gold", "rounds", "learning_rate", "seed"))
    one_prompt = [*shared, "--samples-per-prompt", str(config.samples_per_prompt), *passed_on]
    numbers = [*shared, "--samples-per-prompt", str(config.samples_per_prompt // PROMPTS),
               "--prompts", "count", "--prompts-per-round", str(PROMPTS), "--film-pictures", "32",
               *passed_on]
    start, no_value = ["04_dpok.py", "--reward"], ["--no-value", "--beta"]
    proxy = {f"{config.name}_beta_{beta:g}": [
        *start, config.reward, "--keep-every", "5", "--beta", str(beta), *one_prompt]
        for beta in PROXY_BETAS}
    noise = {f"{config.name}_noise": [*start, "incompressibility", *no_value, "0", *one_prompt]}
    writing = {f"{config.name}_writing_beta_{beta:g}": [
        *start, "vlm_strict", *no_value, str(beta), *numbers] for beta in WRITING_BETAS}
    return {"proxy": proxy, "noise": noise, "writing": writing}


def running_mean(values):
    """The mean of each value and those before it, WINDOW of them at most."""
    means = []
    for end in range(1, len(values) + 1):
        latest = values[max(0, end - WINDOW):end]
        means.append(sum(latest) / len(latest))
    return means


def hindsights_best(gold):
    """argmax_n (g_n + … + g_{n−4})/5: the round at which gold's running mean is highest."""
    means = running_mean(gold)
    return means.index(max(means))


def curves_of(folder, name):
    """Reward queries, and the running mean of a column of metrics.csv."""
    rows = runs.read_rows(folder / "metrics.csv")
    return [row["queries"] for row in rows], running_mean([row[name] for row in rows])


def draw_lines(path, panels, marks=None):
    """Panels side by side, against reward queries.  panels: title -> {label: (x, y)}

    marks: label -> the place of a dot on its lines. A line's label stands at its end.
    """
    figure = Figure(figsize=(4 * len(panels), 3.4), dpi=110, layout="constrained")
    for ax, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, (x, y) in lines.items():
            line, = ax.plot(x, y)
            ax.annotate(f" {label}", (x[-1], y[-1]), va="center", size=8, color=line.get_color())
            if marks:
                k = marks[label]
                ax.plot(x[k], y[k], "o", color=line.get_color())
        ax.set(xlabel="reward queries", title=title)
        ax.set_xlim(right=1.3 * x[-1])  # room for the labels
        ax.margins(y=0.1)
        ax.grid(alpha=0.3)
    figure.savefig(path)


def draw_proxy(config, folders):
    """Proxy and gold as training goes on.  -> a line for each β"""
    panels = {f"paid for: {config.reward}": {}, f"meant: {config.gold}": {}}
    rows, marks = [], {}
    for beta, folder in zip(PROXY_BETAS, folders):
        row = {"beta": beta, "run": folder.name} | tables.gains_of(folder)
        label = f"β = {beta:g},\n {row['kl after']} nats"
        for lines, name in zip(panels.values(), ("reward", "gold")):
            lines[label] = curves_of(folder, name)
        gold = [line["gold"] for line in runs.read_rows(folder / "metrics.csv")]
        best = marks[label] = hindsights_best(gold)
        highest = training.mean_se(gold[max(0, best + 1 - WINDOW):best + 1])
        row["hindsight's best round"] = best + 1
        row["gold over its last five rounds"] = tables.rounded(*highest)
        rows.append(row)
    draw_lines(Path(config.out, f"{config.name}.png"), panels, marks)
    return rows


def draw_noise(config, folders):
    """What incompressibility pays for: the run's own film."""
    shutil.copy(folders[0] / "film.png", Path(config.out, f"{config.name}_noise.png"))
    return [{"run": folders[0].name} | tables.gains_of(folders[0])]


def draw_writing(config, folders):
    """The films side by side, and the curves.  -> a line for each β"""
    rows, films = [], {}
    panels = {"paid for: vlm_strict": {}, f"meant: {config.gold}": {}, "the number is written": {}}
    for beta, folder in zip(WRITING_BETAS, folders):
        prompts, frames = runs.read_film(folder)
        shares = [written_shares(images, prompts) for images in frames.values()]
        row = {"beta": beta, "run": folder.name} | tables.gains_of(folder)
        for when, place in (("before", 0), ("after", -1)):
            row[f"number written {when}"] = f"{shares[place][0]:.2f}"
            row[f"any digit {when}"] = f"{shares[place][1]:.2f}"
        rows.append(row)
        label = f"β = {beta:g}"
        films[label] = frames
        of_reward, of_gold, of_number = panels.values()
        of_reward[label] = curves_of(folder, "reward")
        of_gold[label] = curves_of(folder, "gold")
        of_number[label] = list(frames), [right for right, _ in shares]
    draw_lines(Path(config.out, f"{config.name}_writing_curves.png"), panels)
    ask = reward_models.load_vlm(models.read_config(folders[0])["vlm"], "cpu")
    draw_films(Path(config.out, f"{config.name}_writing.png"), prompts, films, ask)
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
        is_trick = digit == group.count != len(objects)
        (fooled if is_trick else others).append(i)
    places = training.spread_evenly(fooled, min(SHOWN, len(fooled)))
    return sorted(places + training.spread_evenly(others, SHOWN - len(places)))


def written_shares(images, prompts):
    """Share of pictures with the digit that the prompt asks for, and with any digit."""
    digits = judge.read(images)
    right = [digit == shapes.parse(prompt)[0].count for digit, prompt in zip(digits, prompts)]
    some = [digit is not None for digit in digits]
    return sum(right) / len(right), sum(some) / len(some)


DRAW = {"proxy": draw_proxy, "noise": draw_noise, "writing": draw_writing}


def main(argv=None):
    own, passed_on = commands.split_flags(argv, OWN)
    config = flags.parse(Config, __doc__, own)
    parts = commands_of(config, passed_on)
    if config.only:
        parts = {config.only: parts[config.only]}
    if "writing" in parts:
        if config.samples_per_prompt % PROMPTS or config.samples_per_prompt < 2 * PROMPTS:
            raise ValueError(f"--samples-per-prompt must be a multiple of {PROMPTS}, at least "
                             f"{2 * PROMPTS}: the part writing shares them among {PROMPTS} prompts")
        commands.split_flags(["--", *passed_on], OF_WRITING)  # it has its own
    wanted = {}
    for commands_of_part in parts.values():
        wanted |= commands_of_part
    commands.train_missing(wanted, config.out)
    rows = {}
    for part, names in parts.items():
        rows[part] = DRAW[part](config, [Path(config.out, name) for name in names])
        print(f"\n{part}, on pictures from fresh noise:\n{tables.as_text(rows[part])}")
    print(f"The pictures: {Path(config.out, config.name)}*.png")
    return rows


if __name__ == "__main__":
    flags.run(main)
