"""What chapter 5 writes: CSV files, a table for the terminal, figures, and a page with all of it.

rows: model -> a dict for each of its pictures, with its seed, family, split ("seen" or "unseen"),
prompt, and what was measured of it. folders: model -> run folder, in a dict for each seed.
"""
import base64
import html
import math
from pathlib import Path

import numpy as np

from support import figures, models, runs
from support.figures import Figure
from support.measures import price
from support.training import mean_se

CAPTIONS = {  # figure -> what it shows
    "same_seeds": "The same noise in each column, a row a model (DPOK, Figure 2). Only best of n "
                  "chose, from this noise and others.",
    "scores": "On the prompts that were trained on (DPOK, Figure 3). Dotted: the pretrained model.",
    "queries": "Reward on fresh noise against the reward queries that training has paid (DDPO's "
               "curves). Bands: standard deviation over seeds.",
    "generalization": "Gold on prompts that were trained on (seen) and on others of their family.",
    "best_of_n": "Best of n pays n queries for every picture; the trained models have paid once."}
STYLE = """body { font: 16px/1.4 sans-serif; max-width: 1100px; margin: auto; padding: 0 12px }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap }
td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ccc }
td:first-child { text-align: left } tr:first-child { font-weight: bold }
img { max-width: 100% } figure { margin: 24px 0 }"""
NOTE = "Means ± standard errors over training seeds; path_kl in nats, of best of n its bound."
DASHES = ("-", "--", "-.", ":")  # so that lines differ without color, too

# ---- numbers --------------------------------------------------------------------------------


def seed_means(rows, column, split="seen", family=None):
    """Model -> x̄_s, its pictures' mean in each seed, (S,); without models that have no such."""
    means = {}
    for model, pictures in rows.items():
        of_seed = {}
        for row in pictures:
            if row["split"] == split and family in (None, row["family"]) and column in row:
                of_seed.setdefault(int(row["seed"]), []).append(float(row[column]))
        if of_seed:
            means[model] = np.array([np.mean(of_seed[seed]) for seed in sorted(of_seed)])
    return means


def summarize(rows, config):
    """Model -> column -> (mean, s.e.) over seeds; of one seed the error is NaN."""
    columns = {"reward": ("reward",), "gold": ("gold",), "gold unseen": ("gold", "unseen")}
    columns |= {name: (name,) for name in ("diversity", "path_kl", *config.others)}
    for family in dict.fromkeys(row["family"] for row in rows["pretrained"]):
        columns[f"gold {family}"] = ("gold", "seen", family)
        columns[f"gold unseen {family}"] = ("gold", "unseen", family)
    summary = {model: {} for model in rows}
    for name, source in columns.items():
        for model, means in seed_means(rows, *source).items():
            summary[model][name] = mean_se(means)
    return summary


def cell(mean, error):
    """Mean ± s.e. to the error's first digit; three digits of a mean without an error."""
    if not error > 0:
        return f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    digits = min(4, max(0, -math.floor(math.log10(error))))
    return f"{mean:.{digits}f}±{error:.{digits}f}"


def table_of(summary, folders):
    """Cells of the table as text, its head first, with what each training has cost."""
    columns = dict.fromkeys(name for measured in summary.values() for name in measured)
    lines = [["model", "queries", "evaluations", *columns]]
    for model, measured in summary.items():
        cells = [cell(*measured[name]) if name in measured else "–" for name in columns]
        prices = ("0", "0")
        if model in folders[0]:
            prices = map(str, price(models.read_config(folders[0][model])))
        elif model.startswith("best of"):
            prices = (model.split()[-1] + " each", "–")
        lines.append([model, *prices, *cells])
    return lines


def as_text(lines, names, width=100):
    """The first column and those of these names that fit the width.  -> lines of text"""
    shown = [[line[0][:24].ljust(24) for line in lines]]
    for name in names:
        column = [line[lines[0].index(name)] for line in lines if name in lines[0]]
        size = max(map(len, column), default=width)
        if sum(len(cells[0]) + 2 for cells in shown) + size <= width:
            shown.append([text.rjust(size) for text in column])
    return ["  ".join(cells) for cells in zip(*shown)]


def sentence_of(claim):
    """A claim's verdict with its evidence, in two lines."""
    return ("{verdict}: {claim}\n    {a} − {b}, {metric} on {split} prompts: {mean:+.3f} "
            "({low:+.3f} to {high:+.3f}), p = {holm:.2g}").format(**claim)


# ---- files ----------------------------------------------------------------------------------


