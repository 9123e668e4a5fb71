"""A run's folder: its name, what each round logs, the film, and what finish() writes."""
import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import figures, models, runs


@dataclass(frozen=True)
class Config:
    out: str
    name: str | None = None
    reward: str = "compressibility"
    prompts: str = "color"
    rounds: int = 10
    prompts_per_round: int = 2
    samples_per_prompt: int = 3


@pytest.fixture
def config(tmp_path):
    return Config(out=str(tmp_path / "runs"))


def gray(v):
    return Image.new("RGB", (8, 8), (v, v, v))


def log(run, rows):
    for n, row in zip(run.rounds(), rows):
        run.log(n, **row)


@pytest.mark.parametrize("values, name", [
    ({}, "dpok_compressibility_color"), ({"name": "mine"}, "mine"),
    ({"reward": "alignment=1,aesthetic=0.2"}, "dpok_alignment=1,aesthetic=0.2_color"),
    ({"reward": "../my dir/r.py:f", "prompts": "/some/where/p.txt"}, "dpok_.._my_dir_r.py_f_p"),
    ({"prompts": "a star " * 50}, ("dpok_compressibility_" + "a_star_" * 50)[:100])])
def test_a_folder_says_what_is_run(values, name, config):
    run = runs.Run(replace(config, **values), "dpok")
    assert run.folder.name == name and str(run.folder.parent) == config.out
    saved = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert saved["method"] == "dpok" and saved["rounds"] == 10 and saved["out"] == config.out


def test_no_run_is_overwritten(config):
    runs.check_folder(config)
    names = [runs.Run(config, "ddpo").folder.name for _ in range(3)]
    assert names == ["ddpo_compressibility_color" + end for end in ("", "-2", "-3")]
    named = replace(config, name="mine")
    runs.check_folder(named)
    runs.Run(named, "ddpo")
    with pytest.raises(ValueError, match="--name mine"):
        runs.check_folder(named)
    with pytest.raises(ValueError, match="--out"):
        runs.check_folder(replace(config, out=__file__))


def test_rounds_and_their_rows(config, capsys):
    run = runs.Run(replace(config, rounds=2), "ddpo")
    log(run, [{"reward": torch.tensor([1.0, 2.0, 6.0]), "grad_norm": 0.5}] * 9)
    assert [row["queries"] for row in run.rows] == [6, 12]
    rows = runs.read_rows(run.folder / "metrics.csv")
    assert rows == run.rows and rows[1]["round"] == 2
    assert rows[0] | {"seconds": 0} == {
        "round": 1, "queries": 6, "reward": 3, "reward_se": pytest.approx(math.sqrt(7 / 3)),
        "grad_norm": 0.5, "seconds": 0}
    text = capsys.readouterr()
    assert "reward 3.000 ± 1.528" in text.out + text.err


@pytest.mark.parametrize("rounds, due", [
    (1, [0]), (5, [0, 1, 2, 3, 4]), (11, [0, 3, 6, 9]), (200, [0, 40, 80, 120, 160])])
def test_rounds_with_a_frame_of_the_film(rounds, due, config):
    run = runs.Run(replace(config, rounds=rounds), "ddpo")
    assert [n for n in range(rounds) if run.is_film_due(n)] == due


def side(r, g):
    return {"prompts": ["p", "q"], "images": [gray(r), gray(g)],
            "reward": torch.tensor([r, r + 2.0]), "gold": torch.tensor([g, g + 4.0])}


NAMES = {"reward": "my reward", "gold": "gold: its"}


def finished(config):
    run = runs.Run(replace(config, rounds=2), "ddpo")
    film = SimpleNamespace(images=[gray(1), gray(2)], prompts=["first", "second"])
    run.add_to_film(film)
    log(run, [{"reward": torch.tensor([1.0, 2.0]), "gold": 0.5}] * 2)
    run.add_to_film(film)
    return run, run.finish("pipe", side(10, 20), side(15, 50), NAMES)


def test_what_finish_hands_on_tells_before_from_after(config, monkeypatch, capsys):
    drawn = {}
    for name in ("before_after", "curves", "sheet"):
        monkeypatch.setattr(figures, name, lambda path, *a: drawn.update({path.name: a}))
    monkeypatch.setattr(models, "save_trained", lambda pipe, folder: None)
    run, verdict = finished(config)
    assert json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8")) == verdict
    assert verdict["queries"] == 12 and verdict["seconds"] > 0
    assert verdict["reward"] == {"before": 11, "before_se": 1, "after": 16, "after_se": 1,
                                 "gain": 5, "gain_se": 0, "title": "my reward"}
    assert (verdict["gold"]["before"], verdict["gold"]["after"]) == (22, 52)
    runs.report(run, verdict)
    text = capsys.readouterr().out
    assert "my reward" in text and "11.000 ± 1.000 before    16.000 ± 1.000 after" in text
    assert "gain +5.000 ± 0.000" in text and "12 reward queries" in text and str(run.folder) in text

    prompts, (r_before, r_after), (before, after) = drawn["before_after.png"]
    assert prompts == ["p", "q"] and r_before.tolist() == [10, 12] and r_after.tolist() == [15, 17]
    assert before[0].getpixel((0, 0))[0] == 10 and after[0].getpixel((0, 0))[0] == 15
    rows, ends, names = drawn["reward.png"]
    assert rows == run.rows and names == NAMES
    assert {name: [v[0].item() for v in pair] for name, pair in ends.items()} == {
        "reward": [10, 15], "gold": [20, 50]}
    strips, times, prompts = drawn["film.png"]
    assert times == ["0 queries", "12 queries"] and prompts == ["first", "second"]
    assert len(strips) == 2 and strips[0][0].getpixel((0, 0))[0] == 1


def test_evaluation_is_the_last_file(config, monkeypatch):
    """A folder with evaluation.json is a finished run: so all else must be there before it."""
    present = []

    def save(pipe, folder):
        present.append((pipe, sorted(file.name for file in folder.iterdir())))

    monkeypatch.setattr(models, "save_trained", save)
    run, _ = finished(config)
    assert present == [("pipe", ["before_after.png", "config.json", "film.png", "metrics.csv",
                                 "reward.png"])]
    assert (run.folder / "evaluation.json").is_file()
