"""More than one process: `torchrun --nproc-per-node N 03_ddpo.py ...` starts N copies of a script.

All of them hold the same weights and do the same, but share the heavy work: of what is computed in
batches (drawing, decoding, scoring, learning) each process computes its own batches, and then gets
the others' results. Noise has an address, so the pictures are those of one process. The first
process alone writes and prints. Without torchrun there is one process, and nothing is sent.
"""
import functools
import math
import os

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image


def rank():
    """Which process this is: 0, 1, ..., by torchrun's environment variable."""
    return int(os.environ.get("RANK", 0))


def processes():
    """N, the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    return rank() == 0


def only_first(function):
    """The function, but in other processes than the first it does nothing, and gives None."""
    @functools.wraps(function)
    def first(*arguments):
        return function(*arguments) if is_first() else None

    return first


def connect():
    """Meets the other processes, once; each has a GPU of its own where there are any."""
    if processes() > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()


def share(M, batch_size):
    """Places 0 ... M−1 as index tensors, batch_size of them at a time: this process's batches.

    They are dealt out in turn, and smaller where there would be fewer batches than processes.
    """
    if M == 0:
        return ()
    size = min(batch_size, math.ceil(M / processes()))
    return torch.arange(M).split(size)[rank()::processes()]


def total(*tensors):
    """Adds up, in place and in each process, what every process has in these tensors.

    Where each has filled its own places and left 0 in the others', this fills all of them.
    """
    if processes() > 1:
        connect()
        for tensor in tensors:
            dist.all_reduce(tensor)


def wait():
    """Goes on when every process has come here."""
    total(torch.zeros(1))


def total_of(numbers):
    """A dict of numbers, each added up over the processes."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    total(values)
    return dict(zip(numbers, values.tolist()))


def total_gradients(params):
    """Adds up the gradients of all processes: each has those of its own batches."""
    if processes() > 1:
        together = torch.cat([p.grad.flatten() for p in params])  # one message, not hundreds
        total(together)
        for p, grad in zip(params, together.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


def all_images(images, rows):
    """B pictures, of which this process has those of these rows, and None elsewhere."""
    if processes() == 1:
        return images
    sizes = torch.zeros(2, dtype=torch.int64)  # the width and height that they all have
    if len(rows) and rank() == 0:
        sizes = torch.tensor(images[rows[0]].size)
    total(sizes)
    width, height = sizes.tolist()
    pixels = torch.zeros(len(images), height, width, 3, dtype=torch.uint8)
    for i in rows:
        pixels[i] = torch.from_numpy(np.array(images[i]))
    total(pixels)
    return [Image.fromarray(picture) for picture in pixels.numpy()]


def same_text(text):
    """The first process's string, in all of them."""
    if processes() > 1:
        size = torch.tensor([len(text.encode())]) if is_first() else torch.zeros(1).long()
        total(size)
        letters = torch.zeros(size.item(), dtype=torch.uint8)
        if is_first():
            letters = torch.tensor(list(text.encode()), dtype=torch.uint8)
        total(letters)
        text = bytes(letters.tolist()).decode()
    return text
