"""A run's folder: its name, what is logged and kept, and that it survives its process's end."""
import io
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

from support import figures, runs, training
from tests import processes
from tests.equations.closed_forms import difference


@dataclass(frozen=True)
class Config:
    out: str
    name: str | None = "toy"
    reward: str = "compressibility"
    prompts: str = "color"
    rounds: int = 4
    prompts_per_round: int = 1
    samples_per_prompt: int = 3
    keep_every: int = 2
    film_pictures: int = 2
    learning_rate: float = 0.1
    max_grad_norm: float = 0.4
    resume: str | None = None


class Pipe:
    """As much of a pipeline as a run needs."""

    device = "cpu"

    def __init__(self):
        self.unet = nn.Linear(2, 1)
        nn.init.constant_(self.unet.weight, 0.5)
        nn.init.constant_(self.unet.bias, 0.25)

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        folder.joinpath("weights").write_text(str(self.unet.state_dict()))


class PlainRun(runs.Run):
    def draw(self):
        """No figures: they take longer than the rest of this training."""


def gray(v):
    return Image.new("RGB", (8, 8), (v, v, v))


def train(config, Run=PlainRun):
    """A training with all of a run's files that takes milliseconds."""
    pipe, history = Pipe(), {}
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), config.learning_rate)

    def look():
        weight = pipe.unet.weight.detach()
        shade = int(weight.abs().sum() * 100)
        return {"prompts": ['a "red",\nstar', "é", "é"], "images": [gray(shade), gray(9), gray(1)],
                "reward": weight[0, 0] + torch.arange(3)}

    run = Run(config, "toy", look)
    for n in run.rounds(pipe, optimizer, history):
        x = training.gaussian((config.samples_per_prompt, 2), 0, "train", n)
        r = -pipe.unet(x).square().squeeze(1)
        loss = sum(history.get("p", [1.0])) - r
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history["p"] = [*history.get("p", []), loss.mean().item()][-3:]
        for part in loss.detach().split(2):
            run.note(kl_old=part, clip_fraction=part > 1)
        run.log(n, reward=r.detach(), grad_norm=torch.tensor(0.25 + n % 2 / 4))
    run.finish(pipe)
    return run


@pytest.mark.parametrize("values, name", [
    ({"name": None}, "dpok_compressibility_color"), ({"name": "mine"}, "mine"),
    ({"name": None, "reward": "../my dir/r.py:f", "prompts": "some/where/p.txt"},
     "dpok_.._my_dir_r.py_f_p"),
    ({"name": None, "prompts": "a star " * 50}, ("dpok_compressibility_" + "a_star_" * 50)[:100])])
def test_a_folder_says_what_is_run_and_none_is_overwritten(values, name, tmp_path):
    config = replace(Config(str(tmp_path / "runs")), **values)
    found = [runs.Run(config, "dpok", lambda: {"images": []}).folder for _ in range(3)]
    assert found == [tmp_path / "runs" / (name + end) for end in ("", "-2", "-3")]
    saved = json.loads((found[0] / "config.json").read_text(encoding="utf-8"))
    assert saved["method"] == "dpok" and saved["rounds"] == 4 and saved["out"] == config.out


def test_what_a_run_logs_and_keeps(tmp_path):
    run = train(Config(str(tmp_path)))
    rows, pictures = (runs.read_rows(run.folder / name) for name in ("metrics.csv", "pictures.csv"))
    assert rows == run.rows and [row["queries"] for row in rows] == [3, 6, 9, 12]
    first = torch.tensor([picture["reward"] for picture in pictures[:3]])
    assert rows[0]["reward"] == pytest.approx(first.mean().item())
    assert rows[0]["reward_se"] == pytest.approx(first.std().item() / 3 ** 0.5)
    assert rows[0]["kl_old"] == pytest.approx(1 - first.mean().item())  # of pairs, not of batches
    assert [row["grad_norm"] for row in rows] == [0.25, 0.5, 0.25, 0.5] and rows[2]["round"] == 3
    assert [row["grad_clipped"] for row in rows] == [0, 1, 0, 1]
    assert list(pictures[4]) == ["round", "queries", "picture", "reward"]
    assert [pictures[4][name] for name in ("round", "queries", "picture")] == [2, 6, 1]
    prompts, frames = runs.read_film(run.folder)
    assert prompts == ['a "red",\nstar', "é"] and list(frames) == [0, 3, 6, 9, 12]
    assert difference(frames[0], [gray(100), gray(9)]) == 0 < difference(frames[0], frames[3])
    summary = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    gain = run.after["reward"][0].item() - 0.5
    assert summary["queries"] == 12 and summary["reward"] == pytest.approx({
        "title": "compressibility", "before": 1.5, "before_se": 3 ** -0.5, "after": 1.5 + gain,
        "after_se": 3 ** -0.5, "gain": gain, "gain_se": 0}, abs=1e-6) and gain != 0
    assert runs.read_rows(run.folder / "fresh.csv") == run.fresh
    assert [row["queries"] for row in run.fresh] == [0, 3, 6, 9, 12]
    assert run.fresh[0]["reward"] == 1.5 and run.fresh[4]["reward"] == pytest.approx(1.5 + gain)
    weights = [(run.folder / name / "model/weights").read_text() for name in
               ("rounds/002", "rounds/004", ".")]
    assert weights[0] != weights[1] == weights[2]
    assert not (run.folder / runs.CHECKPOINT).exists()


