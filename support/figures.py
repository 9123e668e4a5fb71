"""How the chapters' pictures and curves are drawn, and the page that shows an evaluation.

Nothing here is about learning; skip it on a first reading. Numbers come in as the chapters worked
them out, and leave as PNG files.
"""
import base64
import html
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from support import tables, training


def sheet(path, rows, row_names, column_names=None, titles=None, captions=None):
    """A grid of pictures. rows: lists of PIL pictures, all equally long.

    Names stand left of each row and above each column; titles and captions, lists of lists as rows
    is, above and below each picture.
    """
    R, C = len(rows), len(rows[0])
    size = (1.25 * C + 1, 1.8 * R) if captions else (1.1 * C + 1.2, 1.1 * R + 0.4)
    figure = Figure(figsize=size, dpi=120, layout="constrained" if captions else "compressed")
    for i, ax in enumerate(figure.subplots(R, C, squeeze=False).flat):
        r, c = divmod(i, C)
        ax.imshow(rows[r][c])
        ax.set(xticks=[], yticks=[])
        if titles:
            ax.set_title(titles[r][c], size=9)
        elif r == 0:
            ax.set_title(wrapped(column_names[c]), size=7)
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


def beliefs(path, prompts, pictures, names, last):
    """What the model believes x_0 to be. pictures: a list of B for each step; last: B of x_0."""
    places = torch.linspace(0, len(pictures) - 1, min(10, len(pictures))).round().int().tolist()
    columns = [pictures[k] for k in places] + [last]
    rows = [[column[i] for column in columns] for i in range(len(prompts))]
    sheet(path, rows, prompts, [names[k] for k in places] + ["$x_0$"])


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


def sweep(path, rows, names):
    """What each β/α ends with against path KL. rows: (β/α, KL, proxy, gold), each (mean, s.e.)."""
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    for i, (ax, name) in enumerate(zip(figure.subplots(1, 2), names)):
        for ratio, (kl, _), *values in rows:
            ax.errorbar(kl, *values[i], fmt=".", capsize=3, color="tab:blue")
            ax.annotate(f"{ratio:g}", (kl, values[i][0]), size=7, xytext=(3, 3),
                        textcoords="offset points")
        ax.plot([row[1][0] for row in rows], [row[2 + i][0] for row in rows], lw=1)
        ax.set(xlabel="path KL, nats (β/α beside the points)", title=name)
        ax.set_xscale("symlog", linthresh=1)
        ax.grid(alpha=0.3)
    figure.savefig(path)


def bounds(path, sides):
    """Lemma 4.2's two sides. sides: T -> list of (KL of x_0, sum of step KLs), in nats."""
    figure = Figure(figsize=(5, 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for T, points in sides.items():
        ax.loglog(*zip(*points), ".-", label=f"T = {T}")
    ends = [points[i][0] for points in list(sides.values())[:1] for i in (0, -1)]
    ax.loglog(ends, ends, "k:", label="equal")
    ax.set(xlabel="KL of $x_0$, nats", ylabel="Σ of step KLs, nats")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path)


# ---- chapter 5's ----------------------------------------------------------------------------


def titled(figure, path, title):
    figure.suptitle(title, size=10)
    figure.savefig(path)


def frame(path, source, title):
    """A finished picture, under the title that every figure of the evaluation has."""
    picture = Image.open(source)
    figure = Figure(figsize=(picture.width / 120, picture.height / 120 + 0.4), dpi=120)
    ax = figure.add_axes([0, 0, 1, picture.height / (picture.height + 48)])
    ax.imshow(picture)
    ax.axis("off")
    titled(figure, path, title)


def bars(path, panels, title):
    """Bars with error bars (DPOK, Figure 3a, b). panels: name -> {model: (mean, s.e., ...)}."""
    figure = Figure(figsize=(3 * len(panels), 3), dpi=100, layout="constrained")
    for ax, (name, models) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                  panels.items()):
        ax.bar(range(len(models)), [v[0] for v in models.values()],
               yerr=[v[1] for v in models.values()], capsize=3, color="tab:blue")
        ax.set_xticks(range(len(models)), [textwrap.fill(model, 20) for model in models],
                      rotation=40, ha="right", size=8)
        ax.set_title(name, size=9)
        ax.axhline(0, lw=0.5, color="black")
    titled(figure, path, title)


