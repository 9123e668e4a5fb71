"""What happens where the reward can be fooled? The model writes the number (DDPO, Figure 7, right).

"n shapes" is paid by vlm_strict, which asks the vision-language model how many shapes there are. A
printed digit is what that model believes first; so the diffusion model learns to write it, without
and with a KL term. (Figure 7, left, is film.png of a DDPO_SF run of ddpo_rewards.py on
incompressibility; how gold falls while image_reward rises, chapter 5's curves show.)

RUN `python experiments/overoptimization.py`: two trainings, 13 minutes. It prints and starts
commands (you can type the same), leaves out finished runs, and refuses one with other settings.
Flags behind a lone -- are passed on to chapter 4: `-- --alpha 2`.
EXPECT more and more digits, beside numbers of shapes that get no better. With the KL term they come
later and are fewer, but come: writing costs few nats.
WRITES in --out the run folders overoptimization_beta_*/, overoptimization_curves.png (against
reward queries: proxy and gold, means of five rounds, and the share of pictures with the number
written), and overoptimization.png (first of all prompts with which the trick has worked).
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, figures, flags, models  # noqa: E402
from support import reward_models, runs, training  # noqa: E402
from support.figures import Figure  # noqa: E402
from tiny_sd import judge, shapes  # noqa: E402

BETAS = (0.0, 0.03)
PROMPTS = 4  # of a round
SHOWN = 4  # prompts in the film, for each β
WINDOW = 5  # rounds of a mean


@dataclass(frozen=True)
class Config:
    rounds: int = 50  # rounds of each run: far too many
    samples_per_prompt: int = 12  # pictures of each of a round's four prompts
    learning_rate: float = 2e-3  # of AdamW, twice chapter 4's
    seed: int = 0  # seed of everything
    out: str = "runs"  # folder of all runs
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 4


def command_of(beta, config):
    """The command of the run with this β."""
    shared = ("rounds", "samples_per_prompt", "learning_rate", "seed")
    return ["04_dpok.py", "--beta", str(beta), "--reward", "vlm_strict", "--no-value", "--prompts",
            "count", "--prompts-per-round", str(PROMPTS), "--film-pictures", "32",
            *commands.words_of(config, shared), *config.flags]


def running_mean(values):
    """The mean of each value and those before it, WINDOW of them at most."""
    means = []
    for end in range(1, len(values) + 1):
        latest = values[max(0, end - WINDOW):end]
        means.append(sum(latest) / len(latest))
    return means


def draw_lines(path, panels):
    """Panels side by side, against reward queries.  panels: title -> {label: (x, y)}"""
    figure = Figure(figsize=(4 * len(panels), 3.4), dpi=110, layout="constrained")
    for ax, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
        for label, (x, y) in lines.items():
            ax.plot(x, y, label=label)
        ax.set(xlabel="reward queries", title=title)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)


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
    start = Path(config.out, "overoptimization")
    folders = {beta: Path(f"{start}_beta_{beta:g}") for beta in BETAS}
    wanted = {folder.name: command_of(beta, config) for beta, folder in folders.items()}
    commands.train_missing(wanted, config.out)
    rows, films, saved = [], {}, models.read_config(folders[0.0])
    panels = {f"paid for: {saved['reward']}": {}, f"meant: {saved['gold']}": {},
              "the number is written": {}}
    for beta, folder in folders.items():
        prompts, frames = runs.read_film(folder)
        films[f"β = {beta:g}"] = frames
        shares = [written_shares(images, prompts) for images in frames.values()]
        row = {"beta": beta} | tables.gains_of(folder)
        row["number written before"], row["any digit before"] = shares[0]
        row["number written after"], row["any digit after"] = shares[-1]
        rows.append(row)
        rounds = runs.read_rows(folder / "metrics.csv")
        queries = [line["queries"] for line in rounds]
        lines = [(queries, running_mean([line[name] for line in rounds]))
                 for name in ("reward", "gold")]
        lines.append((list(frames), [right for right, _ in shares]))
        for panel, line in zip(panels.values(), lines):
            panel[f"β = {beta:g}, {row['kl after']} nats"] = line
    draw_lines(f"{start}_curves.png", panels)
    ask = reward_models.load_vlm(saved["vlm"], "cpu")
    draw_films(f"{start}.png", prompts, films, ask)
    print(f"\nOn pictures from fresh noise:\n{evaluation.as_text(rows)}")
    print(f"The pictures: {start}.png and {start}_curves.png")
    return rows


if __name__ == "__main__":
    flags.run(main)
