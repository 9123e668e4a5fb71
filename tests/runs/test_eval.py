"""Chapter 5 from run folders to the page, against a plain second implementation.

Two real trainings, one with adapters and one of all weights, are compared by --runs. The table of
methods is compared on folders with random adapters, for ten trainings would take long.
"""
import base64
import io
import json
import math
import re
import shutil
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from support import commands, figures, flags, models, training
from support import reward_models as nets
from support.prompts import TASKS
from support.tables import read_csv
from tests import oracles
from tiny_sd import judge, shapes

ddpo, dpok, ev = map(import_module, ("03_ddpo", "04_dpok", "05_eval"))

COMPARE = 3  # where the comparison's noise stands in the address of a random number
REWARD, GOLD, OTHER = f"{__file__}:warmth", f"{__file__}:lightness", "incompressibility"
DRAW = SimpleNamespace(num_steps=2, eta=0.8, guidance_scale=1.5, seed=5)
COMMON = ("--num-steps 2 --eta 0.8 --guidance-scale 1.5 --seed 5 --batch-size 7 --device cpu "
          f"--reward {REWARD} --gold {GOLD} --others {OTHER}").split()
TRAIN = ("--num-steps 2 --seed 5 --device cpu --rounds 1 --prompts-per-round 1 "
         "--samples-per-prompt 2 --eval-samples 2").split()
METHODS = {"RWR": ("experiments/sft.py", "weights", "rwr"),
           "SFT": ("experiments/sft.py", "weights", "sparse"),
           "DDPO_SF": ("03_ddpo.py", "estimator", "sf"),
           "DDPO_IS": ("03_ddpo.py", "estimator", "is"),
           "DPOK": ("04_dpok.py", "beta", 0.01)}


def warmth(images, prompts):
    """Red against blue: a smooth reward, which one rounded pixel moves by nearly nothing."""
    return [np.asarray(image, float)[..., [0, 2]].mean((0, 1)) @ (1, -1) for image in images]


def lightness(images, prompts):  # beside another prompt it would be another number
    return [np.mean(image) - 10 * len(prompt) for image, prompt in zip(images, prompts)]


# ---- what is compared -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two real runs, compared by --runs, and the addresses of all that was random in training."""
    out = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        addresses = keep_calls(patch, training, "random_stream")
        dpok.main([*TRAIN, "--out", str(out), "--name", "adapters", "--lora-rank", "2",
                   "--learning-rate", "2e-2", "--reward", REWARD, "--gold", GOLD])
        ddpo.main([*TRAIN, "--out", str(out), "--name", "all_weights", "--learning-rate", "5e-4",
                   "--prompts", "bias", "--reward", OTHER])
    folders = [out / "adapters", out / "all_weights"]
    found = evaluate(out / "eval", "--samples", "4", "--runs", *map(str, folders))
    found.folders, found.training = folders, set(addresses)
    return found


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """All methods with two seeds each; 3·5·3 reward queries are 3 for each of 15 seen pictures."""
    return evaluate(tmp_path_factory.mktemp("methods"), "--seeds", "2", "--samples", "3",
                    "--rounds", "3", "--prompts-per-round", "5", "--samples-per-prompt", "3")


