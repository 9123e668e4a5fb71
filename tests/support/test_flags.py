"""Command line: ranges of numbers, --sd, and what bad input gets."""
import math
import os
from dataclasses import dataclass, fields, make_dataclass
from importlib import import_module

import pytest

from support import flags

CHAPTERS = ("01_mdp", "02_rewards", "03_ddpo", "04_dpok")


@dataclass(frozen=True)
class Config:
    model: str = "tiny_sd"  # what is loaded
    rounds: int = 3  # how many
    eta: float = 1.0  # noise
    sd: bool = False  # the full model


SD = dict(model="full", rounds=50)


def check(name, value):
    flags.check(make_dataclass("Holder", [name])(value))


@pytest.mark.parametrize("name", flags.LIMITS)
def test_both_ends_are_allowed_and_nothing_beyond(name):
    low, high = flags.LIMITS[name]
    inside = [low, high if high < math.inf else max(low, 1e6)]
    outside = [math.nan, -1.0, math.nextafter(low, -math.inf)]
    if high < math.inf:
        outside += [math.nextafter(high, math.inf), high * 2]
    (inside if name in flags.MAY_BE_INFINITE else outside).append(math.inf)
    for value in inside:
        check(name, value)
    for value in outside:
        with pytest.raises(ValueError, match="--" + name.replace("_", "-") + " must be"):
            check(name, value)


def test_none_passes_and_each_number_of_a_tuple_is_checked():
    check("rounds", None)
    check("beta", (0.0, 0.1))
    with pytest.raises(ValueError, match="--beta must be at least 0, not -1"):
        check("beta", (0.1, -1))


@pytest.mark.parametrize("name, allowed, refused", [
    ("eta", (0, 1), 1.01), ("clip_range", (0, 0.999), 1), ("timestep_fraction", (0.01, 1), 0),
    ("updates_per_round", (1,), 0), ("learning_rate", (0,), -1e-9), ("eval_samples", (2,), 1),
    ("seed", (0, 2**31 - 1), 2**31), ("max_grad_norm", (1e-9,), 0), ("beta", (0,), -1e-9)])
def test_limits_are_the_right_ones(name, allowed, refused):
    for value in allowed:
        check(name, value)
    with pytest.raises(ValueError):
        check(name, refused)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_number_of_a_chapter_has_a_limit(chapter):
    for field in fields(import_module(chapter).Config):
        if field.type in (int, float, int | None, float | None):
            assert field.name in flags.LIMITS


def test_sd_makes_its_settings_the_defaults_and_a_flag_still_overrides():
    assert flags.parse(Config, "", [], SD) == Config()
    assert flags.parse(Config, "", ["--sd"], SD) == Config(model="full", rounds=50, sd=True)
    words = ["--rounds", "7", "--sd"]
    assert flags.parse(Config, "", words, SD) == Config(model="full", rounds=7, sd=True)
    words = ["--sd", "--model", "tiny_sd", "--eta", "0.5"]
    assert flags.parse(Config, "", words, SD) == Config(rounds=50, eta=0.5, sd=True)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_full_models_settings_are_fields_of_the_chapter(chapter):
    module = import_module(chapter)
    assert set(module.SD) < {field.name for field in fields(module.Config)}
    config = flags.parse(module.Config, "", ["--sd"], module.SD)
    assert {name: getattr(config, name) for name in module.SD} == module.SD and config.sd


@pytest.mark.parametrize("words, named", [
    (["--ruonds", "3"], "--rounds"), (["--rounds", "x"], "--rounds"), (["--rounds"], "--rounds"),
    (["--rounds", "2.5"], "--rounds"), (["stray"], "stray")])
def test_words_that_cannot_be_read_exit_with_2_and_name_the_flag(words, named, capsys):
    with pytest.raises(SystemExit) as exit:
        flags.parse(Config, "", words)
    assert exit.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("--rounds: no"), FileNotFoundError("--rounds: no")])
def test_run_turns_bad_input_into_one_line(error, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [os.path.join("some", "script.py")])

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        flags.run(main)
    assert exit.value.code == 2 and capsys.readouterr().err == "script.py: --rounds: no\n"
