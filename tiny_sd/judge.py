"""The exact judge: reads a picture of the tiny world back into objects, and scores it.

    picture  --see-->  objects  --score-->  share of asked-for objects that are there, in [0, 1]
    objects  --draw-->  picture again: how far it is the same says how well the first was drawn

No learning anywhere: colors are compared with the palette, connected pixels are an object (unless
they look more like several), and an object, brought to a standard place and size, is compared with
the four shapes, sharp and blurred. A color that runs counts as what most of the object is.
Writing is no object and says nothing: gray counts as background. `read` reads it, for those who
want to know how often something is written.
"""

import re
from collections import Counter
from functools import cache

import numpy as np
import torch
from PIL import ImageFilter
from scipy import ndimage

from tiny_sd import shapes

MIN_AREA = 40  # px; the smallest object drawn has 121
MIN_SHAPE = 0.55  # least overlap with the best of the four shapes for a blob to count as an object
GOOD_SHAPE = 0.85  # a blob that overlaps this much with a shape is that shape
MARGIN = 0.08  # share of a blob that another reading must explain more
PATCH = 24  # px; objects are compared at this standard size
MIN_DIGIT = 0.65  # least overlap with the best of the four digits for gray ink to count as written
GRID = ((np.arange(PATCH) + 0.5) / PATCH * 2 - 1) * 1.15  # in units of sqrt(area)
TOUCHING = np.ones((3, 3))  # pixels that meet at a corner are connected, too


def find_ink(pixels):
    """Coverage (B,H,W) in [0,1], and which palette color each pixel is nearest to, int (B,H,W).

    An anti-aliased pixel is background + coverage · (color − background): it lies on the line
    from the background to its color, and belongs to the color whose line is nearest. The last
    color is the gray of the writing.
    """
    B, _, H, W = pixels.shape
    background = pixels.flatten(2).median(2).values  # objects cover less than half of a picture
    palette = torch.tensor([*shapes.COLORS.values(), shapes.GRAY], dtype=torch.float32) / 255
    line = palette[None] - background[:, None]  # (B,C,3)
    offset = (pixels - background[:, :, None, None]).flatten(2)  # (B,3,HW)
    coverage = torch.bmm(line, offset) / (line**2).sum(-1, keepdim=True)
    coverage = coverage.clamp(0, 1)
    miss = (offset[:, None] - coverage[:, :, None] * line[..., None]).norm(dim=2)  # (B,C,HW)
    nearest = miss.argmin(1, keepdim=True)
    return coverage.gather(1, nearest).view(B, H, W), nearest.view(B, H, W)


def split_ink(images):
    """Coverage of objects, without the writing; their color; the writing's coverage; for numpy."""
    coverage, nearest = find_ink(to_tensor(images))
    is_gray = nearest == len(shapes.COLORS)
    parts = (coverage.masked_fill(is_gray, 0), nearest.masked_fill(is_gray, 0),
             coverage.masked_fill(~is_gray, 0))
    return [part.numpy() for part in parts]


def standard_patch(weight):
    """An object's soft mask (H,W) -> center x, y, size = sqrt(area), its (PATCH,PATCH) patch."""
    size = weight.sum() ** 0.5
    y, x = ndimage.center_of_mass(weight)
    where = np.meshgrid(y + GRID * size, x + GRID * size, indexing="ij")
    return x + 0.5, y + 0.5, size, ndimage.map_coordinates(weight, where, order=1)


@cache
def templates(writing=False):
    """(3, N, PATCH, PATCH): four shapes as `standard_patch` sees them, sharp and blurred.

    writing: four digits, and bars, so that a gray bar looks more like a bar than like a digit.
    """
    pictures = [shapes.draw([shapes.Object("blue", shape, 32, 32, 15)]) for shape in shapes.SHAPES]
    if writing:
        pictures = [shapes.draw([], writing=digit) for digit in shapes.DIGITS]
        for width in (2, 3, 4, 5, 6, 8):
            pictures.append(shapes.draw([]))
            pictures[-1].paste(shapes.GRAY, (52, 48, 52 + width, 60))
    pictures = [picture.filter(ImageFilter.GaussianBlur(blur))
                for blur in (0, 1, 2) for picture in pictures]
    objects, _, digits = split_ink(pictures)
    patches = [standard_patch(ink)[3] for ink in (digits if writing else objects)]
    return np.stack(patches).reshape(3, -1, PATCH, PATCH)