def evaluate(out, *words):
    """main() with make_runs in the place of training, and what can be seen of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "train_missing", make_runs)
        addresses = keep_calls(patch, training, "random_stream")
        sheets = keep_calls(patch, figures, "sheet")
        queries = keep_calls(patch, figures, "queries")
        ev.main([*COMMON, *words, "--out", str(out)])
    return SimpleNamespace(out=out, addresses=set(addresses), sheets=sheets, queries=queries,
                           samples=read_csv(out / "samples.csv"), page=read(out / "index.html"))


def keep_calls(patch, module, name):
    """The list to which the arguments of each call are added from now on."""
    calls, function = [], getattr(module, name)

    def watched(*arguments):
        calls.append(arguments)
        return function(*arguments)

    patch.setattr(module, name, watched)
    return calls


def make_runs(wanted, out):
    """A finished run for each command: random adapters, and two rounds of made-up rewards."""
    pipe = models.load_pipeline("tiny_sd", "cpu")
    adapters = SimpleNamespace(lora_rank=2, lora_targets=models.ATTENTION, seed=0)
    params = models.trainable(pipe, adapters)
    for k, name in enumerate(wanted):
        folder = Path(out, name)
        folder.mkdir(parents=True)
        for p in params:
            torch.nn.init.normal_(p, 0, 0.2, torch.Generator().manual_seed(100 * k + len(p)))
        models.save_trained(pipe, folder)
        (folder / "config.json").write_text(json.dumps({"model": "tiny_sd", "reward": REWARD}))
        (folder / "metrics.csv").write_text(f"queries,reward,gold\n15,{k},9\n30,{k + 2},9\n")
        (folder / "evaluation.json").write_text("{}")


def read(file):
    return file.read_text(encoding="utf-8")


# ---- the second implementation --------------------------------------------------------------


def spread(prompts, samples):
    """All of them in turn, or evenly spaced ones where there are more than that."""
    if len(prompts) > samples:
        return [prompts[i * len(prompts) // samples] for i in range(samples)]
    return (prompts * samples)[:samples]


def plan(samples):
    """(family, split, prompt) of each picture of the shape world's tasks."""
    asked = [(family, "seen", prompt) for family, prompt in TASKS.items() for _ in range(samples)]
    for family in TASKS:
        unseen = shapes.prompts_of(family, held_out=True)
        asked += [(family, "unseen", prompt) for prompt in spread(unseen, samples)]
    return asked


def draw(folder, prompts, k=0, with_kl=False):
    """Pictures of a run's folder, or of the pretrained model, and each chain's path KL."""
    has_adapters = folder and not (folder / "model").exists()
    source = "tiny_sd" if has_adapters or not folder else folder / "model"
    pipe = models.load_pipeline(source, "cpu")
    if has_adapters:
        pipe.load_lora_weights(folder)
    schedule = oracles.make_schedule(pipe.scheduler, DRAW)
    chains, images = oracles.draw_all(pipe, schedule, DRAW, prompts, COMPARE, k)
    if not with_kl:
        return images
    frozen = models.load_pipeline("tiny_sd", "cpu").unet
    return images, [oracles.path_kl(frozen, schedule, DRAW, chain) for chain in chains]


def assert_rows(rows, asked, images, kl):
    """Lines of samples.csv against the pictures that they should be of."""
    prompts = [prompt for _, _, prompt in asked]
    assert [(row["family"], row["split"], row["prompt"]) for row in rows] == asked
    assert [row["picture"] for row in rows] == [str(i) for i in range(len(asked))]
    kilobytes = [ev.rewards.jpeg_kilobytes(image) for image in images]
    for name, values in (("reward", warmth(images, prompts)), ("gold", lightness(images, prompts)),
                         (OTHER, kilobytes)):
        assert column(rows, name) == pytest.approx(values, rel=1e-3, abs=0.05), name
    assert column(rows, "path_kl") == pytest.approx(kl, rel=5e-3, abs=1e-3)
    said = [judge.describe(scene) for scene in judge.see(images)]
    assert sum(row["description"] != line for row, line in zip(rows, said)) <= 1  # a rounded pixel
    clip = nets.load_clip("tiny_sd/clip")
    pixels = nets.clip_pixels(images, clip.config.vision_config.image_size, "cpu")
    f = clip.get_image_features(pixel_values=pixels).pooler_output.detach()
    for prompt in set(prompts):
        places = [i for i, other in enumerate(prompts) if other == prompt]
        distances = [1 - torch.cosine_similarity(f[i], f[j], dim=0).item()
                     for i in places for j in places if i != j]
        mean = np.mean(distances) if len(places) > 2 else math.nan
        values = column([rows[i] for i in places], "diversity")
        assert np.mean(values) == pytest.approx(mean, abs=2e-3, nan_ok=True)


def column(rows, name):
    return [float(row[name]) for row in rows]


def of(samples, model, seed=None):
    return [row for row in samples if row["model"] == model and seed in (None, row["seed"])]


