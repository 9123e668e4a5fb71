"""The experiments as they are started, with tiny flags: what they write, skip and refuse."""
import csv
import re
from dataclasses import asdict, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import (ddpo_rewards, flow, frontier, generalization, lemma, make_tiny_sd,
                         overoptimization, results, sft, sweep, tune, variance)
from support import commands, evaluation, figures, flags, models, runs, training
from support.prompts import get_prompts
from tests.equations import closed_forms
from tests.equations.closed_forms import lightness, warmth

mdp = import_module("01_mdp")
ddpo = import_module("03_ddpo")
dpok = import_module("04_dpok")

REWARD, GOLD = (f"{closed_forms.__file__}:{name}" for name in ("warmth", "lightness"))
TINY = ["--rounds", "2", "--samples-per-prompt", "4", "--num-steps", "3", "--eval-samples", "4",
        "--eta", "0.9", "--device", "cpu", "--reward", REWARD, "--gold", GOLD, "--learning-rate",
        "5e-3", "--seed", "5", "--lora-rank", "4"]


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def no_figures(monkeypatch):
    """They take longer than the trainings."""
    monkeypatch.setattr(runs.Run, "draw", lambda *_: None)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("data, weights, beta", [
    ("fixed", "rwr", 0.1), ("fresh", "sparse", 0.1), ("fixed", "sparse", 0.0)])
