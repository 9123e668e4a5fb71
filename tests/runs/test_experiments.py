"""The experiments as they are started, with tiny flags: what they write, skip, refuse and leave."""
import csv
import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import (lemma, overoptimization, penalties, prompt_alignment, samples, sft, sweep,
                         variance)
from support import commands, figures, flags, models, runs, training
from support.prompts import get_prompts
from tiny_sd import judge

mdp = import_module("01_mdp")
rewards = import_module("02_rewards")
ddpo = import_module("03_ddpo")
dpok = import_module("04_dpok")

SMALL = ["--rounds", "2", "--samples-per-prompt", "4", "--num-steps", "3", "--device", "cpu"]
TINY = [*SMALL, "--eval-samples", "4"]


def brightness(images, prompts):
    """A reward for tests: instant, and another one for each picture."""
    return [sum(image.convert("L").tobytes()) / 1e5 + len(prompt)
            for image, prompt in zip(images, prompts)]


@pytest.fixture
def instant_rewards(monkeypatch):
    def get_reward(name, *_):
        sign = -1 if name == "alignment" else 1
        return lambda *args: [sign * value for value in brightness(*args)]

    monkeypatch.setattr(rewards, "get_reward", get_reward)


def keep_calls(monkeypatch, module, name):
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a: calls.append(a) or function(*a))
    return calls