# ---- each picture ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, 0, 1], ids=["pretrained", "adapters", "all_weights"])
def test_each_sample_is_what_the_folder_alone_gives(place, compared):
    folder = None if place is None else compared.folders[place]
    asked = plan(4)
    images, kl = draw(folder, [prompt for _, _, prompt in asked], with_kl=True)
    assert max(kl) < 1e-3 if place is None else min(kl) > 1
    assert_rows(of(compared.samples, folder.name if folder else "pretrained"), asked, images, kl)


def test_each_seed_of_each_method_is_evaluated_from_its_own_folder(methods):
    for name in (f"{method}_seed{i}" for method in METHODS for i in (0, 1)):
        rows = of(methods.samples, *name.split("_seed"))
        assert len(rows) == len(plan(3)), name
        images = draw(methods.out / "train" / name, [row["prompt"] for row in rows[:2]])
        assert column(rows[:2], "reward") == pytest.approx(warmth(images, None), abs=0.05)


def test_best_of_n_keeps_the_highest_proxy_of_the_n_that_the_budget_pays_for(methods):
    asked = plan(3)[:15]
    prompts = [prompt for _, _, prompt in asked]
    drawn = [draw(None, prompts, k) for k in range(3)]
    r = np.array([warmth(images, prompts) for images in drawn])
    gold = np.array([lightness(images, prompts) for images in drawn])
    assert (r.argmax(0) != gold.argmax(0)).any()  # else one could not tell which of them chose
    best = [drawn[k][i] for i, k in enumerate(r.argmax(0))]
    assert_rows(of(methods.samples, "best of 3"), asked, best, [math.log(3) - 2 / 3] * 15)
    first = column(of(methods.samples, "pretrained")[:15], "reward")
    assert first == pytest.approx(r[0].tolist(), abs=0.05)  # k = 0: the noise of all other models


def test_no_noise_of_the_comparison_is_a_trainings(compared, methods):
    assert {address[:2] for address in compared.training} >= {
        (5, "train"), (5, "evaluate"), (5, "film")}
    assert compared.addresses == {(5, "compare", 0, i) for i in range(len(plan(4)))}
    assert compared.addresses.isdisjoint(compared.training)
    of_three = {(5, "compare", k, i) for k in (1, 2) for i in range(15)}
    assert {address for address in methods.addresses if address[1] == "compare"} == (
        of_three | {(5, "compare", 0, i) for i in range(len(plan(3)))})


@pytest.mark.parametrize("samples", [2, 60])
def test_plan_has_equally_many_seen_and_unseen_pictures_whatever_the_prompts(samples):
    assert [tuple(row.values()) for row in ev.plan(ev.Config(samples=samples))] == plan(samples)
    one = ev.plan(ev.Config(prompts="count", samples=samples))
    for split, held_out in (("seen", False), ("unseen", True)):
        prompts = [row["prompt"] for row in one if row["split"] == split]
        assert prompts == spread(shapes.prompts_of("count", held_out), samples)
        assert all(shapes.is_held_out(shapes.parse(prompt)) == held_out for prompt in prompts)


# ---- tables, claims and the page ------------------------------------------------------------


def by_picture(samples, model, name, split="seen", family=None):
    """Picture -> mean over the training seeds."""
    values = {}
    for row in of(samples, model):
        if row["split"] == split and family in (None, row["family"]) and row[name] != "nan":
            values.setdefault(int(row["picture"]), []).append(float(row[name]))
    return {picture: np.mean(v) for picture, v in values.items()}


