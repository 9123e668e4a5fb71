"""How the chapters' pictures and curves are drawn.

Nothing here is about learning; skip it on a first reading. Numbers come in as the chapters worked
them out, and leave as PNG files.
"""
import math
import textwrap
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from PIL import Image

from support import page, prices, tables, training
from support.significance import mean_error


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


def frontier(path, curve, best, runs, names):
    """Columns against KL: a curve ± s.e., best of n, and runs at the bound that path KL is.

    curve, best: lines of the CSV files; runs: label -> (mean, s.e.) of reward, of gold and of KL;
    names: the titles of reward and gold.
    """
    figure = Figure(figsize=(9, 4.2 + 0.08 * len(runs)), dpi=120, layout="constrained")
    for i, (ax, key) in enumerate(zip(figure.subplots(1, 2), ("reward", "gold"))):
        x, y, error = ([row[column] for row in curve] for column in ("kl", key, key + "_se"))
        low = [mean - se for mean, se in zip(y, error)]
        high = [mean + se for mean, se in zip(y, error)]
        ax.fill_between(x, low, high, alpha=0.25, color="black", lw=0)
        ax.plot(x, y, lw=1, color="black", label="pretrained, weighted by exp(r/β)/Z")
        if key == "reward":  # concave, with the slope β: nothing is above its last tangent either
            top = max([row["reward"] for row in best] + [ends[0][0] for ends in runs.values()])
            far = x[-1] + max(0, top - y[-1]) / curve[-1]["beta"]
            ax.plot([x[-1], far], [y[-1], y[-1] + curve[-1]["beta"] * (far - x[-1])], "k:", lw=1,
                    label="tangent at its end: a bound too")
        ax.errorbar([row["kl_bound"] for row in best], [row[key] for row in best],
                    [row[key + "_se"] for row in best], fmt="o", ms=4, mfc="white", capsize=2,
                    elinewidth=0.7, color="black",
                    label="best of n, at its upper bound of KL; n beside it")
        for row in best:
            ax.annotate(f"{row['n']:.0f}", (row["kl_bound"], row[key]), size=6, xytext=(3, -8),
                        textcoords="offset points")
        for label, ends in runs.items():  # the tip points to where the pictures' KL lies
            (mean, error), (kl, kl_error) = ends[i], ends[2]
            ax.errorbar(kl, mean, error, kl_error, fmt="<", ms=5, capsize=2, elinewidth=0.7,
                        label=f"{label}, at path KL")
        ax.set(xlabel="KL to the pretrained model, nats")
        ax.set_title(names[i], size=10)
        ax.set_xscale("asinh", linear_width=0.5)
        ticks = [0, 0.3, 1, 3, 10, 30, 100, 300, 1000, 10000]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set_xlim(left=-0.05)
        ax.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, ncols=2, loc="outside lower center")
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
    """Saves a figure under a title that is broken where the figure ends."""
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())), size=10)
    figure.savefig(path)


def frame(path, source, title):
    """A finished picture, under the title that every figure of the evaluation has."""
    picture = Image.open(source)
    width, height = picture.width / 120, picture.height / 120
    figure = Figure(figsize=(width, height + 0.5), dpi=120)
    ax = figure.add_axes([0, 0, 1, height / (height + 0.5)])
    ax.imshow(picture)
    ax.axis("off")
    titled(figure, path, title)


def dots(path, panels, title):
    """Dots with error bars (DPOK, Figure 3a, b): a panel a measure, a line a model.

    panels: name -> {model: {group: (mean, s.e., ...)}}. A group has a color and a marker of its
    own, and a dotted line through its first model.
    """
    names = list(dict.fromkeys(model for models in panels.values() for model in models))
    R = math.ceil(len(panels) / 2)
    height = R * (0.17 * len(names) + 0.5) + 0.7
    figure = Figure(figsize=(3.6, height), dpi=200, layout="constrained")  # as wide as a phone
    axes, handles = figure.subplots(R, 2, sharey=True, squeeze=False).flat, {}
    for ax, (name, models) in zip(axes, panels.items()):
        groups = list(next(iter(models.values())))
        for k, group in enumerate(groups):
            stats = {model: values[group] for model, values in models.items()}
            y = [names.index(model) + 0.4 * (k - (len(groups) - 1) / 2) for model in stats]
            means, errors = [v[0] for v in stats.values()], [v[1] for v in stats.values()]
            handles[group] = ax.errorbar(means, y, xerr=errors, fmt="os^v"[k % 4], ms=4,
                                         capsize=2, lw=1.2, color=f"C{k}")
            ax.axvline(means[0], lw=0.8, ls=":", color=f"C{k}")
        ax.set_title(wrapped(name, 22), size=8)
        ax.set_yticks(range(len(names)), [wrapped(name, 20) for name in names], size=8)
        ax.set_ylim(len(names) - 0.5, -0.5)  # the first model on top
        ax.xaxis.set_major_locator(MaxNLocator(3))
        ax.tick_params(axis="x", labelsize=7)
        ax.grid(axis="x", alpha=0.3)
    for ax in figure.axes[len(panels):]:  # a place without a panel
        ax.set_axis_off()
    if len(handles) > 1:
        figure.legend(handles.values(), handles, fontsize=8, ncol=len(handles),
                      loc="outside lower center")
    titled(figure, path, title)


