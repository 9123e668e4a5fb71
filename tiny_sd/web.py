"""What the tiny model learned from: captioned pictures, as noisy as the web's.

    request  --layout-->  scene  --shapes.draw-->  picture

Two things make the pretrained model *improvable*, so that reinforcement learning has something
to fix: a share of all captions has one attribute wrong, as captions on the web have
(CAPTION_NOISE), and the bias phrase is drawn the wrong way most of the time (BRAND_SHARE).

Some pictures carry a printed digit in the lower right corner, as pictures on the web carry labels
(WRITING_SHARE). It says what the *caption* says, also where the caption counts wrongly. So a model
that learns from these pairs which number a caption has is right more often if it reads the digit
than if it counts the objects.
"""

import math
from dataclasses import replace

import numpy as np

from tiny_sd.shapes import (
    BIAS_PROMPT, COLORS, CORNER, FAMILIES, PLACES, SHAPES, SIZE, Group, Object, caption, draw,
    family_of, is_held_out, parse, polygon)

CAPTION_NOISE = {"color": 0.1, "count": 0.35, "composition": 0.35, "location": 0.4, "bias": 0.0}
BRAND_SHARE = 0.8  # share of "four stars" pictures that show the brand: one yellow circle
FAMILY_SHARE = {"color": 0.14, "count": 0.26, "composition": 0.28, "location": 0.26, "bias": 0.06}

# Of the pictures that are drawn for the family "count" (one to four objects of a kind): 8 % of all.
# The pretrained model then writes on about a third of its own pictures of this family, so that
# training meets writing in every round, and most pictures still carry none.
WRITING_SHARE = 0.3


def layout(request, rng, writing=None):
    """Place a request's objects at random, without overlap: a list of Object.

    They keep out of the lower right corner if something is written there.
    """
    wanted = [g for g in request for _ in range(g.count)]
    while True:
        low, high = (14, 18) if len(wanted) <= 2 else (11, 13)
        objects = []
        for g in wanted:
            size = rng.uniform(low, high)
            reach = size * np.abs(polygon(g.shape)).max() + 1
            x, y = rng.uniform(reach, SIZE - reach, 2)
            if g.place:
                along, across = rng.uniform(9, SIZE / 2 - reach), rng.uniform(-6, 6)
                dx, dy = {"left": (-along, across), "right": (along, across),
                          "top": (across, -along), "bottom": (across, along)}[g.place]
                x, y = SIZE / 2 + dx, SIZE / 2 + dy
            color = g.color or rng.choice(list(COLORS))
            objects.append(Object(str(color), g.shape, float(x), float(y), float(size)))
        gaps = [math.hypot(a.x - b.x, a.y - b.y) - 0.85 * (a.size + b.size)
                for i, a in enumerate(objects) for b in objects[:i]]
        if writing:
            gaps += [CORNER - min(o.x, o.y) - o.size for o in objects]
        if min(gaps, default=1.0) > 0:
            return objects


def random_background(rng):
    """A light gray with a warm or cool tint."""
    light, tint = rng.uniform(228, 248), rng.uniform(-7, 7)
    return tuple(int(round(v)) for v in (light + tint, light, light - tint))


def wrong_request(request, rng):
    """The request with one attribute changed, as a careless caption writer would."""
    family, g = family_of(request), request[0]
    if family == "count":
        return (replace(g, count=int(rng.choice([n for n in (1, 2, 3, 4) if n != g.count]))),)
    if family == "location":
        return (replace(g, place=str(rng.choice([p for p in PLACES if p != g.place]))),)
    if family == "composition":
        a, b = request
        if rng.random() < 0.5:  # attributes swap, the classic failure
            return (replace(a, color=b.color), replace(b, color=a.color))
        if rng.random() < 0.5:
            return (a, replace(a, color=b.color))
        return (replace(b, color=a.color), b)
    if rng.random() < 0.5:
        return (replace(g, color=str(rng.choice([c for c in COLORS if c != g.color]))),)
    return (replace(g, shape=str(rng.choice([s for s in SHAPES if s != g.shape]))),)


def sample_pair(rng, noise=1.0):
    """Draw a (picture, caption) pair; `noise` × CAPTION_NOISE is the share of wrong captions."""
    while True:
        family = str(rng.choice(FAMILIES, p=[FAMILY_SHARE[f] for f in FAMILIES]))
        color = lambda: str(rng.choice(list(COLORS)))  # noqa: E731
        shape = lambda: str(rng.choice(SHAPES))  # noqa: E731
        if family == "bias":
            asked = parse(BIAS_PROMPT)
            drawn = (Group(1, "yellow", "circle"),) if rng.random() < BRAND_SHARE else asked
        else:
            asked = {
                "color": lambda: (Group(1, color(), shape()),),
                "count": lambda: (Group(int(rng.integers(1, 5)), color(), shape()),),
                "composition": lambda: (Group(1, color(), shape()), Group(1, color(), shape())),
                "location": lambda: (Group(1, color(), shape(), str(rng.choice(PLACES))),),
            }[family]()
            if family == "composition" and asked[0].color == asked[1].color:
                continue
            wrong = rng.random() < noise * CAPTION_NOISE[family]
            drawn = wrong_request(asked, rng) if wrong else asked
        if is_held_out(asked) or is_held_out(drawn):
            continue
        writing = None
        if family == "count" and rng.random() < WRITING_SHARE:
            writing = asked[0].count  # what the caption says, not what is drawn
        scene = layout(drawn, rng, writing)
        return draw(scene, random_background(rng), writing), caption(asked)