@pytest.mark.parametrize("fixture", ["compared", "methods"])
def test_each_cell_of_the_table_is_what_samples_csv_alone_gives(fixture, request):
    found = request.getfixturevalue(fixture)
    sources = {name: (name,) for name in ("reward", "gold", OTHER, "path_kl", "diversity")}
    sources |= {f"gold {family}": ("gold", "seen", family) for family in TASKS}
    sources["gold unseen"] = ("gold", "unseen")
    others = ["best of 3", *METHODS] if fixture == "methods" else ["adapters", "all_weights"]
    expected, cells = {}, {}
    for model in ["pretrained", *others]:
        for name, source in sources.items():
            values = list(by_picture(found.samples, model, *source).values())
            cells[model, name] = "–"
            if values:
                error = np.std(values, ddof=1) / len(values) ** 0.5
                expected[model, name] = np.mean(values), error, len(values)
                cells[model, name] = "{:.3f} ± {:.3f}".format(*expected[model, name])
    cells["best of 3", "path_kl"] = f"≤ {math.log(3) - 2 / 3:.3f}"

    saved = {(row["model"], row["column"]): tuple(column([row], name)[0] for name in (
        "mean", "standard_error", "N")) for row in read_csv(found.out / "table.csv")}
    assert saved == {key: pytest.approx(v, rel=1e-9, abs=1e-9) for key, v in expected.items()}
    head, _, *lines = [line.strip("| ").split(" | ")
                       for line in read(found.out / "table.md").splitlines()]
    assert [line[0] for line in lines] == ["pretrained", *others]
    for line in lines:
        for title, cell in zip(head[1:], line[1:], strict=True):
            name, N = re.fullmatch(r"(.*) \(N = (\d+)\)", title).groups()
            assert cell == cells[line[0], name] and int(N) == expected["pretrained", name][2]


CLAIMS = [*(("RL is above", rl, other, "reward", "seen")
            for rl in ("DDPO_IS", "DPOK") for other in ("SFT", "RWR")),
          ("Importance sampling is above", "DDPO_IS", "DDPO_SF", "reward", "seen"),
          ("The score function is above RWR", "DDPO_SF", "RWR", "reward", "seen"),
          ("With the KL term gold ends higher", "DPOK", "DDPO_IS", "gold", "seen"),
          ("With the KL term diversity ends higher", "DPOK", "DDPO_IS", "diversity", "seen"),
          *(("Gains carry over to unseen", rl, "pretrained", "gold", "unseen")
            for rl in ("DDPO_IS", "DPOK"))]


def test_each_claim_is_what_samples_csv_alone_says(methods):
    rows = read_csv(methods.out / "claims.csv")
    for row, (start, a, b, metric, split) in zip(rows, CLAIMS, strict=True):
        assert row["claim"].startswith(start)
        assert (row["a"], row["b"], row["metric"], row["split"]) == (a, b, metric, split)
        x, y = (by_picture(methods.samples, model, metric, split) for model in (a, b))
        d = np.array([x[picture] - y[picture] for picture in x])
        chosen = np.random.default_rng(99).integers(len(d), size=(40000, len(d)))
        ends = np.quantile(d[chosen].mean(1), [0.025, 0.975])
        low, high = float(row["low"]), float(row["high"])
        assert (float(row["mean"]), int(row["pairs"])) == (pytest.approx(d.mean()), len(y))
        assert (low, high) == pytest.approx(tuple(ends), abs=0.05 * (ends[1] - ends[0]))
        assert row["verdict"] == ("holds" if low > 0 else "FAILS" if high < 0 else
                                  "cannot be told from chance")


def test_pictures_shown_are_the_first_seeds_two_of_each_family_a_row_a_model(methods):
    _, grid, names, titles = methods.sheets[0]
    assert names == ["pretrained", "best of 3", *METHODS]
    assert titles == [prompt for prompt in TASKS.values() for _ in (0, 1)]
    for pictures, name in zip(grid, names, strict=True):
        rows = of(methods.samples, name, "0" if name in METHODS else None)
        shown = [rows[3 * family + k] for family in range(5) for k in (0, 1)]
        assert warmth(pictures, titles) == pytest.approx(column(shown, "reward"), rel=1e-9)


def test_queries_are_of_all_seeds_and_of_runs_that_were_trained_on_this_reward(methods, compared):
    found = {name: (x, y.tolist()) for name, (x, y) in methods.queries[0][1].items()}
    assert found == {name: ([15, 30], [[k, k + 1], [k + 5, k + 6]])  # running means of k, k + 2
                     for k, name in enumerate(METHODS)}
    assert list(compared.queries[0][1]) == ["adapters"]


