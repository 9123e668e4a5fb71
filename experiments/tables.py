"""Tables for the scripts beside it: what runs ended with, rounded to what errors allow."""
import json
from pathlib import Path

from support.evaluation import cell


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
                row[f"{name} {part}"] = cell(measured[part], measured[f"{part}_se"])
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
