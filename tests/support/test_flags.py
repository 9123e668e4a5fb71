"""Command line: ranges of numbers, --sd, and what bad input gets."""
import json
import math
import re
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from importlib import import_module

import pytest

from support import flags


@dataclass(frozen=True)
class Config:
    model: str = "tiny_sd"  # what is loaded
    rounds: int = 3  # how many
    eta: float = 1.0  # noise
    sd: bool = False  # the full model


SD = dict(model="full", rounds=50)
INFINITE = math.inf


@pytest.mark.parametrize("name, allowed, refused", [
    ("eta", (0, 1), (-0.01, 1.01, math.nan)), ("rounds", (1, 10**6), (10**6 + 1,)),
    ("alpha", (1e30,), (1.1e30,)), ("clip_range", (0, 0.999), (1,)),
    ("timestep_fraction", (0.01, 1), (0, 1.01)), ("seed", (0, 2**31 - 1), (-1, 2**31)),
    ("updates_per_round", (1, 1000), (0, INFINITE)), ("learning_rate", (0, 1e6), (-1e-9, INFINITE)),
    ("eval_samples", (2,), (1,)), ("samples", (1,), (0,)), ("num_steps", (1, 1000), (0, 1001)),
    ("max_grad_norm", (1e-9, INFINITE), (0,)), ("advantage_clip", (0, INFINITE), (-1,)),
    ("rounds", (None, 1), (0,)), ("guidance_scale", (0, 0.5), (-1,)),
    ("beta", (0, (0.0, 0.1)), (-1e-9, (0.1, -1), math.nan))])
def test_both_ends_of_a_range_are_allowed_and_nothing_beyond(name, allowed, refused):
    Holder = make_dataclass("Holder", [name])
    for value in allowed:
        flags.check(Holder(value))
    for value in refused:
        with pytest.raises(ValueError, match="--" + name.replace("_", "-") + " must be"):
            flags.check(Holder(value))


CHAPTERS = ("01_mdp", "02_rewards", "03_ddpo", "04_dpok", "05_eval")
EXPERIMENTS = ("early_stopping", "frontier", "lemma", "overoptimization", "penalties",
               "prompt_alignment", "samples", "sft", "sweep", "variance")


@pytest.mark.parametrize("script", [*CHAPTERS, *(f"experiments.{name}" for name in EXPERIMENTS)])
def test_every_number_of_a_script_has_a_limit_and_sd_sets_what_it_says(script):
    module = import_module(script)
    for field in fields(module.Config):
        if any(number in re.split(r"\W", str(field.type)) for number in ("int", "float")):
            assert field.name in flags.LIMITS
    if script in CHAPTERS[:4]:
        config = flags.parse(module.Config, "", ["--sd"], module.SD)
        assert {name: getattr(config, name) for name in module.SD} == module.SD and config.sd


def test_sd_makes_its_settings_the_defaults_and_a_flag_still_overrides():
    assert flags.parse(Config, "", [], SD) == Config()
    words = ["--model", "tiny_sd", "--eta", "0.5", "--sd"]
    assert flags.parse(Config, "", words, SD) == Config(rounds=50, eta=0.5, sd=True)


@pytest.mark.parametrize("error", [ValueError("--rounds: no"), FileNotFoundError("--rounds: no")])
def test_run_turns_bad_input_into_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/script.py"])

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        flags.run(main)
    assert exit.value.code == 2 and capsys.readouterr().err == "script.py: --rounds: no\n"


def test_a_word_that_is_no_text_and_a_flag_with_no_word_behind_it_are_refused():
    with pytest.raises(ValueError, match="no text in UTF-8"):
        flags.parse(Config, "", ["--model", "\udcff"])
    with pytest.raises(ValueError, match="--rewards: at least one"):
        flags.check(make_dataclass("Holder", ["rewards"])(()))


@pytest.mark.parametrize("error, code, message", [
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"), 2, "--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--batch-size"),
    (MemoryError(), 2, "--batch-size"), (KeyboardInterrupt(), 130, "stopped")])
def test_run_says_in_one_line_that_memory_or_patience_has_ended(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        flags.run(main)
    words = capsys.readouterr().err.strip()
    assert exit.value.code == code and message in words and "\n" not in words


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("a bug")])
def test_run_lets_a_bug_show_where_it_is(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        flags.run(main)


def test_the_full_models_settings_are_those_of_the_papers():
    rewards, ddpo, dpok = (import_module(name).SD for name in CHAPTERS[1:4])
    assert rewards.items() >= dict(num_steps=50, guidance_scale=5.0,
                                   clip="openai/clip-vit-large-patch14").items()
    assert ddpo.items() >= dict(
        prompts_per_round=256, samples_per_prompt=1, updates_per_round=4, num_steps=50,
        guidance_scale=5.0, learning_rate=3e-4, clip_range=1e-4, ratio="per_dim",
        step_weight="none", baseline="running").items()
    assert dpok.items() >= dict(
        samples_per_prompt=10, updates_per_round=5, num_steps=50, guidance_scale=7.5,
        learning_rate=1e-5, lora_rank=4, clip_range=1e-4, ratio="per_dim", step_weight="none",
        alpha=10.0, beta=0.01).items()


@dataclass(frozen=True)
class Training(Config):
    layers: tuple[str, ...] = ("a",)  # which
    max_grad_norm: float = INFINITE  # how long
    device: str | None = None  # where
    name: str | None = None  # what it is called
    resume: str | None = None  # folder


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
    assert flags.parse(Training, "", words, SD) == resumed
    assert flags.parse(Training, "", [f"--resume={folder}", "--sd", "--eta", "0.1"], SD) == resumed
    assert flags.parse(Training, "", [*words, "--device", "cuda"]) == replace(resumed,
                                                                             device="cuda")
    for more, named in (("--rounds 51", "--rounds 50, not 51"), ("--name b", "--name None, not b"),
                        ("--layers b", "--layers"), ("--no-sd", "--sd True, not False"),
                        ("--max-grad-norm 1", "--max-grad-norm inf, not 1.0")):
        with pytest.raises(ValueError, match=f"--resume .*{named}"):
            flags.parse(Training, "", [*words, *more.split()], SD)


def test_resume_refuses_what_is_no_run_of_this_script(tmp_path):
    begin(tmp_path / "run")
    for name, text in (("torn", '{"model'), ("list", "[1]"), ("empty", None)):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
    for name in ("torn", "list", "empty", "nowhere"):
        with pytest.raises(ValueError, match=f"--resume .*{name}: no run"):
            flags.parse(Training, "", ["--resume", str(tmp_path / name)])
    Other = make_dataclass("Other", [("beta", float, 0.5)], bases=(Training,), frozen=True)
    with pytest.raises(ValueError, match="--resume .*run: another script began this run"):
        flags.parse(Other, "", ["--resume", str(tmp_path / "run")])


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, "stopped"), (ValueError("the gradient is nan"), 2,
                                            "the gradient is nan")])
def test_what_cuts_a_training_short_is_one_line_that_says_how_to_go_on(error, code, words, capsys,
                                                                       monkeypatch):
    monkeypatch.setattr("sys.argv", ["some/script.py", "--rounds", "3"])

    def main(folder):
        if folder:
            flags.unfinished = folder
        raise error

    go_on = "; what it has finished is kept, go on with: python some/script.py --resume 'runs/a b'"
    for folder, more in (("runs/a b", go_on), (None, "")):
        with pytest.raises(SystemExit) as exit:
            flags.run(lambda: main(folder))
        assert exit.value.code == code
        assert capsys.readouterr().err == f"script.py: {words}{more}\n"
