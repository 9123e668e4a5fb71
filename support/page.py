"""The page that shows an evaluation: index.html, one file that needs no other.

Findings, intervals and numbers are text, so that they fit a projector and a phone. page.html is
the skeleton that is filled here; figures.py has drawn the pictures before.
"""
import base64
import html
import math
import re
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from support import tables

SKELETON = Path(__file__).with_suffix(".html")
VERDICTS = {  # verdict -> its sign, its class in page.html
    "holds": ("✓", "holds"), "fails": ("✗", "fails"), "cannot be told": ("?", "unknown")}
PRICES = {"queries": "reward queries", "evaluations": "UNet evaluations"}
SHOWN = ("reward", "gold", "gold unseen", "path_kl", "diversity")  # and one more measure
CAPTIONS = {
    "scores": "Mean ± standard error of the proxy and of what it does not know (DPOK, Figure 3). "
              "The dotted line is the first model's mean.",
    "generalization": "Gold on the prompts that were trained on (seen) and on combinations that no "
                      "training saw (unseen).",
    "queries": "Reward of freshly drawn pictures against reward queries (DDPO's curves).",
    "evaluations": "The same against UNet evaluations: a forward pass counts 1, a backward pass 2. "
                   "What is only looked at costs nothing.",
    "best_of_n": "Best of n may choose the first noise x_T, which training cannot; and it pays n "
                 "queries again for every picture that it delivers, where training pays once.",
    "same_seeds": "Same noise in each column (DPOK, Figure 2): one row a model. Only best of n "
                  "chose, from that noise and others."}
FULL_WIDTH = ("same_seeds",)


def write(config, results):
    """index.html in the folder config.out, with the figures that lie there.

    results: as tables.write_evaluation returns them.
    """
    claims = results["claims"]
    out = Path(config.out)
    quick = "QUICK TOUR, far too little training. " if config.quick else ""
    paid = "Measured" if config.runs else "Trained on"
    told = "" if config.quick or not claims else (
        " In brackets: 95 % intervals over training seeds and pictures.")
    note = f"{quick}{paid} (reward): {config.reward}. Meant (gold): {config.gold}.{told}"
    parts = {"NOTE": html.escape(note),
             "FINDINGS": first_screen(claims, config),
             "NUMBERS": numbers(results["summaries"], config) + price_table(results["prices"]),
             "FIGURES": "\n".join(figure(out, name) for name in CAPTIONS)}
    # One pass, so that a name which looks like a placeholder stays a name.
    page = re.sub("__([A-Z]+)__", lambda found: parts[found[1]], SKELETON.read_text("utf-8"))
    (out / "index.html").write_text(page, encoding="utf-8")


# ---- findings and claims --------------------------------------------------------------------


def first_screen(claims, config):
    """The findings, and beside them the forest plot; neither where nothing can be concluded."""
    if config.quick or not claims:
        reason = ("one training says little of the next. Claims are judged with --seeds 5, and "
                  "experiments/README.md has those of five seeds")
        if config.quick:
            reason = "a quick tour trains far too little"
        elif config.runs:
            reason = "each of these runs is one training, which says little of the next"
        return ("<div class='findings'><section class='unknown'><h3>Nothing can be concluded "
                f"here: {reason}.</h3></section></div>")
    cards = []
    for verdict, items in findings(claims).items():
        sign, style = VERDICTS[verdict]
        count = sum(claim["verdict"] == verdict for claim in claims)
        lines = "".join(f"<li>{html.escape(sentence)} <small>{html.escape(evidence)}</small></li>"
                        for sentence, evidence in items)
        cards.append(f"<section class='{style}'><h3>{sign} {verdict.capitalize()}: {count} of "
                     f"{len(claims)} comparisons</h3><ul>{lines}</ul></section>")
    return (f"<div class='first both'><div class='findings'>{''.join(cards)}</div>"
            f"<div>{forest(claims, config)}</div></div>")


def grouped(claims, *keys):
    """Values of the keys -> the claims that share them, in the order of the first ones."""
    groups = {}
    for claim in claims:
        groups.setdefault(tuple(claim[key] for key in keys), []).append(claim)
    return groups


def findings(claims):
    """Verdict -> [(sentence, evidence)], each sentence once with its smallest difference."""
    found = {}
    for verdict in VERDICTS:
        for (sentence,), compared in grouped(claims, "claim").items():
            those = [claim for claim in compared if claim["verdict"] == verdict]
            if those:
                least = min(those, key=lambda claim: abs(claim["mean"]))
                evidence = f"{least['a']} − {least['b']}, {least['metric']} {interval(least)}"
                if len(those) > 1:
                    evidence = f"smallest difference: {evidence}"
                if len(compared) > 1:
                    evidence = f"in {len(those)} of {len(compared)} comparisons; {evidence}"
                found.setdefault(verdict, []).append((sentence, evidence))
    return found


def interval(claim):
    """A claim's difference and interval in words: +0.170 (+0.110 to +0.230)."""
    return "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**claim).replace("-", "−")


def places(claims):
    """Where things stand on an axis that holds 0 and all intervals, in percent of its width.

    -> a function of values, the ticks' values.
    """
    low = min(0, *(claim["low"] for claim in claims))
    high = max(0, *(claim["high"] for claim in claims))
    width = 1.08 * (high - low) or 1  # a little room; 1 where all differences are 0
    left = (low + high - width) / 2
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return (lambda x: round(100 * (x - left) / width, 2),
            [tick for tick in ticks.tolist() if left <= tick <= left + width])


