"""Commands: the finished are kept, others' settings refused, and nothing is ever deleted."""
import json
import sys
import time
from types import SimpleNamespace

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
    resume: str | None = None
    sd: bool = False
SD = dict(rounds=7)

def main():
    config = flags.parse(Config, __doc__, None, SD)
    folder = Path(config.resume or Path(config.out, config.name))
    folder.mkdir(parents=True, exist_ok=bool(config.resume))
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    if config.rounds == 1:
        raise ValueError
    if config.rounds != 2:  # 2: it ends without a verdict
        (folder / "evaluation.json").write_text("{}")

if __name__ == "__main__":
    flags.run(main)
'''

SLOW_SCRIPT = SCRIPT[:SCRIPT.index("@dataclass")] + '''
import os, time
from tqdm import tqdm

@dataclass(frozen=True)
class Config:
    needs: tuple[str, ...] = ()  # ends when these are in --out, or after a minute, unfinished
    seconds: float = 0
    name: str | None = None
    out: str = "runs"

def main():
    config = flags.parse(Config, __doc__)
    folder = Path(config.out, config.name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "threads").write_text(str(os.environ.get("OMP_NUM_THREADS")))
    bar = tqdm(total=2)
    bar.update()
    print("I am", config.name)
    if Path(config.out, config.name + " fails").exists():
        raise ValueError("the loss is not finite")
    time.sleep(config.seconds)
    end = time.time() + 60
    while not all(Path(config.out, name).exists() for name in config.needs):
        time.sleep(0.02)
        if time.time() > end:
            return
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


