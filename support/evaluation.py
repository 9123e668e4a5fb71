"""What chapter 5 writes: CSV files, a table for the terminal, figures, and a page with all of it.

readings: for each seed, prompt -> model -> a dict for each number of queries that a model is read
at, with means and errors over pictures. folders: (prompt, model) -> run folder.
"""
import base64
import html
import math
import textwrap
from pathlib import Path

import numpy as np
from scipy import stats

from support import figures, models, runs
from support.figures import Figure
from support.measures import price
from support.training import mean_se

CAPTIONS = {  # figure -> what it shows
    "same_seeds": "The same noise in each column, a row a model (DPOK, Figure 2).",
    "curves": "What each model has for the reward queries that it paid, on fresh noise. Dotted: "
              "the best fifth of the pretrained pictures, which imitation has no reason to pass "
              "(DPOK, Figure 1). Gray: best of n, which pays n queries for every picture. Bands: "
              "standard deviation over seeds.",
    "kl": "What is meant, against how far the model has gone.",
    "scores": "At the end (DPOK, Figure 3). Bars: standard error over seeds."}
STYLE = """body { font: 16px/1.4 sans-serif; max-width: 1100px; margin: auto; padding: 0 12px }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap }
td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ccc }
td:first-child { text-align: left } tr:first-child { font-weight: bold }
img { max-width: 100% } figure { margin: 24px 0 }"""
NOTE = ("Means over prompts ± standard errors over seeds; kl is the path KL in nats, of best of n "
        "its bound; queries and UNet evaluations are a training's.")
KL_TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 10000)
DASHES = ("-", "--", "-.", ":")  # so that lines differ without color, too

# ---- numbers --------------------------------------------------------------------------------


def seeds_needed(d, level, most=100):
    """The smallest S of which 80 % would tell the observed effect d̄/s; infinite beyond `most`.

    P(T > t_{S−1, 1−α/2}) ≥ 0.8,  T ~ noncentral t_{S−1}(√S·|d̄|/s).   (S,) -> ()
    """
    s = d.std(ddof=1)
    for S in range(2, most + 1):
        if s > 0:
            T = stats.nct(S - 1, S**0.5 * abs(d.mean()) / s)
            limit = stats.t(S - 1).ppf(1 - level / 2)
            if T.sf(limit) >= 0.8:
                return S
    return math.inf


def at_the_end(readings, column):
    """Model -> the mean over prompts, if it has all, of its last reading, in each seed: (S,)."""
    found = {}
    for of_seed in readings:
        values = {}
        for of_model in of_seed.values():
            for model, rows in of_model.items():
                if column in rows[-1]:
                    values.setdefault(model, []).append(rows[-1][column])
        for model, of_prompts in values.items():
            if len(of_prompts) == len(of_seed):
                found.setdefault(model, []).append(np.mean(of_prompts))
    return {model: np.array(values) for model, values in found.items()}


def rounds_of(folders):
    """prompt -> model -> path KL and gold of each round's pictures, where logged for the prompt."""
    found = {}
    for (prompt, model), folder in folders.items():
        rows = runs.read_rows(folder / "metrics.csv")
        if "kl" in rows[0] and models.read_config(folder)["prompts"] == prompt:
            rows = [{name: row[name] for name in ("queries", "kl", "gold")} for row in rows]
            found.setdefault(prompt, {})[model] = rows
    return found


def cell(mean, error):
    """Mean ± s.e. to the error's first digit; three digits of a mean without an error."""
    if math.isnan(mean):
        return "–"
    if not error > 0:
        return f"{mean:.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    digits = min(4, max(0, -math.floor(math.log10(error))))
    return f"{mean:.{digits}f}±{error:.{digits}f}"


def table_of(readings, folders, columns):
    """A row of text for each model, with what each training has cost."""
    rows = []
    numbers = {column: at_the_end(readings, column) for column in columns}
    for model in numbers["reward"]:
        row = {"model": model}
        for column, of_model in numbers.items():
            row[column] = cell(*mean_se(of_model[model])) if model in of_model else "–"
        of_model = [folder for (_, name), folder in folders.items() if name == model]
        prices = map(str, price(models.read_config(of_model[0]))) if of_model else ("–", "–")
        rows.append(row | dict(zip(("queries", "evaluations"), prices)))
    return rows