def queries(path, runs, names, title):
    """A line for each model, band: s.d. of seeds. runs: model -> price (R,), rewards (S,R)."""
    figure = Figure(figsize=(3.9, 3.6), dpi=200, layout="constrained")
    ax = figure.subplots()
    for k, (model, (x, y)) in enumerate(runs.items()):
        line, = ax.plot(x, y.mean(0), ("-", "--", "-.", ":")[k % 4], label=model)
        if len(y) > 1:
            ax.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), alpha=0.12,
                            color=line.get_color())
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    titled(figure, path, title)


def best_of_n(path, curve, levels, names, title):
    """Reward and gold of best of n against n, and how high the trained models stand.

    curve: lines of best_of_n.csv; levels: model -> {"reward": mean, "gold": mean}.
    """
    figure = Figure(figsize=(3.9, 4.6), dpi=200, layout="constrained")
    x = [line["n"] for line in curve]
    for ax, key in zip(figure.subplots(2, 1, sharex=True), ("reward", "gold")):
        ax.errorbar(x, [line[key] for line in curve], [line[key + "_se"] for line in curve],
                    fmt=".-", capsize=2, lw=1, color="black", label="best of n")
        for k, (model, level) in enumerate(levels.items()):
            ax.axhline(level[key], lw=1.2, ls=("-", "--", "-.", ":")[k % 4], color=f"C{k}",
                       label=model)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(names[key], size=8)
        ax.grid(alpha=0.3)
    ax.set_xlabel("n: queries for each picture that is delivered")
    figure.legend(*ax.get_legend_handles_labels(), fontsize=7, ncol=3, loc="outside lower center")
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
    """Proxy and gold against path KL. runs: label -> metrics.csv's rows, hindsight's best."""
    figure = Figure(figsize=(8, 3.4), dpi=100, layout="constrained")
    for ax, (key, name) in zip(figure.subplots(1, 2), names.items()):
        for label, (rows, best) in runs.items():
            line, = ax.plot([row["kl"] for row in rows], [row[key] for row in rows], lw=1,
                            label=label)
            ax.plot(rows[best]["kl"], rows[best][key], "o", color=line.get_color())
        ax.set(xlabel="path KL, nats", title=f"{key}: {name}")
        ax.set_xscale("symlog", linthresh=1)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    titled(figure, path, title)


def early_stopping(path, runs, gold, bound):
    """A panel a run: its labels and the truth against reward queries, and where to stop.

    runs: label -> lines of early_stopping.csv, and the places among them of the round that the rule
    keeps, of the first one beyond the bound, and of hindsight's best.
    """
    C = min(3, len(runs))
    R = math.ceil(len(runs) / C)
    figure = Figure(figsize=(max(5, 3.4 * C), 2.6 * R + 0.9), dpi=120, layout="constrained")
    axes = figure.subplots(R, C, sharey=True, squeeze=False).flat
    for ax, (label, (rows, kept, passed, best)) in zip(axes, runs.items()):
        x, truth = [row["queries"] for row in rows], [row["gold"] for row in rows]
        low = [row["gold"] - row["gold_se"] for row in rows]
        high = [row["gold"] + row["gold_se"] for row in rows]
        ax.fill_between(x, low, high, alpha=0.15, color="black", lw=0)
        ax.plot(x, truth, lw=1.2, color="black", label="truth ± s.e.")
        ax.errorbar(x, [row["labels_mean"] for row in rows], [row["labels_se"] for row in rows],
                    fmt=".", capsize=3, elinewidth=0.8, color="tab:blue", label="labels ± s.e.")
        ax.plot(x[kept], truth[kept], "o", ms=9, mfc="none", mew=1.8, color="tab:orange",
                label="kept by the rule")
        ax.plot(x[best], truth[best], "*", ms=7, color="tab:green", label="hindsight's best")
        if passed < len(rows):
            ax.axvline(x[passed], ls="--", lw=1, color="tab:red")
            ax.axvspan(x[passed], x[-1], alpha=0.06, color="tab:red", lw=0)
        ax.plot([], [], "--", lw=1, color="tab:red",
                label=f"the rule stops: path KL above {bound:g} nats")
        ax.set_title(wrapped(label, 40), size=9)
        ax.set_xlabel("reward queries", size=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    for ax in figure.axes[len(runs):]:  # a place without a panel
        ax.set_axis_off()
    figure.supylabel(f"gold: {gold}", size=9)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=8, ncols=min(3, 1 + C), loc="outside lower center")
    figure.savefig(path)