def test_sft_is_its_plain_training_and_forgets_if_fresh(data, weights, beta, tmp_path):
    """Round 2 has a prompt of round 1: weights over the pictures of both rounds are others."""
    names = ["a red circle", "an orange star", "three red squares"]
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    words = [*TINY, "--data", data, "--weights", weights, "--temperature", "30", "--keep", "0.34",
             "--beta", str(beta), "--passes", "2", "--prompts", f"{tmp_path}/prompts.txt",
             "--prompts-per-round", "2", "--samples-per-prompt", "3", "--weight-decay", "0.5",
             "--train-batch-size", "4", "--anneal", "--out", str(tmp_path), "--name", "run"]
    run = sft.main(words)
    config = flags.parse(sft.Config, "", words)

    pre, pipe = (models.load_pipeline("tiny_sd", "cpu") for _ in range(2))
    params = models.trainable(pipe, config)
    optimizer = torch.optim.AdamW(params, 5e-3, weight_decay=0.5)
    learned = []  # (prompt, r, x_0)
    for n in range(2):
        of_round = training.prompts_of_round(names, config, n)
        own = mdp.rollout(pipe, of_round, config, "train", n)
        assert run.rows[n]["reward"] == pytest.approx(
            torch.tensor(warmth(own.images, of_round)).mean().item(), abs=0.05)
        assert run.rows[n]["gold"] == pytest.approx(
            torch.tensor(lightness(own.images, of_round)).mean().item(), abs=0.05)
        assert n == 0 or {prompt for prompt, _, _ in learned} & set(of_round)
        drawn = own if data == "fresh" else mdp.rollout(pre, of_round, config, "fixed set", n)
        learned = learned if data == "fixed" else []
        learned += zip(of_round, warmth(drawn.images, of_round), drawn.latents[:, -1])
        prompts, r, x_0 = zip(*learned)
        r, x_0 = torch.tensor(r).double(), torch.stack(x_0)
        w = {"rwr": sft.rwr_weights(r, prompts, 30.0),
             "sparse": sft.sparse_weights(r, prompts, 0.34)}[weights]
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - n / 2)
        for update in range(4):
            stream = training.random_stream(5, "sft batches", n, update)
            rows = torch.from_numpy(stream.integers(len(prompts), size=9))
            t = torch.from_numpy(stream.integers(1000, size=9))
            eps = training.gaussian((9, 4, 8, 8), 5, "sft noise", n, update)
            a = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            x_t = a.sqrt() * x_0[rows] + (1 - a).sqrt() * eps
            c = models.encode_prompts(pipe, [prompts[i] for i in rows])
            eps_pre = pre.unet(x_t, t, encoder_hidden_states=c).sample.detach()
            now = pipe.unet(x_t, t, encoder_hidden_states=c).sample
            errors = [(now - target).square().mean((1, 2, 3)) for target in (eps, eps_pre)]
            (w[rows] * errors[0] + beta * errors[1]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    saved = [v.norm().item() for v in load_file(run.folder / models.ADAPTER).values()]
    assert sorted(saved) == pytest.approx(sorted(p.norm().item() for p in params), rel=1e-3)
    assert [row["queries"] for row in run.rows] == [6, 12]
    assert run.rows[0]["kl"] < 1e-3 < run.rows[1]["kl"] and runs.is_finished(run.folder)


@pytest.mark.usefixtures("no_figures")
def test_variance_looks_at_the_round_after_the_training_before_any_update(tmp_path, monkeypatch):
    started, calls, plain = [], [], variance.gradient_variance

    def keep(pipe, params, trajectory, A, config, n):
        started.append(n)
        if len(started) == 1:
            raise KeyboardInterrupt  # cut short: goes on with that round, and with no other
        value = plain(pipe, params, trajectory, A, config, n)
        calls.append((trajectory, A, n))
        return value

    monkeypatch.setattr(variance, "gradient_variance", keep)
    with pytest.raises(KeyboardInterrupt):
        variance.main([*TINY, "--groups", "4", "--prompts-per-round", "2", "--step-weight", "none",
                       "--name", "cut", "--out", str(tmp_path)])
    found = variance.main(["--resume", str(tmp_path / "cut")])
    (trajectory, _, n), config = calls[0], flags.parse(variance.Config, "", TINY)
    config = replace(config, prompts_per_round=2)
    prompts = training.prompts_of_round(get_prompts("tasks"), config, 2)
    assert n == 2 and trajectory.prompts == prompts
    r = torch.tensor(warmth(trajectory.images, prompts))[:, None].expand(8, 3)
    A = [call[1] for call in calls]
    assert A[0].numpy() == pytest.approx(r.numpy(), rel=1e-4)
    for rows in (slice(0, 4), slice(4, 8)):  # one prompt each
        others = (r[rows] - r[rows].mean(0)) * 4 / 3
        assert A[1][rows].numpy() == pytest.approx(others.numpy(), abs=0.05)
        assert (A[2][rows].sum(0).abs() < 0.05).all()
    assert not torch.allclose(A[1], A[2], atol=1e-2)
    lines = read(tmp_path / "variance.csv")
    assert [line["advantage"] for line in lines] == list(found)
    others = found["r − mean of others"]
    for line, value in zip(lines, found.values()):
        assert float(line["variance"]) == pytest.approx(value, rel=0.01)
        assert float(line["relative"]) == pytest.approx(value / others, abs=0.006)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_frontier_goes_on_where_it_was_stopped_and_places_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "BLOCK", 50)
    start = ["--reward", REWARD, "--gold", GOLD, "--num-steps", "2", "--eta", "0.8", "--device",
             "cpu", "--prompts", "four stars"]
    run = ddpo.main([*start[:2], *start[4:], "--rounds", "1", "--samples-per-prompt", "4",
                     "--prompts-per-round", "1", "--eval-samples", "6", "--lora-rank", "2",
                     "--learning-rate", "0.05", "--out", str(tmp_path)])
    own = ["--eval-samples", "6", "--runs", str(run.folder)]
    curve, others = frontier.main([*start, *own, "--pictures", "100", "--out", f"{tmp_path}/a"])
    assert 0 < len(curve) < len(frontier.BETAS) and min(row["ess"] for row in curve) >= 50
    frontier.main([*start, "--pictures", "150", "--out", f"{tmp_path}/a"])
    frontier.main([*start, "--pictures", "150", "--out", f"{tmp_path}/b"])
    pictures = [runs.read_rows(tmp_path / name / "pictures.csv") for name in "ab"]
    assert pictures[0] == pictures[1] and pictures[0][:50] != pictures[0][50:100]  # other noise

    r, g = (torch.tensor([row[name] for row in pictures[0][:100]]).double()
            for name in ("reward", "gold"))
    best_of_1 = others["best of 1"]["reward"], others["best of 1"]["gold"]
    assert best_of_1 == pytest.approx((r.mean().item(), g.mean().item()))
    pipe, reference = models.load_run(run.folder, "cpu")
    config = flags.parse(frontier.Config, "", [*start, *own])
    looked = dpok.evaluate(pipe, ["four stars"], warmth, lightness, reference, config)
    point = others[run.folder.name]
    assert point["least reward"] == point["reward"] - 2 * point["reward_se"] < point["reward"]
    assert others[run.folder.name]["kl"] == pytest.approx(looked["kl"].mean().item(), rel=1e-2)
    trajectory = mdp.rollout(pipe, ["four stars"] * 6, config, "evaluate")
    for name, reward in (("reward", warmth), ("gold", lightness)):
        values = torch.tensor(reward(trajectory.images, trajectory.prompts))
        found = others[run.folder.name][name]
        assert found == pytest.approx(values.mean().item(), abs=0.05)
    with pytest.raises(ValueError, match="--num-steps 2, not 3"):
        frontier.main([*start, *own, "--num-steps", "3", "--out", f"{tmp_path}/c"])
    for words, named in (["--seed", "1"], "--seed 0, not 1"), (["--gold", REWARD], "--gold"):
        with pytest.raises(ValueError, match=f"made with {named}"):
            frontier.main([*start, *words, "--out", f"{tmp_path}/a"])


