"""Randomness by address, the prompts of a round, and which process computes what.

All randomness is a pure function of (seed, purpose, round, sample): nothing is passed around, and
nothing has to be saved. So the noise of an evaluation can never be that of a training, and neither
batches nor the number of processes change a picture.

`torchrun --nproc-per-node N 03_ddpo.py ...` starts N processes with the same weights. Each draws,
scores and learns from its own pictures; only rewards are gathered and gradients summed. The first
process alone writes and prints. Without torchrun there is one process, and nothing is sent.
"""
import functools
import os

import numpy as np
import torch
import torch.distributed as dist

PURPOSES = (  # what random numbers are for; the place in this list is part of their address
    "train", "evaluate", "film", "compare", "examples", "prompts", "minibatches", "timesteps",
    "adapters", "value", "value batches", "fixed set", "sft batches", "sft noise", "bootstrap",
    "pretrain", "make", "frontier", "labels", "truth", "pool", "halves")


# ---- randomness by address ------------------------------------------------------------------


def random_stream(seed, purpose, n=0, i=0):
    """numpy's generator at the address (seed, purpose, round n, sample i); always the same one.

    Four numbers below 2³², never fewer: numpy reads [1], [1, 0] and [1, 0, 0, 0] as one.
    """
    return np.random.default_rng([seed, PURPOSES.index(purpose), n, i])


def gaussian(shape, seed, purpose, n=0, i=0):
    """z ~ N(0, I) at an address, float32, as a tensor of that shape on the CPU."""
    z = random_stream(seed, purpose, n, i).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(z)


def gaussians(rows, shape, seed, purpose, n=0):
    """z ~ N(0, I) for each sample in rows, at its address.  -> (len(rows), *shape)"""
    return torch.stack([gaussian(shape, seed, purpose, n, i) for i in rows.tolist()])


def permutation(size, seed, purpose, n=0, i=0):
    """0 ... size−1 in an order drawn at an address, as a tensor."""
    return torch.from_numpy(random_stream(seed, purpose, n, i).permutation(size))


def permutations(rows, size, seed, purpose, n=0):
    """An order of 0 ... size−1 for each sample in rows, at its address.  -> (len(rows), size)"""
    return torch.stack([permutation(size, seed, purpose, n, i) for i in rows.tolist()])


def torch_seed(seed, purpose):
    """A seed for torch's global generator, where a library draws first weights from it."""
    return int(random_stream(seed, purpose).integers(2**31))


# ---- prompts, means -------------------------------------------------------------------------


def prompts_of_round(prompts, config, n):
    """The prompts of round n, each of them samples_per_prompt times in a row: a list of strings.

    Rounds take their prompts in turn from shuffled passes over all of them.
    """
    chosen = []
    first = n * config.prompts_per_round
    for place in range(first, first + config.prompts_per_round):
        passes, position = divmod(place, len(prompts))
        order = permutation(len(prompts), config.seed, "prompts", passes)
        chosen += [prompts[order[position]]] * config.samples_per_prompt
    return chosen


def spread_evenly(prompts, samples):
    """`samples` prompts: all in turn, or evenly spaced ones where there are more; [] of none."""
    P = len(prompts)
    if P > samples:
        return [prompts[i * P // samples] for i in range(samples)]
    return [prompts[i % P] for i in range(samples)] if P else []


def mean_se(values):
    """x̄, s/√N of N numbers; NaN for the error of a single one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), float("nan")
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def set_rate(optimizer, config, n):
    """lr_n = lr·(1 − n/N) with --anneal, else lr: the learning rate of round n = 0 … N−1."""
    rate = config.learning_rate
    if config.anneal:
        rate = rate * (1 - n / config.rounds)
    for group in optimizer.param_groups:
        group["lr"] = rate


# ---- processes ------------------------------------------------------------------------------


def processes():
    """N, the number of processes; what a cluster left in its place that is no number means 1."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and int(size) else 1


def rank():
    """Which process this is, 0 to N−1; a RANK that a cluster left without WORLD_SIZE is none."""
    return int(os.environ.get("RANK", 0)) if processes() > 1 else 0


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


def is_mine(i):
    """Whether this process draws, scores and learns from picture i of a round.  (N,) -> (N,)"""
    return i % processes() == rank()


def mine(B):
    """Those of the pictures 0 ... B−1 that are mine."""
    if B < processes():
        raise ValueError(f"torchrun: {processes()} processes, but only {B} pictures to share")
    return torch.arange(rank(), B, processes())


def batches(i, k, batch_size):
    """Those (picture, step) pairs whose picture is mine, batch_size at a time.  (M,), (M,)"""
    own = is_mine(i)
    if own.any():  # else split gives one empty batch
        yield from zip(i[own].split(batch_size), k[own].split(batch_size))


def total(*tensors):
    """Adds up, in place and in each process, what every process has in these tensors.

    Where each has filled its own places and left 0 in the others', this fills all of them.
    """
    if processes() > 1:
        connect()
        for tensor in tensors:
            dist.all_reduce(tensor)


def total_gradients(params):
    """Adds up the gradients of all processes, in one message; a missing one counts 0."""
    params = list(params)
    for p in params:
        if p.grad is None:  # no picture of this process had anything to teach
            p.grad = torch.zeros_like(p)
    if processes() > 1:
        together = torch.cat([p.grad.flatten() for p in params])
        total(together)
        for p, grad in zip(params, together.split([p.numel() for p in params])):
            p.grad.copy_(grad.view_as(p))


def all_images(images):
    """B pictures, of which this process has its own, and None in the others' places."""
    if processes() == 1:
        return images
    connect()
    parts = [None] * processes()
    dist.all_gather_object(parts, images)
    return [parts[i % processes()][i] for i in range(len(images))]
