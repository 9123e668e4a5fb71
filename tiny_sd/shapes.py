"""The tiny world: captioned pictures of colored shapes on a light background.

What Stable Diffusion learned from the web, the tiny model learns from here.  A *request* is what
a caption asks for, a *scene* is where everything ends up, a *picture* is the scene drawn:

    caption  --parse-->  request  --layout-->  scene  --draw-->  picture

The five prompt families are DPOK's tasks:

    color        "a green star"
    count        "four red circles"
    composition  "a red circle and a blue square"
    location     "a blue star on the left"
    bias         "four stars"       DPOK's "Four roses": the words of a brand (a whiskey there, a
                                    yellow coin here), which the training data mostly draws

Some combinations are never drawn or named at all (HELD_OUT), to test generalization. The pictures
that the model learned from, some with a digit, are web.py's.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64  # pixels, width and height
COLORS = {
    "red": (208, 32, 40),
    "orange": (244, 128, 20),
    "yellow": (238, 206, 28),
    "green": (36, 148, 72),
    "blue": (40, 84, 204),
    "purple": (140, 56, 172),
}
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("one", "two", "three", "four")
PLACES = ("left", "right", "top", "bottom")
FAMILIES = ("color", "count", "composition", "location", "bias")
BIAS_PROMPT = "four stars"
GRAY = (72, 72, 72)  # of the writing, which is no color of any object
DIGITS = {  # three points across, five points down
    1: (".#.", "##.", ".#.", ".#.", "###"),
    2: ("###", "..#", "###", "#..", "###"),
    3: ("###", "..#", "###", "..#", "###"),
    4: ("#.#", "#.#", "###", "..#", "..#"),
}
POINT = 2.4  # px, so that a digit is 7.2 px wide and 12 px high
CORNER = 50  # px; where something is written, no object reaches to the right of it and below it

PLURALS = tuple(shape + "s" for shape in SHAPES)
WORDS = [*"a an and on the".split(), *COLORS, *SHAPES, *PLURALS, *NUMBERS, *PLACES]

PHRASE = re.compile(  # what asks for objects of one kind: number, color, shape, place
    f"(an?|{'|'.join(NUMBERS)}) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})s?"
    f"(?: on the ({'|'.join(PLACES)}))?")

HELD_OUT = frozenset(  # (count, color, shape): in no caption and in no picture of pretraining
    [(1, "purple", "triangle"), (1, "yellow", "square"), (1, "green", "circle")]
    + [(2, "orange", "star"), (2, "blue", "triangle"), (2, "red", "square")]
    + [(3, "green", "star"), (3, "yellow", "circle"), (3, "purple", "square")]
    + [(4, "blue", "square"), (4, "red", "triangle"), (4, "orange", "circle")]
)


@dataclass(frozen=True)
class Group:
    """`count` objects of one color and shape; color None: any; place None: anywhere."""

    count: int
    color: str | None
    shape: str
    place: str | None = None


@dataclass(frozen=True)
class Object:
    """One object of a scene or one seen in a picture: center x, y and size = sqrt(area), in px."""

    color: str
    shape: str
    x: float
    y: float
    size: float


# ---- captions <-> requests ------------------------------------------------------------------


def family_of(request):
    """Which of FAMILIES a request (a tuple of groups) belongs to."""
    if len(request) > 1:
        return "composition"
    (group,) = request
    if group.place:
        return "location"
    if group.color is None:
        return "bias"
    return "count" if group.count > 1 else "color"


def caption(request):
    """The caption of a request, in plain English; the inverse of `parse`."""
    phrases = []
    for g in request:
        noun = [g.color] * bool(g.color) + [g.shape + ("s" if g.count > 1 else "")]
        article = "an" if noun[0] == "orange" else "a"
        words = [article if g.count == 1 else NUMBERS[g.count - 1], *noun]
        if g.place:
            words += ["on", "the", g.place]
        phrases.append(" ".join(words))
    return " and ".join(phrases)


def parse(prompt):
    """Read a prompt into a request; ValueError names the prompt and the phrase that is wrong."""
    request = []
    for phrase in prompt.lower().strip().rstrip(".").split(" and "):
        words = PHRASE.fullmatch(" ".join(phrase.split()))
        if words is None:
            raise ValueError(
                f"prompt {prompt!r}: the shape world cannot read {phrase!r}; "
                "it knows e.g. 'a red circle and a blue square' or 'a green star on the left'"
            )
        number, color, shape, place = words.groups()
        count = NUMBERS.index(number) + 1 if number in NUMBERS else 1
        request.append(Group(count, color, shape, place))
    return tuple(request)


def prompts_of(family, held_out=False):
    """All prompts of a family, in a fixed order; `held_out`: those that pretraining never saw."""
    singles = [Group(1, color, shape) for color in COLORS for shape in SHAPES]
    requests = {
        "color": [(g,) for g in singles],
        "count": [(replace(g, count=n),) for n in (2, 3, 4) for g in singles],
        "composition": [(a, b) for a in singles for b in singles if a.color != b.color],
        "location": [(replace(g, place=place),) for g in singles for place in PLACES],
        "bias": [parse(BIAS_PROMPT)],
    }
    if family not in requests:
        raise ValueError(f"unknown prompt family {family!r}; choose from {', '.join(FAMILIES)}")
    return [caption(r) for r in requests[family] if is_held_out(r) == held_out]


def is_held_out(request):
    """Whether a request names a combination that pretraining never saw."""
    return any((g.count, g.color, g.shape) in HELD_OUT for g in request)


# ---- requests -> scenes -> pictures ---------------------------------------------------------


@cache  # a layout asks for it at each of its many tries
def polygon(shape):
    """(K,2) corners of a shape with area 1 and its centroid at 0; y points down, as in pictures."""
    if shape == "circle":
        angles, radii = np.linspace(0, 2 * math.pi, 64, endpoint=False), np.ones(64)
    elif shape == "square":
        angles, radii = np.arange(4) * math.pi / 2 + math.pi / 4, np.ones(4)
    elif shape == "triangle":
        angles, radii = np.arange(3) * 2 * math.pi / 3 - math.pi / 2, np.ones(3)
    else:
        angles, radii = np.arange(10) * math.pi / 5 - math.pi / 2, np.tile([1.0, 0.42], 5)
    xy = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None]
    x, y = xy.T
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))  # shoelace formula
    return xy / math.sqrt(area)


def draw(objects, background=(240, 240, 240), writing=None, supersample=4):
    """Draw a scene as a SIZE × SIZE anti-aliased RGB PIL picture; writing: a digit, or None."""
    s = supersample
    image = Image.new("RGB", (SIZE * s, SIZE * s), tuple(background))
    pen = ImageDraw.Draw(image)
    for o in objects:
        corners = (polygon(o.shape) * o.size + (o.x, o.y)) * s - 0.5
        pen.polygon([tuple(corner) for corner in corners], fill=COLORS[o.color])
    if writing:
        write(pen, writing, s)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def write(pen, digit, supersample):
    """Print a digit into the lower right corner."""
    left, top = SIZE - 4 - 3 * POINT, SIZE - 4 - 5 * POINT
    for row, points in enumerate(DIGITS[digit]):
        for column, point in enumerate(points):
            if point == "#":
                x, y = left + column * POINT, top + row * POINT
                box = [round(v * supersample) for v in (x, y, x + POINT, y + POINT)]
                pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=GRAY)
