"""A reward from a name, a sum or a file, and its numbers, checked: with a table of our own."""
import copy
import os
import re
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from support import scoring
from support.scoring import RewardFlags, score


class Numbers:
    """A learned reward: its batches are kept, its value is 100·picture + prompt."""
    batches = []

    def __init__(self, config, device):
        assert (config.clip, device) == ("mine", "cpu")

    def __call__(self, images, prompts):
        assert not torch.is_grad_enabled()
        self.batches.append(len(images))
        values = [100 * image + int(prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.tensor(values)


TABLE = {"numbers": Numbers, "length": lambda images, prompts: [len(p) for p in prompts]}
PICTURES = [Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")]


def get(spec, flag="--reward"):
    return scoring.get_reward(TABLE, spec, RewardFlags(clip="mine"), "cpu", flag)


@pytest.fixture
def file(tmp_path):
    """A path that no other test's module has the name of."""
    return tmp_path / f"{tmp_path.name}.py"


@pytest.mark.equation("weighted sum", "support.scoring.weighted_sum")
def test_a_sum_weighs_each_term_and_every_batch_gets_its_own_prompts():
    Numbers.batches.clear()
    pictures, prompts = list(range(70)), [f"{n}" for n in range(70)]
    r = score(get("numbers=2,length=-0.5"), pictures, prompts)
    assert r.tolist() == [2 * 101 * n - len(prompts[n]) / 2 for n in pictures]
    assert r.dtype == torch.float64 and Numbers.batches == [32, 32, 6]


@pytest.mark.parametrize("spec", ["beauty", "length=1,beauty=2", "length=x", "length=1,,",
                                  "none.py:f"])
def test_what_is_no_reward_is_named_with_its_flag(spec):
    with pytest.raises(ValueError, match="^--gold .*(unknown|no weight|no file)") as error:
        get(spec, "--gold")
    assert "\n" not in str(error.value)


def test_a_file_is_a_module_of_its_own_name_which_processes_and_dataclasses_find(file):
    (file.parent / "neighbor.py").write_text("from builtins import len as length\n")
    file.write_text("from __future__ import annotations\nimport multiprocessing\n"
                    "from dataclasses import dataclass\nfrom neighbor import length\n"
                    "@dataclass\nclass Config:\n    k: int = 2\n"
                    "def one(prompt):\n    return Config().k * length(prompt)\n"
                    "def f(images, prompts):\n"
                    "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
                    "        yield from pool.map(one, prompts)\n")
    assert score(get(f"{file}:f=2,length=1"), PICTURES, ["abc", "x"]).tolist() == [15, 5]


@pytest.mark.parametrize("name", ["support", "statistics"])
def test_a_name_that_python_knows_otherwise_is_refused(name, tmp_path):
    file = tmp_path / f"{name}.py"
    file.write_text("def f(images, prompts):\n    return [0] * len(images)\n")
    with pytest.raises(ValueError, match=f"--reward {file}:f: rename {file}"):
        get(f"{file}:f")


CHANGES = """
import os, torch
def change():
    torch.set_grad_enabled(not torch.is_grad_enabled())
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_autocast_enabled("cpu", not torch.is_autocast_enabled("cpu"))
    os.chdir("/")
change()
def f(images, prompts):
    change()
    images[0].thumbnail((1, 1))
    images.clear()
    yield from (1.0, 2.0)
"""


def test_what_a_file_does_to_pictures_and_the_process_changes_no_training(file):
    def state():
        return (os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(),
                torch.get_default_device(), torch.get_num_threads(),
                torch.is_autocast_enabled("cpu"))

    before = state()
    file.write_text(CHANGES)
    images = copy.deepcopy(PICTURES)
    assert score(get(f"{file}:f"), images, ["a", "b"]).tolist() == [1, 2]
    assert state() == before and images == PICTURES


@pytest.mark.parametrize("text, last", [
    ("def f(:", "SyntaxError"), ("\n1 / 0", "ZeroDivisionError"), ("raise SystemExit(3)", ": 3"),
    ("def f(images):\n    return 1, 2", "TypeError: f.. takes 1 positional argument"),
    ("def f(images, prompts):\n    raise ValueError('of\\nmine')", "ValueError: of\nmine"),
    ("def f(images, prompts):\n    yield 1 / 0", "ZeroDivisionError: division by zero"),
    ("def f(images, prompts):\n    pass", "TypeError: 'NoneType'.*"),
    ("def f(images, prompts):\n    return 'ab'", "ValueError: could not convert .*'a'"),
    ("def f(images, prompts):\n    return [[1, 2], 3]", "TypeError: float.*")])
def test_a_file_that_fails_shows_pythons_traceback_behind_its_name(text, last, file):
    file.write_text(text)
    line = rf"(--)?reward {file}:f failed:\nTraceback .*\n\w*{last}"
    with pytest.raises(ValueError, match=re.compile(line, re.DOTALL)):
        score(get(f"{file}:f"), PICTURES, ["a", "b"])


@pytest.mark.parametrize("values, problem", [
    ("[1]", "1 numbers for 2"), ("[1] * 3", "3 numbers for 2"), ("[3, nan]", "nan.*'b'"),
    ("torch.tensor([inf, 0])", "inf.*'a'")])
def test_b_finite_numbers_are_wanted_and_the_bad_picture_is_saved(values, problem, file,
                                                                  monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(file.parent))
    file.write_text(f"import torch\nfrom math import inf, nan\ndef f(i, p):\n    return {values}\n")
    for spec in (f"{file}:f", f"length=1,{file}:f=2"):  # a term of a sum is named too
        with pytest.raises(ValueError, match=f"^reward {file}:f: {problem}") as error:
            score(get(spec), PICTURES, ["a", "b"])
    if "numbers" not in problem:
        bad = np.array(Image.open(str(error.value).partition("see ")[2]))
        assert np.array_equal(bad, PICTURES["b" in problem])