# ---- scripts that start others --------------------------------------------------------------


@pytest.fixture
def fake_runs(monkeypatch):
    """Instead of training, a folder whose numbers are made of β (03: of the reward's length).

    -> the Configs of what was started. A film's picture: (reward's length, 9·frame, prompt).
    """
    started, one_at_a_time = [], Lock()  # trainings side by side are threads here; tyro has a cache

    def start(command, *_):
        script = import_module(command[0].removesuffix(".py").replace("/", "."))
        with one_at_a_time:
            config = flags.parse(script.Config, "", command[1:], script.SD)
        started.append(config)
        folder, beta = Path(config.out, config.name), getattr(config, "beta", len(config.reward))
        (folder / "film").mkdir(parents=True)
        runs.write_json(folder / "config.json", asdict(config) | {"method": "fake"})
        rows, pictures, prompts = [], [], get_prompts(config.prompts)
        for n in range(config.rounds):
            rows.append({"round": n + 1, "queries": 8 * n + 8, "kl": n, "reward": n,
                         "gold": beta - (n - 2) ** 2})
            for i, prompt in enumerate(training.prompts_of_round(prompts, config, n)):
                pictures.append({"round": n + 1, "picture": i, "reward": 10 * (len(prompt) + n)})
        runs.write_rows(folder / "metrics.csv", rows)
        runs.write_rows(folder / "pictures.csv", pictures)
        runs.write_rows(folder / "fresh.csv", [
            {"queries": 99 * k, "reward": k, "reward_se": 1} for k in (0, 1)])
        film = training.spread_evenly(prompts, config.film_pictures)
        runs.write_json(folder / "film" / "prompts.json", film)
        for k in range(5):
            frame = folder / "film" / str(8 * k)
            frame.mkdir()
            for i in range(len(film)):
                picture = Image.new("RGB", (8, 8), (len(config.reward), 9 * k, i))
                picture.save(frame / f"{i}.png")
        figures.sheet(folder / "film.png", [[Image.new("RGB", (8, 8))]], ["x"], ["y"])
        numbers = {name: {"title": name, "before": beta - k, "before_se": 0.25, "gain": 11.0 * k,
                          "after": 10.0 * k + beta, "after_se": 0.5 + k, "gain_se": 0.125}
                   for k, name in enumerate(("reward", "gold", "kl"))}
        runs.write_json(folder / "evaluation.json", numbers | {"queries": 99})

    monkeypatch.setattr(commands, "start", start)
    return started


