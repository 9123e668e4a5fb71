"""What the README tells readers to run works as it is written there.

The commands come from the page: its bash blocks, and `inline code` that starts with a program.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from support import flags

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in ("README.md", "assignments/README.md") if (ROOT / page).is_file()]
PROGRAMS = ("python ", "python3 ", "pytest ", "torchrun ", "pip ")
WHOLE = {"--votes votes_*.json": "python 05_eval.py --votes votes_*.json"}  # begun in a sentence
TINY = ("--rounds 1 --prompts-per-round 2 --samples-per-prompt 2 --num-steps 2 --eval-samples 2 "
        "--film-pictures 1")
APPENDED = {  # beginning of a command -> what makes it short, behind what the page says
    "python 02_rewards.py --help": "",
    "python 03_ddpo.py": TINY,
    "torchrun --nproc-per-node 2 03_ddpo.py": TINY,
    "python experiments/overoptimization.py --only writing":
        "--rounds 1 --samples-per-prompt 8 -- --num-steps 2 --eval-samples 2",
    "python 05_eval.py --ballot":  # by itself it trains six models; these two are there by then
        "--num-steps 2 --out runs/eval --runs runs/ddpo_is_alignment_location*",
    "python 05_eval.py --votes": "",
    "python assignments/make.py": "",
    "python assignments/grade.py": "--exercises 3.2",
    "python assignments/mutants.py": "03_ddpo.ddpo_sf_objective",
    "python 01_mdp.py": "",
    "python 02_rewards.py": "--rewards compressibility --samples 2 --num-steps 2",
    "python 04_dpok.py": TINY,
    "python 05_eval.py --quick":  # by itself it trains six models, too
        "--prompts location --num-steps 2 --samples 4 --runs runs/ddpo_is_alignment_location",
    "pytest tests/equations": "--collect-only",  # the suite that this test is in runs them anyway
    "pytest --equations": ""}
NOT_RUN = {  # beginning of a command -> why it is not run; flags of our scripts are parsed
    "python3 -m venv": "it installs",
    ". .venv/bin/activate": "it installs",
    "pip install": "it installs",
    "python -m pytest": "it would run this test",
    "python 03_ddpo.py --sd": "it downloads gigabytes",
    "python 04_dpok.py --sd": "it downloads gigabytes"}


def parts_of(page):
    """(language, block, inline code) of each piece of code; what a piece is not is empty."""
    text = (ROOT / page).read_text(encoding="utf-8")
    parts = re.findall(r"```(\w*)\n(.*?)```|`([^`]+)`", text, re.DOTALL)
    return [(language, block, " ".join(inline.split())) for language, block, inline in parts]


def commands_of(page):
    """Every command on a page, once and in order; && stands between two of them."""
    found = []
    for language, block, inline in parts_of(page):
        for line in (WHOLE.get(inline, inline), *block.replace("\\\n", "").splitlines()):
            for command in map(str.strip, f" {line}".partition(" #")[0].split("&&")):
                if command.startswith(PROGRAMS) or (command and language == "bash"):
                    found.append(command)
    return list(dict.fromkeys(found))


def entry_of(command):
    """The longest beginning in the two tables that fits a command, or None."""
    fitting = [start for start in APPENDED | NOT_RUN if f"{command} ".startswith(f"{start} ")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_has_an_entry_and_every_flag_exists(page, capsys):
    known = {"--help", "--equations"}
    for name in (*(script.stem for script in ROOT.glob("0*.py")), "assignments.make",
                 "assignments.grade"):
        known |= {flags.flag(field.name) for field in fields(import_module(name).Config)}
    alone = [inline for _, _, inline in parts_of(page) if inline.startswith("--")]
    assert set(re.findall(r"--[a-z-]+", " ".join(alone))) <= known, f"flags alone in {page}"
    for command in commands_of(page):
        assert entry_of(command), (
            f"{page} says `{command}`: add how it begins to APPENDED in tests/test_readme.py, with "
            "flags that make it short, or to NOT_RUN with the reason why no test can run it")
        script = re.match(r"(?:python3?|torchrun .*?) (\S+)\.py( .*|$)", command)
        if script and not script[1].startswith("assignments/"):  # these are quick, and run whole
            module = import_module(script[1].replace("/", "."))
            sd, quick = getattr(module, "SD", None), getattr(module, "QUICK", None)
            words = shlex.split(script[2].partition(" -- ")[0])
            try:
                flags.parse(module.Config, "", words, sd, quick)
            except SystemExit as exit:  # which is 0 after --help
                assert exit.code == 0, f"{page} says `{command}`:\n{capsys.readouterr().err}"


def test_every_entry_belongs_to_a_command():
    used = {entry_of(command) for page in PAGES for command in commands_of(page)}
    assert (APPENDED | NOT_RUN).keys() - used == set()


@pytest.mark.slow
def test_every_command_works_as_it_is_written(tmp_path):
    """In a copy of the repository, one after the other: some need what an earlier one has made."""
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(
        ".*", "runs", "__pycache__"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    python = "\n".join(block for page in PAGES for language, block, _ in parts_of(page)
                       if language == "python")
    commands = dict.fromkeys(command for page in PAGES for command in commands_of(page))
    for command in [command for command in commands if entry_of(command) in APPENDED]:
        for file in re.findall(r"(\w+\.py):\w+", command):  # a reader's own, as the page has it
            (copy / file).write_text(python, encoding="utf-8")
        if "votes_*.json" in command:
            write_votes(copy)
        typed = f"{command} {APPENDED[entry_of(command)]}"
        done = subprocess.run(["bash", "-c", typed], cwd=copy, env=env, text=True, timeout=300,
                              capture_output=True)
        assert done.returncode == 0, f"A page says `{typed}`:\n{done.stdout[-999:]}{done.stderr}"


def write_votes(folder):
    """What a rater of the ballot in runs/eval sends back."""
    key = json.loads((folder / "runs/eval/ballot_key.json").read_text(encoding="utf-8"))
    votes = [{"pair": i, "alignment": "left", "quality": "tie"} for i in range(len(key["pairs"]))]
    form = {"ballot": key["ballot"], "rater": "A", "votes": votes}
    (folder / "votes_A.json").write_text(json.dumps(form), encoding="utf-8")