def test_page_needs_no_other_file_and_holds_table_claims_and_figures(methods):
    pictures = re.findall(r"src='data:image/png;base64,([^']*)'", methods.page)
    names = ("same_seeds", "scores", "queries", "generalization")
    assert [base64.b64decode(picture) for picture in pictures] == [
        (methods.out / f"{name}.png").read_bytes() for name in names]
    assert methods.page.count("src=") == 4 and not re.search("href|http|@import", methods.page)
    table = read(methods.out / "table.md").splitlines()
    assert re.findall(r"<td>(.*?)</td>", methods.page) == [
        cell for line in (table[0], *table[2:]) for cell in line.strip("| ").split(" | ")]
    claims = [f"- {line}" for line in re.findall("<li>(.*?)</li>", methods.page)]
    assert claims == read(methods.out / "claims.md").splitlines() and len(claims) == len(CLAIMS)
    assert "QUICK" not in methods.page


def test_runs_of_one_name_are_two_models_and_nothing_of_an_earlier_call_stays(compared, tmp_path,
                                                                              monkeypatch):
    twins = [tmp_path / name / "run" for name in "ab"]
    for folder, twin in zip(compared.folders, twins):
        shutil.copytree(folder, twin)
    for stale in ("queries.png", "claims.csv"):
        (tmp_path / stale).write_text("stale")
    monkeypatch.chdir(twins[1].parent)
    found = evaluate(tmp_path, "--runs", str(twins[0]), "run", "--prompts", "four stars",
                     "--samples", "2", "--reward", GOLD)
    prompts = ["four stars"] * 2
    for label, folder in zip(("run", str(twins[1].resolve())), compared.folders):
        expected = lightness(draw(folder, prompts), prompts)
        assert column(of(found.samples, label), "reward") == pytest.approx(expected, abs=0.05)
    assert len(found.samples) == 6 and found.queries == []  # neither was trained on this reward
    assert not (tmp_path / "queries.png").exists() and not (tmp_path / "claims.csv").exists()
    assert found.page.count("<img") == 3 and "<li>" not in found.page


def test_a_quick_tour_draws_no_claims_and_says_so(tmp_path):
    found = evaluate(tmp_path, "--quick", "--prompts", "four stars", "--samples", "3",
                     "--rounds", "1", "--prompts-per-round", "1", "--samples-per-prompt", "2")
    assert list(dict.fromkeys(row["model"] for row in found.samples)) == [
        "pretrained", "best of 2", *METHODS]  # the budget pays for less, which would be no choice
    assert not (tmp_path / "claims.csv").exists() and read(tmp_path / "claims.md") == ""
    assert "QUICK TOUR" in found.page and "<li>" not in found.page


# ---- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "--sd", "--samples 9 --seeds 2 --seed 4 --model m --reward r --gold g --prompts count "
    "--rounds 7 --prompts-per-round 3 --samples-per-prompt 6 --learning-rate 0.002 --lora-rank 3 "
    "--lora-targets to_q conv1 --num-steps 9 --eta 0.6 --guidance-scale 2.5 --batch-size 11 "
    "--device cpu --clip c --aesthetic-weights a --image-reward-weights i --vlm v "
    "--vlm-questions q --bert b --bert-layer 2"])
def test_each_command_has_the_methods_own_flag_all_shared_ones_and_no_other(words):
    config = flags.parse(ev.Config, None, words.split(), ev.SD)
    table = ev.commands_of(config)
    assert list(table) == [f"{method}_seed{i}" for i in range(config.seeds) for method in METHODS]
    shared = {field.name for field in fields(config)} - {"out", "sd", "seed"}
    for name, (script, *rest) in table.items():
        method, seed = name.split("_seed")
        expected_script, own, value = METHODS[method]
        assert script == expected_script
        module = import_module(script.removesuffix(".py").replace("/", "."))
        job = flags.parse(module.Config, None, rest, module.SD)
        expected = {field.name: field.default for field in fields(job)}
        expected |= {field: getattr(config, field) for field in shared & expected.keys()}
        expected |= {own: value, "seed": config.seed + int(seed),
                     "eval_samples": min(40, config.samples)}
        assert vars(job) == expected