def queries(path, runs, name, title):
    """A line for each model, band: s.d. of seeds. runs: model -> queries (R,), rewards (S,R)."""
    figure = Figure(figsize=(5.5, 3.6), dpi=100, layout="constrained")
    ax = figure.subplots()
    for model, (x, y) in runs.items():
        line, = ax.plot(x, y.mean(0), label=model)
        if len(y) > 1:
            ax.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), alpha=0.12,
                            color=line.get_color())
    ax.set(xlabel="reward queries", ylabel=name)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    titled(figure, path, title)


def lines(path, panels, xlabel, title):
    """Panels side by side. panels: name -> {label: (x, y)}."""
    figure = Figure(figsize=(3.4 * len(panels), 3.2), dpi=100, layout="constrained")
    for ax, (name, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                  panels.items()):
        for label, (x, y) in curves.items():
            ax.plot(x, y, ".-", lw=1, label=label)
        ax.set(xlabel=xlabel, title=name)
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    titled(figure, path, title)


def overoptimization(path, runs, names, title):
    """Proxy and gold against path KL. runs: label -> metrics.csv's rows, where to stop early."""
    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    for ax, (key, name) in zip(figure.subplots(1, 2), names.items()):
        for label, (rows, stop) in runs.items():
            line, = ax.plot([row["kl"] for row in rows], [row[key] for row in rows], lw=1,
                            label=label)
            ax.plot(rows[stop]["kl"], rows[stop][key], "o", color=line.get_color())
        ax.set(xlabel="path KL, nats", title=f"{key}: {name}")
        ax.set_xscale("symlog", linthresh=1)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    titled(figure, path, title)


def groups(path, models, name, title):
    """Bars side by side. models: name -> {group: (mean, s.e.)}, the same groups for all."""
    figure = Figure(figsize=(9, 3.2), dpi=100, layout="constrained")
    ax, width = figure.subplots(), 0.8 / len(models)
    for k, (model, stats) in enumerate(models.items()):
        ax.bar([i + (k + 0.5) * width - 0.4 for i in range(len(stats))],
               [m for m, _ in stats.values()], width, yerr=[e for _, e in stats.values()],
               label=model)
    ax.set_xticks(range(len(stats)), list(stats), size=8)
    ax.set_ylabel(name)
    ax.margins(y=0.15)  # room for the legend
    ax.legend(fontsize=7, ncol=len(models))
    titled(figure, path, title)


CAPTIONS = {
    "same_seeds": "Same noise in each column (DPOK, Figure 2): one row a model. Only best of n "
                  "chose, from that noise and others.",
    "scores": "Mean ± standard error of the proxy and of what it does not know (DPOK, Figure 3).",
    "queries": "Reward of freshly drawn pictures against reward queries (DDPO's curves).",
    "generalization": "Gold on the prompts that were trained on (seen) and on combinations that no "
                      "training saw (unseen)."}


def evaluation(config, requests, rows, summaries, images, claims, curves):
    """Chapter 5's figures, and index.html, which shows them with the table and the claims."""
    out = Path(config.out)
    for name in CAPTIONS:  # an earlier call's must not end up on this one's page
        (out / f"{name}.png").unlink(missing_ok=True)
    note = "QUICK TOUR, far too little training: " if config.quick else ""
    draw_same_seeds(out / "same_seeds.png", requests, images, note)
    draw_scores(out / "scores.png", summaries, config, note)
    draw_generalization(out / "generalization.png", rows, config, note)
    if curves:
        draw_queries(out / "queries.png", curves, config, note)
    headline = (f"{'Measured' if config.runs else 'Trained on'}: {config.reward}; meant: "
                f"{config.gold}. Mean ± standard error.")
    page(out / "index.html", tables.summary_table(summaries), tables.claim_lines(claims),
         CAPTIONS, f"<p>{note}{headline}</p>")


