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


def gains_of(folder, names=("reward", "gold", "kl")):
    """What a run was before and after, and gained: {"queries": ..., "reward before": ..., ...}."""
    summary = summary_of(folder)
    row = {"queries": summary["queries"]}
    for name in names:
        if name in summary:  # chapter 3 measures no gold
            measured = summary[name]
            for part in ("before", "after", "gain"):
                row[f"{name} {part}"] = rounded(measured[part], measured[f"{part}_se"])
            row[f"{name} gain_se"] = rounded(measured["gain_se"], measured["gain_se"])
    return row


def as_text(rows, width=100):
    """A table for the terminal; too wide with few rows, it lies on its side.  rows: equal keys"""
    cells = [list(rows[0])] + [[str(value) for value in row.values()] for row in rows]
    is_wide = sum(max(map(len, column)) + 2 for column in zip(*cells)) > width
    if is_wide and len(rows) < len(rows[0]):
        cells = list(zip(*cells))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [[text.rjust(size) for text, size in zip(line, widths)] for line in cells]
    return "\n".join("  ".join(line) for line in lines)
