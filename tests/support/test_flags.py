"""Command line: ranges of numbers, --sd, --resume, and what bad input gets."""
import json
import math
from dataclasses import asdict, dataclass, make_dataclass, replace
from importlib import import_module

import pytest

from support import flags, runs

SCRIPTS = ("01_mdp", "02_rewards", "03_ddpo", "04_dpok", "05_eval", "experiments.sft",
           "experiments.flow")


@pytest.mark.parametrize("name, allowed, refused", [
    ("eta", (1e-9, 1), (0, 1.01, math.nan)), ("rounds", (1, 10**6), (0, 10**6 + 1)),
    ("clip_range", (0, 0.999), (1,)), ("timestep_fraction", (0.01, 1), (0, 1.01)),
    ("seed", (0, 2**31 - 1), (-1, 2**31)), ("learning_rate", (0.0, 1e6), (-1e-9, math.inf)),
    ("eval_samples", (2,), (1,)), ("num_steps", (1, 1000), (0, 1001)),
    ("guidance_scale", (1, 7.5), (0, 0.99)), ("max_grad_norm", (1e-9, math.inf), (0,)),
    ("advantage_clip", (0, math.inf), (-1,)), ("rounds", (None, 1), (0,)),
    ("beta", (0.0, (0.0, 0.1)), (-1e-9, (0.1, -1.0), math.nan)),
    ("lora_targets", (("a",),), ((),)), ("prompts", ("a b",), ("",))])
def test_both_ends_of_a_range_are_allowed_and_nothing_beyond(name, allowed, refused):
    Holder = make_dataclass("Holder", [name])
    for value in allowed:
        flags.check(Holder(value))
    for value in refused:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} (must be|is empty)"):
            flags.check(Holder(value))


@pytest.mark.parametrize("script", SCRIPTS)
def test_sd_makes_its_settings_the_defaults_and_a_flag_still_overrides(script):
    module = import_module(script)
    assert flags.parse(module.Config, "", [], module.SD) == module.Config()
    expected = replace(module.Config(), **module.SD, sd=True)
    assert flags.parse(module.Config, "", ["--sd"], module.SD) == expected
    words = ["--num-steps", "7", "--sd"]
    assert flags.parse(module.Config, "", words, module.SD) == replace(expected, num_steps=7)


# ---- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error, code, words", [
    (ValueError("--rounds: no"), 2, "--rounds: no"), (FileNotFoundError("f"), 2, "f"),
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"), 2, "--batch-size"),
    (MemoryError(), 2, "--batch-size"), (KeyboardInterrupt(), 130, "stopped")])
@pytest.mark.parametrize("folder", (None, "runs/a b"))
def test_bad_input_and_what_else_can_end_a_run_is_one_line_that_says_how_to_go_on(
        folder, error, code, words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/script.py", "--rounds", "3"])

    def main():
        flags.unfinished = folder
        raise error

    with pytest.raises(SystemExit) as exit:
        flags.run(main)
    line = capsys.readouterr().err
    assert exit.value.code == code
    assert line.startswith("script.py: ") and line.count("\n") == 1 and words in line
    go_on = "go on with: python some/script.py --resume 'runs/a b'\n"
    assert line.endswith(go_on) == bool(folder)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("a bug")])
def test_run_lets_a_bug_show_where_it_is(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        flags.run(main)


def test_a_word_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="no text in UTF-8"):
        runs.parse(Training, "", ["--model", "\udcff"])


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for out, named in (("file", "file"), ("file/below", "file"), ("/proc/runs", "/proc/runs")):
        with pytest.raises(OSError, match=str(tmp_path / named)):
            runs.parse(Training, "", ["--out", str(tmp_path / out)])
    runs.parse(Training, "", ["--out", str(tmp_path / "a/b")])
    assert (tmp_path / "a/b").is_dir()


# ---- resume ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    model: str = "tiny_sd"  # what is loaded
    rounds: int = 3  # how many
    eta: float = 1.0  # noise
    layers: tuple[str, ...] = ("a",)  # which
    max_grad_norm: float = math.inf  # how long
    device: str | None = None  # where
    name: str | None = None  # what it is called
    out: str = "runs"  # where it lies
    resume: str | None = None  # folder
    sd: bool = False  # the full model


SD = dict(model="full", rounds=50)


def begin(folder, **settings):
    folder.mkdir()
    config = Training(**settings)
    (folder / "config.json").write_text(json.dumps(asdict(config) | {"method": "m"}))
    return config


def test_resume_takes_the_runs_own_flags_and_none_that_change_it(tmp_path):
    folder = tmp_path / "a run"
    config = begin(folder, rounds=50, layers=("b", "c"), model="full", sd=True, eta=0.1)
    resumed = replace(config, resume=str(folder))
    words = ["--resume", str(folder)]
    assert runs.parse(Training, "", words, SD) == resumed
    assert runs.parse(Training, "", [f"--resume={folder}", "--sd", "--eta", "0.1"], SD) == resumed
    elsewhere = runs.parse(Training, "", [*words, "--device", "cuda"])
    assert elsewhere == replace(resumed, device="cuda")
    for more, named in (("--rounds 51", "--rounds 50, not 51"), ("--layers b", "--layers"),
                        ("--no-sd", "--sd True, not False"),
                        ("--max-grad-norm 1", "--max-grad-norm inf, not 1.0")):
        with pytest.raises(ValueError, match=f"{folder} was made with .*{named}.*: it goes on as"):
            runs.parse(Training, "", [*words, *more.split()], SD)


@pytest.mark.parametrize("text", ('{"model', "[1]", None))
def test_resume_refuses_what_is_no_run_of_this_script_or_finished(text, tmp_path):
    begin(tmp_path / "run")
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: not the settings of a run"):
        runs.parse(Training, "", ["--resume", str(tmp_path)])
    Other = make_dataclass("Other", [("resume", str | None, None)], frozen=True)
    with pytest.raises(ValueError, match="--resume .*run: no run of this script"):
        runs.parse(Other, "", ["--resume", str(tmp_path / "run")])
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="this run is finished; --model"):
        runs.parse(Training, "", ["--resume", str(tmp_path / "run")])