def write(config, rows, claims, folders, images):
    """All files of a comparison in its folder.  -> its table and verdicts as lines of text

    images: model -> pictures of its first seed.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    summary = summarize(rows, config)
    table = table_of(summary, folders)
    sentences = [sentence_of(claim) for claim in claims]
    if not claims:
        sentences = ["No verdicts: one training of each says little of the next one."]
    if config.quick:
        sentences = ["QUICK TOUR: far too little training to conclude anything."]
    samples = []
    for model, pictures in rows.items():
        samples += [{"model": model} | row for row in pictures]
    runs.write_rows(out / "samples.csv", samples)
    runs.write_rows(out / "table.csv", [dict(zip(table[0], line)) for line in table[1:]])
    (out / "claims.csv").unlink(missing_ok=True)
    if claims:
        runs.write_rows(out / "claims.csv", [rounded(claim) for claim in claims])
    draw(config, rows, summary, folders, images)
    write_page(config, table, sentences)
    names = ("reward", "gold", "path_kl", "queries", "gold unseen", "diversity", "evaluations")
    return [*as_text(table, names), NOTE, "", *sentences]


def rounded(row):
    """A dict with four digits of each number that has decimals."""
    return {name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in row.items()}


def write_page(config, table, sentences):
    """index.html, which needs no other file: verdicts, the table, the figures."""
    out, title = Path(config.out), "Who is better, at what price"
    note = f"Reward: {config.reward}. Gold, which is meant: {config.gold}. {NOTE}"
    lines = ""
    for line in table:
        lines += "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "\n"
    parts = [f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{title}</title>",
             f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>",
             f"<h1>{title}</h1>", *[f"<p>{html.escape(sentence)}" for sentence in sentences],
             f"<p>{html.escape(note)}<table>{lines}</table>"]
    for name, caption in CAPTIONS.items():
        if (out / f"{name}.png").is_file():
            data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
            parts.append(f"<figure><img src='data:image/png;base64,{data}' alt='{name}'>"
                         f"<figcaption>{caption}</figcaption></figure>")
    (out / "index.html").write_text("\n".join(parts), encoding="utf-8")


# ---- figures --------------------------------------------------------------------------------


def draw(config, rows, summary, folders, images):
    """The figures that these models can have; those of an earlier call go."""
    paths = {name: Path(config.out, f"{name}.png") for name in CAPTIONS}
    for path in paths.values():
        path.unlink(missing_ok=True)
    draw_same_seeds(paths["same_seeds"], rows["pretrained"], images)
    names = ("reward", "gold", *config.others[:1], "diversity")
    draw_dots(paths["scores"], summary, {name: {"seen": name} for name in names})
    trained = {model: summary[model] for model in ("pretrained", *folders[0])}
    families = dict.fromkeys(row["family"] for row in rows["pretrained"])
    draw_dots(paths["generalization"], trained, {family: {
        "seen": f"gold {family}", "unseen": f"gold unseen {family}"} for family in families})
    curves = {}
    for model, folder in folders[0].items():
        if models.read_config(folder)["reward"] == config.reward:  # else on no axis with others
            curves[model] = [runs.read_rows(Path(its[model], "fresh.csv")) for its in folders]
    if curves:
        draw_queries(paths["queries"], curves, config.reward)
    if not config.runs:
        draw_best_of_n(paths["best_of_n"], summary, folders[0])


def draw_same_seeds(path, rows, images):
    """Two pictures of each family of seen prompts, at most twelve, for each model."""
    shown, counts = [], {}
    for i, row in enumerate(rows):
        counts[row["family"]] = counts.get(row["family"], 0) + 1
        if row["split"] == "seen" and counts[row["family"]] <= 2 and len(shown) < 12:
            shown.append(i)
    grid = [[pictures[i] for i in shown] for pictures in images.values()]
    figures.sheet(path, grid, list(images), [rows[i]["prompt"] for i in shown], inches=0.66)


def draw_dots(path, summary, panels):
    """Dots with error bars, a line a model.  panels: title -> {group: column of the summary}"""
    R = math.ceil(len(panels) / 2)
    height = R * (0.2 * len(summary) + 0.8)
    figure = Figure(figsize=(7.5, height), dpi=120, layout="constrained")
    axes = figure.subplots(R, 2, sharey=True, squeeze=False).flat
    for ax, (title, groups) in zip(axes, panels.items()):
        for k, (group, column) in enumerate(groups.items()):
            found = [(y + 0.2 * k, *measured[column])
                     for y, measured in enumerate(summary.values()) if column in measured]
            if found:
                y, means, errors = zip(*found)
                ax.errorbar(means, y, xerr=errors, fmt="os"[k], ms=4, capsize=2, label=group)
                ax.axvline(means[0], lw=0.8, ls=":", color=f"C{k}")
        ax.set_title(figures.wrapped(title, 40), size=9)
        ax.set_yticks(range(len(summary)), [figures.wrapped(model) for model in summary], size=8)
        ax.set_ylim(len(summary) - 0.5, -0.5)  # the first model on top
        ax.grid(axis="x", alpha=0.3)
    for ax in figure.axes[len(panels):]:
        ax.set_axis_off()
    if len(groups) > 1:
        handles = figure.axes[0].get_legend_handles_labels()
        figure.legend(*handles, fontsize=8, ncols=2, loc="outside lower center")
    figure.savefig(path)


def draw_queries(path, curves, reward):
    """A line for each model.  curves: model -> lines of fresh.csv, a list for each seed"""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    ax = figure.subplots()
    for k, (model, seeds) in enumerate(curves.items()):
        x = [row["queries"] for row in seeds[0]]
        r = np.array([[row["reward"] for row in rows] for rows in seeds])
        mean, spread = r.mean(0), r.std(0)
        ax.plot(x, mean, DASHES[k % 4], marker=".", label=f" {model}")  # no legend shows a _model
        ax.fill_between(x, mean - spread, mean + spread, alpha=0.12)
    ax.set(xlabel="reward queries", ylabel=reward)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)


def draw_best_of_n(path, summary, trained):
    """Reward and gold of best of n against n, and how high the trained models stand."""
    points = {1: summary["pretrained"]}
    for model, measured in summary.items():
        if model.startswith("best of"):
            points[int(model.split()[-1])] = measured
    figure = Figure(figsize=(7.5, 4), dpi=120, layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("reward", "gold")):
        means, errors = zip(*(measured[name] for measured in points.values()))
        ax.errorbar(list(points), means, errors, fmt="k.-", capsize=2, label="best of n")
        for k, model in enumerate(trained):
            height = summary[model][name][0]
            ax.axhline(height, ls=DASHES[k % 4], color=f"C{k}", label=model)
        ax.set(xlabel="n: queries for each picture", title=name)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), fontsize=8, ncols=4,
                  loc="outside lower center")
    figure.savefig(path)
