"""Tables for the scripts beside it: what runs ended with, rounded to what errors allow."""
import json
import math
from pathlib import Path


def rounded(value, error):
    """A number as text, up to the second digit of its error; three digits where there is none."""
    if not error > 0:
        return f"{value:.3g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}"


def summary_of(folder):
    """A finished run's evaluation.json: column -> its numbers before and after, on fresh noise."""
    return json.loads(Path(folder, "evaluation.json").read_text(encoding="utf-8"))


def ends_of(folder, names=("kl", "reward", "gold")):
    """What a run ended with: {"kl": ..., "kl error": ..., ...}."""
    summary, row = summary_of(folder), {}
    for name in names:
        error = summary[name]["after_se"]
        row[name] = rounded(summary[name]["after"], error)
        row[f"{name} error"] = rounded(error, error)
    return row


def gains_of(folder):
    """What a run was before and after, and gained: {"queries": ..., "reward before": ..., ...}."""
    summary = summary_of(folder)
    row = {"queries": summary["queries"]}
    for name in ("reward", "gold", "kl"):
        if name in summary:
            for part in ("before", "after", "gain"):
                error = summary[name][f"{part}_se"]
                row[f"{name} {part}"] = rounded(summary[name][part], error)
            row[f"{name} gain_se"] = rounded(error, error)
    return row


def as_text(rows, width=100):
    """A table for the terminal; one that is too wide lies on its side.  rows: of equal keys"""
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    if sum(max(map(len, column)) + 2 for column in zip(*cells)) > width:
        cells = list(zip(*cells))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[text.rjust(size) for text, size in zip(line, widths)] for line in cells]
    return "\n".join("  ".join(line) for line in lines)
