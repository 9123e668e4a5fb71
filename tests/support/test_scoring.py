"""A reward from a name, a sum or a file, and its numbers, checked: with a table of our own."""
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from support import scoring
from support.scoring import RewardFlags, score


class Numbers:
    """A learned reward: its batches are kept, its value is 100·picture + prompt."""
    made, batches = [], []

    def __init__(self, models, device):
        self.made.append((models, device))
        self.weight = torch.ones((), requires_grad=True)

    def __call__(self, images, prompts):
        self.batches.append(len(images))
        values = [100 * image + int(prompt) for image, prompt in zip(images, prompts, strict=True)]
        values = self.weight * torch.tensor(values)
        assert not values.requires_grad
        return values


def length(images, prompts):
    return [len(prompt) for prompt in prompts]


def broken(images, prompts):
    return [1.0, math.nan]


TABLE = {"length": length, "numbers": Numbers, "broken": broken}
PICTURES = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]


def get(spec, flag="--reward"):
    return scoring.get_reward(spec, TABLE, RewardFlags(clip="mine"), "cpu", flag)


@pytest.mark.parametrize("spec, times", [("numbers", 1), ("numbers=2,numbers=0.5", 2.5)])
def test_every_batch_gets_its_own_prompts_and_no_gradient(spec, times):
    Numbers.made.clear(), Numbers.batches.clear()
    pictures = list(range(70))
    reward = get(spec)
    got = score(reward, pictures, [str(n) for n in pictures])
    assert got.tolist() == [times * 101 * n for n in pictures] and reward.__name__ == spec
    terms = spec.count("numbers")
    assert Numbers.made == [(RewardFlags(clip="mine"), "cpu")] * terms
    assert Numbers.batches == [32, 32, 6] * terms


@pytest.mark.equation("weighted sum", "support.scoring.weighted_sum")
def test_a_sum_weighs_each_term_with_its_own_weight():
    got = score(get("length=2,numbers=-0.5"), [1, 3], ["7", "12"])
    assert got.tolist() == [2 * 1 - 0.5 * 107, 2 * 2 - 0.5 * 312] and got.dtype == torch.float64


@pytest.mark.parametrize("spec, problem", [
    ("beauty", "length, numbers, broken"), ("length=1,beauty=2", "beauty"), ("length=x", "'x'"),
    ("length=1,,", "''"), ("no_such.py:f", "no_such.py")])
def test_bad_specs_are_named(spec, problem):
    with pytest.raises(ValueError, match="^--gold " + re.escape(spec)) as error:
        get(spec, "--gold")
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_a_reward_from_a_file_alone_and_in_a_sum(tmp_path):
    folder = tmp_path / "lr=3"  # this = is no weight
    folder.mkdir()
    (folder / "neighbor_of_mine.py").write_text("from builtins import len as length\n")
    file = folder / "mine.py"
    file.write_text("from __future__ import annotations\n"
                    "from dataclasses import dataclass\nfrom neighbor_of_mine import length\n"
                    "@dataclass\nclass Config:\n    k: int = 2\n"
                    "def f(images, prompts):\n"
                    "    yield from (Config().k * length(p) for p in prompts)\n")
    for spec, want in ((f"{file}:f", [6, 2]), (f"{file}:f=2,length=0.5", [13.5, 4.5])):
        assert score(get(spec), PICTURES, ["abc", "x"]).tolist() == want


@pytest.mark.parametrize("text, problem", [
    ("def f(:", "SyntaxError"), ("\n1 / 0", "ZeroDivisionError: .*mine.py:2"),
    ("g = 1", "AttributeError: .*'f'"), ("f = 1", "TypeError: f is not a function")])
def test_a_file_that_does_not_run_is_named(text, problem, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"--reward .*mine.py:f: {problem}"):
        get(f"{file}:f")


@pytest.mark.parametrize("sum_", ["", "=2,length=1"])
@pytest.mark.parametrize("arguments, line, problem", [
    ("images, prompts", "raise ValueError('of\\nmine')", "ValueError: of mine"),
    ("images, prompts", "helper()", "TypeError: no"),
    ("images, prompts", "yield 1 / 0", "ZeroDivisionError: division by zero"),
    ("images", "return 1, 2", "TypeError: f() takes 1 positional argument but 2 were given")])
def test_what_goes_wrong_inside_is_named_with_its_line(arguments, line, problem, sum_, tmp_path):
    (tmp_path / "helps_mine.py").write_text("def helper():\n    raise TypeError('no')\n")
    file = tmp_path / "mine.py"
    file.write_text(f"from helps_mine import helper\ndef f({arguments}):\n    {line}\n")
    with pytest.raises(ValueError) as error:
        score(get(f"{file}:f{sum_}"), PICTURES, ["a", "b"])
    number = 3 if "prompts" in arguments else 2  # where the function starts, if it never ran
    assert str(error.value) == f"reward {file}:f: {problem} ({file}:{number})"


@pytest.mark.parametrize("values, problem", [
    ([1.0], "1 numbers for 2"), ([1.0, 2.0, 3.0], "3 numbers for 2"), ([1.0, math.nan], "nan.*'b'"),
    ([math.inf, 0.0], "inf.*'a'"), (None, "not a number"), (["x", 1], "not a number")])
def test_broken_rewards_are_named(values, problem, tmp_path):
    def mine(images, prompts):
        return values

    with pytest.raises(ValueError, match="^reward mine: .*" + problem):
        score(mine, PICTURES, ["a", "b"], tmp_path)


@pytest.mark.parametrize("spec", ["length=1,broken=0.5", "broken"])
def test_the_reward_or_term_is_named_and_its_picture_saved(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "runs" if "=" in spec else "new/one"
    file = f"{folder}/bad_reward.png"
    with pytest.raises(ValueError, match=f"^reward broken: gave nan.*'a blue star': see {file}"):
        score(get(spec), PICTURES, ["x", "a blue star"], folder)
    assert np.array_equal(np.array(Image.open(file)), np.array(PICTURES[1]))
