"""Chapter 5 from run folders with random adapters to the page, against a plain second program."""
import csv
import json
import math
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import commands, evaluation, models, training
from support.prompts import TASKS
from tests import oracles
from tests.equations import closed_forms
from tests.equations.closed_forms import lightness, warmth
from tiny_sd import shapes

dpok, ev = map(import_module, ("04_dpok", "05_eval"))

COMPARE = 3  # where the comparison's noise stands in the address of a random number
REWARD, GOLD = (f"{closed_forms.__file__}:{name}" for name in ("warmth", "lightness"))
OTHER = "incompressibility"
COMMON = [*("--num-steps 2 --eta 0.8 --guidance-scale 1.5 --seed 5 --batch-size 7 --device cpu "
            f"--others {OTHER}").split(), "--reward", REWARD, "--gold", GOLD]
METHODS = ["RWR", "SFT", "DDPO_SF", "DDPO_IS", "DPOK", "DPOK_no_KL"]


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    words = "--seeds 2 --samples 3 --best-of 1 3".split()  # the seeds are 5 and 6
    return evaluate(tmp_path_factory.mktemp("methods"), *words)


@pytest.fixture(scope="module")
def compared(methods):
    folders = [str(methods.out / "train" / name) for name in ("DPOK_seed5", "SFT_seed6")]
    return evaluate(methods.out / "compared", "--samples", "8", "--runs", *folders)


def evaluate(out, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "train_missing", make_runs)
        ev.main([*COMMON, *words, "--out", str(out)])
    return SimpleNamespace(out=out, samples=read(out / "samples.csv"),
                           page=(out / "index.html").read_text(encoding="utf-8"))


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def make_runs(wanted, out, jobs=1):
    """A finished run for each command: random adapters, and a made-up curve."""
    pipe = models.load_pipeline("tiny_sd", "cpu")
    params = models.trainable(pipe, dpok.Config(lora_rank=2, lora_targets=models.ATTENTION))
    for k, (name, command) in enumerate(wanted.items()):
        folder, seed = Path(out, name), int(command[command.index("--seed") + 1])
        folder.mkdir(parents=True)
        for p in params:
            torch.nn.init.normal_(p, 0, 0.2, torch.Generator().manual_seed(100 * k + seed + len(p)))
        models.save_trained(pipe, folder)
        words = dict(rounds=3, prompts_per_round=1, samples_per_prompt=4, num_steps=2, beta=0,
                     guidance_scale=1.5, timestep_fraction=1, updates_per_round=1, seed=seed,
                     method="ddpo", reward=REWARD, model="tiny_sd")
        (folder / "config.json").write_text(json.dumps(words))
        (folder / "fresh.csv").write_text(f"queries,reward\n0,{k}\n12,{k + seed}\n")
        (folder / "evaluation.json").write_text("{}")


