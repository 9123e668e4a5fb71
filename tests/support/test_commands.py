"""Commands: the finished are kept, others' settings refused, and nothing is ever deleted."""
import json
import sys

import pytest

from support import commands

SCRIPT = '''"""A script that trains nothing."""
import json, sys
from dataclasses import asdict, dataclass
from pathlib import Path
from support import flags

@dataclass(frozen=True)
class Config:
    rounds: int = 3
    beta: float = 0.01
    prompts: str = "bias"
    layers: tuple[str, ...] = ("a", "b")
    device: str | None = None
    batch_size: int = 1
    eval_samples: int = 2
    name: str | None = None
    out: str = "runs"
    sd: bool = False
SD = dict(rounds=7)

def main():
    config = flags.parse(Config, __doc__, None, SD)
    folder = Path(config.out, config.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    if config.rounds == 1:
        raise ValueError
    if config.rounds != 2:  # 2: it ends without a verdict
        (folder / "evaluation.json").write_text("{}")

if __name__ == "__main__":
    flags.run(main)
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(commands.HERE))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return str(file)


@pytest.fixture
def started(monkeypatch):
    """The commands that are started; they still run."""
    words, start = [], commands.start
    monkeypatch.setattr(commands, "start", lambda command: words.append(command) or start(command))
    return words


def test_missing_runs_are_started_once_and_as_they_are_printed(script, started, tmp_path, capfd):
    out = tmp_path / "out"
    wanted = {"a": [script, "--beta", "0.1", "--prompts", "four stars"], "b": [script, "--sd"]}
    for _ in range(2):
        commands.train_missing(wanted, out)
    assert len(started) == 2
    saved = json.loads((out / "a/config.json").read_text())
    assert (saved["beta"], saved["prompts"], saved["rounds"]) == (0.1, "four stars", 3)
    printed = f"script.py --beta 0.1 --prompts 'four stars' --name a --out {out}\n"
    assert printed in capfd.readouterr().out


def test_a_finished_run_with_other_settings_is_refused_before_any_start(script, started, tmp_path):
    commands.train_missing({"a": [script]}, tmp_path)
    for flags, named in (("--beta 0.2", "a was made with --beta 0.01, not 0.2"),
                         ("--layers a", "--layers"), ("--sd", "--rounds 3, not 7")):
        with pytest.raises(ValueError, match=named):
            commands.train_missing({"new": [script], "a": [script, *flags.split()]}, tmp_path)
    alike = "--device cpu --batch-size 9 --eval-samples 9 --layers a b".split()
    commands.train_missing({"a": [script, *alike]}, tmp_path)
    assert len(started) == 1


def test_an_unfinished_run_is_moved_aside_with_all_that_is_in_it(script, tmp_path):
    (tmp_path / "a").mkdir()
    for k in (1, 2):
        (tmp_path / "a" / "metrics.csv").write_text(f"precious {k}")
        commands.train_missing({"a": [script]}, tmp_path)
        assert (tmp_path / f"a-unfinished-{k}" / "metrics.csv").read_text() == f"precious {k}"
        (tmp_path / "a" / "evaluation.json").unlink()


def test_what_fails_is_named_with_its_command(script, started, tmp_path):
    with pytest.raises(ValueError, match="exit code 2 of the command python .*--rounds 1 --name a"):
        commands.train_missing({"a": [script, "--rounds", "1"], "b": [script]}, tmp_path)
    with pytest.raises(ValueError, match="no finished run in .*c after python .*--rounds 2"):
        commands.train_missing({"c": [script, "--rounds", "2"]}, tmp_path)
    with pytest.raises(ValueError, match="--beta must be at least 0"):
        commands.train_missing({"d": [script], "e": [script, "--beta", "-1"]}, tmp_path)
    assert len(started) == 2 and not (tmp_path / "b").exists() and not (tmp_path / "d").exists()


def test_flags_behind_two_dashes_are_passed_on():
    assert commands.split_flags(["--x", "--", "--y", "--"], ()) == (["--x"], ["--y", "--"])
    for word in ("--beta=1", "--learning_rate", "--no-value"):
        with pytest.raises(ValueError, match="behind --"):
            commands.split_flags(["--", word], ("--beta", "--learning-rate", "--value"))