def test_sweep_trains_what_is_missing_and_compares(fake_runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep.Figure, "savefig", lambda figure, path: drawn.append((figure, path)))
    words = ["--betas", "0", "0.25", "--out", str(tmp_path), "--", "--alpha", "2"]
    rows = sweep.main(words)
    assert [(config.beta, config.alpha) for config in fake_runs] == [(0, 2), (0.25, 2)]
    assert rows[1]["beta"] == 0.25
    assert (rows[1]["kl after"], rows[1]["gold gain"]) == ("20±2", "11.0±0.1")
    assert sweep.main(words) == rows and len(fake_runs) == 2
    with pytest.raises(ValueError, match="--alpha 2.0, not 3.0"):
        sweep.main([*words[:-1], "3"])
    figure, path = drawn[-1]
    assert path == tmp_path / "sweep.png"
    for ax, name, first, error in zip(figure.axes, ("reward", "gold"), (0, 10), (0.5, 1.5)):
        x, y = ax.lines[0].get_data()
        assert ax.get_title() == name
        assert (list(x), list(y)) == ([20, 20.25], [first, first + 0.25])
        assert ax.collections[0].get_segments()[0].tolist()[1] == [20, first + error]


def test_overoptimization_counts_and_shows_where_the_trick_has_worked(fake_runs, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(overoptimization.reward_models, "load_vlm", lambda name, device: (
        lambda images, questions: [f"{question} 7" for question in questions]))
    monkeypatch.setattr(overoptimization.judge, "read", lambda images: [
        3 if image.getpixel((4, 4))[1] >= 27 else None for image in images])
    drawn, draw = [], overoptimization.draw_lines
    monkeypatch.setattr(overoptimization, "draw_lines", lambda path, panels: (
        draw(path, panels), drawn.append([list(lines.values()) for lines in panels.values()])))
    words = ["--rounds", "9", "--seed", "3", "--out", str(tmp_path), "--", "--vlm", "mine"]
    rows = overoptimization.main(words)
    common = dict(reward="vlm_strict", value=False, prompts="count", film_pictures=32, rounds=9,
                  prompts_per_round=4, samples_per_prompt=12, learning_rate=2e-3, seed=3,
                  vlm="mine", out=str(tmp_path))
    assert [replace(config, name=None) for config in fake_runs] == [
        dpok.Config(**common, beta=beta) for beta in (0.0, 0.03)]
    (_, r), (_, g), (queries, shares) = [lines[1] for lines in drawn[0]]
    assert (r[8], g[3]) == (6, pytest.approx(-1.47)) and queries == [0, 8, 16, 24, 32]
    threes = sum("three" in prompt for prompt in
                 training.spread_evenly(get_prompts("count"), 32)) / 32
    row = rows[1]
    assert [row[name] for name in ("number written before", "number written after",
                                   "any digit after")] == [0, round(threes, 2), 1]
    assert (shares[0], shares[-1]) == (0, round(threes, 2))
    prompts, frames = runs.read_film(tmp_path / "overoptimization_beta_0")
    assert all("three" in prompts[i] for i in overoptimization.telling(prompts, frames[32]))
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "overoptimization", "overoptimization_curves"}
    assert overoptimization.main(words) == rows and len(fake_runs) == 2