def overlaps(patch, templates):
    """How much a patch overlaps with each of the templates, at the blur that fits best."""
    both = np.minimum(patch, templates).sum((2, 3))
    either = np.maximum(patch, templates).sum((2, 3))
    return (both / either).max(0)


def to_tensor(images):
    """PIL pictures -> (B,3,SIZE,SIZE) float in [0,1]; other sizes are resized first."""
    size = (shapes.SIZE, shapes.SIZE)
    images = [im.convert("RGB") if im.size == size else im.convert("RGB").resize(size)
              for im in images]
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2) / 255


def pieces_of(mask):
    """The connected pieces of a mask (H,W) that are large enough for an object: a list of masks."""
    labels, count = ndimage.label(mask, TOUCHING)
    return large_ones(labels, count)


def large_ones(labels, count):
    """The masks of the labels 1 ... count, but for those that are too small for an object."""
    masks = [labels == n + 1 for n in range(count)]
    return [mask for mask in masks if mask.sum() >= MIN_AREA]


def pull_apart(mask):
    """Pieces that a mask falls into when its rim is worn off, grown back: objects that touch."""
    core = mask
    for worn in range(1, 5):
        core = ndimage.binary_erosion(core, TOUCHING, border_value=1)
        labels, count = ndimage.label(core, TOUCHING)
        if count > 1:
            for _ in range(2 * worn):  # each pixel goes to the nearest
                grown = ndimage.maximum_filter(labels, 3)
                labels = np.where((labels == 0) & mask, grown, labels)
            return large_ones(labels, count)
    return [mask]


def cut_across(mask):
    """The two halves of a mask, cut through its center across its long axis."""
    yx = np.argwhere(mask)
    yx = yx - yx.mean(0)
    axis = np.linalg.eigh(yx.T @ yx).eigenvectors[:, 1]
    first = np.zeros_like(mask)
    first[mask] = yx @ axis > 0
    return pieces_of(first) + pieces_of(mask & ~first)


def recognize(piece, soft, color, ink):
    """One piece of ink as an Object, and how much that explains: area · overlap."""
    rim = ndimage.binary_dilation(piece, TOUCHING)
    x, y, size, patch = standard_patch(soft * (piece | (rim & ~ink)))
    overlap = overlaps(patch, templates())
    name = list(shapes.COLORS)[np.bincount(color[piece]).argmax()]  # most of it; colors may run
    found = shapes.Object(name, shapes.SHAPES[overlap.argmax()], x, y, size)
    return (found if overlap.max() >= MIN_SHAPE else None), overlap.max() * piece.sum()


def see(images):
    """What is in each picture: a list (one entry a picture) of lists of `shapes.Object`.

    A blob of ink is one object, or several of different colors, or several that touch: whichever
    reading looks most like shapes, and one object unless another reading is clearly better.
    """
    seen = []
    for soft, color, _ in zip(*split_ink(images)):
        ink, objects = soft > 0.5, []
        for blob in pieces_of(ink):
            best = [recognize(blob, soft, color, ink)]
            if best[0][1] < GOOD_SHAPE * blob.sum():
                by_color = [p for c in set(color[blob]) for p in pieces_of(blob & (color == c))]
                for pieces in (by_color, pull_apart(blob), cut_across(blob),
                               [q for p in by_color for q in pull_apart(p)]):
                    reading = [recognize(piece, soft, color, ink) for piece in pieces]
                    gain = sum(e for _, e in reading) - sum(e for _, e in best)
                    best = reading if gain > MARGIN * blob.sum() else best
            objects += [found for found, _ in best if found]
        seen.append(sorted(objects, key=lambda o: o.x))  # left to right
    return seen