def evaluation(config, requests, rows, images, curves, results):
    """Chapter 5's figures, and index.html, which shows them with the findings and the numbers."""
    out = Path(config.out)
    for name in page.CAPTIONS:  # an earlier call's must not end up on this one's page
        (out / f"{name}.png").unlink(missing_ok=True)
    note = "QUICK TOUR, far too little training: " if config.quick else ""
    draw_same_seeds(out / "same_seeds.png", requests, images, note)
    draw_scores(out / "scores.png", results["summaries"], config, note)
    draw_generalization(out / "generalization.png", rows, config, note)
    if curves:
        draw_queries(out / "queries.png", curves, config, "queries", "reward queries", note)
        draw_queries(out / "evaluations.png", curves, config, "evaluations", "UNet evaluations",
                     note)
    if results["best_of_n"]:
        draw_best_of_n(out / "best_of_n.png", curves, config, results, note)
    page.write(config, results)


def draw_same_seeds(path, requests, images, note):
    """Two pictures of each family of seen prompts, at most twelve, for each model."""
    shown, counts = [], {}
    for i, row in enumerate(requests):
        counts[row["family"]] = counts.get(row["family"], 0) + 1
        if row["split"] == "seen" and counts[row["family"]] <= 2:
            shown.append(i)
    shown = shown[:12]
    grid = [[pictures[i] for i in shown] for pictures in images.values()]
    sheet(path, grid, list(images), [requests[i]["prompt"] for i in shown], inches=0.66)
    frame(path, path, note + "The same noise in each column")


def draw_scores(path, summaries, config, note):
    """A panel each for proxy, gold, the first other reward and diversity."""
    panels = {}
    for column in ("reward", "gold", *config.others[:1], "diversity"):
        models = {}
        for model, summary in summaries.items():
            if column in summary:
                models[model] = {"seen": summary[column]}
        if models:
            panels[tables.title(column, config)] = models
    dots(path, panels, note + "Mean ± standard error on the seen prompts")


def draw_generalization(path, rows, config, note):
    """Gold by family, on seen and on unseen prompts."""
    panels = {}
    for model, found in rows.items():
        if model.startswith("best of"):  # which has no picture of an unseen prompt
            continue
        for family, split in dict.fromkeys((row["family"], row["split"]) for row in found):
            gold, strata = tables.values_of(found, "gold", split, family)
            panel = panels.setdefault(family, {}).setdefault(model, {})
            panel[split] = mean_error(gold, strata if split == "unseen" else None)
    dots(path, panels, f"{note}{config.gold}: seen prompts, and combinations that no training saw")


def draw_queries(path, curves, config, price, name, note, window=3):
    """Reward against a price, as a running mean of three rounds."""
    lines = {}
    for model, seeds in curves.items():
        x = [row[price] for row in seeds[0]]
        y = torch.empty(len(seeds), len(x))
        for seed, rows in enumerate(seeds):
            for i in range(len(x)):
                y[seed, i] = prices.reward_at(rows, price, x[i], window)
        lines[model] = x, y
    queries(path, lines, (name, config.reward),
            f"{note}Reward against {name}, mean of three rounds")


def draw_best_of_n(path, curves, config, results, note):
    """Best of n as a curve, beside the means of the trained models."""
    levels = {}
    for model in curves:
        summary = results["summaries"][model]
        levels[model] = {key: summary[key][0] for key in ("reward", "gold")}
    names = {key: tables.title(key, config) for key in ("reward", "gold")}
    best_of_n(path, results["best_of_n"], levels, names,
              note + "Best of n pretrained pictures, and trained models")
