"""The scripts as users start them, and what bad input gets: one line, exit code 2, no harm."""
import csv
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent.parent
mdp, ddpo = import_module("01_mdp"), import_module("03_ddpo")
TINY = ["--rounds", "2", "--prompts-per-round", "2", "--samples-per-prompt", "3", "--num-steps",
        "3", "--eval-samples", "4", "--device", "cpu"]


def run(script, *flags, cwd):
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, text=True,
                          capture_output=True, timeout=300)


def test_rewards_from_another_directory(tmp_path):
    done = run("02_rewards.py", "--samples", "2", "--num-steps", "3", "--show", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/02_rewards/best_worst.png").stat().st_size > 5000
    assert all(name in done.stdout for name in ("compressibility", "incompressibility",
                                                "alignment"))


@pytest.mark.parametrize("flags", [
    ("--estimator", "sf", "--step-weight", "none"),
    ("--estimator", "is", "--reward", "compressibility", "--baseline", "running", "--ratio",
     "per_dim", "--clip-range", "1e-4", "--guidance-scale", "3", "--lora-rank", "2",
     "--timestep-fraction", "0.5"),
])
def test_ddpo_from_another_directory(flags, tmp_path):
    done = run("03_ddpo.py", *TINY, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "before" in done.stdout and "±" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "config.json").read_text())["rounds"] == 2
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [row["queries"] for row in rows] == ["6", "12"]
    assert all((folder / name).stat().st_size > 5000 for name in ("reward.png", "before_after.png"))
    StableDiffusionPipeline.from_pretrained(folder / "model")  # diffusers format, LoRA merged
    mdp.load_pipeline(str(folder / "model"), device="cpu")


def test_dpok_from_another_directory(tmp_path):
    done = run("04_dpok.py", *TINY, "--prompts", "tasks", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gain" in done.stdout and "path KL" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.csv", "film.png", "before_after.png", "reward.png", "model"}
    flags = ["--samples", "2", "--num-steps", "3", "--device", "cpu"]
    done = run("05_eval.py", "--runs", str(folder), *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "runs/eval_runs/table.md").read_text(encoding="utf-8")
    assert f"| {folder.name} |" in table


def test_a_log_that_cannot_hold_greek_loses_no_run(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "04_dpok.py"), *TINY, "--prompts", "tasks"], cwd=tmp_path,
        capture_output=True, timeout=300, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    assert b"KL_t, nats" in done.stdout and list(tmp_path.glob("runs/*/model"))


def test_train_is_repeatable_and_saves_what_it_trained(tmp_path):
    config = ddpo.Config(rounds=2, prompts_per_round=2, samples_per_prompt=3, num_steps=3,
                         eval_samples=4, device="cpu", out=str(tmp_path), seed=0,
                         reward="compressibility")
    first, second = ddpo.train(config), ddpo.train(config)
    assert first["folder"] != second["folder"]  # an earlier run is never overwritten
    assert [row["reward"] for row in first["rows"]] == [row["reward"] for row in second["rows"]]
    assert first["after"].tolist() == second["after"].tolist() != first["before"].tolist()
    saved = ddpo.Config(**{**config.__dict__, "model": first["folder"] + "/model"})
    pipe = mdp.load_pipeline(saved.model, device="cpu")
    again = ddpo.evaluate(pipe, ddpo.get_prompts(saved.prompts), ddpo.rewards.compressibility,
                          saved)[0]
    assert again.tolist() == first["after"].tolist()


@pytest.mark.parametrize("flags, named", [
    (["--reward", "beauty"], "--reward beauty"),
    (["--prompts", "no_such_file.txt"], "--prompts no_such_file.txt"),
    (["--prompts", "EMPTY"], "--prompts"),
    (["--prompts", "BINARY"], "--prompts BINARY"),
    (["--prompts", "CATS", "--reward", "compressibility"], "'cat'"),
    (["--num-steps", "-3"], "--num-steps"),
    (["--num-steps", "2000"], "--num-steps"),
    (["--batch-size", "0"], "--batch-size"),
    (["--samples-per-prompt", "1"], "--samples-per-prompt"),
    (["--updates-per-round", "7"], "--updates-per-round"),
    (["--estimator", "sf", "--updates-per-round", "2"], "--estimator sf"),
    (["--prompts-per-round", "1", "--samples-per-prompt", "1", "--baseline", "running"],
     "--updates-per-round"),
    (["--timestep-fraction", "0"], "--timestep-fraction"),
    (["--clip-range", "1.5"], "--clip-range"),
    (["--eta", "0"], "--eta 0"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--learning-rate", "fast"], "--learning-rate"),
    (["--name", "taken"], "taken"),
    (["--out", "A_FILE"], "A_FILE"),
    (["--model", "no_such_model"], "--model no_such_model"),
    (["--device", "abacus"], "--device abacus"),
    (["--rounds"], "--rounds"),
    (["--seed", "x"], "--seed"), (["--seed", "-1"], "--seed"), (["--seed", str(2**30)], "--seed"),
])
def test_bad_input_is_one_line_naming_the_flag(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("EMPTY").write_text("\n \n")
    Path("CATS").write_text("a red circle\na cat\n")
    Path("BINARY").write_bytes(bytes(range(128, 256)))
    Path("A_FILE").write_text("")
    Path("runs/taken").mkdir(parents=True)
    Path("runs/taken/config.json").write_text("precious")
    with pytest.raises(SystemExit) as exit:
        mdp.run_main(lambda: ddpo.main([*TINY, *flags]))
    said = capsys.readouterr().err.strip()
    assert exit.value.code == 2 and named in said.splitlines()[-1], said
    complaints = [line for line in said.splitlines() if ".py:" in line or "error" in line.lower()]
    assert len(complaints) == 1, said
    assert [p.name for p in Path("runs").iterdir()] == ["taken"]
    assert Path("runs/taken/config.json").read_text() == "precious"


@pytest.mark.parametrize("values, named", [([float("nan")] * 4, "nan"), ([1.0], "1 numbers for 4")])
def test_a_broken_reward_stops_the_run_before_it_starts(values, named, tmp_path, monkeypatch,
                                                        capsys):
    def broken(images, prompts):
        return values

    monkeypatch.setitem(ddpo.rewards.REWARDS, "broken", broken)
    with pytest.raises(SystemExit) as exit:
        mdp.run_main(lambda: ddpo.main([*TINY, "--reward", "broken", "--out",
                                        str(tmp_path / "runs")]))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and ": reward broken" in said and named in said
    left = [file.name for file in (tmp_path / "runs").glob("*")]
    assert left == (["bad_reward.png"] if "nan" in named else [])  # the picture, and no run
