"""Human preference (DPOK, Figure 3c): a ballot on which people compare two models, blind.

`make_ballot` fills the page ballot.html, one file that needs no network; raters send back what they
download from it, and `count_votes` makes a table of that. Nothing here is about learning.
"""
import base64
import hashlib
import io
import json
import random
import secrets
import statistics
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).with_name("ballot.html")
QUESTIONS = {"alignment": "Which picture fits the prompt better?",
             "quality": "Which picture looks better?"}
ANSWERS = ("left", "right", "tie")


# ---- the page -------------------------------------------------------------------------------


def make_ballot(pairs, seed, names=("rl", "sft")):
    """The page for raters, which says left and right only, and the key, which they must not see.

    pairs: dicts of "prompt" and two pictures, "a" and "b"; names: of the models behind a and b.
    -> HTML that needs no other file and no network; {"ballot": id, "pairs": [{"prompt", "left":
    name}], "a": name, "b": name}. Pairs are shuffled, and a is on the left in half of them (to
    within one), so "always left" favors nobody. Equal seeds make equal ballots: keep yours secret.
    """
    a, b = names
    assert pairs and a != b, names
    rng = random.Random(seed)
    N = len(pairs)
    shuffled = rng.sample(pairs, N)
    left_sides = rng.sample(["a", "b"] * ((N + 1) // 2), N)

    public, secret = [], []
    for pair, left in zip(shuffled, left_sides):
        prompt = pair["prompt"]
        if pair["a"].size != pair["b"].size:
            raise ValueError(f"pictures of two sizes give the models away: {prompt!r}")
        right = "b" if left == "a" else "a"
        public.append({
            "prompt": prompt,
            "left": as_uri(pair[left]),
            "right": as_uri(pair[right]),
        })
        secret.append({"prompt": prompt, "left": a if left == "a" else b})

    ballot = hashlib.sha256(json.dumps([public, secret]).encode()).hexdigest()[:16]
    data = {"ballot": ballot, "questions": QUESTIONS, "pairs": public}
    widest = max(pair["a"].width for pair in pairs)
    page = fill_page(data, "pixelated" if widest <= 256 else "auto")
    return page, {"ballot": ballot, "pairs": secret, "a": a, "b": b}


def as_uri(picture):
    """A picture as text, made from bare pixels, because metadata may name the model."""
    pixels = picture.convert("RGB").tobytes()
    file = io.BytesIO()
    Image.frombytes("RGB", picture.size, pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def fill_page(data, rendering):
    """ballot.html with its data.  rendering: how to enlarge; "pixelated" keeps pixels square."""
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("__RENDERING__", rendering)
    text = json.dumps(data).replace("<", r"\u003c")  # so that no prompt ends the script
    return page.replace("__BALLOT__", text)


# ---- the votes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What one file of votes holds."""

    content: bytes
    ballot: str
    name: str  # as the rater wrote it
    rater: str  # the same without spaces and capitals
    pairs: list
    answers: dict  # question -> an answer for each of pairs


def read_form(file):
    """A downloaded file -> Form.  ValueError where it is none; what it says is not yet checked."""
    try:
        content = Path(file).read_bytes()
        form = json.loads(content)
        votes = form["votes"]
        answers = {}
        for question in QUESTIONS:
            answers[question] = [vote[question] for vote in votes]
        return Form(
            content=content,
            ballot=form["ballot"],
            name=form["rater"],
            rater="".join(form["rater"].split()).casefold(),
            pairs=[vote["pair"] for vote in votes],
            answers=answers,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not what a ballot's page saves") from error


def find_mistake(form, key, contents, raters):
    """Why a form must not be counted, or None.  contents, raters: of earlier forms -> their file"""
    if form.content in contents:
        return f"the same file as {contents[form.content]}"
    if form.ballot != key["ballot"]:
        return f"votes on ballot {form.ballot!r:.40}, not {key['ballot']}"
    if not form.rater:
        return "without a rater's name"
    if form.rater in raters:
        return f"{form.name!r} has voted already, in {raters[form.rater]}"
    N = len(key["pairs"])
    # Compared as text, because 1 == True == 1.0.
    if sorted(map(repr, form.pairs)) != sorted(map(repr, range(N))):
        return f"pairs 0 to {N - 1} need one vote each, but these have one: {form.pairs!r:.200}"
    for question in QUESTIONS:
        unknown = [answer for answer in form.answers[question] if answer not in ANSWERS]
        if unknown:
            return f"unknown answers: {unknown!r:.200}"
    return None


def read_votes(files, key):
    """rate = (1/N) Σ_pairs (1 if a is preferred, ½ for no difference, 0 if b), for each rater.

    files: what raters downloaded; key: `make_ballot`'s. -> {"alignment": {"rates": [...], "ties":
    [...]}, "quality": the same, "raters": [...], "pairs": N}; ties are shares of N as well.
    ValueError names the first file that is not one new rater's complete vote on this ballot.
    """
    if not files:
        raise ValueError("no files with votes were given")
    N = len(key["pairs"])
    sides_of_a = ["left" if pair["left"] == key["a"] else "right" for pair in key["pairs"]]
    votes = {question: {"rates": [], "ties": []} for question in QUESTIONS}
    contents, raters = {}, {}
    for file in files:
        form = read_form(file)
        mistake = find_mistake(form, key, contents, raters)
        if mistake:
            raise ValueError(f"{file}: {mistake}")
        contents[form.content] = file
        raters[form.rater] = file
        for question, answers in form.answers.items():
            wins = 0
            for pair, answer in zip(form.pairs, answers):
                wins += answer == sides_of_a[pair]
            ties = answers.count("tie")
            votes[question]["rates"].append((wins + ties / 2) / N)
            votes[question]["ties"].append(ties / N)
    return {**votes, "raters": list(raters), "pairs": N}


# ---- the table ------------------------------------------------------------------------------


def preference_table(votes, names):
    """Mean ± standard deviation (n − 1) over raters of each model's preference rate.

    votes: `read_votes`'s; names: of a and b. -> Markdown. A tie counts one half for each model.
    """
    a, b = names
    lines = [
        f"| Question | {a} preferred | {b} preferred | ties | raters | pairs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for question, text in QUESTIONS.items():
        rates, ties = votes[question]["rates"], votes[question]["ties"]
        cells = [
            text,
            mean_and_spread(rates),
            mean_and_spread([1 - rate for rate in rates]),
            mean_and_spread(ties),
            str(len(rates)),
            str(votes["pairs"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_spread(shares):
    """[0.5, 0.75] -> "62.5 ± 17.7 %"; one share alone has no spread."""
    mean = 100 * statistics.mean(shares)
    spread = f"{100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else "–"
    return f"{mean:.1f} ± {spread} %"


def read_key(file):
    """What `write` has kept from raters.  ValueError that names the file where it is no key."""
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        sides = [pair["left"] for pair in key["pairs"]]
        if not sides or not {*sides} <= {key["a"], key["b"]} or not key["ballot"]:
            raise ValueError("it has no pairs of two models")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the key of a ballot ({error})") from error
    return key


def count_votes(files, folder):
    """Preference rates of the votes on the folder's ballot, as a table; also in its votes.md."""
    try:
        key = read_key(folder / "ballot_key.json")
        votes = read_votes(files, key)
    except OSError as error:
        raise ValueError(f"--votes: no ballot_key.json in --out {folder}") from error
    except ValueError as error:
        raise ValueError(f"--votes: {error}") from error
    table = preference_table(votes, (key["a"], key["b"]))
    (folder / "votes.md").write_text(table + "\n", encoding="utf-8")
    return f"Mean ± standard deviation over raters; a tie counts one half for each\n{table}"


def check_new(folder):
    """ValueError where the folder holds a ballot already: votes on it may be under way."""
    if Path(folder, "ballot_key.json").exists():
        raise ValueError(f"--ballot: there is one in {folder}; move ballot_key.json away first")


def write(folder, prompts, pictures):
    """ballot.html for raters, ballot_key.json for nobody else.  pictures: model -> B pictures."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = pictures.values()
    pairs = []
    for i, prompt in enumerate(prompts):
        pairs.append({"prompt": prompt, "a": ours[i], "b": theirs[i]})
    # Not the run's seed: who knows the seed knows the sides.
    page, key = make_ballot(pairs, secrets.randbits(64), tuple(pictures))
    (folder / "ballot.html").write_text(page, encoding="utf-8")
    (folder / "ballot_key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    print(f"For raters, {len(pairs)} pairs: {folder}/ballot.html; not for them: "
          f"{folder}/ballot_key.json\n"
          f"Count what they send back: python 05_eval.py --out {folder} --votes votes_*.json")
