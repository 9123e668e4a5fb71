"""How the chapters' pictures and curves are drawn.

Nothing here is about learning; skip it on a first reading. Numbers come in as the chapters worked
them out, and leave as PNG files.
"""
import os
import textwrap

import torch
from PIL import Image

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


def strip(images):
    """Pictures of one size side by side in one."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row


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


def before_after(path, prompts, rewards, images):
    """The same seeds before and after. rewards: two tensors (B,); images: two lists of B pictures.

    Evenly spaced in the ranking *before*, so that bad and good pictures get their fair share.
    """
    before, after = rewards
    places = torch.linspace(0, len(prompts) - 1, min(10, len(prompts))).round().long()
    shown = before.argsort(stable=True)[places].tolist()
    sheet(path, [[side[i] for i in shown] for side in images], ["before", "after"],
          [f"{prompts[i]}\n{before[i]:.2f} → {after[i]:.2f}" for i in shown])


def curves(path, rows, ends, names):
    """Columns of metrics.csv against reward queries, ± s.e. where there is one.

    ends: column -> its values (B,) on fresh seeds, before and after; names: column -> its title.
    """
    x = [row["queries"] for row in rows]
    figure = Figure(figsize=(3 * len(names) + 1, 3.2), dpi=120, layout="constrained")
    for ax, (key, name) in zip(figure.subplots(1, len(names), squeeze=False)[0], names.items()):
        errors = [row[key + "_se"] for row in rows] if key + "_se" in rows[0] else None
        ax.errorbar(x, [row[key] for row in rows], errors, fmt=".-", lw=1, elinewidth=0.5,
                    label="training rounds")
        stats = [(v.mean(), v.std() / len(v) ** 0.5) for v in ends[key]]
        ax.errorbar([0, x[-1]], *zip(*stats), fmt="s", capsize=4, color="black",
                    label="fresh seeds")
        ax.set(xlabel="reward queries", title=name)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    figure.savefig(path)
