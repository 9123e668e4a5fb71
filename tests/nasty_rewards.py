"""Rewards as nobody should write them: test_fuzz.py gives them to the scripts, one by one."""
import sys

import numpy as np
import torch

not_a_function = 3


class Hostile:
    def __float__(self):
        raise KeyError("hostile")


class NeedsMore:
    def __init__(self, one, two, three):
        self.one = one


def boom(images, prompts):
    raise RuntimeError("boom")


def lines(images, prompts):
    raise RuntimeError("of\nthree\n\nlines")


def key(images, prompts):
    return {}[prompts[0]]


def leaves(images, prompts):
    sys.exit("I leave")


def quits(images, prompts):
    raise SystemExit


def stops(images, prompts):
    raise KeyboardInterrupt


def deep(images, prompts):
    return deep(images, prompts)


def memory(images, prompts):
    raise MemoryError


def broken_generator(images, prompts):
    yield 1.0
    raise LookupError("in the middle")


def endless(images, prompts):
    while True:
        yield 1.0


def clears(images, prompts):
    images.clear()
    prompts.clear()
    return []


def spoils(images, prompts):
    images[:] = [None] * len(images)
    prompts[:] = [None] * len(prompts)
    return [1.0] * len(images)


def closes(images, prompts):
    for image in images:
        image.close()
    return [1.0] * len(images)


def other_modes(images, prompts):
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "HSV")
    return [sum(len(image.convert(mode).tobytes()) for mode in modes) for image in images]


def nan(images, prompts):
    return [float("nan")] * len(images)


def none(images, prompts):
    pass


def nones(images, prompts):
    return [None] * len(images)


def few(images, prompts):
    return [1.0]


def many(images, prompts):
    return [1.0] * (len(images) + 1)


def empty(images, prompts):
    return []


def words(images, prompts):
    return ["red"] * len(images)


def digits(images, prompts):
    return ["1.5"] * len(images)


def one_number(images, prompts):
    return 1.0


def scalar(images, prompts):
    return torch.tensor(1.0)


def generator(images, prompts):
    return (1.0 for image in images)


def nested(images, prompts):
    return [[1.0, 2.0] for image in images]


def meta(images, prompts):
    return torch.zeros(len(images), device="meta")


def matrix(images, prompts):
    return torch.zeros(len(images), 3)


def column(images, prompts):
    return torch.zeros(len(images), 1)


def complex_list(images, prompts):
    return [1j] * len(images)


def complex_tensor(images, prompts):
    return torch.full((len(images),), 1 + 1j)


def huge_whole(images, prompts):
    return [10**400] * len(images)


def large(images, prompts):
    return [1e300 * (-1) ** i for i in range(len(images))]


def infinite(images, prompts):
    return np.full(len(images), np.inf)


def pictures(images, prompts):
    return images


def hostile(images, prompts):
    return [Hostile() for image in images]


def truths(images, prompts):
    return [True] * len(images)


def needs_grad(images, prompts):
    return torch.ones(len(images), requires_grad=True)


def one_argument(images):
    return [1.0] * len(images)


def no_argument():
    return 1.0
