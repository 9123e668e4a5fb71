"""Rewards as nobody should write them: test_fuzz.py gives them to the scripts, one by one."""
import sys

import numpy as np
import torch

inf = float("inf")
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


def quits(images, prompts):
    raise SystemExit


def stops(images, prompts):
    raise KeyboardInterrupt


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
    return [1.0] * len(prompts)


def closes(images, prompts):
    for image in images:
        image.close()
    return [1.0] * len(images)


def other_modes(images, prompts):
    modes = ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "F", "HSV")
    return [sum(len(image.convert(mode).tobytes()) for mode in modes) for image in images]


# What raises, by itself or for its arguments.
key = lambda images, prompts: {}[prompts[0]]
leaves = lambda images, prompts: sys.exit("I leave")
deep = lambda images, prompts: deep(images, prompts)
one_argument = lambda images: [1.0] * len(images)
no_argument = lambda: 1.0

# What gives no number for each picture.
nan = lambda images, prompts: [-inf + inf] * len(images)
infinite = lambda images, prompts: np.full(len(images), np.inf)
none = lambda images, prompts: None
nones = lambda images, prompts: [None] * len(images)
few = lambda images, prompts: [1.0]
many = lambda images, prompts: [1.0] * (len(images) + 1)
empty = lambda images, prompts: []
words = lambda images, prompts: ["red"] * len(images)
one_number = lambda images, prompts: 1.0
scalar = lambda images, prompts: torch.tensor(1.0)
nested = lambda images, prompts: [[1.0, 2.0]] * len(images)
meta = lambda images, prompts: torch.zeros(len(images), device="meta")
matrix = lambda images, prompts: torch.zeros(len(images), 3)
complex_list = lambda images, prompts: [1j] * len(images)
complex_tensor = lambda images, prompts: torch.full((len(images),), 1 + 1j)
huge_whole = lambda images, prompts: [10**400] * len(images)
pictures = lambda images, prompts: images
hostile = lambda images, prompts: [Hostile()] * len(images)

# What is odd, and right.
digits = lambda images, prompts: ["1.5"] * len(images)
generator = lambda images, prompts: (1.0 for image in images)
column = lambda images, prompts: torch.zeros(len(images), 1)
large = lambda images, prompts: [1e300 * (-1) ** i for i in range(len(images))]
truths = lambda images, prompts: [True] * len(images)
needs_grad = lambda images, prompts: torch.ones(len(images), requires_grad=True)
