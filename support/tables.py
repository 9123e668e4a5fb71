"""Tables from rows: what a model's pictures have in common, as Markdown and as CSV files."""
import csv
import math
from pathlib import Path

import torch

from support import training
from support.prompts import families


def picture_means(rows, metric, split="seen", family=None):
    """A metric of each picture, averaged over the training seeds, which share its noise.  (N,)"""
    found = {}
    for row in rows:
        if row["split"] == split and family in (None, row["family"]):
            found.setdefault(row["picture"], []).append(row[metric])
    means = [sum(values) / len(values) for _, values in sorted(found.items())]
    values = torch.tensor(means, dtype=torch.float64)
    return values[~values.isnan()]


def summarize(rows, config):
    """Column -> (mean, s.e., N pictures) of one model."""
    columns = {"reward": picture_means(rows, "reward"), "gold": picture_means(rows, "gold")}
    for family in families(config.prompts):
        columns[f"gold {family}"] = picture_means(rows, "gold", "seen", family)
    columns["gold unseen"] = picture_means(rows, "gold", "unseen")
    for name in (*config.others, "path_kl", "diversity"):
        columns[name] = picture_means(rows, name)
    return {name: (*training.mean_se(v), len(v)) for name, v in columns.items() if len(v)}


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
            "95 % interval {low:+.3f} to {high:+.3f}, {pairs} pairs).")
    return [form.format(**claim) for claim in claims]


def write_evaluation(out, rows, summaries, claims):
    """samples.csv, table.csv, table.md, claims.csv and claims.md in the folder out."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "samples.csv", [dict(model=model, **row) for model in rows
                                    for row in rows[model]])
    cells = []
    for model, summary in summaries.items():
        for column, (mean, error, count) in summary.items():
            cells.append({"model": model, "column": column, "mean": mean,
                          "standard_error": error, "N": count})
    write_csv(out / "table.csv", cells)
    write_csv(out / "claims.csv", claims)
    table = "\n".join(summary_table(summaries)) + "\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    sentences = "".join(f"- {line}\n" for line in claim_lines(claims))
    (out / "claims.md").write_text(sentences, encoding="utf-8")


def read_csv(path):
    """The lines of a CSV file as dicts of text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
