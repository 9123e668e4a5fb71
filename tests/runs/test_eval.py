"""Chapter 5 from run folders with random adapters to the page, against a plain second program."""
import csv
import json
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import commands, evaluation, models
from tests import oracles
from tests.equations import closed_forms
from tests.equations.closed_forms import lightness, warmth

dpok, ev = map(import_module, ("04_dpok", "05_eval"))

COMPARE = 3  # where the comparison's noise stands in the address of a random number
REWARD, GOLD = (f"{closed_forms.__file__}:{name}" for name in ("warmth", "lightness"))
OTHER = "incompressibility"
COMMON = [*("--num-steps 2 --eta 0.8 --guidance-scale 1.5 --seed 5 --batch-size 7 --device cpu "
            f"--others {OTHER}").split(), "--reward", REWARD, "--gold", GOLD]
METHODS = ["SFT", "DDPO_IS", "DPOK", "DPOK_no_KL"]
READ = {"SFT": (0, 4, 8, 16, 32), "DPOK": (0, 4, 8, 16, 32)}  # the others have kept only their end
PROMPTS = ["an orange star", "four stars"]
POOL = 20  # where the pool's noise stands in the address of a random number
N = 6  # pictures of each model on each prompt


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    words = f"--seeds 2 --samples {N} --pool 9 --best-of 1 3 --rounds 8".split()  # seeds 5 and 6
    return evaluate(tmp_path_factory.mktemp("methods"), *words, "--prompts", *PROMPTS)


@pytest.fixture(scope="module")
def compared(methods):
    folders = [str(methods.out / "train" / f"{name}_four_stars") for name in (
        "DPOK_seed5", "SFT_seed6")]
    return evaluate(methods.out / "compared", "--prompts", "bias", "--samples", str(N), "--pool",
                    "3", "--runs", *folders)


def evaluate(out, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "train_missing", make_runs)
        found, judged = ev.main([*COMMON, *words, "--out", str(out)])
    return SimpleNamespace(out=out, found=found, judged=judged,
                           rows=rows_of(out / "readings.csv"),
                           page=(out / "index.html").read_text(encoding="utf-8"))


def rows_of(path):
    """A CSV file's lines: numbers as numbers, None where nothing stands."""
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    for row in rows:
        for name, text in row.items():
            try:
                row[name] = float(text)
            except ValueError:
                row[name] = text or None
    return rows


def make_runs(wanted, out, jobs=1):
    """A finished run for each command, with random adapters, in every second run others kept."""
    pipe = models.load_pipeline("tiny_sd", "cpu")
    params = models.trainable(pipe, dpok.Config(lora_rank=2, lora_targets=models.ATTENTION))
    for k, (name, command) in enumerate(wanted.items()):
        folder, seed = Path(out, name), int(command[command.index("--seed") + 1])
        settings = dict(rounds=8, prompts_per_round=1, samples_per_prompt=4, num_steps=2, beta=0,
                        guidance_scale=1.5, timestep_fraction=1, updates_per_round=1, seed=seed,
                        method="ddpo", reward=REWARD, model="tiny_sd",
                        prompts=command[command.index("--prompts") + 1])
        for n in (1, 2, 3, 4, 8) if k % 2 == 0 else (8,):
            weights = folder / "rounds" / f"{n:03d}" if n < 8 else folder
            weights.mkdir(parents=True, exist_ok=True)
            for p in params:
                address = 1000 * n + 100 * k + seed + len(p)
                torch.nn.init.normal_(p, 0, 0.2, torch.Generator().manual_seed(address))
            models.save_trained(pipe, weights)
            (weights / "config.json").write_text(json.dumps(settings))
        (folder / "evaluation.json").write_text("{}")
        rounds = [f"{4 * n},{n * (k + 1)},{0.1 * n + 0.01 * k + 0.001 * seed}" for n in range(1, 9)]
        has_kl = command[0] != "03_ddpo.py"
        (folder / "metrics.csv").write_text("\n".join(
            ["queries,kl,gold", *rounds] if has_kl else ["queries", "4"]))


def draw(folder, prompts, seed, purpose=COMPARE):
    """Pictures of a folder's weights, or of the pretrained model, and a function of their KL."""
    pipe = models.load_run(folder, "cpu")[0] if folder else models.load_pipeline("tiny_sd", "cpu")
    pipe.scheduler.set_timesteps(2)
    config = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, seed=seed)
    chains, images = oracles.draw_all(pipe, pipe.scheduler, config, prompts, purpose, 0)
    return images, lambda frozen: [oracles.path_kl(frozen, pipe.scheduler, config, chain)
                                   for chain in chains]


def rewards_of(images, prompt):
    prompts = [prompt] * len(images)
    return {"reward": warmth(images, prompts), "gold": lightness(images, prompts),
            OTHER: ev.rewards.incompressibility(images, prompts)}


def row_of(rows, seed, prompt, model, queries=None):
    (found,) = [row for row in rows if (row["seed"], row["prompt"], row["model"]) == (
        seed, prompt, model) and queries in (None, row["queries"])]
    return found


@pytest.mark.parametrize("seed, prompt, model, queries", [
    (5, "an orange star", "DPOK", 4), (6, "four stars", "SFT", 16), (6, "four stars", "SFT", 32),
    (5, "four stars", "pretrained", 0)])
