"""Commands: the finished are kept, others' settings refused, and nothing is ever deleted."""
import json
import sys
from pathlib import Path

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
    value: bool = True
    device: str | None = None
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
    commands.train_missing(wanted, out)
    saved = json.loads((out / "a/config.json").read_text())
    assert (saved["beta"], saved["prompts"], saved["rounds"]) == (0.1, "four stars", 3)
    assert json.loads((out / "b/config.json").read_text())["rounds"] == 7
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("$ ")]
    assert len(lines) == 2 and lines[0].startswith("$ python ")
    assert lines[0].endswith(f"script.py --beta 0.1 --prompts 'four stars' --name a --out {out}")

    commands.train_missing(wanted, out)
    assert len(started) == 2


def test_a_finished_run_with_other_settings_is_refused_before_any_start(
        script, started, tmp_path):
    commands.train_missing({"a": [script]}, tmp_path)
    for flags, named in (("--beta 0.2", "a was made with --beta 0.01, not 0.2"),
                         ("--no-value", "--value True, not False"), ("--layers a", "--layers"),
                         ("--sd", "--rounds 3, not 7")):
        with pytest.raises(ValueError, match=named):
            commands.train_missing({"new": [script], "a": [script, *flags.split()]}, tmp_path)
    assert len(started) == 1 and not (tmp_path / "new").exists()
    commands.train_missing({"a": [script, "--device", "cpu", "--layers", "a", "b"]}, tmp_path)
    with pytest.raises(ValueError, match="--gamma"):  # made by another script
        commands.check_settings(tmp_path / "a", {"gamma": 1})


def test_an_unfinished_run_is_moved_aside_with_all_that_is_in_it(script, tmp_path):
    for k in range(2):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "metrics.csv").write_text(f"precious {k}")
        commands.train_missing({"a": [script]}, tmp_path)
        assert commands.is_finished(tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / f"finished-{k}")
    for k in range(2):
        file = tmp_path / f"a-unfinished-{k + 1}" / "metrics.csv"
        assert file.read_text() == f"precious {k}"


def test_what_fails_is_named_with_its_command(script, started, tmp_path):
    with pytest.raises(ValueError, match="exit code 2 of the command python .*--rounds 1 --name a"):
        commands.train_missing({"a": [script, "--rounds", "1"], "b": [script]}, tmp_path)
    assert len(started) == 1
    with pytest.raises(ValueError, match="no finished run in .*c after python .*--rounds 2"):
        commands.train_missing({"c": [script, "--rounds", "2"]}, tmp_path)
    with pytest.raises(ValueError, match="--beta must be at least 0"):
        commands.train_missing({"d": [script], "e": [script, "--beta", "-1"]}, tmp_path)
    assert not (tmp_path / "d").exists()


def test_flags_behind_two_dashes_are_passed_on():
    assert commands.split_flags(["--x", "--", "--y", "--"], ()) == (["--x"], ["--y", "--"])
    assert commands.split_flags(["--x"], ()) == (["--x"], [])
    for word in ("--beta", "--beta=1", "--learning_rate", "--no-value"):
        with pytest.raises(ValueError, match="behind --"):
            commands.split_flags(["--", word], ("--beta", "--learning-rate", "--value"))
