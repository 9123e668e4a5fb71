"""A run's folder: its name, what each round logs, the film, and what finish() writes."""
import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support import figures, models, runs
from tests.oracles import difference


@dataclass(frozen=True)
class Config:
    out: str
    name: str | None = None
    reward: str = "compressibility"
    prompts: str = "color"
    rounds: int = 10
    prompts_per_round: int = 2
    samples_per_prompt: int = 3
    keep_every: int = 0
    resume: str | None = None


@pytest.fixture
def config(tmp_path):
    return Config(out=str(tmp_path / "runs"))


@pytest.mark.parametrize("values, name", [
    ({}, "dpok_compressibility_color"), ({"name": "mine"}, "mine"),
    ({"reward": "alignment=1,aesthetic=0.2"}, "dpok_alignment=1,aesthetic=0.2_color"),
    ({"reward": "../my dir/r.py:f", "prompts": "some/where/p.txt"}, "dpok_.._my_dir_r.py_f_p"),
    ({"prompts": "a star " * 50}, ("dpok_compressibility_" + "a_star_" * 50)[:100])])
def test_a_folder_says_what_is_run(values, name, config):
    run = runs.Run(replace(config, **values), "dpok")
    assert run.folder.name == name and str(run.folder.parent) == config.out
    saved = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))
    assert saved["method"] == "dpok" and saved["rounds"] == 10 and saved["out"] == config.out


def test_no_run_is_overwritten(config):
    names = [runs.Run(config, "ddpo").folder.name for _ in range(3)]
    assert names == ["ddpo_compressibility_color" + end for end in ("", "-2", "-3")]
    named = replace(config, name="mine")
    runs.check_folder(named)
    runs.Run(named, "ddpo")
    with pytest.raises(ValueError, match="--name mine"):
        runs.check_folder(named)
    with pytest.raises(ValueError, match="--out"):
        runs.check_folder(replace(config, out=__file__))


@pytest.mark.parametrize("rounds, due", [
    (1, [0]), (3, [0, 1, 2]), (11, [0, 2, 5, 8]), (60, [0, 15, 30, 45])])
def test_rounds_with_a_frame_of_the_film(rounds, due, config):
    run = runs.Run(replace(config, rounds=rounds), "ddpo")
    assert [n for n in range(rounds) if run.is_film_due(n)] == due


def gray(v):
    return Image.new("RGB", (8, 8), (v, v, v))


def side(r, g):
    return {"prompts": ["p", "q"], "images": [gray(r), gray(g)],
            "reward": torch.tensor([r, r + 2.0]), "gold": torch.tensor([g, g + 4.0])}


@pytest.fixture
def drawn(monkeypatch):
    """File -> what was drawn or saved there, in this order."""
    found = {}

    def save_trained(pipe, folder):  # with evaluation.json it would count as finished already
        assert not (folder / "evaluation.json").exists()
        found["weights"] = pipe

    for name in ("before_after", "curves", "sheet"):
        monkeypatch.setattr(figures, name, lambda path, *a: found.update({path.name: a}))
    monkeypatch.setattr(models, "save_trained", save_trained)
    return found