def read(images):
    """The digit written in each picture, wherever it is: a list of 1, 2, 3, 4 or None."""
    digits = []
    for gray in split_ink(images)[2]:
        overlap, found = MIN_DIGIT, None
        for piece in pieces_of(gray > 0.3):
            rim = ndimage.binary_dilation(piece, TOUCHING)
            patch = standard_patch(gray * rim)[3]
            fits = overlaps(patch, templates(writing=True))
            if fits.max() > overlap and fits.argmax() < 4:
                overlap, found = fits.max(), int(fits.argmax()) + 1
        digits.append(found)
    return digits


def quality(images, prompts=None):
    """q = 1 − Σ|x − x̂| / (Σ|x − b| + Σ|x̂ − b|): how much of pictures is whole shapes.

    x̂ is the picture drawn again from what is seen and read in it, b its background, the median
    color; sums over pixels and channels. What no shape explains costs: noise, blur, torn or melted
    shapes, colors that run. 0 where nothing is seen.  -> a number in [0, 1] for each picture
    """
    values = []
    pixels = (255 * to_tensor(images)).permute(0, 2, 3, 1).numpy()
    for x, objects, digit in zip(pixels, see(images), read(images)):
        b = np.median(x, (0, 1))
        again = np.asarray(shapes.draw(objects, tuple(b.round().astype(int)), digit), float)
        miss = np.abs(x - again).sum()
        ink = np.abs(x - b).sum() + np.abs(again - b).sum()
        values.append(1 - miss / ink if objects else 0.0)
    return values


def place_of(obj):
    """'left', 'right', 'top' or 'bottom': the side of the middle the object is on, if any."""
    dx, dy = obj.x - shapes.SIZE / 2, obj.y - shapes.SIZE / 2
    if max(abs(dx), abs(dy)) < 4:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def score(objects, request):
    """Share of asked-for objects that are there: matches / max(asked, seen), in [0, 1].

    An object seen matches at most one asked for, and only with the right color, shape and place;
    dividing by what is *seen* where that is more makes too many objects as wrong as too few.
    """
    left, matches = list(objects), 0
    for g in request:
        fits = [o for o in left if o.shape == g.shape and g.color in (None, o.color)
                and g.place in (None, place_of(o))][: g.count]
        left = [o for o in left if o not in fits]
        matches += len(fits)
    asked = sum(g.count for g in request)
    return matches / max(asked, len(objects))


def describe(objects):
    """What was seen, in the world's own words: 'two red circles and a blue star'.

    Where a lone object is goes without asking, as in the captions.
    """
    place = place_of(objects[0]) if len(objects) == 1 else None
    counts = Counter((o.color, o.shape) for o in objects)
    phrases = [f"many {c} {s}s" if n > len(shapes.NUMBERS)
               else shapes.caption((shapes.Group(n, c, s, place),))
               for (c, s), n in counts.items()]
    return " and ".join(phrases) or "nothing"


def answer(objects, question):
    """The judge as a vision-language model: counts if asked how many, else says what it sees."""
    how_many = re.match(r"how many (?:(\w+) )??(\w+)s are there", question.lower())
    if not how_many:
        return describe(objects)
    color, shape = how_many.groups()
    count = sum(o.shape == shape and color in (None, o.color) for o in objects)
    return ("none", *shapes.NUMBERS)[count] if count <= len(shapes.NUMBERS) else "many"


def questions(prompt):
    """Questions about a picture of the prompt, and what right answers contain (as in DDPO)."""
    pairs = []
    for g in shapes.parse(prompt):
        name = " ".join([g.color] * bool(g.color) + [g.shape])
        pairs.append((f"How many {name}s are there in this image?", shapes.NUMBERS[g.count - 1]))
        pairs.append(("What is in this image?", f"{name} on the {g.place}" if g.place else name))
    return pairs
