"""Randomness by address, minibatches of pictures, and one optimizer step.

All randomness is a pure function of (seed, purpose, round, sample): nothing is passed around, and
nothing has to be saved. So the noise of an evaluation can never be that of a training, and neither
batches nor the number of processes change a picture.
"""
import numpy as np
import torch

from support import parallel

PURPOSES = (  # what random numbers are for; the place in this list is part of their address
    "train", "evaluate", "film", "compare", "examples", "prompts", "minibatches", "timesteps",
    "adapters", "value", "value batches", "fixed set", "sft batches", "sft noise", "bootstrap",
    "pretrain", "make", "frontier", "labels", "truth")
WORD = 2**32


def random_stream(seed, purpose, n=0, i=0):
    """numpy's generator at the address (seed, purpose, round n, sample i); always the same one.

    Four words of 32 bits each, never fewer: numpy reads [1], [1, 0] and [1, 0, 0, 0] as one.
    """
    address = [seed, PURPOSES.index(purpose), n, i]
    for word in address:
        if not 0 <= word < WORD:
            raise ValueError(f"random numbers have no address {address}: each part lies in "
                             "[0, 2³²); is --seed below 0 or too large?")
    return np.random.default_rng(address)


def gaussian(shape, seed, purpose, n=0, i=0):
    """z ~ N(0, I) at an address, float32, as a tensor of that shape on the CPU."""
    z = random_stream(seed, purpose, n, i).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(z)


def torch_seed(seed, purpose):
    """A seed for torch's global generator, where a library draws first weights from it."""
    return int(random_stream(seed, purpose).integers(2**31))


def prompts_of_round(prompts, config, n):
    """The prompts of round n, each of them samples_per_prompt times in a row: a list of strings.

    Rounds take their prompts in turn from shuffled passes over all of them.
    """
    chosen = []
    first = n * config.prompts_per_round
    for place in range(first, first + config.prompts_per_round):
        passes, position = divmod(place, len(prompts))
        order = random_stream(config.seed, "prompts", passes).permutation(len(prompts))
        chosen += [prompts[order[position]]] * config.samples_per_prompt
    return chosen


def spread_evenly(prompts, samples):
    """`samples` prompts: all in turn, or evenly spaced ones where there are more; [] of none."""
    P = len(prompts)
    if P == 0:
        return []
    if P > samples:
        return [prompts[i * P // samples] for i in range(samples)]
    return [prompts[i % P] for i in range(samples)]


def minibatches(samples, updates, seed, n):
    """Round n's pictures, shuffled and split into as many index tensors as there are updates.

    By picture, not by (picture, step): so no picture of the first update comes back in the second.
    """
    order = random_stream(seed, "minibatches", n).permutation(samples)
    return torch.from_numpy(order).tensor_split(updates)


def step_pairs(pictures, steps, config, n):
    """(picture, step) of all steps that these pictures are trained on: index tensors (M,), (M,).

    A timestep_fraction below 1 keeps that share of the T steps, drawn anew for each picture.
    """
    kept = max(1, round(config.timestep_fraction * steps))
    i, k = [], []
    for picture in pictures.tolist():
        order = random_stream(config.seed, "timesteps", n, picture).permutation(steps)
        i += [picture] * kept
        k += order[:kept].tolist()
    return torch.tensor(i), torch.tensor(k)


def batches(i, k, batch_size):
    """Index tensors (M,), (M,), batch_size of their pairs at a time; of N processes, a share."""
    for rows in parallel.share(len(i), batch_size):
        yield i[rows], k[rows]


def optimizer_step(optimizer, params, config):
    """One step along the gradient of all processes, scaled down to max_grad_norm if it is longer.

    -> its norm before that, and whether it was scaled: both belong in the log, because a bound
    that always acts fixes the length of every step whatever the rewards are.
    """
    for p in params:
        if p.grad is None:  # this process had no picture of this update, or none that teaches
            p.grad = torch.zeros_like(p)
    parallel.total_gradients(params)
    norm = torch.nn.utils.clip_grad_norm_(params, config.max_grad_norm)
    if not norm.isfinite():
        raise ValueError(f"the gradient is {norm.item()}; try a smaller --learning-rate")
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": norm.item(), "grad_clipped": float(norm > config.max_grad_norm)}


def mean_se(values):
    """x̄, s/√N of N numbers; NaN for the error of a single one."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), float("nan")
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()