@pytest.mark.parametrize("data, weights", [*product(["fixed", "fresh"], ["rwr", "sparse"])])
def test_sft_is_its_plain_training_and_forgets_if_fresh(data, weights, tmp_path, monkeypatch,
                                                        instant_rewards):
    """Round 2 has a prompt of round 1: weights over the pictures of both rounds are others."""
    names = ["a red circle", "an orange star", "three red squares"]
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    config = sft.Config(
        data=data, weights=weights, temperature=2.0, keep=0.34, beta=0.1, rounds=2, batch_size=8,
        prompts=str(tmp_path / "prompts.txt"), prompts_per_round=2, samples_per_prompt=3, seed=5,
        num_steps=3, eval_samples=2, learning_rate=2e-3, weight_decay=0.5, lora_rank=4,
        train_batch_size=4, device="cpu", out=str(tmp_path), name="run")
    calls = keep_calls(monkeypatch, rewards, "score")
    run, verdict = sft.train(config)
    assert len(calls) == {"fixed": 3, "fresh": 2}[data] * 2 + 2 * 2  # nothing is scored twice

    pre, pipe = (models.load_pipeline("tiny_sd", "cpu") for _ in range(2))
    params = models.trainable(pipe, config)
    optimizer = torch.optim.AdamW(params, 2e-3, weight_decay=0.5)
    learned = []  # (prompt, r, x_0)
    for n in range(2):
        of_round = training.prompts_of_round(names, config, n)
        own = mdp.rollout(pipe, of_round, config, (5, "train", n))
        shown = torch.tensor(brightness(own.images, of_round)).mean().item()
        assert run.rows[n]["reward"] == -run.rows[n]["gold"] == pytest.approx(shown, rel=1e-4)
        assert n == 0 or {prompt for prompt, _, _ in learned} & set(of_round)
        drawn = own if data == "fresh" else mdp.rollout(pre, of_round, config, (5, "fixed set", n))
        learned = learned if data == "fixed" else []
        learned += zip(of_round, brightness(drawn.images, of_round), drawn.latents[:, -1])
        prompts, r, x_0 = zip(*learned)
        r, x_0 = torch.tensor(r).double(), torch.stack(x_0)
        w = {"rwr": sft.rwr_weights(r, prompts, 2.0),
             "sparse": sft.sparse_weights(r, prompts, 0.34)}[weights]
        for update in range(2):
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
            (w[rows] * errors[0] + 0.1 * errors[1]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    saved = [v.norm().item() for v in load_file(run.folder / models.ADAPTER).values()]
    assert sorted(saved) == pytest.approx(sorted(p.norm().item() for p in params), rel=1e-4)
    assert run.before["prompts"] == run.after["prompts"] == training.spread_evenly(names, 2)
    assert [row["queries"] for row in run.rows] == [6, 12] == [6, verdict["queries"]]
    assert run.rows[0]["kl"] < 1e-3 < run.rows[1]["kl"] and commands.is_finished(run.folder)


@pytest.mark.parametrize("data, needed", [("fixed", 10 + 10000), ("fresh", 1 + 10000)])
def test_sft_times_only_what_its_updates_need(data, needed, tmp_path, monkeypatch):
    """Each piece of work takes another power of ten, so that the sum tells which are in it."""
    clock, rollout, step_means = [0], mdp.rollout, dpok.step_means

    def timed_rollout(pipe, prompts, config, noise):
        clock[0] += {"train": 1, "fixed set": 10}.get(noise[1], 10**6)
        return rollout(pipe, prompts, config, noise)

    def timed_means(*arguments):
        clock[0] += 100
        return step_means(*arguments)

    def timed_reward(name, *_):
        def reward(images, prompts):
            clock[0] += 1000 if name == "alignment" else 10000
            return brightness(images, prompts)

        return reward

    monkeypatch.setattr(mdp, "rollout", timed_rollout)
    monkeypatch.setattr(dpok, "step_means", timed_means)
    monkeypatch.setattr(rewards, "get_reward", timed_reward)
    monkeypatch.setattr(runs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run = sft.main([*TINY, "--data", data, "--out", str(tmp_path)])
    assert [row["seconds"] for row in run.rows] == [needed] * 2


@pytest.mark.slow
def test_without_flags_of_its_own_penalties_is_chapter_4(tmp_path, instant_rewards):
    words = [*TINY, "--beta", "0.3", "--updates-per-round", "3", "--batch-size", "2", "--out",
             str(tmp_path)]
    chapter, run = [script.main([*words, "--clip-range", "1e-3"]) for script in (dpok, penalties)]
    for a, b in zip(chapter.rows, run.rows, strict=True):
        assert b.pop("beta") == 0.3
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for side, name in product(("before", "after"), ("reward", "gold", "kl")):
        assert torch.equal(getattr(chapter, side)[name], getattr(run, side)[name])
    for script in (penalties, sft):
        with pytest.raises(ValueError, match="--name"):
            script.main([*words, "--name", run.folder.name])


@pytest.mark.parametrize("kl", ["mse", "reward"])
def test_each_leash_gets_its_betas_and_its_advantage(kl, tmp_path, monkeypatch, instant_rewards):
    calls = keep_calls(monkeypatch, penalties, "accumulate")
    run = penalties.main([*TINY, "--kl", kl, "--target-kl", "2", "--beta", "0.5", "--alpha", "2",
                          "--rounds", "4", "--learning-rate", "1e-2", "--step-weight", "none",
                          "--no-value", "--out", str(tmp_path)])
    for row, following in zip(run.rows, run.rows[1:]):
        beta = penalties.adapt_beta(row["beta"], row["kl"], 2)
        assert following["beta"] == pytest.approx(beta, rel=1e-5)
    assert run.rows[0]["beta"] == 0.5 and run.rows[-1]["kl"] > 0.1
    for n, row in enumerate(run.rows):
        pipe, trajectory, reference_means, A, betas, _, config, _ = calls[2 * n]
        R = torch.tensor(brightness(trajectory.images, trajectory.prompts))[:, None].expand(4, 3)
        want = row["beta"] * penalties.mse_weights(pipe.scheduler, config)
        if kl == "reward":
            pre = penalties.pre_log_probs(pipe, trajectory, reference_means, config)
            R = penalties.reward_to_go(R[:, 0], trajectory.log_probs, pre, 2.0, row["beta"])
            want = 0 * want
        assert betas.tolist() == pytest.approx(want.tolist())
        assert A.numpy() == pytest.approx((R - (R.sum(0) - R) / 3).numpy(), abs=1e-3)


@pytest.mark.slow
def test_lemma_from_another_folder(tmp_path):
    file = commands.HERE / "experiments" / "lemma.py"
    ended = subprocess.run([sys.executable, str(file), "--eta", "0.9"], cwd=tmp_path,
                           capture_output=True, text=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr
    for m, line in zip(lemma.MEANS, ended.stdout.splitlines()[2:7], strict=True):
        row = line.split()
        assert all(0 < float(row[i]) < float(row[i + 2]) for i in (1, 4, 7, 10))
        assert float(row[10]) == pytest.approx(m**2 / (2 * 0.5**2), rel=0.25)  # of the data, T = 50
    assert [file.name for file in tmp_path.rglob("*.png")] == ["lemma.png"]


def test_variance_compares_three_advantages_of_an_unseen_round(monkeypatch, instant_rewards,
                                                               tmp_path, capsys):
    fits = keep_calls(monkeypatch, dpok.Value, "fit")
    steps = keep_calls(monkeypatch, dpok, "accumulate")
    calls = keep_calls(monkeypatch, variance, "gradient_variance")
    variances = variance.main([*SMALL, "--groups", "4", "--prompts-per-round", "2", "--eta", "0.5",
                               "--out", str(tmp_path / "new")])
    r_alone, others, _ = variances.values()
    assert r_alone > 2 * others  # prompts differ by more than the pictures of one
    relative = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert relative == pytest.approx([v / others for v in variances.values()], abs=0.006)
    with open(tmp_path / "new" / "variance.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["advantage"]: float(row["variance"]) for row in rows} == variances
    assert [round(float(row["relative"]), 2) for row in rows] == relative
    pipe, _, trajectory, _, _, config, n = calls[0]
    assert trajectory.prompts == training.prompts_of_round(get_prompts("tasks"), config, n)
    r = torch.tensor(brightness(trajectory.images, trajectory.prompts))[:, None].expand(8, 3)
    weights = variance.ddpo.step_weights(pipe.scheduler, config)
    A, first = [call[4] / weights for call in calls], steps[0][3] / weights
    assert n == len(fits) == 2 and A[0].numpy() == pytest.approx(r.numpy(), abs=1e-4)
    assert torch.allclose(first, first[:, :1].expand(8, 3), atol=1e-4)  # V is 0 until it is fitted
    for rows in (slice(0, 4), slice(4, 8)):  # one prompt each
        assert (A[1][rows].sum(0).abs() < 1e-3).all() and (A[2][rows].sum(0).abs() < 1e-3).all()
    assert not torch.allclose(A[1], A[2], atol=1e-3)


@pytest.fixture
def fake_runs(monkeypatch):
    """Instead of training, a folder whose numbers are made of β (03: of the name's length).

    -> what was started. A picture's color: (the name's length, 9·frame, prompt); prompt 0 is still.
    """
    started = []

    def start(command):
        started.append(command)
        script = import_module(command[0].removesuffix(".py"))
        config = flags.parse(script.Config, "", command[1:], script.SD)
        folder, beta = Path(config.out, config.name), getattr(config, "beta", len(config.reward))
        (folder / "film").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        prompts = get_prompts(config.prompts)
        for n in range(config.rounds):
            row = {"round": n + 1, "queries": 8 * n + 8}
            runs.append_row(folder / "metrics.csv",
                            row | {"kl": n, "reward": n, "gold": beta - (n - 2) ** 2})
            for i, prompt in enumerate(training.prompts_of_round(prompts, config, n)):
                reward = 100 * len(prompt.split()) + n**2
                runs.append_row(folder / "pictures.csv", row | {"picture": i, "reward": reward})
        film = training.spread_evenly(prompts, config.film_pictures)
        (folder / "film" / "prompts.json").write_text(json.dumps(film))
        for k in range(5):
            figures.strip([Image.new("RGB", (8, 8), (len(config.reward), 9 * k * (i > 0), i))
                           for i in range(len(film))]).save(folder / "film" / f"{8 * k:06d}.png")
        figures.sheet(folder / "film.png", [[Image.new("RGB", (8, 8))]], ["x"], ["y"])
        verdict = {name: {"title": f"title {name}", "before": beta / 2 - k, "before_se": 0.25,
                          "after": 10 * k + beta, "after_se": 0.5 * k}
                   for k, name in enumerate(("reward", "gold", "kl"))}
        (folder / "evaluation.json").write_text(json.dumps(verdict | {"queries": 99}))

    monkeypatch.setattr(commands, "start", start)
    return started


def test_sweep_trains_what_is_missing_and_compares(fake_runs, tmp_path, capsys):
    words = ["--betas", "0", "0.25", "--out", str(tmp_path), "--", "--alpha", "2"]
    rows = sweep.main(words)
    assert [command[:5] for command in fake_runs] == [
        ["04_dpok.py", "--beta", beta, "--alpha", "2"] for beta in ("0.0", "0.25")]
    assert rows == [[beta / 2, (20 + beta, 1.0), (beta, 0.0), (10 + beta, 0.5)]
                    for beta in (0.0, 0.25)]
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.split() == "0.125 20.2 ± 1.0 0.250 ± 0.000 10.250 ± 0.500".split()
    assert sweep.main(words) == rows and len(fake_runs) == 2
    with pytest.raises(ValueError, match="--alpha 2.0, not 3.0"):
        sweep.main([*words[:-1], "3"])
    sweep.main(["--betas", "0.25", "1", "--name", "other", "--out", str(tmp_path)])
    assert (tmp_path / "other.png").is_file() and (tmp_path / "other_beta_1").is_dir()


def test_overoptimization_runs_its_parts_and_marks_hindsights_best(fake_runs, tmp_path, capsys,
                                                                   monkeypatch):
    def load_vlm(name, device):
        assert (name, device) == ("my vlm", "cpu")
        return lambda images, questions: [f"{question} {image.getpixel((4, 4))[1]}"
                                          for image, question in zip(images, questions)]

    sheets, curves = [keep_calls(monkeypatch, figures, name) for name in ("sheet", "lines")]
    monkeypatch.setattr(overoptimization.reward_models, "load_vlm", load_vlm)
    monkeypatch.setattr(overoptimization.judge, "read", lambda images: [
        3 if image.getpixel((4, 4))[1] >= 27 else None for image in images])
    words = ["--rounds", "9", "--seed", "3", "--out", str(tmp_path), "--", "--vlm", "my vlm"]
    drawn = overoptimization.main(words)
    wanted = [dict(reward="image_reward", beta=beta, keep_every=5) for beta in (0.0, 0.01, 0.1)]
    wanted.append(dict(reward="incompressibility", beta=0.0, value=False))
    for beta in (0.0, 0.03):
        wanted.append(dict(reward="vlm_strict", beta=beta, value=False, prompts="count",
                           prompts_per_round=4, samples_per_prompt=12, film_pictures=32))
    for command, changes in zip(fake_runs, wanted, strict=True):
        config = flags.parse(dpok.Config, "", command[1:], dpok.SD)
        common = dict(rounds=9, samples_per_prompt=48, learning_rate=2e-3, seed=3, vlm="my vlm",
                      gold="alignment", out=str(tmp_path), name=config.name)
        assert asdict(config) == asdict(dpok.Config(**common | changes))
    for beta, (rows, best) in zip((0.0, 0.01, 0.1), drawn["proxy"].values(), strict=True):
        assert best == 3 and len(rows) == 9 and rows[0]["gold"] == beta - 4
    said = capsys.readouterr().out
    assert ("β = 0.1: over the last 5 of 9 rounds image_reward is 6.000, alignment -17.900, at 8 "
            "nats; in hindsight alignment was best, -1.400, at round 4.") in said

    prompts = training.spread_evenly(get_prompts("count"), 32)
    threes = sum("three" in prompt for prompt in prompts) / 32  # none of them the first, still one
    assert drawn["writing"] == dict.fromkeys(
        (0.0, 0.03), ([0, 8, 16, 24, 32], [0, 0, 0, threes, threes]))
    assert f"any digit in 0% and {31 / 32:.0%}" in said and 0.2 < threes < 0.5
    _, panels, xlabel, _ = curves[0]
    for lines, column in zip(panels.values(), ("reward", "gold", None), strict=True):
        for beta, (x, y) in zip((0.0, 0.03), lines.values(), strict=True):
            means = {"reward": [0, 0.5, 1, 1.5, 2, 3, 4, 5, 6], None: [0] * 3 + [threes] * 2,
                     "gold": [beta - v for v in (4, 2.5, 5 / 3, 1.5, 2, 3, 6, 11, 18)]}
            assert y == pytest.approx(means[column])
            assert x == [8 * k + (column is not None) * 8 for k in range(len(x))]
    path, strips, names, columns, _, captions = sheets[-1]
    shown = training.spread_evenly([prompt for prompt in prompts if "three" in prompt], 4)
    assert path == tmp_path / "overoptimization_writing.png" and xlabel == "reward queries"
    assert columns == [f"{prompt}\nβ = {beta}" for beta in ("0", "0.03") for prompt in shown]
    place = prompts.index(shown[1])
    assert [len(row) for row in strips] == [8] * 5 and colors(strips[3])[5] == (10, 27, place)
    question, _ = judge.questions(shown[1])[0]
    assert captions[3][5] == f"VLM: {question} 27\njudge: none" and names[3] == "24 queries"
    with pytest.raises(ValueError, match="--rounds 9, not 8"):
        overoptimization.main(["--rounds", "8", *words[2:]])
    assert len(fake_runs) == 6 and (tmp_path / "overoptimization_noise.png").is_file()
    assert list(overoptimization.main(["--only", "writing", *words])) == ["writing"]


def colors(images):
    return [image.getpixel((4, 4)) for image in images]


def test_samples_compare_three_rewards_on_the_same_noise(fake_runs, tmp_path, monkeypatch, capsys):
    sheets = keep_calls(monkeypatch, figures, "sheet")
    samples.main(["--prompts", "location", "--rounds", "3", "--name", "s", "--out", str(tmp_path),
                  "--", "--film-pictures", "2"])
    names = ["aesthetic", "compressibility", "incompressibility"]
    assert [commands.settings_of(command) for command in fake_runs] == [asdict(ddpo.Config(
        reward=name, prompts="location", rounds=3, film_pictures=2, name=f"s_{name}",
        out=str(tmp_path))) for name in names]
    path, rows, row_names, columns = sheets[-1]
    assert path == tmp_path / "s.png" and path.is_file()
    assert columns == training.spread_evenly(get_prompts("location"), 2)
    assert row_names == ["pretrained", "aesthetic\n4.50 → 9.00", "compressibility\n7.50 → 15.00",
                         "incompressibility\n8.50 → 17.00"]
    assert [colors(row) for row in rows] == [[(9, 0, 0), (9, 0, 1)], *(
        [(len(name), 0, 0), (len(name), 36, 1)] for name in names)]
    assert "incompressibility    8.500 ± 0.250  ->  17.000 ± 0.000" in capsys.readouterr().out


def test_alignment_draws_each_family_by_its_own_prompts(fake_runs, tmp_path, monkeypatch):
    sheets, plots = (keep_calls(monkeypatch, figures, name) for name in ("sheet", "queries"))
    lengths = {"location": 6, "color": 3, "composition": 7}  # words of each family's prompts
    words = ["--families", *lengths, "--rounds", "7", "--out", str(tmp_path),
             "--prompts-per-family"]
    curves = prompt_alignment.main([*words, "2", "--", "--seed", "3", "--vlm", "judge"])
    (command,), path = fake_runs, tmp_path / "prompt_alignment"
    assert commands.settings_of(command) == asdict(ddpo.Config(
        reward="vlm_alignment", prompts=f"{path}.txt", rounds=7, prompts_per_round=6,
        samples_per_prompt=8, film_pictures=6, seed=3, vlm="judge", name=path.name,
        out=str(tmp_path)))
    prompts = sum((training.spread_evenly(get_prompts(family), 2) for family in lengths), [])
    assert Path(f"{path}.txt").read_text().splitlines() == prompts
    latest = [0, 1 / 2, 5 / 3, 14 / 4, 30 / 4, 54 / 4, 86 / 4]  # of 0, 1, 4, 9, 16, 25, 36
    for family, length in lengths.items():
        x, y = plots[0][1][family]
        assert (x, y[0].tolist()) == (curves[family][0], pytest.approx(curves[family][1]))
        assert x == [8, 16, 24, 32, 40, 48, 56]
        assert curves[family][1] == pytest.approx([100 * length + mean for mean in latest])
    film, rows, row_names, columns = sheets[-1]
    assert row_names == [prompts[i] for i in (1, 2, 4)]  # the first of a family that is not still
    assert columns == [f"{n} queries" for n in (0, 8, 16, 24, 32)]
    assert [colors(row) for row in rows] == [[(13, 9 * k, i) for k in range(5)] for i in (1, 2, 4)]
    assert all(Path(file).is_file() for file in (film, f"{path}_film.png", f"{path}.png"))
    with pytest.raises(ValueError, match="--prompts-per-family"):
        prompt_alignment.main([*words, "1"])
    assert Path(f"{path}.txt").read_text().splitlines() == prompts and len(fake_runs) == 1


@pytest.mark.parametrize("script, words, named", [
    (sft, "--temperature 0", "--temperature"), (sft, "--gold beauty", "--gold beauty"),
    (penalties, "--samples-per-prompt 1", "--samples-per-prompt"),
    (penalties, "--target-kl 3 --beta 0", "--target-kl"), (variance, "--groups 99", "--groups"),
    (lemma, "--eta 0", "--eta"), (sweep, "--betas 0.1 0.1", "--betas"),
    (sweep, "-- --beta 1", "--beta"), (sweep, "-- --rounds 0", "--rounds"),
    (samples, "-- --num-steps 0", "--num-steps"), (prompt_alignment, "--families", "--families"),
    (prompt_alignment, "--families shape", "--families"), (prompt_alignment, "-- --eta 2", "--eta"),
    *((samples, f"-- {flag} 1", f"{flag} behind --") for flag in (
        "--reward --prompts --rounds --name --out").split()),
    *((prompt_alignment, f"-- {flag} 1", f"{flag} behind --") for flag in (
        "--reward --prompts --rounds --film-pictures --prompts-per-round --samples-per-prompt "
        "--name --out").split()),
    (overoptimization, "-- --film-pictures 4", "--film-pictures"),
    (overoptimization, "--samples-per-prompt 10", "--samples-per-prompt"),
    *((overoptimization, f"-- --{flag} 1", "gets its own") for flag in (
        "beta no-value rounds samples-per-prompt learning-rate reward gold seed").split())])
def test_bad_input_is_one_line_naming_the_flag(script, words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "start", None)  # nothing is started
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        flags.run(lambda: script.main(words.split()))
    assert error.value.code == 2 and named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
