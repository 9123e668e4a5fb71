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

Two things make the pretrained model *improvable*, so that reinforcement learning has something
to fix: a share of all captions has one attribute wrong, as captions on the web have
(CAPTION_NOISE), and the bias phrase is drawn the wrong way most of the time (BRAND_SHARE).
Some combinations are never drawn or named at all (HELD_OUT), to test generalization.

Some pictures carry a printed digit in the lower right corner, as pictures on the web carry labels
(WRITING_SHARE). It says what the *caption* says, also where the caption counts wrongly. So a model
that learns from these pairs which number a caption has is right more often if it reads the digit
than if it counts the objects.
"""

import math
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

CAPTION_NOISE = {"color": 0.1, "count": 0.35, "composition": 0.35, "location": 0.4, "bias": 0.0}
BRAND_SHARE = 0.8  # share of "four stars" pictures that show the brand: one yellow circle
FAMILY_SHARE = {"color": 0.14, "count": 0.26, "composition": 0.28, "location": 0.26, "bias": 0.06}

# Of the pictures that are drawn for the family "count" (one to four objects of a kind): 8 % of all.
# The pretrained model then writes on about a third of its own pictures of this family, so that
# training meets writing in every round, and most pictures still carry none.
WRITING_SHARE = 0.3
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
    """Read a prompt into a request; ValueError names the prompt and the word that does not fit."""
    request = []
    for phrase in prompt.lower().strip().rstrip(".").split(" and "):
        words = phrase.split()
        number, words = (words[0], words[1:]) if words else ("", words)
        count = {"a": 1, "an": 1, **{word: i + 1 for i, word in enumerate(NUMBERS)}}.get(number, 0)
        color = words.pop(0) if words and words[0] in COLORS else None
        noun = words.pop(0) if words else ""
        shape = noun.removesuffix("s") if count > 1 else noun
        places = {("on", "the", place): place for place in PLACES}
        place = places.get(tuple(words))
        left_over = [] if place else words
        if not count or shape not in SHAPES or left_over:
            raise ValueError(
                f"prompt {prompt!r}: the shape world cannot read {phrase!r}; "
                "it knows e.g. 'a red circle and a blue square' or 'a green star on the left'"
            )
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


def random_background(rng):
    """A light gray with a warm or cool tint."""
    light, tint = rng.uniform(228, 248), rng.uniform(-7, 7)
    return tuple(int(round(v)) for v in (light + tint, light, light - tint))


# ---- the training set -----------------------------------------------------------------------


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
