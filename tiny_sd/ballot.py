"""Human preference (DPOK, Figure 3c): a ballot on which people compare two models, blind.

`python 05_eval.py --ballot` writes the page, `--votes FILES` counts what raters send back. Nothing
here is about learning; the page is one HTML file that needs no network.
"""
import base64
import hashlib
import io
import json
import random
import statistics
from pathlib import Path

from PIL import Image

QUESTIONS = {"alignment": "Which picture fits the prompt better?",
             "quality": "Which picture looks better?"}
# The Content-Security-Policy makes the browser itself refuse whatever would need a network.
PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Picture ballot</title>
<style>
  body { font: 17px/1.4 system-ui, sans-serif; text-align: center; color: #222; background: #eee;
         max-width: 700px; margin: auto; padding: 12px; }
  h1 { font-size: 1.3em; outline: none; }
  button, input { font: inherit; color: inherit; background: #fff; padding: 10px 16px; margin: 2px;
                  border: 2px solid #888; border-radius: 8px; touch-action: manipulation; }
  :is(button, input):is(:hover, :focus-visible) { border-color: #36c; outline: 2px solid #36c; }
  input { display: block; width: 260px; margin: 4px auto 14px; }
  img, progress { display: block; width: 100%; margin: 6px 0; accent-color: #36c; }
  #pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-bottom: 12px; }
  #pair button { margin: 0; padding: 4px 10px; background: #ddd; image-rendering: __RENDERING__; }
</style>
<body>
<form id="start">
  <h1>Which picture?</h1>
  <p>Two pictures for one prompt, two questions about them, and so on. Click, or use the keys:
    ← left, → right, ↑ or space no difference, backspace for one answer back.</p>
  <label for="rater">Your name</label>
  <input id="rater" required maxlength="60" autocomplete="name">
  <button>Start</button>
</form>
<section id="vote">
  <div id="progress" aria-live="polite"></div>
  <progress id="bar" aria-labelledby="progress"></progress>
  <p id="prompt"></p>
  <h1 id="question" tabindex="-1"></h1>
  <div id="pair">
    <button data-act="left"><img id="left" alt="">← Left</button>
    <button data-act="right"><img id="right" alt="">Right →</button>
  </div>
  <button data-act="tie">No difference ↑</button> <button data-act="back">Back</button>
</section>
<section id="end">
  <h1 id="thanks" tabindex="-1">Thank you, that was the last pair.</h1>
  <p>Download your votes and send the file to whoever gave you this page.</p>
  <button id="download">Download votes</button> <button data-act="back">Back</button>
  <button data-act="next">Next rater</button>
</section>
<script>
const BALLOT = __BALLOT__, asked = Object.keys(BALLOT.questions), slot = "votes-" + BALLOT.ballot;
const steps = BALLOT.pairs.length * asked.length, $ = (id) => document.getElementById(id);
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", " ": "tie",
              Backspace: "back"};
let state = {rater: "", answers: []};  // answers as they come: alignment, quality, alignment, ...
// The first outlives the tab but may come up empty on a page read from a file; the tab's own not.
const stores = ["localStorage", "sessionStorage"];  // either may be blocked
for (const store of stores)
  try { state = JSON.parse(window[store].getItem(slot)) || state; } catch {}
function save() {
  for (const store of stores)
    try { window[store].setItem(slot, JSON.stringify(state)); } catch {}
}
function show() {
  const step = state.answers.length, q = step % asked.length, k = (step - q) / asked.length;
  const pair = BALLOT.pairs[k], part = !state.rater ? "start" : pair ? "vote" : "end";
  for (const id of ["start", "vote", "end"]) $(id).hidden = id !== part;
  if (pair) {
    $("progress").textContent = `Pair ${k + 1} of ${BALLOT.pairs.length}, question ${q + 1} of 2`;
    $("bar").value = step / steps;
    $("prompt").textContent = `“${pair.prompt}”`;
    $("question").textContent = BALLOT.questions[asked[q]];
    for (const side of ["left", "right"]) $(side).src = pair[side];
  }
  $("rater").value = state.rater;
  $({start: "rater", vote: "question", end: "thanks"}[part]).focus();
}
function act(action) {
  if (action === "next") {
    if (confirm("Erase the votes on this screen?")) state = {rater: "", answers: []};
  } else if (action !== "back") state.answers = [...state.answers, action].slice(0, steps);
  else if (!state.answers.pop()) state.rater = "";
  save();
  show();
}
document.onclick = (event) => {
  const button = event.target.closest("[data-act]");
  if (button) event.detail > 1 ? show() : act(button.dataset.act);  // a double click answers once
};
document.onkeydown = (event) => {
  const press = event.key === " " && event.target.closest("button");  // is the button's own
  const command = event.ctrlKey || event.altKey || event.metaKey;  // and that is the browser's
  if (!state.rater || press || command || !keys[event.key]) return;
  event.preventDefault();
  if (!event.repeat) act(keys[event.key]);  // and so does a key held down
};
$("start").onsubmit = (event) => {
  event.preventDefault();
  state.rater = $("rater").value.trim();
  save();
  show();
};
$("download").onclick = () => {
  const votes = BALLOT.pairs.map((_, pair) => ({pair, ...Object.fromEntries(
    asked.map((question, q) => [question, state.answers[pair * asked.length + q]]))}));
  const text = JSON.stringify({ballot: BALLOT.ballot, rater: state.rater, votes}, null, 1) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = `votes_${state.rater.replace(/[^\p{L}\p{M}\p{N}_-]+/gu, "_")}.json`;
  link.click();
};
show();
</script>
"""


def make_ballot(pairs, seed, names=("rl", "sft")):
    """The page for raters, which says left and right only, and the key, which they must not see.

    pairs: dicts of "prompt" and two pictures, "a" and "b"; names: of the models behind a and b.
    -> HTML that needs no other file and no network; {"ballot": id, "pairs": [{"prompt", "left":
    name}], "a": name, "b": name}. Pairs are shuffled, and a is on the left in half of them (to
    within one), so "always left" favors nobody. Equal seeds make equal ballots: keep yours secret.
    """
    (a, b), rng, n, shown, sides = names, random.Random(seed), len(pairs), [], []
    assert pairs and a != b, names
    for pair, left in zip(rng.sample(pairs, n), rng.sample(["a", "b"] * ((n + 1) // 2), n)):
        if pair["a"].size != pair["b"].size:
            raise ValueError(f"pictures of two sizes give the models away: {pair['prompt']!r}")
        shown.append(row := {"prompt": pair["prompt"]})
        for side, picture in ("left", pair[left]), ("right", pair["b" if left == "a" else "a"]):
            # From bare pixels, because metadata may name the model.
            plain = Image.frombytes("RGB", picture.size, picture.convert("RGB").tobytes())
            plain.save(png := io.BytesIO(), "PNG")
            row[side] = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        sides.append({"prompt": pair["prompt"], "left": a if left == "a" else b})
    ballot = hashlib.sha256(json.dumps([shown, sides]).encode()).hexdigest()[:16]
    data = json.dumps({"ballot": ballot, "questions": QUESTIONS, "pairs": shown})
    small = all(pair["a"].width <= 256 for pair in pairs)  # shown enlarged: keep pixels square
    page = PAGE.replace("__RENDERING__", "pixelated" if small else "auto")
    page = page.replace("__BALLOT__", data.replace("<", r"\u003c"))  # no prompt ends the script
    return page, {"ballot": ballot, "pairs": sides, "a": a, "b": b}


def read_votes(files, key):
    """rate = (1/N) Σ_pairs (1 if a is preferred, ½ for no difference, 0 if b), for each rater.

    files: what raters downloaded; key: `make_ballot`'s. -> {"alignment": {"rates": [...], "ties":
    [...]}, "quality": the same, "raters": [...], "pairs": N}; ties are shares of N as well.
    ValueError names the first file that is not one new rater's complete vote on this ballot.
    """
    N, contents, raters = len(key["pairs"]), {}, {}
    if not files:
        raise ValueError("no files with votes were given")
    a_side = ["left" if pair["left"] == key["a"] else "right" for pair in key["pairs"]]
    result = {question: {"rates": [], "ties": []} for question in QUESTIONS}
    for file in files:
        try:
            content = Path(file).read_bytes()
            form = json.loads(content)
            ballot, rater = form["ballot"], "".join(form["rater"].split()).casefold()
            pairs = [vote["pair"] for vote in form["votes"]]
            answers = {name: [vote[name] for vote in form["votes"]] for name in QUESTIONS}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not what a ballot's page saves") from error
        unknown = [x for x in sum(answers.values(), []) if x not in ("left", "right", "tie")]
        for wrong, mistake in (
            (content in contents, f"the same file as {contents.get(content)}"),
            (ballot != key["ballot"], f"votes on ballot {ballot!r:.40}, not {key['ballot']}"),
            (not rater, "without a rater's name"),
            (rater in raters, f"{form['rater']!r} has voted already, in {raters.get(rater)}"),
            # As text, because 1 == True == 1.0.
            (sorted(map(repr, pairs)) != sorted(map(repr, range(N))),
             f"pairs 0 to {N - 1} need one vote each, but these have one: {pairs!r:.200}"),
            (unknown, f"unknown answers: {unknown!r:.200}"),
        ):
            if wrong:
                raise ValueError(f"{file}: {mistake}")
        contents[content] = raters[rater] = file
        for question, lists in result.items():
            ties = answers[question].count("tie")
            wins = sum(x == a_side[pair] for pair, x in zip(pairs, answers[question]))
            lists["rates"].append((wins + ties / 2) / N)
            lists["ties"].append(ties / N)
    return {**result, "raters": list(raters), "pairs": N}


def preference_table(votes, names):
    """Mean ± standard deviation (n − 1) over raters of each model's preference rate.

    votes: `read_votes`'s; names: of a and b. -> Markdown. A tie counts one half for each model.
    """
    lines = ["| Question | {} preferred | {} preferred | ties | raters | pairs |".format(*names),
             "| --- | --- | --- | --- | --- | --- |"]
    for question, text in QUESTIONS.items():
        rates, cells = votes[question]["rates"], [text]
        for shares in rates, [1 - rate for rate in rates], votes[question]["ties"]:
            spread = f"{100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else "–"
            cells.append(f"{100 * statistics.mean(shares):.1f} ± {spread} %")
        cells += [str(len(rates)), str(votes["pairs"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def count_votes(files, folder):
    """Preference rates of the votes on the folder's ballot, as a table; also in its votes.md."""
    try:
        key = json.loads((folder / "ballot_key.json").read_text(encoding="utf-8"))
        votes = read_votes(files, key)
    except OSError as error:
        raise ValueError(f"--votes: no ballot_key.json in --out {folder}") from error
    except ValueError as error:
        raise ValueError(f"--votes: {error}") from error
    table = preference_table(votes, (key["a"], key["b"]))
    (folder / "votes.md").write_text(table + "\n", encoding="utf-8")
    return f"Mean ± standard deviation over raters; a tie counts one half for each\n{table}"
