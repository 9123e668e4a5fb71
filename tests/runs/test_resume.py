"""Runs that survive: killed and resumed, every script ends with the bits of a run left alone.

`KILLS=10 python -m pytest -m "" tests/runs/test_resume.py` kills each of them ten times.
"""
import os
import random
import shutil
import time
from functools import partial
from importlib import import_module

import pytest

from support import runs
from tests import processes

TINY = ("--rounds 6 --num-steps 2 --samples-per-prompt 4 --prompts-per-round 1 --eval-samples 2 "
        "--device cpu --reward compressibility --eta 0.5").split()
SCRIPTS = {  # script -> its flags
    "03_ddpo": "--baseline running --prompts bias --timestep-fraction 0.5",
    "04_dpok": "--prompts bias --value-rounds 3 --lora-rank 2 --keep-every 2",
    "experiments.sft": "--lora-rank 2 --temperature 0.01 --beta 0.1"}
KILLS = int(os.environ.get("KILLS", 1))


def main(script, words):
    import_module(script).main(words)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(script, tmp_path):
    words = [*TINY, *SCRIPTS[script].split(), "--out", str(tmp_path)]
    log = tmp_path / "log"
    began = time.monotonic()
    whole = partial(main, script, [*words, "--name", "whole"])
    assert processes.ended(whole, log) == 0, log.read_text()
    seconds = time.monotonic() - began
    wanted = processes.left_behind(tmp_path / "whole")
    rows = runs.read_rows(tmp_path / "whole/metrics.csv")
    assert rows[0]["reward"] != rows[5]["reward"]
    moments, folder, kills = random.Random(script), tmp_path / "cut", 0
    while not runs.is_finished(folder):
        command = ["--resume", str(folder)]
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [*words, "--name", folder.name]
        process = processes.start(partial(main, script, command), log)
        process.join(moments.uniform(0, seconds) if kills < KILLS else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            if folder.exists():  # where a run goes on, and which way it came there, is all the same
                folder = shutil.copytree(folder, tmp_path / f"cut{kills}")
        else:
            assert process.exitcode == 0, log.read_text()
    found = processes.left_behind(folder)
    found.pop(runs.CHECKPOINT, None)  # the last kill may have come before its end
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_a_gradient_that_is_not_finite_keeps_the_last_good_round(tmp_path):
    words = [*TINY, *"--learning-rate 1e30 --updates-per-round 1 --name a".split()]
    log = tmp_path / "log"
    assert processes.ended(partial(main, "03_ddpo", [*words, "--out", str(tmp_path)]), log) == 2
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    assert "try a smaller --learning-rate" in last
    assert last.endswith(f"go on with: python 03_ddpo.py --resume {tmp_path / 'a'}")
    assert (tmp_path / "a" / runs.CHECKPOINT).is_file()
    assert len(runs.read_rows(tmp_path / "a/metrics.csv")) > 0