def as_text(rows, width=100):
    """A table for the terminal, on its side if it is too wide and has few rows.

    rows: dicts with equal keys. Columns for which there is no room are left out: "…" says so.
    """
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    columns = list(zip(*cells))
    is_wide = sum(max(map(len, column)) + 2 for column in columns) > width - 1
    if is_wide and len(rows) < len(columns):
        columns = cells
    shown = [[text.ljust(max(map(len, columns[0]))) for text in columns[0]]]
    for column in columns[1:]:
        size = max(map(len, column))
        if sum(len(texts[0]) + 2 for texts in shown) + size <= width - 3:
            shown.append([text.rjust(size) for text in column])
    if len(shown) < len(columns):
        shown.append(["…"] * len(columns[0]))
    return "\n".join("  ".join(line) for line in zip(*shown))


def sentence_of(claim):
    """A claim's verdict with its evidence; how many seeds would tell it, where it is not told."""
    text = ("{verdict}: {claim}\n    {a} − {b}, {column} at {at}: {mean:+.3f} "
            "({low:+.3f} to {high:+.3f}), p after Holm {holm:.2g}").format(**claim)
    if claim["verdict"] == "cannot be told":
        seeds = claim["seeds_needed"]
        number = seeds if math.isfinite(seeds) else "more than 100"
        text += f"; if this is the true effect, {number} new seeds would tell it 4 times in 5"
    return text


# ---- files ----------------------------------------------------------------------------------


