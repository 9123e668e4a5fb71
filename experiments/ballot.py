"""Which model do people prefer? A blind ballot on two runs (DPOK, Figure 3c).

RUN `python experiments/ballot.py RUN_A RUN_B`, two run folders. Both models draw each prompt on the
same noise, with the steps and the guidance of their training. WRITES ballot.html, one file for
raters that needs no network and says left and right only, and ballot_key.json, which they must not
see. Raters send back what the page saves: `python experiments/ballot.py --votes votes_*.json` makes
a table of each model's share of the pairs, mean and standard deviation over raters. EXPECT raters
to differ.
"""
import base64
import hashlib
import io
import json
import random
import statistics
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import evaluation, flags, models, runs, training  # noqa: E402
from support.prompts import get_prompts  # noqa: E402

mdp = import_module("01_mdp")  # rollout

QUESTIONS = {"alignment": "Which picture fits the prompt better?",
             "quality": "Which picture looks better?"}


@dataclass(frozen=True)
class Config(flags.MachineFlags):
    runs: Positional[tuple[str, ...]] = ()  # the two run folders that are compared
    prompts: str = "tasks"  # a shape family, animals, activities, tasks, a file, or one prompt
    pairs: int = 20  # pairs of pictures, of all prompts in turn
    votes: tuple[str, ...] = ()  # count these files from raters of the ballot in --out
    seed: int = 0  # seed of the pictures' noise; who is left is drawn anew for each ballot
    out: str = "runs/ballot"  # where the page, its key and the table go


# ---- the page -------------------------------------------------------------------------------


def make_ballot(prompts, pictures, rng):
    """The page for raters, and its key.  pictures: model -> its pictures, one for each prompt.

    key: {"ballot": id, "models": [a, b], "pairs": [{"prompt", "left": a model}]}. Pairs are
    shuffled, and a is on the left in half of them (to within one): "always left" favors nobody.
    """
    a, b = pictures
    N = len(prompts)
    left_models = rng.sample([a, b] * ((N + 1) // 2), N)
    shown, secret = [], []
    for i, left in zip(rng.sample(range(N), N), left_models):
        right = b if left == a else a
        shown.append({"prompt": prompts[i], "left": as_uri(pictures[left][i]),
                      "right": as_uri(pictures[right][i])})
        secret.append({"prompt": prompts[i], "left": left})
    ballot = hashlib.sha256(json.dumps([shown, secret]).encode()).hexdigest()[:16]
    data = json.dumps({"ballot": ballot, "questions": QUESTIONS, "pairs": shown})
    data = data.replace("<", r"\u003c")  # so that no prompt ends the script
    page = Path(__file__).with_name("ballot.html").read_text(encoding="utf-8")
    return page.replace("__BALLOT__", data), {"ballot": ballot, "models": [a, b], "pairs": secret}


def as_uri(picture):
    """A picture as text, from its pixels alone: metadata might name the model."""
    file = io.BytesIO()
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def draw(folder, prompts, config):
    """A run's pictures, drawn as it was trained, on the noise that comparisons share."""
    pipe, _ = models.load_run(folder, config.device, config.dtype)
    settings = models.read_config(folder) | {"batch_size": config.batch_size, "seed": config.seed}
    return mdp.rollout(pipe, prompts, SimpleNamespace(**settings), "compare").images


def write(config):
    """ballot.html for raters and ballot_key.json for nobody else, in --out."""
    if len(set(config.runs)) != 2:
        raise ValueError("give two run folders to compare, or --votes to count")
    out = Path(config.out)
    if Path(out, "ballot_key.json").exists():  # votes on it may be under way
        raise ValueError(f"--out {out}: there is a ballot; move ballot_key.json away first")
    prompts = training.spread_evenly(get_prompts(config.prompts), config.pairs)
    pictures = {folder: draw(folder, prompts, config) for folder in config.runs}
    page, key = make_ballot(prompts, pictures, random.SystemRandom())
    out.mkdir(parents=True, exist_ok=True)
    Path(out, "ballot.html").write_text(page, encoding="utf-8")
    Path(out, "ballot_key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
    print(f"{len(prompts)} pairs in {out}; for raters: ballot.html, not for them: ballot_key.json")


# ---- the votes ------------------------------------------------------------------------------


def read_vote(file, key):
    """One rater's file -> the rater's name, and question -> an answer for each pair of the key."""
    try:
        form = json.loads(Path(file).read_text(encoding="utf-8"))
        rater, ballot = form["rater"].strip().casefold(), form["ballot"]
        answers = {question: [vote[question] for vote in form["votes"]] for question in QUESTIONS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--votes {file}: not what the page saves ({error!r:.200})") from error
    if ballot != key["ballot"]:
        raise ValueError(f"--votes {file}: votes on another ballot")
    for own in answers.values():
        if len(own) != len(key["pairs"]) or not set(own) <= {"left", "right", "tie"}:
            raise ValueError(f"--votes {file}: not one answer to each question about each pair")
    return rater, answers


def preference_rate(answers, left_models, model):
    """rate = (1/N)·Σ_pairs (1 if the model is preferred, ½ for a tie, 0 if the other is)"""
    score = answers.count("tie") / 2
    for answer, left in zip(answers, left_models, strict=True):
        side = "left" if left == model else "right"
        score += answer == side
    return score / len(answers)


def count(config):
    """Preference rates of the votes on the ballot in --out, as a table; also in its votes.csv."""
    key = json.loads(Path(config.out, "ballot_key.json").read_text(encoding="utf-8"))
    left_models = [pair["left"] for pair in key["pairs"]]
    voted = {}  # rater -> answers
    for file in config.votes:
        rater, answers = read_vote(file, key)
        if rater in voted:
            raise ValueError(f"--votes {file}: {rater!r} has voted already")
        voted[rater] = answers
    rows = []
    for question, text in QUESTIONS.items():
        row = {"question": text, "raters": len(voted), "pairs": len(left_models)}
        given = [answers[question] for answers in voted.values()]
        for model in key["models"]:
            rates = [100 * preference_rate(own, left_models, model) for own in given]
            spread = f" ± {statistics.stdev(rates):.1f}" if len(rates) > 1 else ""
            row[f"{model} preferred, %"] = f"{statistics.mean(rates):.1f}{spread}"
        ties = [own.count("tie") / len(own) for own in given]
        row["ties, %"] = f"{100 * statistics.mean(ties):.1f}"
        rows.append(row)
    runs.write_rows(Path(config.out, "votes.csv"), rows)
    print(f"Mean ± standard deviation over raters; a tie counts one half for each\n"
          f"{evaluation.as_text(rows)}")
    return rows


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    return count(config) if config.votes else write(config)


if __name__ == "__main__":
    flags.run(main)