def test_sd_has_chapter_4s_settings_and_a_given_flag_wins():
    config = flags.parse(ev.Config, None, ["--sd", "--rounds", "3"], ev.SD, ev.QUICK)
    for name in ("model", "clip", "aesthetic_weights", "image_reward_weights", "gold", "num_steps",
                 "guidance_scale", "lora_rank", "lora_targets", "learning_rate", "batch_size"):
        assert getattr(config, name) == dpok.SD[name], name
    assert (config.prompts, config.reward, config.rounds) == ("tasks_sd", "image_reward", 3)
    assert config.vlm.startswith("llava") and config.seed == 0
    quick = flags.parse(ev.Config, None, ["--quick", "--samples", "9"], ev.SD, ev.QUICK)
    assert (quick.rounds, quick.samples_per_prompt, quick.samples, quick.sd) == (4, 4, 9, False)


@pytest.mark.parametrize("words, named", [
    ("--runs nowhere", "--runs nowhere"), ("--runs RUN RUN", "given twice"),
    ("--samples 0", "--samples"), ("--seeds 0", "--seeds"), ("--rounds 0", "--rounds"),
    ("--reward beauty", "--reward beauty"), ("--gold beauty", "--gold beauty"),
    ("--others beauty", "--others beauty"), ("--prompts dogs", "--prompts dogs"),
    ("--model nothing", "--model nothing"), ("--guidance 2", "--guidance-scale"),
    ("--ballot --runs RUN", "--ballot"), ("--votes x.json", "--out runs/eval\n"),
    ("--votes x.json --quick", "--out runs/quick\n"),
    ("--votes x.json --runs RUN", "--out runs/eval_runs\n")])
def test_bad_input_is_one_message_naming_the_flag(words, named, compared, tmp_path, capsys,
                                                  monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "train_missing", None)
    words = words.replace("RUN", str(compared.folders[0])).split()
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: ev.main(["--device", "cpu", *words]))
    message = capsys.readouterr().err
    assert exit.value.code == 2 and named in message
    assert "Traceback" not in message and list(tmp_path.iterdir()) == []


# ---- the ballot -----------------------------------------------------------------------------


def test_ballot_from_runs_to_votes(tmp_path, monkeypatch, capsys):
    """Labels belong to the pictures that were drawn; one rater always prefers DPOK's."""
    monkeypatch.setattr(commands, "train_missing", make_runs)
    words = [*COMMON, "--out", str(tmp_path)]
    ev.main([*words, "--ballot", "--seeds", "2", "--samples", "5"])
    key = json.loads(read(tmp_path / "ballot_key.json"))
    data = json.loads(re.search(r"const BALLOT = (.*);\n", read(tmp_path / "ballot.html"))[1])
    prompts = [prompt for prompt in TASKS.values() for _ in range(4)]
    drawn = {name: draw(tmp_path / "train" / f"{name}_seed0", prompts) for name in ("DPOK", "SFT")}
    places, votes = [], []
    for i, (pair, secret) in enumerate(zip(data["pairs"], key["pairs"], strict=True)):
        left, right = secret["left"], ({"DPOK", "SFT"} - {secret["left"]}).pop()
        place = find(pair["left"], drawn[left])
        assert place == find(pair["right"], drawn[right]) and pair["prompt"] == prompts[place]
        places.append(place)
        votes.append({"pair": i, "alignment": "left" if left == "DPOK" else "right",
                      "quality": "tie"})
    assert sorted(places) == list(range(20))
    file = tmp_path / "votes_ann.json"
    file.write_text(json.dumps({"ballot": key["ballot"], "rater": "Ann", "votes": votes}))
    capsys.readouterr()
    ev.main([*words, "--votes", str(file)])
    table = capsys.readouterr().out
    columns = re.search(r"\| Question \| (\w+) preferred \| (\w+) preferred", table).groups()
    rates = re.search(r"fits the prompt better\? \| ([\d.]+) ± – % \| ([\d.]+) ± – %", table)
    assert dict(zip(columns, rates.groups())) == {"DPOK": "100.0", "SFT": "0.0"}
    with pytest.raises(ValueError, match="--ballot"):  # never over one that is being voted on
        ev.main([*words, "--ballot", "--seeds", "2", "--samples", "5"])


def find(uri, pictures):
    """The place of a picture of the page among pictures."""
    file = io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))
    shown = np.asarray(Image.open(file), float)
    distances = [np.abs(shown - np.asarray(picture, float)).mean() for picture in pictures]
    assert min(distances) < 0.01
    return int(np.argmin(distances))