@pytest.mark.parametrize("experiment", ["eval", "ddpo_rewards"])
def test_tuning_trains_all_settings_then_the_best_three_again_and_chooses_one(
        experiment, fake_runs, tmp_path, monkeypatch):
    """r is made up: the third setting wins with the first seed, by luck."""
    table = {"eval": tune.SETTINGS, "ddpo_rewards": tune.ddpo_rewards.SETTINGS}[experiment]
    luck = {100: [0.1, 0.5, 0.9, 0.3], 101: [9, 0.51, 0.2, 0.4], 102: [9, 0.52, 0.4, 0.2]}

    def reward_of(folder):
        (place,) = [k for settings in table.values() for k, setting in enumerate(settings)
                    if runs.clean(f" {setting.replace('--', '')} ") in folder.name]
        seed = models.read_config(folder)["seed"]
        shift = 0 if "_0_seed" in folder.name else 0.2  # of the other prompt
        return luck[seed][place] + shift

    monkeypatch.setattr(tune, "reward_of", reward_of)
    only = list(table)[1]
    for method in list(table):
        if method != only:
            monkeypatch.delitem(table, method)
    rows = tune.main(["--experiment", experiment, "--rounds", "8", "--out", str(tmp_path)])
    each = 2 if experiment == "eval" else 1
    assert len(fake_runs) == each * (4 + 2 * 3)
    assert {config.seed for config in fake_runs[:4 * each]} == {100}
    assert len({config.name for config in fake_runs}) == len(fake_runs)
    if experiment == "eval":
        assert {(config.prompts, config.rounds) for config in fake_runs} == {
            (prompt, 8) for prompt in tune.PROMPTS}
    settings = table[only]
    assert [row["setting"] for row in rows] == [settings[k] for k in (1, 2, 3, 0)]
    assert [row["chosen"] for row in rows] == ["chosen", "", "", ""]
    assert [row["seeds"] for row in rows] == [3, 3, 3, 1]
    values = [numbers[1] + 0.1 * (each - 1) for numbers in luck.values()]
    assert rows[0]["reward"] == evaluation.cell(*training.mean_se(values))


@pytest.mark.usefixtures("no_figures")
def test_tuning_judges_the_final_weights_on_pictures_of_their_own(tmp_path, monkeypatch):
    run = sft.main([*TINY, "--rounds", "1", "--prompts", "four stars", "--out", str(tmp_path)])
    monkeypatch.setattr(tune, "SAMPLES", 3)
    found = tune.reward_of(run.folder)
    pipe, _ = models.load_run(run.folder, "cpu")
    drawn = mdp.rollout(pipe, ["four stars"] * 3, flags.parse(sft.Config, "", TINY), "compare")
    assert found == pytest.approx(sum(warmth(drawn.images, drawn.prompts)) / 3, abs=0.05)
    monkeypatch.setattr(models, "load_run", None)  # what is kept is not measured again
    assert tune.reward_of(run.folder) == found


def test_a_tie_goes_to_the_smaller_learning_rate():
    found = {"--learning-rate 0.01": [1.0, 1.0], "--learning-rate 0.001 --passes 9": [0.995, 0.995],
             "--learning-rate 0.0001": [0.98, 0.98], "--learning-rate 0.00001": [7.0],
             "--learning-rate 0.002": [0.5, 1.9]}
    assert tune.choose(found) == "--learning-rate 0.001 --passes 9"