@pytest.mark.parametrize("rounds, frames", [(1, [0, 1]), (3, [0, 1, 2, 3]), (11, [0, 2, 5, 8, 11])])
def test_frames_of_the_film(rounds, frames, tmp_path):
    run = train(Config(str(tmp_path), rounds=rounds, samples_per_prompt=2))
    assert list(runs.read_film(run.folder)[1]) == [2 * n for n in frames]


def test_a_figure_that_cannot_be_drawn_costs_no_weights(tmp_path, monkeypatch, capsys):
    drawn = {}
    for name in ("before_after", "curves"):
        monkeypatch.setattr(figures, name, lambda path, *a: drawn.update({path.name: a}))
    monkeypatch.setattr(figures, "sheet", lambda *a: 1 / 0)
    run = train(Config(str(tmp_path)), runs.Run)
    assert "warning: not all figures could be drawn: division by zero" in capsys.readouterr().out
    assert runs.is_finished(run.folder) and (run.folder / "model/weights").is_file()
    assert drawn["before_after.png"] == (run.before, run.after)
    titles = {"reward": "compressibility"}
    assert drawn["reward.png"] == (run.rows, run.fresh, titles)


def test_killed_before_any_change_of_a_file_a_run_ends_with_the_same_bits(tmp_path):
    wanted = processes.left_behind(train(Config(str(tmp_path), "whole")).folder)
    log = tmp_path / "log"
    for k in range(0, 1000, 7):
        config = Config(str(tmp_path / str(k)))
        folder = tmp_path / str(k) / "toy"
        if processes.ended(partial(train, config), log, die_at=k) == 0:
            break
        if (folder / "config.json").is_file() and not runs.is_finished(folder):
            if k % 2:  # in a copy of its folder too
                folder = shutil.copytree(folder, tmp_path / str(k) / "copy")
            train(replace(config, resume=str(folder)))
            assert processes.left_behind(folder) == wanted, k
    assert 60 < k < 200


def test_a_file_is_replaced_whole_and_never_written_over(tmp_path):
    path, old = tmp_path / "file", tmp_path / "old"
    path.write_text("old")
    old.hardlink_to(path)
    runs.write_whole(path, b"new")
    assert (path.read_text(), old.read_text()) == ("new", "old")


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_to_go_on(tmp_path):
    wanted = processes.left_behind(train(Config(str(tmp_path), "whole")).folder)
    log, rounds_done = tmp_path / "log", set()
    for size in range(4300, 5600, 150):
        config = Config(str(tmp_path / str(size)))
        folder = tmp_path / str(size) / "toy"
        code = processes.ended(partial(train, config), log, largest_file=size)
        if code == 0:
            break
        assert code == 2 and "File too large" in log.read_text().splitlines()[-1]
        assert not list(folder.rglob("*.part"))
        if (folder / "config.json").is_file():
            assert f"--resume {folder}" in log.read_text().splitlines()[-1]
            rounds_done.add(len(runs.read_rows(folder / "metrics.csv")))
            train(replace(config, resume=str(folder)))
            assert processes.left_behind(folder) == wanted, size
    assert code == 0 and len(rounds_done) > 2


def test_a_checkpoint_that_was_cut_off_is_named_and_a_whole_one_knows_its_seconds(tmp_path):
    config = Config(str(tmp_path))
    assert processes.ended(partial(train, config), tmp_path / "log", die_at=100) == -9
    checkpoint = tmp_path / "toy" / runs.CHECKPOINT
    whole, config = checkpoint.read_bytes(), replace(config, resume=str(tmp_path / "toy"))
    checkpoint.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=f"--resume: {checkpoint} cannot be read"):
        train(config)
    torch.save(torch.load(io.BytesIO(whole)) | {"seconds": 1e6}, checkpoint)
    summary = (train(config).folder / "evaluation.json").read_text()
    assert json.loads(summary)["seconds"] > 1e6  # those before the stop, too


def test_labels_tell_folders_of_one_name_apart_and_a_folder_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b/a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "evaluation.json").write_text("{}")
    a, ba, bc = (tmp_path.resolve() / name for name in ("a", "b/a", "b/c"))
    assert runs.labels(["a", "b/a", str(ba)]) == {"a": a, "b/a": ba}
    assert runs.labels(["b/a", "b/c"]) == {"a": ba, "c": bc} and runs.labels([]) == {}
    with pytest.raises(ValueError, match="--runs b: no finished run"):
        runs.labels(["a", "b"])
