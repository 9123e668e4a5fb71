"""Runs that survive: killed and resumed, every script ends with the bits of a run left alone.

`KILLS=10 python -m pytest tests/runs/test_resume.py` kills chapters 3 and 4 ten times each.
"""
import csv
import json
import os
import random
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from support import checkpoints, figures, flags, models, runs, training

TINY = ("--rounds 6 --num-steps 2 --samples-per-prompt 4 --prompts-per-round 1 --eval-samples 2 "
        "--device cpu --reward compressibility --eta 0.5").split()
SCRIPTS = {  # name -> script, its flags
    "ddpo": ("03_ddpo", "--baseline running --prompts bias --timestep-fraction 0.5"),
    "dpok": ("04_dpok", "--prompts bias --value-rounds 3 --lora-rank 2 --keep-every 2"),
    "penalties": ("experiments.penalties", "--target-kl 0.5 --kl reward --lora-rank 2"),
    "sft": ("experiments.sft", "--lora-rank 2 --temperature 0.01 --beta 0.1")}
KILLS = int(os.environ.get("KILLS", 1))


class Killed(BaseException):
    """Nothing in the code catches this: as little is done after it as after a SIGKILL."""


def left_behind(folder):
    """Path -> what is in a finished run's folder; without times, names and drawn figures."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path.name in ("reward.png", "film.png", "before_after.png"):
            continue
        content = path.read_bytes()
        if path.name == "metrics.csv":
            rows = csv.DictReader(content.decode().splitlines())
            content = [{key: row[key] for key in row if key != "seconds"} for row in rows]
        if path.name in ("config.json", "evaluation.json"):
            saved = json.loads(content)
            content = {key: saved[key] for key in saved if key not in ("seconds", "name", "out")}
        found[path.relative_to(folder).as_posix()] = content
    return found


def differing(folder, wanted):
    """Names of files that are not the same, or only in one of the two."""
    found = left_behind(folder)
    return [name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)]


def die_at(monkeypatch, module, name, k):
    """The k-th call of a function is the last thing that the process does."""
    calls, function = [], getattr(module, name)

    def count(*a, **named):
        calls.append(name)
        if len(calls) == k:
            raise Killed
        return function(*a, **named)
    monkeypatch.setattr(module, name, count)


@pytest.mark.parametrize("name", list(SCRIPTS) if KILLS > 3 else ["ddpo", "dpok"])
def test_every_script_goes_on_as_if_nothing_had_happened(name, tmp_path, monkeypatch, capsys):
    script, words = SCRIPTS[name]
    main = import_module(script).main
    words = [*TINY, *words.split(), "--out", str(tmp_path)]
    for figure in ("before_after", "curves", "sheet"):
        monkeypatch.setattr(figures, figure, lambda *a: None)
    wanted = left_behind(main([*words, "--name", "whole"]).folder)
    assert wanted["metrics.csv"][0] | {"round": "", "queries": ""} != (
        wanted["metrics.csv"][5] | {"round": "", "queries": ""})  # something was learned
    folder = tmp_path / "cut"
    start = [*words, "--name", "cut"]
    for module, function, k in ((training, "optimizer_step", 8), (runs, "append_row", 3),
                                (models, "save_trained", 1)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            die_at(patch, module, function, k)
            main(start)
        start = ["--resume", str(folder)]
    main(start)
    assert differing(folder, wanted) == []
    assert json.loads((folder / "config.json").read_text())["resume"] is None
    with pytest.raises(ValueError, match="this run is finished; --model"):
        main(start)


def test_a_gradient_that_is_not_finite_keeps_the_last_good_round(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["03_ddpo.py"])
    words = [*TINY, *"--learning-rate 1e30 --updates-per-round 1 --name a --out".split(),
             str(tmp_path)]
    with pytest.raises(SystemExit) as exit:
        flags.run(lambda: import_module("03_ddpo").main(words))
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2 and "--learning-rate" in last
    assert last.endswith(f"go on with: python 03_ddpo.py --resume {tmp_path / 'a'}")
    rounds_done = len(runs.read_rows(tmp_path / "a/metrics.csv"))
    assert checkpoints.read_newest(tmp_path / "a")[1]["round"] == rounds_done > 0


def start_and_wait(script, words, folder):
    """The process of a script on one thread, as it begins the work, after seconds of imports."""
    log = folder.parent / "log.txt"
    file = str(models.HERE / f"{script}.py")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", file, *words], stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    while process.poll() is None and "clip ±" not in log.read_text(encoding="utf-8"):
        time.sleep(0.01)
    return process, log


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpo", "dpok"] if KILLS > 3 else ["dpok"])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(name, tmp_path):
    script, words = SCRIPTS[name]
    words = [*TINY, *words.split(), "--out", str(tmp_path)]
    process, log = start_and_wait(script, [*words, "--name", "whole"], tmp_path / "whole")
    began = time.time()
    assert process.wait() == 0, log.read_text()
    seconds = time.time() - began
    wanted = left_behind(tmp_path / "whole")
    moments, folder, kills, finished = random.Random(7), tmp_path / "cut", 0, []
    while True:
        command = ["--resume", str(folder)]
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [*words, "--name", "cut"]
        process, log = start_and_wait(script, command, folder)
        if kills < KILLS:
            try:
                process.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                print(f"kill {kills}: {[path.name for path in (folder / 'checkpoints').glob('*')]}")
                continue
        if process.wait() == 0:
            finished.append(folder)
            assert differing(folder, wanted) == []
            assert not (folder / "checkpoints").exists()
            if kills == KILLS:
                break
            shutil.rmtree(folder)  # and once more from its beginning
        else:  # it was killed after its last file
            assert "this run is finished" in log.read_text(encoding="utf-8")
            shutil.rmtree(folder)
    print(f"{kills} kills, {len(finished)} times to the end")
