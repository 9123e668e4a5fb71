"""Chapter 5 from run folders to the page, against a plain second implementation.

Two real trainings, one with adapters and one of all weights, are compared by --runs. The table of
methods is compared on folders with random adapters, for twelve trainings would take long.
"""
import base64
import io
import json
import math
import re
import shlex
import shutil
from collections import Counter
from dataclasses import fields
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from support import commands, figures, flags, models, significance, training
from support.prompts import TASKS
from support.tables import read_csv
from tests import oracles
from tests.oracles import lightness, warmth
from tiny_sd import shapes

ddpo, dpok, ev = map(import_module, ("03_ddpo", "04_dpok", "05_eval"))

COMPARE = 3  # where the comparison's noise stands in the address of a random number
REWARD, GOLD = (f"{oracles.__file__}:{name}" for name in ("warmth", "lightness"))
OTHER = "incompressibility"
DRAW = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, seed=5)
COMMON = ("--num-steps 2 --eta 0.8 --guidance-scale 1.5 --seed 5 --batch-size 7 --device cpu "
          f"--reward {REWARD} --gold {GOLD} --others {OTHER}").split()
TRAIN = ("--num-steps 2 --seed 5 --device cpu --rounds 1 --prompts-per-round 1 "
         "--samples-per-prompt 2 --eval-samples 2").split()
METHODS = {"RWR": ("experiments/sft.py", {"data": "fresh", "weights": "rwr"}),
           "SFT": ("experiments/sft.py", {"data": "fixed", "weights": "sparse"}),
           "DDPO_SF": ("03_ddpo.py", {"estimator": "sf", "updates_per_round": 1}),
           "DDPO_IS": ("03_ddpo.py", {"estimator": "is"}),
           "DPOK": ("04_dpok.py", {"beta": 0.01}),
           "DPOK_no_KL": ("04_dpok.py", {"beta": 0})}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared")
    dpok.main([*TRAIN, "--out", str(out), "--name", "adapters", "--lora-rank", "2",
               "--learning-rate", "2e-2", "--reward", REWARD, "--gold", GOLD])
    ddpo.main([*TRAIN, "--out", str(out), "--name", "all_weights", "--learning-rate", "5e-4",
               "--prompts", "bias", "--reward", OTHER])
    folders = {name: out / name for name in ("adapters", "all_weights")}
    found = evaluate(out / "eval", "--samples", "4", "--runs", *map(str, folders.values()))
    found.folders = folders
    return found


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """All methods with two seeds each; 3·5·3 reward queries are 3 for each of 15 seen pictures."""
    return evaluate(tmp_path_factory.mktemp("methods"), "--seeds", "2", "--samples", "3",
                    "--rounds", "3", "--prompts-per-round", "5", "--samples-per-prompt", "3",
                    "--best-of", "4")


def evaluate(out, *words):
    calls, draws = [], figures.evaluation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "train_missing", make_runs)
        patch.setattr(figures, "evaluation", lambda *a: calls.append(a) or draws(*a))
        ev.main([*COMMON, *words, "--out", str(out)])
    *_, images, curves, _ = calls[0]
    return SimpleNamespace(out=out, images=images, curves=curves,
                           samples=read_csv(out / "samples.csv"),
                           page=(out / "index.html").read_text(encoding="utf-8"))


def make_runs(wanted, out, jobs=1):
    """A finished run for each command: random adapters, and two rounds of made-up rewards."""
    pipe = models.load_pipeline("tiny_sd", "cpu")
    adapters = SimpleNamespace(lora_rank=2, lora_targets=models.ATTENTION, seed=0,
                               checkpointing=False)
    params = models.trainable(pipe, adapters)
    for k, name in enumerate(wanted):
        folder = Path(out, name)
        folder.mkdir(parents=True)
        for p in params:
            torch.nn.init.normal_(p, 0, 0.2, torch.Generator().manual_seed(100 * k + len(p)))
        models.save_trained(pipe, folder)
        settings = commands.settings_of(wanted[name]) | {"method": Path(wanted[name][0]).stem}
        (folder / "config.json").write_text(json.dumps(settings))
        first = settings["prompts_per_round"] * settings["samples_per_prompt"]
        lines = f"{first},{k},9\n{first * settings['rounds']},{k + 2},9\n"
        (folder / "metrics.csv").write_text("queries,reward,gold\n" + lines)
        (folder / "evaluation.json").write_text("{}")