def draw_same_seeds(path, requests, images, note):
    """Two pictures of each family of seen prompts, at most twelve, for each model."""
    shown, counts = [], {}
    for i, row in enumerate(requests):
        counts[row["family"]] = counts.get(row["family"], 0) + 1
        if row["split"] == "seen" and counts[row["family"]] <= 2:
            shown.append(i)
    shown = shown[:12]
    grid = [[pictures[i] for i in shown] for pictures in images.values()]
    sheet(path, grid, list(images), [requests[i]["prompt"] for i in shown])
    frame(path, path, note + "The same noise in each column")


def draw_scores(path, summaries, config, note):
    """A panel each for proxy, gold, the first other reward and diversity."""
    titles = {"reward": f"reward: {config.reward}", "gold": f"gold: {config.gold}"}
    panels = {}
    for column in ("reward", "gold", *config.others[:1], "diversity"):
        models = {}
        for model, summary in summaries.items():
            if column in summary:
                models[model] = summary[column]
        if models:
            panels[titles.get(column, column)] = models
    bars(path, panels, note + "Mean ± standard error on the seen prompts")


def draw_generalization(path, rows, config, note):
    """Gold by family, on seen and on unseen prompts."""
    models = {}
    for model, found in rows.items():
        if model.startswith("best of"):  # which has no picture of an unseen prompt
            continue
        models[model] = {}
        for family, split in dict.fromkeys((row["family"], row["split"]) for row in found):
            gold = tables.picture_means(found, "gold", split, family)
            models[model][f"{family}\n{split}"] = training.mean_se(gold)
    groups(path, models, config.gold, note + "Seen prompts, and combinations that no training saw")


def draw_queries(path, curves, config, note, window=3):
    """Reward against queries, as a running mean of three rounds."""
    lines = {}
    for model, seeds in curves.items():
        x = [row["queries"] for row in seeds[0]]
        y = torch.empty(len(seeds), len(x))
        for seed, rows in enumerate(seeds):
            for i in range(len(x)):
                latest = [row["reward"] for row in rows[max(0, i - window + 1):i + 1]]
                y[seed, i] = sum(latest) / len(latest)
        lines[model] = x, y
    queries(path, lines, config.reward,
            note + "Reward against reward queries, mean of three rounds")


def page(path, table, said, captions, note):
    """One HTML file that needs no other: a Markdown table, sentences, and the figures beside it."""
    cells = []
    for line in table:
        if not line.startswith("| ---"):
            words = [html.escape(cell.strip()) for cell in line.strip("|").split("|")]
            cells.append("".join(f"<td>{word}</td>" for word in words))
    pictures = {name: base64.b64encode(path.with_name(f"{name}.png").read_bytes()).decode()
                for name in captions if path.with_name(f"{name}.png").is_file()}
    path.write_text(
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Evaluation</title><style>body{"
        "font-family:sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{font-size:70%;"
        "border-collapse:collapse}td{border:1px solid #ccc;padding:3px}img{max-width:100%}"
        f".wide{{overflow-x:auto}}</style><h1>Who is better, at what price</h1>{note}"
        "<div class=wide><table><tr>" + "</tr><tr>".join(cells)
        + "</tr></table></div><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in said)
        + "</ul>"
        + "".join(f"<figure><img alt='{captions[name]}' src='data:image/png;base64,{data}'>"
                  f"<figcaption>{captions[name]}</figcaption></figure>"
                  for name, data in pictures.items()), encoding="utf-8")