def write(config, readings, rounds, claims, folders, images):
    """All files of a comparison in its folder.  -> its table and verdicts as text

    rounds: for each seed, prompt -> model -> what it logged. folders, images: of the first seed.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    columns = ("reward", "gold", *config.others, "kl", "diversity")
    table = table_of(readings, folders, columns)
    sentences = [sentence_of(claim) for claim in claims]
    if not claims:
        sentences = ["No verdicts: they take both models of a claim, and --seeds 2, better 5."]
    runs.write_rows(out / "readings.csv", rows_of(readings, config.seed))
    for name in ("rounds.csv", "claims.csv"):  # of another comparison
        (out / name).unlink(missing_ok=True)
    if any(rounds):
        runs.write_rows(out / "rounds.csv", rows_of(rounds, config.seed))
    if claims:
        runs.write_rows(out / "claims.csv", [rounded(claim) for claim in claims])
    draw(config, readings, images)
    write_page(config, table, sentences)
    runs.write_rows(out / "table.csv", table)  # last: where it is, all is
    page = f"All of it on one page: {out / 'index.html'}"
    return "\n".join([as_text(table), *textwrap.wrap(NOTE, 100), "", *sentences, page])


def rows_of(readings, seed):
    """A line for each seed, prompt, model and number of queries."""
    rows = []
    for k, of_seed in enumerate(readings):
        for prompt, of_model in of_seed.items():
            for model, own in of_model.items():
                place = {"seed": seed + k, "prompt": prompt, "model": model}
                rows += [place | row for row in own]
    return rows


def rounded(row):
    """A dict with four digits of each number that has decimals."""
    return {name: f"{value:.4g}" if isinstance(value, float) else value
            for name, value in row.items()}


def write_page(config, table, sentences):
    """index.html, which needs no other file: verdicts, the table, the figures."""
    out, title = Path(config.out), "Who is better, at what price"
    note = f"Reward: {config.reward}. Gold, which is meant: {config.gold}. {NOTE}"
    lines = ""
    for line in (table[0], *(row.values() for row in table)):
        lines += "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in line) + "\n"
    parts = [f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{title}</title>",
             f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style>",
             f"<h1>{title}</h1>", *[f"<p>{html.escape(sentence)}" for sentence in sentences],
             f"<p>{html.escape(note)}<table>{lines}</table>"]
    for name, caption in CAPTIONS.items():
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        parts.append(f"<figure><img src='data:image/png;base64,{data}' alt='{name}'>"
                     f"<figcaption>{caption}</figcaption></figure>")
    (out / "index.html").write_text("\n".join(parts), encoding="utf-8")


# ---- figures --------------------------------------------------------------------------------


def draw(config, readings, images):
    """All figures, one for each of CAPTIONS."""
    paths = {name: Path(config.out, f"{name}.png") for name in CAPTIONS}
    draw_same_seeds(paths["same_seeds"], images)
    titles = {"reward": f"reward, {config.reward}", "gold": f"gold, {config.gold}"}
    draw_curves(paths["curves"], readings, titles)
    draw_kl(paths["kl"], readings, titles["gold"])
    names = ("reward", "gold", *config.others, "diversity")
    draw_scores(paths["scores"], {name: at_the_end(readings, name) for name in names})


def draw_same_seeds(path, images, most=12):
    """The first pictures of each prompt, at most twelve in all; a row a model."""
    each = max(1, most // len(images))
    models_drawn = list(next(iter(images.values())))
    prompts = [prompt for prompt, of_model in images.items()
               for _ in of_model[models_drawn[0]][:each]]
    rows = [[picture for of_model in images.values() for picture in of_model[model][:each]]
            for model in models_drawn]
    figures.sheet(path, rows, models_drawn, prompts, inches=0.66)


def curves_of(readings, prompt):
    """Model -> its readings' columns in all seeds, of models with more than one reading.

    -> {model: {column: (S, readings)}}
    """
    found = {}
    for model, rows in readings[0][prompt].items():
        if len(rows) > 1:
            seeds = [of_seed[prompt][model] for of_seed in readings]
            found[model] = {name: np.array([[row[name] for row in rows] for rows in seeds])
                            for name in rows[0]}
    return found


def draw_curves(path, readings, titles):
    """Columns against reward queries, a panel each, a row a prompt.  titles: of the columns"""
    prompts = list(readings[0])
    size = (5 * len(titles), 3.2 * len(prompts))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(prompts), len(titles), squeeze=False)
    for row, prompt in zip(axes, prompts):
        for ax, (column, title) in zip(row, titles.items()):
            for k, (model, values) in enumerate(curves_of(readings, prompt).items()):
                x, mean = values["queries"][0], values[column].mean(0)
                spread = values[column].std(0, ddof=len(readings) > 1)
                ax.plot(x, mean, DASHES[k % 4], marker=".", label=f" {model}")
                ax.fill_between(x, mean - spread, mean + spread, alpha=0.12)
            for model in readings[0][prompt]:
                if model == "ceiling" or model.startswith("best of"):
                    values = [of_seed[prompt][model][-1][column] for of_seed in readings]
                    is_ceiling = model == "ceiling"
                    ax.axhline(np.mean(values), ls=":" if is_ceiling else "-", lw=1,
                               color="k" if is_ceiling else "0.7")
                    if ax is row[0]:  # elsewhere they may lie on each other
                        ax.annotate(model, (1, np.mean(values)), (-4, 2), size=7, ha="right",
                                    xycoords=("axes fraction", "data"), textcoords="offset points")
            ax.set(xlabel="reward queries", title=f"{prompt}: {title}")
            ax.grid(alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    ncols = max(1, int(15 * size[0]) // (8 + max(map(len, labels))))  # so many have room
    figure.legend(handles, labels, fontsize=8, ncols=ncols, loc="outside lower center")
    figure.savefig(path)


def draw_kl(path, readings, title):
    """Gold against path KL, each seed a line."""
    prompts = list(readings[0])
    figure = Figure(figsize=(5 * len(prompts), 3.6), dpi=120, layout="constrained")
    for ax, prompt in zip(figure.subplots(1, len(prompts), squeeze=False)[0], prompts):
        for k, (model, values) in enumerate(curves_of(readings, prompt).items()):
            for s, (kl, gold) in enumerate(zip(values["kl"], values["gold"])):
                ax.plot(kl, gold, DASHES[k % 4], marker=".", color=f"C{k}", lw=1,
                        label=None if s else model)
        ax.set_xscale("asinh", linear_width=1)
        ticks = [kl for kl in KL_TICKS if kl <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, map(str, ticks))
        ax.minorticks_off()
        ax.set(xlabel="path KL, nats", title=f"{prompt}: {title}")
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    figure.savefig(path)


def draw_scores(path, columns):
    """Dots with error bars, a line a model.  columns: name -> model -> (S,)"""
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    labels = list(columns["reward"])
    for ax, (name, of_model) in zip(figure.subplots(1, len(columns), sharey=True), columns.items()):
        for y, model in enumerate(labels):
            if model in of_model:
                mean, error = mean_se(of_model[model])
                ax.errorbar(mean, y, xerr=np.nan_to_num(error), fmt="ok", ms=4, capsize=2)
        ax.axvline(of_model["pretrained"].mean(), lw=0.8, ls=":")
        ax.set_title(figures.wrapped(name, 24), size=9)
        ax.set_yticks(range(len(labels)), labels, size=8)
        ax.set_ylim(len(labels) - 0.5, -0.5)  # the first model on top
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(path)