def plan(samples):
    """(family, split, prompt) of each picture of the shape world's tasks."""
    asked = [(family, "seen", prompt) for family, prompt in TASKS.items() for _ in range(samples)]
    most = max(1, samples // 4)  # unseen prompts of a family, with 4 pictures each or more
    for family in TASKS:
        unseen = shapes.prompts_of(family, held_out=True)
        for prompt in unseen if len(unseen) <= most else training.spread_evenly(unseen, most):
            asked += [(family, "unseen", prompt)] * (samples // most)
    return asked


def draw(folder, prompts, k=0):
    """Pictures of a run's folder, or of the pretrained model, and a function of their path KL."""
    pipe = models.load_run(folder, "cpu")[0] if folder else models.load_pipeline("tiny_sd", "cpu")
    pipe.scheduler.set_timesteps(DRAW.num_steps)
    chains, images = oracles.draw_all(pipe, pipe.scheduler, DRAW, prompts, COMPARE, k)
    return images, lambda frozen: [oracles.path_kl(frozen, pipe.scheduler, DRAW, chain)
                                   for chain in chains]


def assert_rows(rows, asked, images, kl):
    """Lines of samples.csv against the pictures that they should be of."""
    prompts = [prompt for _, _, prompt in asked]
    assert [(row["family"], row["split"], row["prompt"]) for row in rows] == asked
    assert [row["picture"] for row in rows] == [str(i) for i in range(len(asked))]
    rewards = {"reward": warmth, "gold": lightness, OTHER: ev.rewards.incompressibility}
    for name, reward in rewards.items():
        values = reward(images, prompts)
        assert column(rows, name) == pytest.approx(values, rel=1e-3, abs=0.05), name
    assert column(rows, "path_kl") == pytest.approx(kl, rel=5e-3, abs=1e-3)


def column(rows, name):
    return [float(row[name]) for row in rows]


def of(samples, model, seed=None):
    return [row for row in samples if row["model"] == model and seed in (None, row["seed"])]


def by_picture(samples, model, name, split="seen", family=None):
    """(seeds, prompts, pictures) of a column, for as many pictures of each prompt."""
    seeds = {}
    for row in of(samples, model):
        if row["split"] == split and family in (None, row["family"]):
            prompts = seeds.setdefault(row["seed"], {})
            prompts.setdefault((row["family"], row["prompt"]), []).append(float(row[name]))
    return np.array([list(prompts.values()) for prompts in seeds.values()])


@pytest.mark.parametrize("model", ["pretrained", "adapters", "all_weights"])
def test_each_sample_is_what_the_folder_alone_gives(model, compared, pipe):
    asked = plan(4)
    images, path_kl = draw(compared.folders.get(model), [prompt for _, _, prompt in asked])
    kl = path_kl(pipe.unet)
    assert max(kl) < 1e-3 if model == "pretrained" else min(kl) > 1
    assert_rows(of(compared.samples, model), asked, images, kl)


def test_each_seed_of_each_method_is_evaluated_from_its_own_folder(methods):
    for name in (f"{method}_seed{i}" for method in METHODS for i in (0, 1)):
        rows = of(methods.samples, *name.split("_seed"))
        assert len(rows) == len(plan(3)), name
        images, _ = draw(methods.out / "train" / name, [rows[0]["prompt"]])
        assert column(rows[:1], "reward") == pytest.approx(warmth(images, None), abs=0.05)


def test_best_of_n_keeps_the_highest_proxy_of_the_n_that_the_budget_pays_for(methods):
    asked = plan(3)[:15]
    prompts = [prompt for _, _, prompt in asked]
    drawn = [draw(None, prompts, k)[0] for k in range(3)]  # k = 0: the noise of all other models
    r = np.array([warmth(images, prompts) for images in drawn])
    gold = np.array([lightness(images, prompts) for images in drawn])
    assert (r.argmax(0) != gold.argmax(0)).any()  # else one could not tell which of them chose
    best = [drawn[k][i] for i, k in enumerate(r.argmax(0))]
    assert_rows(of(methods.samples, "best of 3"), asked, best, [math.log(3) - 2 / 3] * 15)
    lines = {int(line["n"]): line for line in read_csv(methods.out / "best_of_n.csv")}
    assert list(lines) == [1, 2, 3, 4]  # powers of two, and what budgets pay for
    bought = [(line["price"], line["budget"], line["n"]) for line in read_csv(
        methods.out / "prices.csv") if line["model"] == "best of n"]
    # SFT is the cheapest: 45·2·2 to draw, and 3 rounds of 2·15 noisy pictures at 3 each
    assert bought == [("queries", "22", "1"), ("queries", "45", "3"), ("evaluations", "112", "1"),
                      ("evaluations", "225", "3")]
    assert column([lines[3]], "reward") == pytest.approx([r.max(0).mean()], rel=1e-3)
    assert column([lines[2]], "reward") == pytest.approx([r[:2].max(0).mean()], rel=1e-3)
    assert column(lines.values(), "kl_bound") == pytest.approx(
        [math.log(n) - (n - 1) / n for n in (1, 2, 3, 4)])


@pytest.mark.parametrize("samples", [2, 60])
def test_plan_has_equally_many_pictures_of_each_prompt_of_a_split(samples):
    assert [tuple(row.values()) for row in ev.plan(ev.Config(samples=samples))] == plan(samples)
    one = ev.plan(ev.Config(prompts="count", samples=samples))
    splits = [shapes.is_held_out(shapes.parse(row["prompt"])) for row in one]
    assert splits == [row["split"] == "unseen" for row in one] == sorted(splits)
    for split in (False, True):
        counts = Counter(row["prompt"] for row, held in zip(one, splits) if held == split)
        assert len(set(counts.values())) == 1 and len(counts) == min(
            max(1, samples // 4), 9 if split else 63)
        assert min(counts.values()) >= min(4, samples)


def test_each_cell_of_the_table_is_what_samples_csv_alone_gives(methods):
    sources = {name: (name,) for name in ("reward", "gold", OTHER, "path_kl", "diversity")}
    sources |= {f"gold {family}": ("gold", "seen", family) for family in TASKS}
    sources["gold unseen"] = ("gold", "unseen")
    cells = set()
    for row in read_csv(methods.out / "table.csv"):
        v = by_picture(methods.samples, row["model"], *sources[row["column"]])
        unseen = row["column"] == "gold unseen"
        error = significance.mean_error(torch.from_numpy(v), "abcd" if unseen else None)[1]
        found = [float(row[name]) for name in ("mean", "standard_error", "N")]
        assert found == pytest.approx([v.mean(), error, v[0].size], abs=1e-9), row
        if len(v) == 1 and v.shape[1] == 1:  # one training, one prompt: s/√N of its pictures
            assert error == pytest.approx(v.std(ddof=1) / v.size**0.5, abs=1e-9)
        cells.add((row["model"], row["column"]))
    assert cells == set(product(["pretrained", "best of 3", *METHODS], sources)) - {
        ("best of 3", "gold unseen")}


CLAIMS = [*(("RL is above", rl, other, "reward", "seen")
            for rl in ("DDPO_IS", "DPOK") for other in ("SFT", "RWR")),
          ("RL is above supervised fine-tuning in alignment", "DPOK", "SFT", "gold", "seen"),
          ("Importance sampling is above", "DDPO_IS", "DDPO_SF", "reward", "seen"),
          ("The score function is above RWR", "DDPO_SF", "RWR", "reward", "seen"),
          ("With the KL term gold ends higher", "DPOK", "DPOK_no_KL", "gold", "seen"),
          ("With the KL term diversity ends higher", "DPOK", "DPOK_no_KL", "diversity", "seen"),
          *(("Gains carry over to unseen", rl, "pretrained", "gold", "unseen")
            for rl in ("DDPO_IS", "DPOK"))]  # of quality none: here nothing is called aesthetic


def test_each_claim_is_what_samples_csv_alone_says(methods):
    rows = read_csv(methods.out / "claims.csv")
    p = significance.holm(column(rows, "p"))
    for i, (row, (start, a, b, metric, split)) in enumerate(zip(rows, CLAIMS, strict=True)):
        assert row["claim"].startswith(start)
        assert (row["a"], row["b"], row["metric"], row["split"]) == (a, b, metric, split)
        x, y = (by_picture(methods.samples, model, metric, split) for model in (a, b))
        found = significance.hierarchical_bootstrap(
            torch.from_numpy(x), torch.from_numpy(y), "abcd" if split == "unseen" else None)
        assert column([row], "mean") == pytest.approx([np.mean(x - y)])
        for name in ("mean", "low", "high", "p"):
            assert column([row], name) == pytest.approx([found[name]], abs=1e-9), name
        assert column([row], "holm") == pytest.approx([p[i]])
        shape = tuple(int(row[name]) for name in ("seeds", "prompts", "pictures"))
        assert shape == x.shape and shape[0] == 2
        assert row["verdict"] == significance.verdict(found["low"], found["high"], p[i])


def test_page_and_figures_show_the_first_seeds_pictures_and_all_seeds_rewards(methods, compared):
    rows = re.findall("class='verdict'><b>. (.*?)</b><small>(.*?) \\(", methods.page)
    expected = [(row["verdict"], f"{float(row['mean']):+.3f}".replace("-", "−"))
                for row in read_csv(methods.out / "claims.csv")]
    assert len(rows) == 11 and sorted(rows) == sorted(expected)
    assert methods.page.count("src='data:image/png;base64,") == 6
    text = re.sub("base64,[^']*", "", methods.page)  # whose letters may spell anything
    assert not re.search("QUICK|href|https?:|@import", text)  # it needs no other file
    assert list(methods.images) == ["pretrained", "best of 3", *METHODS]
    for name, pictures in methods.images.items():
        rows = of(methods.samples, name, "0" if name in METHODS else None)
        assert warmth(pictures, None) == pytest.approx(column(rows, "reward"), rel=1e-9)
    curves = {name: [[row["reward"] for row in rows] for rows in seeds]
              for name, seeds in methods.curves.items()}
    assert curves == {name: [[k, k + 2], [k + 6, k + 8]] for k, name in enumerate(METHODS)}
    assert list(compared.curves) == ["adapters"]  # the other was paid for something else


def test_runs_of_one_name_are_two_models_and_nothing_of_an_earlier_call_stays(compared, tmp_path,
                                                                              monkeypatch):
    twins = [Path(shutil.copytree(folder, tmp_path / name / "run"))
             for folder, name in zip(compared.folders.values(), "ab")]
    for stale in ("queries.png", "claims.csv"):
        (tmp_path / stale).write_text("stale")
    monkeypatch.chdir(twins[1].parent)
    found = evaluate(tmp_path, "--runs", str(twins[0]), "run", "--prompts", "four stars",
                     "--samples", "2", "--reward", GOLD)
    prompts = ["four stars"] * 2
    for label, folder in zip(("run", str(twins[1].resolve())), twins):
        expected = lightness(draw(folder, prompts)[0], prompts)
        assert column(of(found.samples, label), "reward") == pytest.approx(expected, abs=0.05)
    assert len(found.samples) == 6 and found.curves == {}  # neither was trained on this reward
    assert not (tmp_path / "queries.png").exists() and not (tmp_path / "claims.csv").exists()
    assert found.page.count("<img") == 3 and "Nothing can be concluded" in found.page


def test_two_runs_draw_no_claims_even_if_they_have_the_names_of_methods(compared, tmp_path):
    folders = [shutil.copytree(compared.folders["adapters"], tmp_path / name)
               for name in ("DPOK", "SFT")]
    found = evaluate(tmp_path / "eval", "--runs", *map(str, folders), "--seeds", "2",
                     "--prompts", "four stars", "--samples", "2")
    assert "each of these runs is one training" in found.page
    assert not (tmp_path / "eval" / "claims.csv").exists()


def test_a_quick_tour_draws_no_claims_and_says_so(tmp_path):
    found = evaluate(tmp_path, "--quick", "--prompts", "four stars", "--samples", "3",
                     "--rounds", "1", "--prompts-per-round", "1", "--samples-per-prompt", "2")
    assert list(dict.fromkeys(row["model"] for row in found.samples)) == [
        "pretrained", *METHODS]  # the budget pays for no choice
    assert "QUICK TOUR" in found.page and "Nothing can be concluded" in found.page
    assert (tmp_path / "claims.md").read_text() == ""


@pytest.mark.parametrize("words", [
    "--sd", "--sd --quick", "--samples 1", "--samples 9 --seeds 2 --seed 4 --model m --reward r "
    "--gold g --prompts count --rounds 7 --prompts-per-round 3 --samples-per-prompt 6 --eta 0.6 "
    "--no-tuned --lora-rank 3 --lora-targets to_q conv1 --num-steps 9 "
    "--guidance-scale 2.5 --batch-size 11 --device cpu --clip c --aesthetic-weights a "
    "--image-reward-weights i --vlm v --vlm-questions q --bert b --bert-layer 2"])
def test_each_command_has_the_methods_own_flag_all_shared_ones_and_no_other(words):
    config = flags.parse(ev.Config, None, words.split(), ev.SD, ev.QUICK)
    assert config.rounds == 4 or not config.quick
    if config.sd:
        assert all(getattr(config, name) == dpok.SD[name] for name in ("model", "gold", "clip"))
    table = ev.commands_of(config)
    assert list(table) == [f"{method}_seed{i}" for i in range(config.seeds) for method in METHODS]
    shared = {field.name for field in fields(config)} - {"out", "sd", "seed"}
    for name, (script, *rest) in table.items():
        method, seed = name.split("_seed")
        expected_script, own = METHODS[method]
        assert script == expected_script
        module = import_module(script.removesuffix(".py").replace("/", "."))
        job = flags.parse(module.Config, None, rest, module.SD)
        expected = {field.name: field.default for field in fields(job)}
        expected |= module.SD | {"sd": True} if config.sd else {}
        expected |= {field: getattr(config, field) for field in shared & expected.keys()}
        expected |= own | {"seed": config.seed + int(seed),
                           "keep_every": max(1, config.rounds // 4),
                           "eval_samples": max(2, min(40, config.samples))}
        if config.tuned:
            expected["learning_rate"], expected["updates_per_round"] = ev.TUNED[method]
        assert vars(job) == expected


@pytest.mark.parametrize("words, named", [
    ("--runs nowhere", "--runs nowhere"), ("--runs RUN RUN", "given twice"),
    ("--gold beauty", "--gold beauty"), ("--others beauty", "--others beauty"),
    ("--prompts dogs", "--prompts dogs"), ("--prompts 'a purple cat'", "in 'a purple cat'"),
    ("--ballot --runs RUN", "--ballot"), ("--votes x.json", "--out runs/eval\n"),
    ("--votes x.json --quick", "--out runs/quick\n"),
    ("--votes x.json --runs RUN", "--out runs/eval_runs\n")])
def test_bad_input_is_one_message_naming_the_flag(words, named, compared, tmp_path, capsys,
                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "train_missing", None)
    words = shlex.split(words.replace("RUN", str(compared.folders["adapters"])))
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: ev.main(["--device", "cpu", *words]))
    assert exit.value.code == 2 and named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ballot_from_runs_to_votes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "train_missing", make_runs)
    words = [*COMMON, "--out", str(tmp_path)]
    ev.main([*words, "--ballot", "--seeds", "2", "--samples", "5"])
    key = json.loads((tmp_path / "ballot_key.json").read_text())
    page = (tmp_path / "ballot.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"const BALLOT = (.*);\n", page)[1])
    prompts = [prompt for prompt in TASKS.values() for _ in range(4)]
    drawn = {name: draw(tmp_path / "train" / f"{name}_seed0", prompts)[0]
             for name in ("DPOK", "SFT")}
    places, votes = [], []  # of a rater who always prefers DPOK's picture
    for i, (pair, secret) in enumerate(zip(data["pairs"], key["pairs"], strict=True)):
        left, right = ("DPOK", "SFT") if secret["left"] == "DPOK" else ("SFT", "DPOK")
        places.append(find(pair["left"], drawn[left]))
        assert places[i] == find(pair["right"], drawn[right])
        assert pair["prompt"] == prompts[places[i]]
        votes.append({"pair": i, "alignment": "left" if left == "DPOK" else "right",
                      "quality": "tie"})
    assert sorted(places) == list(range(20))
    file = tmp_path / "votes_ann.json"
    file.write_text(json.dumps({"ballot": key["ballot"], "rater": "Ann", "votes": votes}))
    capsys.readouterr()
    ev.main([*words, "--votes", str(file)])
    head, _, fits, *_ = [line.split("|") for line in capsys.readouterr().out.splitlines()
                         if line.startswith("|")]
    assert {name.split()[0]: rate.split()[0] for name, rate in zip(head[2:4], fits[2:4])} == {
        "DPOK": "100.0", "SFT": "0.0"}
    with pytest.raises(ValueError, match="--ballot"):  # never over one that is being voted on
        ev.main([*words, "--ballot", "--seeds", "2", "--samples", "5"])


def find(uri, pictures):
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    distances = [oracles.difference([shown], [picture]) for picture in pictures]
    assert min(distances) < 0.01
    return int(np.argmin(distances))