@pytest.fixture
def slow(script, tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(SLOW_SCRIPT)
    return str(file)


@pytest.fixture
def beside(monkeypatch):
    """Names, processes and counts, this one included, of what is started side by side."""
    names, processes, at_once, start = [], [], [], commands.start_logged

    def start_and_count(command, folder, jobs):
        names.append(folder.name)
        processes.append(start(command, folder, jobs))
        at_once.append(sum(process.poll() is None for process in processes))
        return processes[-1]
    monkeypatch.setattr(commands, "start_logged", start_and_count)
    return SimpleNamespace(names=names, processes=processes, at_once=at_once)


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


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_with_a_checkpoint_goes_on_where_it_is(script, tmp_path, capfd, jobs):
    with pytest.raises(ValueError, match="no finished run|exit code 0"):
        commands.train_missing({"a": [script, "--rounds", "2"]}, tmp_path, jobs)
    saved = json.loads((tmp_path / "a/config.json").read_text()) | {"rounds": 3}
    (tmp_path / "a/config.json").write_text(json.dumps(saved))
    (tmp_path / "a/checkpoints").mkdir()
    (tmp_path / "a/checkpoints/round-0001.safetensors").write_text("")
    with pytest.raises(ValueError, match="a was made with --beta 0.01, not 0.2"):
        commands.train_missing({"new": [script], "a": [script, "--beta", "0.2"]}, tmp_path, jobs)
    assert not (tmp_path / "new").exists()
    commands.train_missing({"a": [script, "--eval-samples", "9"]}, tmp_path, jobs)
    words = f"script.py --eval-samples 9 --resume {tmp_path / 'a'}\n"
    assert words in capfd.readouterr().out
    assert (tmp_path / "a/evaluation.json").is_file()
    assert not (tmp_path / "a-unfinished-1").exists()


def test_what_fails_is_named_with_its_command(script, started, tmp_path):
    with pytest.raises(ValueError, match="exit code 2 of the command python .*--rounds 1 --name a"):
        commands.train_missing({"a": [script, "--rounds", "1"], "b": [script]}, tmp_path)
    with pytest.raises(ValueError, match="no finished run in .*c after python .*--rounds 2"):
        commands.train_missing({"c": [script, "--rounds", "2"]}, tmp_path)
    with pytest.raises(ValueError, match="--beta must be at least 0"):
        commands.train_missing({"d": [script], "e": [script, "--beta", "-1"]}, tmp_path)
    assert len(started) == 2 and not (tmp_path / "b").exists() and not (tmp_path / "d").exists()


def test_two_runs_meet_and_each_has_its_own_log(slow, beside, tmp_path, capfd):
    out = tmp_path / "out"
    wanted = {"x_0.1": [slow, "--needs", "x_0.2/config.json"],
              "x_0.2": [slow, "--needs", "x_0.1/config.json"]}
    for _ in range(2):
        commands.train_missing(wanted, out, jobs=2)
    screen = capfd.readouterr()
    for name, words in wanted.items():
        typed = f"{commands.as_typed(words)} --name {name} --out {out}\n"
        assert (out / f"{name}.log").read_text() == f"$ {typed}I am {name}\n"  # and no bar
        assert f"$ {typed}" in screen.out
    assert beside.names == list(wanted) and "2/2" in screen.err
    assert "I am" not in screen.out + screen.err


def test_never_more_than_jobs_at_once_and_finished_ones_are_left_out(slow, beside, tmp_path):
    wanted = {name: [slow, "--seconds", "0.3"] for name in "abcde"}
    commands.train_missing({"c": wanted["c"]}, tmp_path)
    commands.train_missing(wanted, tmp_path, jobs=2)
    assert beside.names == list("abde")
    assert max(beside.at_once) == 2 and all((tmp_path / name).is_dir() for name in wanted)


def test_side_by_side_each_takes_its_share_of_the_threads(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(commands.torch, "get_num_threads", lambda: 7)
    for name, jobs, users, threads in (("alone", 1, None, "None"), ("share", 2, None, "3"),
                                       ("few", 9, None, "1"), ("kept", 2, "5", "5")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if users:
            monkeypatch.setenv("OMP_NUM_THREADS", users)
        commands.train_missing({name: [slow]}, tmp_path, jobs)
        assert (tmp_path / name / "threads").read_text() == threads


def test_after_a_failure_none_is_started_and_those_that_run_are_waited_for(
        slow, beside, tmp_path, monkeypatch):
    broken = tmp_path / "b fails"
    broken.write_text("")
    wanted = {"a": [slow, "--needs", "b was seen to fail"], "b": [slow], "c": [slow]}

    def let_a_end(seconds):
        time.sleep(seconds)
        if beside.processes[1].returncode is not None:
            (tmp_path / "b was seen to fail").write_text("")
    named = (r"^exit code 2 of the command python \S*slow.py --name b --out .*\n"
             r".*b.log ends with: slow.py: the loss is not finite$")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=named):
        patch.setattr(commands, "time", SimpleNamespace(sleep=let_a_end))
        commands.train_missing(wanted, tmp_path, jobs=2)
    assert beside.names == ["a", "b"] and (tmp_path / "a/evaluation.json").is_file()

    broken.unlink()
    commands.train_missing(wanted, tmp_path, jobs=2)  # goes on
    assert beside.names == ["a", "b", "b", "c"]
    assert (tmp_path / "b-unfinished-1/config.json").is_file()
    assert (tmp_path / "b.log").read_text().count("I am b") == 2  # a log is not lost either


def test_side_by_side_a_run_must_end_with_a_verdict(script, tmp_path):
    with pytest.raises(ValueError, match="exit code 0 of .*--rounds 2 --name a .*\n.*a.log ends"):
        commands.train_missing({"a": [script, "--rounds", "2"]}, tmp_path, jobs=2)


def test_ctrl_c_leaves_nothing_running_and_keeps_what_is_finished(
        slow, beside, tmp_path, monkeypatch):
    wanted = {name: [slow, "--needs", f"{name} may end"] for name in "abcd"}
    (tmp_path / "a may end").write_text("")

    def interrupt(seconds):
        time.sleep(seconds)
        if (tmp_path / "b/config.json").exists() and (tmp_path / "c/config.json").exists():
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(commands, "time", SimpleNamespace(sleep=interrupt))
        commands.train_missing(wanted, tmp_path, jobs=2)
    assert beside.names == ["a", "b", "c"]
    assert None not in [process.returncode for process in beside.processes]

    for name in "bcd":
        (tmp_path / f"{name} may end").write_text("")
    commands.train_missing(wanted, tmp_path, jobs=2)
    assert beside.names == ["a", "b", "c", "b", "c", "d"]
    assert (tmp_path / "c-unfinished-1").is_dir() and not (tmp_path / "a-unfinished-1").exists()


def test_flags_behind_two_dashes_are_passed_on():
    assert commands.split_flags(["--x", "--", "--y", "--"], ()) == (["--x"], ["--y", "--"])
    for word in ("--beta=1", "--learning_rate", "--no-value"):
        with pytest.raises(ValueError, match="behind --"):
            commands.split_flags(["--", word], ("--beta", "--learning-rate", "--value"))
