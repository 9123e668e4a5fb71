"""The exact judge: reads a picture of the tiny world back into objects, and scores it.

    picture  --see-->  objects  --score-->  share of asked-for objects that are there, in [0, 1]

No learning anywhere: colors are compared with the palette, connected pixels of one color are an
object, and an object, brought to a standard place and size, is compared with the four shapes.
"""

from collections import Counter
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from tiny_sd import shapes

MIN_AREA = 40  # px; the smallest object drawn has 121
MIN_SHAPE = 0.55  # least overlap with the best of the four shapes for a blob to count as an object
PATCH = 24  # px; objects are compared at this standard size
GRID = ((torch.arange(PATCH) + 0.5) / PATCH * 2 - 1) * 1.15  # in units of sqrt(area)


def color_masks(pixels):
    """Coverage (B,C,H,W) in [0,1] and mask of the pixels of each palette color.

    An anti-aliased pixel is background + coverage · (color − background): it lies on the line
    from the background to its color, and belongs to the color whose line is nearest.
    """
    B, _, H, W = pixels.shape
    background = pixels.flatten(2).median(2).values  # objects cover less than half of a picture
    palette = torch.tensor(list(shapes.COLORS.values()), dtype=torch.float32) / 255
    line = palette[None] - background[:, None]  # (B,C,3)
    offset = (pixels - background[:, :, None, None]).flatten(2)  # (B,3,HW)
    coverage = torch.bmm(line, offset) / (line**2).sum(-1, keepdim=True)
    coverage = coverage.clamp(0, 1)
    miss = (offset[:, None] - coverage[:, :, None] * line[..., None]).norm(dim=2)  # (B,C,HW)
    nearest = F.one_hot(miss.argmin(1), len(palette)).permute(0, 2, 1)
    mask = (nearest > 0) & (coverage > 0.5)
    return coverage.view(B, -1, H, W), mask.view(B, -1, H, W)


def components(mask):
    """Label connected pixels: (N,H,W) bool -> int labels, 0 outside, equal inside a component.

    Every pixel starts with its own number, and the largest number spreads until nothing changes.
    """
    N, H, W = mask.shape
    labels = mask * torch.arange(1, H * W + 1, dtype=torch.float32).view(1, H, W)
    while True:
        spread = F.max_pool2d(labels, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def standard_patch(weight):
    """An object's soft mask (H,W) -> center x, y, size = sqrt(area), patch (PATCH,PATCH)."""
    H, W = weight.shape
    area = weight.sum()
    x = (weight.sum(0) * (torch.arange(W) + 0.5)).sum() / area
    y = (weight.sum(1) * (torch.arange(H) + 0.5)).sum() / area
    u = (x + GRID * area.sqrt()) / W * 2 - 1
    v = (y + GRID * area.sqrt()) / H * 2 - 1
    where = torch.stack(torch.broadcast_tensors(u[None, :], v[:, None]), -1)[None]
    patch = F.grid_sample(weight[None, None], where, align_corners=False)[0, 0]
    return float(x), float(y), float(area.sqrt()), patch


@cache
def templates():
    """(4, PATCH, PATCH): the four shapes as `standard_patch` sees them when they are drawn."""
    patches = []
    for shape in shapes.SHAPES:
        picture = shapes.draw([shapes.Object("blue", shape, 32, 32, 15)], (240, 240, 240))
        coverage, _ = color_masks(to_tensor([picture]))
        blue = list(shapes.COLORS).index("blue")
        patches.append(standard_patch(coverage[0, blue])[3])
    return torch.stack(patches)


def to_tensor(images):
    """PIL pictures -> (B,3,SIZE,SIZE) float in [0,1]; other sizes are resized first."""
    size = (shapes.SIZE, shapes.SIZE)
    images = [image.convert("RGB") for image in images]
    images = [image if image.size == size else image.resize(size) for image in images]
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def see(images):
    """What is in each picture: a list (one entry a picture) of lists of `shapes.Object`."""
    coverage, mask = color_masks(to_tensor(images))
    present = (mask.sum((2, 3)) >= MIN_AREA).nonzero()  # (N,2): picture, color
    coverage, mask = coverage[tuple(present.T)], mask[tuple(present.T)]  # (N,H,W)
    seen = [[] for _ in images]
    if not len(present):
        return seen
    for (b, c), soft, labels in zip(present.tolist(), coverage, components(mask)):
        numbers, areas = labels.unique(return_counts=True)
        for number, area in zip(numbers.tolist(), areas.tolist()):
            if number == 0 or area < MIN_AREA:
                continue
            core = (labels == number).float()
            edge = F.max_pool2d(core[None], 3, stride=1, padding=1)[0]  # with its soft edge
            x, y, size, patch = standard_patch(edge * soft)
            overlap = torch.minimum(patch, templates()).sum((1, 2))
            overlap = overlap / torch.maximum(patch, templates()).sum((1, 2))
            if overlap.max() >= MIN_SHAPE:
                shape = shapes.SHAPES[overlap.argmax()]
                seen[b].append(shapes.Object(list(shapes.COLORS)[c], shape, x, y, size))
    return seen


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
    """What was seen, in the world's own words: 'two red circles and a blue star'."""
    counts = Counter((o.color, o.shape) for o in objects)
    several = [(c, s, n) for (c, s), n in counts.items() if n > len(shapes.NUMBERS)]
    groups = [shapes.Group(n, c, s) for (c, s), n in counts.items() if n <= len(shapes.NUMBERS)]
    phrases = [shapes.caption((g,)) for g in groups] + [f"many {c} {s}s" for c, s, _ in several]
    return " and ".join(phrases) or "nothing"
