"""For the scripts beside it: what runs ended with, as rows of a table."""
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