def forest(claims, config):
    """The claims as rows of a table: what is measured alike shares a scale."""
    rows = []
    for (metric, split), group in grouped(claims, "metric", "split").items():
        place, ticks = places(group)
        marks = "".join(f"<span class='tick' style='left:{place(tick)}%'>{tick:g}</span>"
                        for tick in ticks).replace(">-", ">−")
        title = html.escape(f"{tables.title(metric, config)}, {split} prompts")
        rows.append(f"<tr class='scale'><th colspan='2'>{title}</th><td class='graph'>"
                    f"<div class='plot'>{marks}</div></td><td></td></tr>")
        for (sentence,), compared in grouped(group, "claim").items():
            head = f"<th class='claim' rowspan='{len(compared)}'>{html.escape(sentence)}</th>"
            for claim in compared:
                rows.append(forest_row(claim, head, place))
                head = ""  # a sentence stands before its first comparison only
    return (f"<table class='forest'>{''.join(rows)}</table><p class='note'>Each row: the first "
            "model minus the second, with its 95 % interval over training seeds and pictures (of "
            "unseen prompts: seeds and prompts). The claim is that this is above 0; it holds or "
            "fails where also p ≤ 0.05 after Holm's correction for all comparisons.</p>")


def forest_row(claim, head, place):
    """One comparison: its names, its interval with a dot at the mean, its verdict."""
    verdict = claim["verdict"]
    sign, style = VERDICTS[verdict]
    low, mean, high = place(claim["low"]), place(claim["mean"]), place(claim["high"])
    return (f"<tr class='{style}'>{head}"
            f"<td class='names'>{html.escape(claim['a'])} − {html.escape(claim['b'])}</td>"
            f"<td class='graph'><div class='plot'><span class='zero' style='left:{place(0)}%'>"
            f"</span><span class='interval' style='left:{low}%;width:{high - low:.2f}%'>"
            f"</span><span class='dot' style='left:{mean}%'></span></div></td>"
            f"<td class='verdict'><b>{sign} {verdict}</b><small>{interval(claim)}</small></td>"
            "</tr>")


# ---- numbers and figures --------------------------------------------------------------------


def numbers(summaries, config):
    """The table of the measures that matter, and behind a fold the table of all others."""
    columns = tables.columns_of(summaries)
    shown = [column for column in (*SHOWN, *config.others[:1]) if column in columns]
    rest = [column for column in columns if column not in shown]
    note = ("<p class='note'>Mean of N pictures ± standard error over seeds and pictures (of one "
            "seed: over pictures alone); path KL in nats, for best of n its bound. All digits are "
            "in table.csv.</p>")
    fold = ""
    if rest:
        fold = (f"<details><summary>{len(rest)} more measures</summary>"
                f"{number_table(summaries, rest)}</details>")
    return number_table(summaries, shown) + note + fold


def number_table(summaries, columns):
    """A row a model."""
    head, rows = "<th>Model</th>", []
    for column in columns:
        name = html.escape(column.replace("path_kl", "path KL"))
        head += f"<th>{name}<small>N = {tables.counts(summaries, column)}</small></th>"
    decimals = {column: tables.decimals(summaries, column) for column in columns}
    for model, summary in summaries.items():
        cells = f"<th>{html.escape(model)}</th>"
        for column in columns:
            cell = tables.cell(model, column, summary, decimals[column]).replace("-", "−")
            mean, _, error = cell.partition(" ± ")
            cells += f"<td>{mean}{error and f' <small>± {error}</small>'}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return (f"<div class='wide'><table class='numbers'><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def price_table(bought):
    """Model by price and budget: the reward that it buys.  bought: lines of prices.csv."""
    if not bought:
        return ""
    head, rows = "<th>Model</th>", []
    budgets = list(grouped(bought, "price", "budget"))
    for price, budget in budgets:
        head += f"<th>{budget:,}<small>{PRICES[price]}</small></th>"
    for (model,), lines in grouped(bought, "model").items():
        cells = f"<th>{html.escape(model)}</th>"
        for pair in budgets:
            text = "–"
            for line in lines:
                if (line["price"], line["budget"]) == pair:
                    text = price_cell(line)
            cells += f"<td>{text}</td>"
        rows.append(f"<tr>{cells}</tr>")
    return (f"<h3>Reward at equal price</h3><div class='wide'><table class='numbers'><thead><tr>"
            f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div><p class='note'>Mean "
            "of the last three rounds that the budget pays for, on the pictures drawn in training, "
            "± standard error over seeds; best of n: of the comparison's pictures, the n that the "
            "budget pays for.</p>")


def price_cell(line):
    """Reward ± its error where there is one, and the n of best of n."""
    text = f"{line['reward']:.2f}".replace("-", "−")
    if not math.isnan(line["standard_error"]):
        text += f" <small>± {line['standard_error']:.2f}</small>"
    return text + (f" <small>n = {line['n']}</small>" if line["n"] else "")


def figure(folder, name):
    """A picture of the folder inside the page, with its caption; nothing where there is none."""
    file = folder / f"{name}.png"
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(CAPTIONS[name])
    style = " class='full'" if name in FULL_WIDTH else ""
    return (f"<figure{style}><div><img alt=\"{caption}\" src='data:image/png;base64,{data}'></div>"
            f"<figcaption>{caption}</figcaption></figure>")