def test_ddpo_rewards_compares_the_last_looks_of_the_same_seeds(tmp_path, monkeypatch):
    """Fresh noise is made up: the seed moves all methods, and each has a place of its own."""
    started = {}

    def train_missing(wanted, out, jobs):
        started.update(wanted)
        for name, (script, *words) in wanted.items():
            config = flags.parse(import_module(
                script.removesuffix(".py").replace("/", ".")).Config, "", words)
            paid = config.rounds * config.prompts_per_round * config.samples_per_prompt
            place = {"is": 3, "sf": 2}.get(getattr(config, "estimator", None), 1)
            more = {"gold": 7} if place == 1 else {}  # as sft.py's looks have
            looks = [{"queries": queries, "reward": config.seed + place * queries / paid,
                      "reward_se": 0.5} | more for queries in (0, paid)]
            Path(out, name).mkdir(parents=True)
            runs.write_rows(Path(out, name, "fresh.csv"), looks)

    monkeypatch.setattr(commands, "train_missing", train_missing)
    monkeypatch.setattr(ddpo_rewards, "draw_samples", lambda config: None)
    rows = ddpo_rewards.main(["--rewards", "aesthetic", "compressibility", "--seeds", "3", "--seed",
                              "4", "--out", str(tmp_path), "--", "--device", "cpu"])
    assert len(started) == 2 * 4 * 3 and all(
        words[-2:] == ["--device", "cpu"] for words in started.values())
    assert rows[0] == {"method": "DDPO_IS", "aesthetic": "8.0±0.6", "compressibility": "8.0±0.6"}
    looks = read(tmp_path / "queries.csv")
    assert {look["queries"] for look in looks} == {"0.0", "1600.0"}
    claims = read(tmp_path / "claims.csv")
    assert [(line["claim"], line["mean"], line["p"]) for line in claims] == [
        (f"{a} is above {b} on {reward}", "1", "1")  # all seeds alike say nothing of others
        for reward in ("aesthetic", "compressibility") for a, b in ddpo_rewards.CLAIMS]
    assert (tmp_path / "queries.png").is_file()
    temperatures = {words[words.index("--reward") + 1]: words[words.index("--temperature") + 1]
                    for words in started.values() if "--temperature" in words}
    assert temperatures == {"aesthetic": "0.4", "compressibility": "0.08"}


