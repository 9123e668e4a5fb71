"""Commands: the finished are kept, others' settings refused, and nothing is ever deleted."""
import json

import pytest

from support import commands

SCRIPT = '''"""A script that trains nothing."""
import json, os, time
from dataclasses import asdict, dataclass
from pathlib import Path
import tyro

@dataclass(frozen=True)
class Config:
    rounds: int = 3
    beta: float = 0.01
    seed: int = 0
    prompts: str = "bias"
    layers: tuple[str, ...] = ("a", "b")
    meets: str | None = None  # a run in --out that must have begun
    outlives: str | None = None  # one whose process must have ended
    device: str | None = None
    eval_samples: int = 2
    name: str | None = None
    out: str = "runs"
    resume: str | None = None
    sd: bool = False
SD = dict(rounds=7)

def is_running(folder):
    try:
        os.kill(int((folder / "pid").read_text()), 0)
    except ProcessLookupError:
        return False
    return True

def main():
    config = tyro.cli(Config)
    folder = Path(config.resume or Path(config.out, config.name))
    folder.mkdir(parents=True, exist_ok=bool(config.resume))
    (folder / "config.json").write_text(json.dumps(asdict(config) | {"resume": None}))
    (folder / "pid.part").write_text(str(os.getpid()))
    (folder / "pid.part").rename(folder / "pid")
    print("I am", folder.name, "with threads:", os.environ.get("OMP_NUM_THREADS"))
    for other in (config.meets, config.outlives):
        while other and not Path(config.out, other, "pid").exists():
            time.sleep(0.02)
    while config.outlives and is_running(Path(config.out, config.outlives)):
        time.sleep(0.02)
    if config.rounds == 1:
        raise ValueError("the loss is not finite")
    (folder / "metrics.csv").write_text("queries" + "\\n4" * config.rounds)
    (folder / "evaluation.json").write_text("{}")

if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("scripts") / "script_of_this_test.py"
    file.write_text(SCRIPT)
    return str(file)


def finished(folder):
    return sorted(path.parent.name for path in folder.glob("*/evaluation.json"))


def test_missing_runs_are_started_once_and_as_they_are_printed(script, tmp_path, capfd):
    out = tmp_path / "out"
    wanted = {"a": [script, "--beta", "0.1", "--prompts", "four stars"], "b": [script]}
    commands.train_missing(wanted, out)
    saved = json.loads((out / "a/config.json").read_text())
    assert (saved["beta"], saved["prompts"], saved["rounds"]) == (0.1, "four stars", 3)
    printed = capfd.readouterr().out
    assert f"test.py --beta 0.1 --prompts 'four stars' --name a --out {out}\n" in printed
    assert "I am a" in printed and finished(out) == ["a", "b"]
    commands.train_missing(wanted, out)
    assert capfd.readouterr().out == ""


def test_a_finished_run_with_other_settings_is_refused_before_any_start(script, tmp_path):
    commands.train_missing({"a": [script]}, tmp_path)
    for flags, named in (("--beta 0.2", "a was made with --beta 0.01, not 0.2"),
                         ("--layers a", "--layers"), ("--seed 1", "--seed 0, not 1"),
                         ("--sd", "--rounds 3, not 7")):
        with pytest.raises(ValueError, match=named):
            commands.train_missing({"new": [script], "a": [script, *flags.split()]}, tmp_path)
    with pytest.raises(ValueError, match="--beta must be at least 0"):
        commands.train_missing({"new": [script], "b": [script, "--beta", "-1"]}, tmp_path)
    commands.train_missing({"a": [script, *"--device cpu --eval-samples 9".split()]}, tmp_path)
    assert finished(tmp_path) == ["a"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_unfinished_run_goes_on_but_not_with_other_settings(script, tmp_path, capfd, jobs):
    with pytest.raises(ValueError, match="exit code 1 of the command python .* --name cut .*"):
        commands.train_missing({"cut": [script, "--rounds", "1"]}, tmp_path, jobs)
    config = tmp_path / "cut" / "config.json"
    config.write_text(config.read_text().replace('"rounds": 1', '"rounds": 3'))
    with pytest.raises(ValueError, match="cut was made with --beta 0.01, not 0.2"):
        commands.train_missing({"cut": [script, "--beta", "0.2"]}, tmp_path, jobs)
    commands.train_missing({"cut": [script, "--eval-samples", "9"], "new": [script]}, tmp_path,
                           jobs)
    place = "" if jobs == 1 else f" >> {tmp_path / 'cut.log'}"
    assert f"--eval-samples 9 --resume {tmp_path / 'cut'}{place}\n" in capfd.readouterr().out
    assert finished(tmp_path) == ["cut", "new"]


def test_side_by_side_each_has_its_log_and_its_share_of_the_threads(script, tmp_path, monkeypatch,
                                                                    capfd):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(commands.torch, "get_num_threads", lambda: 7)
    wanted = {"x": [script, "--meets", "y"], "y": [script, "--meets", "x"]}
    commands.train_missing(wanted, tmp_path, jobs=2)  # neither would end without the other
    printed, bar = capfd.readouterr()
    assert "6/6" in bar  # rounds of both
    for name, words in wanted.items():
        typed = f"$ {commands.as_typed(words)} --name {name} --out {tmp_path}"
        log = tmp_path / f"{name}.log"
        assert log.read_text() == f"{typed}\nI am {name} with threads: 3\n"
        assert f"{typed} >> {log}\n" in printed and f"I am {name}" not in printed
    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # the reader's own choice
    commands.train_missing({"z": [script]}, tmp_path, jobs=2)
    assert "threads: 9" in (tmp_path / "z.log").read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_a_failure_none_is_started_and_those_that_run_are_waited_for(script, tmp_path, jobs):
    wanted = {"b": [script, "--rounds", "1"], **{name: [script] for name in "cdefg"}}
    if jobs > 1:
        wanted = {"a": [script, "--outlives", "b"], **wanted}
    log = ": ValueError: the loss is not finite .*in .*b.log" if jobs > 1 else "$"
    with pytest.raises(ValueError, match=f"exit code 1 of .*--rounds 1 --name b .*{log}"):
        commands.train_missing(wanted, tmp_path, jobs)
    assert finished(tmp_path) == ["a"] * (jobs > 1) and not (tmp_path / "c").exists()


def test_a_flag_that_is_passed_on_does_not_replace_the_runs_own(script, tmp_path):
    for words in ("--beta 1 --beta=2", "--sd --no_sd", "--name other"):
        with pytest.raises(ValueError, match="behind --"):
            commands.train_missing({"a": [script, *words.split()]}, tmp_path)