def test_a_finished_run_tells_before_from_after(config, drawn, capsys, monkeypatch):
    ticks = iter(range(100))  # one second from each look at the clock to the next
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    run = runs.Run(replace(config, rounds=2), "ddpo")
    film = SimpleNamespace(images=[gray(1), gray(2)], prompts=["first", "second"])
    run.add_to_film(film)
    for n in run.rounds("pipe"):
        run.log(n, reward=torch.tensor([1.0, 2.0, 6.0]), gold=0.5, kl=torch.ones(3) * n)
    run.add_to_film(film)
    names = {"reward": "my reward", "gold": "its"}
    verdict = run.finish("pipe", side(10, 20), side(15, 50), names)

    rows = runs.read_rows(run.folder / "metrics.csv")
    assert rows == run.rows and [row["round"] for row in rows] == [1, 2]
    assert rows[1] == {"round": 2, "queries": 12, "reward": 3, "gold": 0.5, "seconds": 1,
                       "kl": 1, "kl_se": 0, "reward_se": pytest.approx(math.sqrt(7 / 3))}
    assert (run.folder / "pictures.csv").read_text().splitlines() == [
        "round,queries,picture,reward,kl", "1,6,0,1.0,0.0", "1,6,1,2.0,0.0", "1,6,2,6.0,0.0",
        "2,12,0,1.0,1.0", "2,12,1,2.0,1.0", "2,12,2,6.0,1.0"]
    assert json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8")) == verdict
    assert (verdict["queries"], verdict["seconds"]) == (12, 9)
    assert (verdict["gold"]["before"], verdict["gold"]["after"]) == (22, 52)
    runs.report(run, verdict)
    assert "11.000 ± 1.000 before    16.000 ± 1.000 after  gain +5.000" in capsys.readouterr().out

    assert list(drawn) == ["before_after.png", "reward.png", "film.png", "weights"]
    prompts, (r_before, r_after), (before, after) = drawn["before_after.png"]
    assert prompts == ["p", "q"] and r_before.tolist() == [10, 12] and r_after.tolist() == [15, 17]
    assert before[0].getpixel((0, 0))[0] == 10 and after[0].getpixel((0, 0))[0] == 15
    rows, ends, _ = drawn["reward.png"]
    assert rows == run.rows
    assert {name: [v[0].item() for v in pair] for name, pair in ends.items()} == {
        "reward": [10, 15], "gold": [20, 50]}
    strips, times, prompts = drawn["film.png"]
    assert times == ["0 queries", "12 queries"] and prompts == ["first", "second"]
    assert strips == [film.images] * 2 and drawn["weights"] == "pipe"


def test_neither_film_nor_looks_nor_kept_weights_are_in_a_rounds_seconds(config, monkeypatch):
    """Each piece of work takes another power of ten, so that the sums tell which are in them."""
    clock, kept = [0.0], []

    def spend(seconds):
        clock[0] += seconds

    def save_trained(pipe, folder):
        assert json.loads((run.folder / "config.json").read_text())["keep_every"] == 2
        kept.append((pipe, folder.relative_to(run.folder).as_posix()))
        spend(1000)

    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(models, "save_trained", save_trained)
    run = runs.Run(replace(config, rounds=5, keep_every=2), "sft")
    for n in run.rounds("pipe"):
        if n in (0, 3):
            spend(100)
            run.add_to_film(SimpleNamespace(images=[gray(1)], prompts=["p"]))
        spend(1)
        with run.looking():
            spend(10)
        spend(2)
        run.log(n, reward=torch.ones(2))
    assert [row["seconds"] for row in run.rows] == [3] * 5
    assert kept == [("pipe", "rounds/002"), ("pipe", "rounds/004")]
    for _, name in kept:  # what load_run reads beside the weights
        assert (run.folder / name / "config.json").read_text() == (
            run.folder / "config.json").read_text()


def test_the_film_is_kept_without_loss_and_eight_columns_of_it_are_drawn(config, drawn):
    run = runs.Run(replace(config, rounds=1), "ddpo")
    prompts = ['a "red", round one', "a\nb", *[f"{i}, 'é'" for i in range(8)]]
    frames = [[Image.effect_noise((9, 7), 90 + i).convert("RGB") for i in range(10)]
              for _ in range(2)]
    for images in frames:
        run.add_to_film(SimpleNamespace(images=images, prompts=prompts))
        for n in run.rounds("pipe"):
            run.log(n, reward=torch.ones(2))
    read, found = runs.read_film(run.folder)
    assert read == prompts and list(found) == [0, 6]
    assert all(difference(*pair) == 0 for pair in zip(frames, found.values(), strict=True))
    run.finish("pipe", side(1, 2), side(3, 4), {"reward": "r"})
    columns = [0, 1, 2, 3, 5, 6, 7, 8]
    assert drawn["film.png"] == ([[images[i] for i in columns] for images in frames],
                                 ["0 queries", "6 queries"], [prompts[i] for i in columns])


def test_labels_are_unlike_the_pretrained_models_and_a_folder_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "pretrained"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text("{}")
    assert list(runs.labels(["a", "pretrained"])) == ["a", str(tmp_path.resolve() / "pretrained")]
    with pytest.raises(ValueError, match="given twice"):
        runs.labels(["a", str(tmp_path / "a")])