def plan(samples):
    """(family, split, prompt) of each picture of the shape world's tasks."""
    asked = [(family, "seen", prompt) for family, prompt in TASKS.items() for _ in range(samples)]
    most = max(1, samples // 4)  # unseen prompts of a family, with 4 pictures each or more
    for family in TASKS:
        unseen = shapes.prompts_of(family, held_out=True)
        chosen = unseen if len(unseen) <= most else training.spread_evenly(unseen, most)
        asked += [(family, "unseen", prompt) for prompt in chosen
                  for _ in range(max(2, samples // len(chosen)))]
    return asked


def draw(folder, prompts, k=0, seed=5):
    """Pictures of a run's folder, or of the pretrained model, and a function of their path KL."""
    pipe = models.load_run(folder, "cpu")[0] if folder else models.load_pipeline("tiny_sd", "cpu")
    pipe.scheduler.set_timesteps(2)
    config = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, seed=seed)
    chains, images = oracles.draw_all(pipe, pipe.scheduler, config, prompts, COMPARE, k)
    return images, lambda frozen: [oracles.path_kl(frozen, pipe.scheduler, config, chain)
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


@pytest.mark.parametrize("model", [
    "SFT_seed6", pytest.param("pretrained", marks=pytest.mark.slow)])
def test_each_sample_is_what_the_folder_alone_gives(model, methods, compared, pipe):
    asked = plan(8)  # of two unseen prompts a family
    folder = None if model == "pretrained" else methods.out / "train" / model
    images, path_kl = draw(folder, [prompt for _, _, prompt in asked])
    kl = path_kl(pipe.unet)
    assert max(kl) < 1e-3 if model == "pretrained" else min(kl) > 1
    assert_rows(of(compared.samples, model), asked, images, kl)


def test_each_model_of_each_seed_is_evaluated_from_its_own_folder_on_that_seeds_noise(methods):
    for seed in (5, 6):
        for model in ("pretrained", *METHODS):
            folder = methods.out / "train" / f"{model}_seed{seed}" if model in METHODS else None
            rows = of(methods.samples, model, str(seed))
            assert [(row["family"], row["split"], row["prompt"]) for row in rows] == plan(3), model
            images, _ = draw(folder, [rows[0]["prompt"]], seed=seed)
            assert column(rows[:1], "reward") == pytest.approx(warmth(images, None), abs=0.05)


@pytest.mark.parametrize("seed", [5, 6])
def test_best_of_n_keeps_the_highest_proxy_of_n_pretrained_pictures_of_each_seed(seed, methods):
    asked = plan(3)[:15]
    prompts = [prompt for _, _, prompt in asked]
    drawn = [draw(None, prompts, k, seed)[0] for k in range(3)]  # k = 0: the noise of all models
    r = np.array([warmth(images, prompts) for images in drawn])
    gold = np.array([lightness(images, prompts) for images in drawn])
    assert (r.argmax(0) != gold.argmax(0)).any()  # else one could not tell which of them chose
    best = [drawn[k][i] for i, k in enumerate(r.argmax(0))]
    rows = of(methods.samples, "best of 3", str(seed))
    assert_rows(rows, asked, best, [round(math.log(3) - 2 / 3, 4)] * 15)
    first, same = (of(methods.samples, name, str(seed)) for name in ("best of 1", "pretrained"))
    assert column(first, "reward") == column(same[:15], "reward")


def test_verdicts_and_cells_are_those_of_samples_csv_alone(methods):
    pictures = {model: of(methods.samples, model) for model in ("pretrained", *METHODS)}
    rows = read(methods.out / "claims.csv")
    for row, wanted in zip(rows, ev.claims(pictures), strict=True):
        for name, value in wanted.items():
            same = row[name] == value
            assert same or float(row[name]) == pytest.approx(value, rel=1e-3, abs=1e-6), row
    assert "aesthetic" not in {row["metric"] for row in rows}  # which is not measured here
    lines = {line["model"]: line for line in read(methods.out / "table.csv")}
    assert list(lines) == ["pretrained", "best of 1", "best of 3", *METHODS]
    for model, means in evaluation.seed_means(pictures, "gold").items():
        error = np.std(means, ddof=1) / 2**0.5
        assert lines[model]["gold"] == evaluation.cell(np.mean(means), error)
    assert [lines["best of 3"]["queries"], lines["DPOK"]["queries"]] == ["3 each", "12"]
    assert lines["DPOK"]["evaluations"] == str(3 * 4 * 2 * 2 * 4)


def test_a_page_has_a_verdict_a_claim_and_the_figures_that_there_can_be(methods, compared):
    assert methods.page.count("<img") == 5 and methods.page.count("prompts: ") == 11
    assert "No verdicts" not in methods.page and "QUICK" not in methods.page
    assert compared.page.count("<img") == 4 and "No verdicts" in compared.page  # no best of n


@pytest.mark.slow
def test_nothing_of_an_earlier_call_stays_and_a_quick_tour_has_no_verdicts(tmp_path, capsys):
    for stale in ("best_of_n.png", "queries.png", "claims.csv"):
        (tmp_path / stale).write_text("stale")
    words = ("--prompts", "four stars", "--samples", "2", "--best-of", "2", "--reward", GOLD)
    found = evaluate(tmp_path, "--quick", "--seeds", "2", *words)
    printed = capsys.readouterr().out
    assert "QUICK TOUR" in found.page and "QUICK TOUR" in printed
    assert max(map(len, printed.splitlines()[:10])) <= 100
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"claims.csv", "queries.png"} and "best_of_n.png" in left  # none is of GOLD
