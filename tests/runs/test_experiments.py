"""The experiments as they are started, with tiny flags: what they write, skip, refuse and leave."""
import json
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import lemma, overoptimization, penalties, sft, sweep, variance
from support import commands, figures, flags, models, runs, training
from support.prompts import get_prompts

mdp = import_module("01_mdp")
rewards = import_module("02_rewards")
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


@pytest.mark.parametrize("weights", ["rwr", "sparse"])
def test_sft_is_its_plain_training_and_forgets_no_picture(weights, tmp_path, instant_rewards):
    config = sft.Config(
        weights=weights, temperature=2.0, keep=0.34, beta=0.1, rounds=2, prompts="tasks",
        prompts_per_round=2, samples_per_prompt=3, num_steps=3, eval_samples=2, seed=5,
        learning_rate=2e-3, weight_decay=0.5, lora_rank=4, batch_size=8, device="cpu",
        out=str(tmp_path), name="run")
    run, verdict = sft.train(config)

    fresh, pipe = (models.load_pipeline("tiny_sd", "cpu") for _ in range(2))
    params = models.trainable(pipe, config)
    optimizer = torch.optim.AdamW(params, 2e-3, weight_decay=0.5)
    prompts, r, x_0 = [], torch.empty(0).double(), torch.empty(0, 4, 8, 8)
    for n in range(2):
        of_round = training.prompts_of_round(get_prompts("tasks"), config, n)
        own = mdp.rollout(pipe, of_round, config, (5, "train", n))
        shown = torch.tensor(brightness(own.images, of_round)).mean().item()
        assert run.rows[n]["reward"] == -run.rows[n]["gold"] == pytest.approx(shown, rel=1e-4)
        drawn = mdp.rollout(fresh, of_round, config, (5, "fixed set", n))
        prompts += of_round
        r = torch.cat([r, torch.tensor(brightness(drawn.images, of_round)).double()])
        x_0 = torch.cat([x_0, drawn.latents[:, -1]])
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
            pre = fresh.unet(x_t, t, encoder_hidden_states=c).sample.detach()
            now = pipe.unet(x_t, t, encoder_hidden_states=c).sample
            errors = [(now - target).square().mean((1, 2, 3)) for target in (eps, pre)]
            (w[rows] * errors[0] + 0.1 * errors[1]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    saved = [v.norm().item() for v in load_file(run.folder / models.ADAPTER).values()]
    assert sorted(saved) == pytest.approx(sorted(p.norm().item() for p in params), rel=1e-4)
    asked = training.spread_evenly(get_prompts("tasks"), 2)
    assert run.before["prompts"] == run.after["prompts"] == asked
    assert [row["queries"] for row in run.rows] == [6, 12] == [6, verdict["queries"]]
    assert run.rows[0]["kl"] < 1e-3 < run.rows[1]["kl"] and commands.is_finished(run.folder)


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
                                                               capsys):
    fits = keep_calls(monkeypatch, dpok.Value, "fit")
    steps = keep_calls(monkeypatch, dpok, "accumulate")
    calls = keep_calls(monkeypatch, variance, "gradient_variance")
    variances = variance.main([*SMALL, "--groups", "4", "--prompts-per-round", "2", "--eta", "0.5"])
    r_alone, others, _ = variances.values()
    assert r_alone > 2 * others  # prompts differ by more than the pictures of one
    relative = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert relative == pytest.approx([v / others for v in variances.values()], abs=0.006)
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
    """Instead of training, a folder whose numbers are made of β.  -> what was started"""
    started = []

    def start(command):
        started.append(command)
        config = flags.parse(dpok.Config, "", command[1:], dpok.SD)
        folder = Path(config.out, config.name)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        for n in range(config.rounds):
            runs.append_row(folder / "metrics.csv",
                            {"kl": n, "reward": n, "gold": config.beta - (n - 2) ** 2})
        figures.sheet(folder / "film.png", [[Image.new("RGB", (8, 8))]], ["x"], ["y"])
        verdict = {name: {"title": f"title {name}", "before": -k, "after": 10 * k + config.beta,
                          "after_se": 0.5 * k} for k, name in enumerate(("reward", "gold", "kl"))}
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


def test_overoptimization_runs_four_commands_and_marks_the_early_stop(fake_runs, tmp_path, capsys):
    words = ["--rounds", "9", "--seed", "3", "--out", str(tmp_path), "--", "--prompts", "a star"]
    lines = overoptimization.main(words)
    wanted = [dict(reward="image_reward", beta=beta, value=True) for beta in (0.0, 0.01, 0.1)]
    wanted.append(dict(reward="incompressibility", beta=0.0, value=False))
    for command, changes in zip(fake_runs, wanted, strict=True):
        config = flags.parse(dpok.Config, "", command[1:], dpok.SD)
        common = dict(rounds=9, samples_per_prompt=48, learning_rate=2e-3, seed=3, prompts="a star",
                      gold="alignment", out=str(tmp_path), name=config.name)
        assert asdict(config) == asdict(dpok.Config(**common, **changes))
    for beta, (rows, stop) in zip((0.0, 0.01, 0.1), lines.values(), strict=True):
        assert stop == 3 and len(rows) == 9 and rows[0]["gold"] == beta - 4
    assert ("β = 0.1: over the last 5 of 9 rounds image_reward is 6.000, alignment -17.900, at 8 "
            "nats; alignment was best, -1.400, at round 4.") in capsys.readouterr().out
    with pytest.raises(ValueError, match="--rounds 9, not 8"):
        overoptimization.main(["--rounds", "8", *words[2:]])
    assert len(fake_runs) == 4 and (tmp_path / "overoptimization_noise.png").is_file()


@pytest.mark.parametrize("script, words, named", [
    (sft, "--temperature 0", "--temperature"), (sft, "--gold beauty", "--gold beauty"),
    (penalties, "--samples-per-prompt 1", "--samples-per-prompt"),
    (penalties, "--target-kl 3 --beta 0", "--target-kl"), (variance, "--groups 99", "--groups"),
    (lemma, "--eta 0", "--eta"), (sweep, "--betas 0.1 0.1", "--betas"),
    (sweep, "-- --beta 1", "--beta"), (sweep, "-- --rounds 0", "--rounds"),
    *((overoptimization, f"-- --{flag} 1", "gets its own") for flag in (
        "beta no-value rounds samples-per-prompt learning-rate reward gold seed").split())])
def test_bad_input_is_one_line_naming_the_flag(script, words, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "start", None)  # nothing is started
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        flags.run(lambda: script.main(words.split()))
    assert error.value.code == 2 and named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
