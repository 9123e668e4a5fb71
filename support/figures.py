"""How the chapters' pictures and curves are drawn.

Nothing here is about learning; skip it on a first reading. Numbers come in as the chapters worked
them out, and leave as PNG files.
"""
import os
import textwrap

import torch

os.environ["MPLBACKEND"] = "agg"  # a notebook's or a shell's other choice cannot draw here
import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

matplotlib.rcdefaults()  # nor does a matplotlibrc change a picture
matplotlib.rcParams["text.parse_math"] = False  # a prompt's or a name's $ is a dollar


def sheet(path, rows, row_names, column_names=None, titles=None, captions=None, inches=1.1):
    """A grid of pictures. rows: lists of PIL pictures, all equally long.

    Names stand left of each row and above each column; titles and captions, lists of lists as rows
    is, above and below each picture. inches: of a picture; the smaller, the larger the names.
    """
    R, C = len(rows), len(rows[0])
    size = (1.25 * C + 1, 1.8 * R) if captions else (inches * C + 1.2, inches * R + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained" if captions else "compressed")
    for i, ax in enumerate(figure.subplots(R, C, squeeze=False).flat):
        r, c = divmod(i, C)
        ax.imshow(rows[r][c])
        ax.set(xticks=[], yticks=[])
        if titles:
            ax.set_title(titles[r][c], size=9)
        elif r == 0:
            ax.set_title(wrapped(column_names[c], round(16.5 * inches)), size=7)
        if captions:
            ax.set_xlabel(wrapped(captions[r][c]), size=6)
        if c == 0:
            ax.set_ylabel(wrapped(row_names[r]), rotation=0, ha="right", va="center",
                          size=8)
    figure.savefig(path)


def wrapped(text, width=18):
    """Each line of a text broken where it is too long."""
    return "\n".join(textwrap.fill(line, width) for line in text.splitlines())


def beliefs(path, trajectory, pictures):
    """What the model believes x_0 to be, and x_0. pictures: a list of B for each step."""
    steps = torch.linspace(0, len(pictures) - 1, min(10, len(pictures))).round().int().tolist()
    columns = [pictures[k] for k in steps] + [trajectory.images]
    rows = [[column[i] for column in columns] for i in range(len(trajectory.prompts))]
    names = [f"t = {trajectory.timesteps[k]}" for k in steps] + ["x_0"]
    sheet(path, rows, trajectory.prompts, names)


def ranking(path, images, prompts, scores, show):
    """A sheet with a row for each reward: evenly spaced pictures of its ranking, best to worst."""
    places = torch.linspace(0, len(images) - 1, min(show, len(images))).round().long()
    order = {name: values.argsort(descending=True, stable=True)[places].tolist()
             for name, values in scores.items()}
    sheet(path, [[images[i] for i in row] for row in order.values()], list(scores),
          titles=[[f"{scores[name][i]:.2f}" for i in row] for name, row in order.items()],
          captions=[[prompts[i] for i in row] for row in order.values()])


def before_after(path, before, after):
    """The same noise before and after: two dicts with "prompts", "images" and "reward" (B,).

    Evenly spaced in the ranking *before*, so that bad and good pictures get their fair share.
    """
    B = len(before["prompts"])
    places = torch.linspace(0, B - 1, min(10, B)).round().long()
    shown = before["reward"].argsort(stable=True)[places].tolist()
    names = [f"{before['prompts'][i]}\n{before['reward'][i]:.2f} → {after['reward'][i]:.2f}"
             for i in shown]
    rows = [[side["images"][i] for i in shown] for side in (before, after)]
    sheet(path, rows, ["before", "after"], names)


def curves(path, rows, fresh, titles):
    """Columns of metrics.csv and of fresh.csv against reward queries, ± s.e. where there is one."""
    figure = Figure(figsize=(3 * len(titles) + 1, 3.2), dpi=120, layout="constrained")
    for ax, (name, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items()):
        for lines, label, style in ((rows, "training rounds", dict(fmt=".-", lw=1, elinewidth=0.5)),
                                    (fresh, "fresh noise", dict(fmt="ks", ms=4, capsize=4))):
            x, y, error = ([line[key] for line in lines] for key in ("queries", name, name + "_se"))
            ax.errorbar(x, y, error, label=label, **style)
        ax.set(xlabel="reward queries", title=wrapped(title, 36))
        ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(path)