def test_ddpos_samples_are_three_rewards_on_the_same_noise(fake_runs, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(figures, "sheet", lambda *sheet: sheets.append(sheet))
    words = [*"--jobs 1 --methods DDPO_IS --seed 3 --seeds 2 --prompts location".split(),
             "--out", str(tmp_path), "--", "--film-pictures", "2"]
    (row,) = ddpo_rewards.main(words)
    rewards = ("compressibility", "incompressibility", "aesthetic")
    assert [(config.reward, config.seed) for config in fake_runs] == [
        (reward, seed) for seed in (3, 4) for reward in rewards]
    assert list(row) == ["method", *rewards] and not (tmp_path / "claims.csv").exists()
    path, pictures, names, columns = sheets[-1]
    assert columns == training.spread_evenly(get_prompts("location"), 2)
    assert names[0] == "pretrained" and names[1] == "compressibility\n15.0±0.2 → 15.0±0.5"
    colors = [[image.getpixel((4, 4)) for image in row] for row in pictures]
    assert colors == [[(15, 0, 0), (15, 0, 1)], *(
        [(len(name), 36, 0), (len(name), 36, 1)] for name in rewards)]


def test_generalization_trains_on_one_half_by_lot_and_judges_both(tmp_path, monkeypatch):
    """Judges are made up: trained prompts gain seed/2, new ones 0.3 − seed/10; gold twice that."""
    trained = {}

    def train_missing(wanted, out, jobs):
        for name, (script, *words) in wanted.items():
            config = flags.parse(ddpo.Config, "", words)
            assert replace(config, prompts="", seed=0) == replace(
                ddpo.Config(), prompts="", reward="compressibility", eta=0.5)
            trained[config.seed, name.split("_")[0]] = get_prompts(config.prompts)
            Path(out, name).mkdir()
            runs.write_json(Path(out, name, "config.json"), asdict(config) | {"method": "x"})

    def judge(pipe, prompts, judges, config, samples):
        assert config.eta == 0.5 and samples == 3
        assert [reward.__name__ for reward in judges.values()] == ["compressibility", "alignment"]
        is_trained = prompts in trained.values()
        gain = (pipe == "after") * (0.5 * config.seed if is_trained else 0.3 - 0.1 * config.seed)
        return {name: [k * gain + len(prompt) for prompt in prompts]
                for k, name in enumerate(judges, 1)}

    monkeypatch.setattr(commands, "train_missing", train_missing)
    monkeypatch.setattr(models, "load_pipeline", lambda *_: "before")
    monkeypatch.setattr(models, "load_run", lambda folder, *_: ("after", None))
    monkeypatch.setattr(generalization, "judge", judge)
    table = generalization.main(["--prompts", "location", "color", "--reward", "compressibility",
                                 "--samples", "3", "--seeds", "2", "--seed", "1", "--out",
                                 str(tmp_path), "--", "--eta", "0.5"])
    rows, everything = read(tmp_path / "prompts.csv"), get_prompts("location")
    for seed in ("1", "2"):
        of_seed = [row for row in rows if (row["family"], row["seed"]) == ("location", seed)]
        half, new = ([row["prompt"] for row in of_seed if row["half"] == name]
                     for name in ("trained", "new"))
        assert half == trained[int(seed), "location"] and sorted(half + new) == sorted(everything)
        assert len(half) == len(everything) // 2
    assert set(trained[1, "location"]) != set(trained[2, "location"])
    assert [(line["reward gain"], line["gold gain"], line["share"]) for line in table[:2]] == [
        ("0.8±0.2", "1.5±0.5", ""), ("0.15±0.05", "0.3±0.1", "0.2±0.1")]
    assert [line["family"] for line in table] == ["location"] * 2 + ["color"] * 2
    (tmp_path / "location_seed1.txt").write_text("four stars")
    with pytest.raises(ValueError, match="location_seed1.txt has other prompts"):
        generalization.main(["--seed", "1", "--out", str(tmp_path)])


def test_a_pair_of_shapes_is_in_the_same_half_as_its_mirror():
    halves = generalization.halves("composition", 3).values()
    first, second = ({frozenset(prompt.split(" and ")) for prompt in half} for half in halves)
    assert not first & second and sum(map(len, halves)) == len(get_prompts("composition"))


def test_a_prompts_mean_is_that_of_its_own_pictures(pipe):
    config = ddpo.Config(num_steps=2, seed=4, reward=REWARD)
    prompts = ["a red circle", "four stars"]
    found = generalization.judge(pipe, prompts, {"r": warmth, "g": lightness}, config, 3)
    drawn = mdp.rollout(pipe, ["a red circle"] * 3 + ["four stars"] * 3, config, "compare")
    for name, reward in (("r", warmth), ("g", lightness)):
        values = reward(drawn.images, drawn.prompts)
        assert found[name] == pytest.approx([sum(values[:3]) / 3, sum(values[3:]) / 3], rel=1e-5)


def test_results_keep_a_tables_head_and_render_it(tmp_path, monkeypatch, fake_runs):
    monkeypatch.setattr(results, "HERE", tmp_path)
    (tmp_path / "a.csv").write_text("# title: T\n# command: C\n# date: 1999-01-01\nx\n1\n")
    (tmp_path / "README.md").write_text("<!-- a.csv -->\nold\n<!-- end -->\n")
    results.write("a", [{"x": "1"}])
    assert "1999" in (tmp_path / "a.csv").read_text()  # nothing has changed
    results.write("a", [{"x": 2, "y": "3 ± 1"}])
    results.render(tmp_path / "README.md", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "**T**\n\n| x | y |\n| --- | --- |\n| 2 | 3 ± 1 |\n" in text and "command: C" in text
    rows = results.chapter(tmp_path, "dpok", "04_dpok.py")
    assert [config.seed for config in fake_runs] == [row["seed"] for row in rows] == [0, 1, 2]
    assert rows[0]["kl after"] == "20±2"


def test_results_start_their_scripts_on_the_runs_that_are_meant(tmp_path, monkeypatch):
    for name in ("DPOK_seed10_four_stars", "DPOK_seed11_four_stars", "DPOK_seed10_an_orange_star",
                 "SFT_x_0_seed100", "SFT_x_1_seed100"):
        (tmp_path / name).mkdir()
    found = []

    def start(file, script, *words):
        module = import_module(script.removesuffix(".py").replace("/", "."))
        found.append(flags.parse(module.Config, "", list(words)))
        return []

    monkeypatch.setattr(results, "start", start)
    for rows_of in (results.frontier, results.quality):
        rows_of(tmp_path / "out", tmp_path)
    results.TABLES["early_stopping"](tmp_path)
    assert found.pop().comparison == str(tmp_path / "eval_seeds")
    assert [[Path(folder).name for folder in config.runs] for config in found] == [
        ["DPOK_seed10_four_stars"], ["SFT_x_0_seed100"], ["SFT_x_1_seed100"]]
    assert found[0].prompts == "four stars"  # which its runs were trained on
    assert [config.prompts for config in found[1:]] == [(prompt,) for prompt in tune.PROMPTS]


def test_lemma_prints_both_sides(tmp_path):
    sides = lemma.main(["--eta", "0.9", "--out", f"{tmp_path}/lemma.png"])
    for m, (kl, bound) in zip(lemma.MEANS, sides[50], strict=True):
        assert kl < bound and kl == pytest.approx(m**2 / (2 * 0.5**2), rel=0.25)
    assert (tmp_path / "lemma.png").is_file()


@pytest.mark.parametrize("name", [
    "ballot", "ddpo_rewards", "early_stopping", "flow", "frontier", "generalization", "lemma",
    "make_rewards", "make_tiny_sd", "results",
    "sft", "tune", "variance"])  # those above are asked by what they start
def test_no_flag_is_parsed_and_dropped(name):
    """A flag that chapters have may be read by them; all others must be read by the script."""
    script = import_module(f"experiments.{name}")
    files = [Path(script.__file__), Path(make_tiny_sd.__file__)]  # whose loop make_rewards uses
    chapters = [*models.HERE.glob("0*.py"), *models.HERE.glob("support/*.py")]
    of_chapters = {field.name for field in (*fields(ddpo.Config), *fields(dpok.Config))}
    for field in fields(script.Config):
        read = files + chapters if field.name in of_chapters else files
        text = "".join(file.read_text(encoding="utf-8") for file in read)
        assert re.search(rf"(config|settings)\.{field.name}\b", text), field.name


@pytest.mark.parametrize("script, words, named", [
    (sft, "--temperature 0", "--temperature"), (sft, "--gold beauty", "--gold beauty"),
    (flow, "--samples-per-prompt 1", "--samples-per-prompt"), (flow, "--noise 0", "--noise"),
    (flow, "--num-steps 1 --no-train-last", "--no-train-last"),
    (flow, "--sampler cps --noise 1.2", "--noise"),
    (variance, "--groups 99", "--groups"), (frontier, "--prompts count", "--prompts count"),
    (lemma, "--eta 0", "--eta"), (sweep, "--betas", "--betas"), (sweep, "-- --beta 1", "--beta"),
    (sweep, "-- --rounds 0", "--rounds"), (ddpo_rewards, "-- --num-steps 0", "--num-steps"),
    (generalization, "--prompts nothing", "--prompts nothing"),
    (generalization, "--prompts bias", "--prompts bias"), (generalization, "--gold a", "--gold a"),
    (ddpo_rewards, "--methods RWR RWR", "--methods"), (tune, "--rounds 0", "--rounds"),
    (overoptimization, "-- --film-pictures 4", "--film-pictures"),
    (overoptimization, "-- --value", "--value")])
def test_bad_input_is_one_line_naming_the_flag(script, words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "start", None)  # nothing is started
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        flags.run(partial(script.main, words.split()))
    assert error.value.code == 2 and named in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