def test_each_reading_is_what_its_weights_alone_give_on_the_seeds_noise(
        seed, prompt, model, queries, methods, pipe):
    folder = None
    if model != "pretrained":
        folder = methods.out / "train" / f"{model}_seed{seed}_{prompt.replace(' ', '_')}"
        if queries < 32:
            folder = folder / "rounds" / f"{queries // 4:03d}"
    images, path_kl = draw(folder, [prompt] * N, seed)
    row = row_of(methods.rows, seed, prompt, model, queries)
    for name, values in (rewards_of(images, prompt) | {"kl": path_kl(pipe.unet)}).items():
        error = np.std(values, ddof=1) / N**0.5
        assert (row[name], row[name + "_se"]) == pytest.approx(
            (np.mean(values), error), rel=5e-3, abs=0.02), name


def test_every_model_is_read_after_an_eighth_a_quarter_a_half_and_all_where_kept(methods):
    read = [(row["seed"], row["prompt"], row["model"], row["queries"]) for row in methods.rows
            if row["model"] in METHODS]
    assert sorted(read) == sorted((seed, prompt, model, queries) for seed in (5, 6)
                                  for prompt in PROMPTS for model in METHODS
                                  for queries in READ.get(model, (0, 32)))


@pytest.mark.parametrize("seed, prompt", [(5, "four stars"), (6, "an orange star")])
def test_best_of_n_and_the_ceiling_are_of_the_seeds_own_pretrained_pictures(seed, prompt, methods):
    images, _ = draw(None, [prompt] * 9, seed, POOL)
    values = rewards_of(images, prompt)
    order = np.argsort(values["reward"])[::-1]
    row = row_of(methods.rows, seed, prompt, "ceiling")
    for name in values:  # the best fifth of nine are those that the 80 % quantile is not above
        best = np.array(values[name])[order[:2]]
        assert row[name] == pytest.approx(best.mean(), abs=0.02), name
    shares = [(i + 1) ** 3 - i**3 for i in range(9)]  # of 9³ draws of three: with the i-th largest
    ranked = np.array(values["gold"])[order[::-1]]
    row = row_of(methods.rows, seed, prompt, "best of 3")
    assert row["gold"] == pytest.approx(np.average(ranked, weights=shares), abs=0.02)
    assert row["kl"] == pytest.approx(np.log(3) - 2 / 3, abs=1e-4)
    assert row_of(methods.rows, seed, prompt, "best of 1")["reward"] == pytest.approx(
        np.mean(values["reward"]), abs=0.02)


def test_of_rewards_that_tie_the_ceiling_takes_a_fifth_and_no_more(monkeypatch):
    monkeypatch.setattr(ev.mdp, "rollout", lambda *args: SimpleNamespace(images=None))
    columns = {"reward": torch.tensor([0.0, *[1.0] * 9]), "gold": torch.arange(10.0)}
    measures = SimpleNamespace(rewards_of=lambda *args: columns)
    row = ev.read_pool(None, "four stars", measures, ev.Config(pool=10))["ceiling"][0]
    assert (row["reward"], row["gold"]) == (1, 1.5)


def test_verdicts_and_cells_are_those_of_readings_csv_alone(methods):
    ends = {}
    for row in methods.rows:
        if row["queries"] in (32, None) or row["model"] in ("ceiling", "best of 3"):
            ends.setdefault((row["model"], row["seed"]), []).append(row)
    for claim in methods.judged:
        if claim["at"] == "the end":
            d = [np.mean([a[claim["column"]] - b[claim["column"]] for a, b in zip(
                ends[claim["a"], seed], ends[claim["b"], seed], strict=True)]) for seed in (5, 6)]
            assert claim["mean"] == pytest.approx(np.mean(d), abs=1e-3)
            spread = np.std(d, ddof=1) / 2**0.5
            assert claim["high"] - claim["mean"] == pytest.approx(12.7062 * spread, rel=1e-2)
    assert len(methods.judged) == len(ev.CLAIMS)
    by_rounds = {}
    for row in rows_of(methods.out / "rounds.csv"):
        by_rounds.setdefault((row["model"], row["seed"], row["prompt"]), []).append(row)
    d = []
    for seed, prompt in product((5, 6), PROMPTS):
        A, B = (by_rounds[model, seed, prompt] for model in ("DPOK", "DPOK_no_KL"))
        kl = min(A[-1]["kl"], B[-1]["kl"])
        gold = [np.interp(kl, [row["kl"] for row in rows], [row["gold"] for row in rows])
                for rows in (A, B)]
        d.append(gold[0] - gold[1])
    assert methods.judged[-1]["mean"] == pytest.approx(np.mean(d))
    assert {model for model, *_ in by_rounds} == {"SFT", "DPOK", "DPOK_no_KL"}
    lines = {line["model"]: line for line in rows_of(methods.out / "table.csv")}
    assert list(lines) == ["pretrained", "ceiling", "best of 1", "best of 3", *METHODS]
    gold = [np.mean([row["gold"] for row in ends["DPOK", seed]]) for seed in (5, 6)]
    error = np.std(gold, ddof=1) / 2**0.5
    assert lines["DPOK"]["gold"] == evaluation.cell(np.mean(gold), error)
    assert (lines["DPOK"]["queries"], lines["DPOK"]["evaluations"]) == (32, 8 * 4 * 2 * 2 * 4)


def test_a_page_has_a_verdict_a_claim_and_all_figures(methods, compared):
    assert methods.page.count("<img") == compared.page.count("<img") == len(evaluation.CAPTIONS)
    assert methods.page.count("p after Holm") == len(ev.CLAIMS) and "No verdicts" in compared.page
    assert {row["model"] for row in compared.rows} == {
        "pretrained", "ceiling", "best of 4", "best of 16", "best of 64",
        "DPOK_seed5_four_stars", "SFT_seed6_four_stars"}
