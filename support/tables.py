"""Tables from rows: what a model's pictures have in common, as Markdown and as CSV files."""
import csv
import math
from pathlib import Path

import torch

from support import prices
from support.prompts import families
from support.significance import mean_error


def values_of(rows, metric, split="seen", family=None):
    """A metric of one model's pictures by seed, prompt and picture: (S,P,K), and P families.

    (0,0,0) where there are none, or where one has no such value.
    """
    seeds, families = {}, {}
    for row in rows:
        if row["split"] == split and family in (None, row["family"]):
            prompts = seeds.setdefault(row.get("seed", 0), {})
            prompts.setdefault((row["family"], row["prompt"]), []).append(float(row[metric]))
            families[row["family"], row["prompt"]] = row["family"]
    values = torch.tensor([list(prompts.values()) for prompts in seeds.values()],
                          dtype=torch.float64)
    if values.isnan().any() or not seeds:
        values = torch.empty(0, 0, 0)
    return values, list(families.values())


def summarize(rows, config):
    """Column -> (mean, s.e., N pictures) of one model; unseen prompts stand for more of them."""
    columns = {"reward": values_of(rows, "reward"), "gold": values_of(rows, "gold")}
    for family in families(config.prompts):
        columns[f"gold {family}"] = values_of(rows, "gold", "seen", family)
    columns["gold unseen"] = values_of(rows, "gold", "unseen")
    for name in (*config.others, "path_kl", "diversity"):
        columns[name] = values_of(rows, name)
    summary = {}
    for name, (values, strata) in columns.items():
        if len(values):
            unseen = strata if name == "gold unseen" else None
            summary[name] = *mean_error(values, unseen), values[0].numel()
    return summary


def write_csv(path, rows):
    """One line a dict; no file without rows, not even an earlier one."""
    path = Path(path)
    if not rows:
        path.unlink(missing_ok=True)
        return
    names = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def markdown(head, rows):
    """A table in Markdown: a list of lines."""
    lines = []
    for cells in (head, ["---"] * len(head), *rows):
        safe = [cell.replace("|", "/") for cell in cells]  # a bar would start another cell
        lines.append("| " + " | ".join(safe) + " |")
    return lines


def columns_of(summaries):
    """All columns that some model has, in the order in which they come."""
    return list(dict.fromkeys(name for summary in summaries.values() for name in summary))


def title(column, config):
    """reward -> reward (image_reward): what a column is called above a figure."""
    titles = {"reward": f"reward ({config.reward})", "gold": f"gold ({config.gold})"}
    return titles.get(column, column)


def counts(summaries, column):
    """How many pictures a column's means are over: 50, or 12/50 where models differ."""
    found = {summary[column][2] for summary in summaries.values() if column in summary}
    return "/".join(map(str, sorted(found)))


def decimals(summaries, column):
    """As many as show one digit of the smallest standard error that counts, at most 3."""
    errors = [summary[column][1] for summary in summaries.values() if column in summary]
    errors = [error for error in errors if error > 0.01 * max(errors)]  # a KL of 0 has almost none
    return min(3, max(0, -math.floor(math.log10(min(errors))))) if errors else 3


def cell(model, column, summary, decimals=3):
    """Mean ± standard error; a dash where nothing was measured, best of n's KL as a bound."""
    if column not in summary:
        return "–"
    mean, error, _ = summary[column]
    if column == "path_kl" and model.startswith("best of"):  # a bound, and not measured
        return f"≤ {mean:.{max(decimals, 2)}f}"
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def summary_table(summaries):
    """Model by column, mean ± standard error, N in the head.  -> lines of Markdown"""
    columns = columns_of(summaries)
    head = ["Model", *(f"{column} (N = {counts(summaries, column)})" for column in columns)]
    rows = []
    for model, summary in summaries.items():
        rows.append([model, *(cell(model, column, summary) for column in columns)])
    return markdown(head, rows)


def claim_lines(claims):
    """A sentence a claim: what is said, whether it holds, by how much."""
    form = ("{claim}: {verdict} ({a} − {b}, {metric} on {split} prompts: {mean:+.3f}, "
            "95 % interval {low:+.3f} to {high:+.3f}, p = {holm:.3g} by Holm; {seeds} seeds, "
            "{prompts} prompts, {pictures} pictures of each).")
    return [form.format(**claim) for claim in claims]


def best_of_n_lines(best, config):
    """A line for each n: its price, its bound of KL, and mean and error of each measure.

    best: n -> (rows, pictures).
    """
    lines = []
    for n, (rows, _) in best.items():
        line = {"n": n, "queries_per_picture": n, "kl_bound": rows[0]["path_kl"]}
        for name, (mean, error, _) in summarize(rows, config).items():
            if name != "path_kl":
                line |= {name: mean, name + "_se": error}
        lines.append(line)
    return lines


def write_evaluation(config, rows, best, curves, claims):
    """All of an evaluation as CSV and Markdown files in its folder; returns it in a dict.

    rows: model -> a dict a picture; best: n -> (rows, pictures) of best of n; curves: model ->
    metrics of its runs.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    summaries = {model: summarize(found, config) for model, found in rows.items()}
    best_of_n = best_of_n_lines(best, config)
    of_n = {line["n"]: (line["reward"], line["reward_se"]) for line in best_of_n}
    pictures = sum(row["split"] == "seen" for row in rows["pretrained"])
    bought = prices.table(curves, of_n, pictures, config)
    write_csv(out / "samples.csv", [dict(model=model, **row) for model in rows
                                    for row in rows[model]])
    cells = []
    for model, summary in summaries.items():
        for column, (mean, error, count) in summary.items():
            cells.append({"model": model, "column": column, "mean": mean,
                          "standard_error": error, "N": count})
    write_csv(out / "table.csv", cells)
    write_csv(out / "claims.csv", claims)
    write_csv(out / "best_of_n.csv", best_of_n)
    write_csv(out / "prices.csv", bought)
    table = "\n".join(summary_table(summaries)) + "\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    sentences = "".join(f"- {line}\n" for line in claim_lines(claims))
    (out / "claims.md").write_text(sentences, encoding="utf-8")
    return {"summaries": summaries, "claims": claims, "best_of_n": best_of_n, "prices": bought}


def read_csv(path):
    """The lines of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
