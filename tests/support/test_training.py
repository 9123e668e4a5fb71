"""Addresses of random numbers, prompts and minibatches of a round, one optimizer step."""
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import flags, training


def settings(**values):
    usual = {"seed": 0, "prompts_per_round": 2, "samples_per_prompt": 3, "timestep_fraction": 1.0}
    return SimpleNamespace(**usual | values)


def test_no_two_addresses_share_a_stream():
    seeds = (0, 1, 2, 7, 10, flags.LIMITS["seed"][1])
    first = []
    for seed, purpose in product(seeds, training.PURPOSES):
        for n, i in product((0, 1, 2, 1999), (0, 1, 2, 255)):
            first.append(training.random_stream(seed, purpose, n, i).integers(2**63))
        first.append(training.torch_seed(seed, purpose))
    assert len(set(first)) == len(first) == 6 * 17 * len(training.PURPOSES)


def test_an_address_is_four_words_for_numpy():
    z = training.gaussian((2, 3), 5, "film", 7, 9)
    expected = np.random.default_rng([5, 2, 7, 9]).standard_normal((2, 3), dtype=np.float32)
    assert z.dtype == torch.float32 and np.array_equal(z.numpy(), expected)
    # A new purpose goes to the end: in the middle it would change the noise of every old run.
    assert training.PURPOSES[:11] == (
        "train", "evaluate", "film", "compare", "examples", "prompts", "minibatches",
        "timesteps", "adapters", "value", "value batches")
    for address in ((2**32, "train"), (-1, "train"), (0, "train", 0, 2**32), (0, "nonsense")):
        with pytest.raises(ValueError):
            training.random_stream(*address)


@pytest.mark.parametrize("per_round, count", [(1, 4), (2, 5), (7, 3)])
def test_every_prompt_comes_before_any_comes_again(per_round, count):
    prompts = [f"prompt {j}" for j in range(count)]
    config = settings(prompts_per_round=per_round)
    line = []
    for n in range(4 * count):
        chosen = training.prompts_of_round(prompts, config, n)
        line += chosen[::3]
        assert chosen == [prompt for prompt in chosen[::3] for _ in range(3)]
    assert len(line) == 4 * count * per_round
    passes = [tuple(line[first:first + count]) for first in range(0, len(line), count)]
    assert all(sorted(one) == sorted(prompts) for one in passes)
    assert len(set(passes)) > 1, "all passes in the same order"
    other = settings(prompts_per_round=4 * count, seed=1)
    assert training.prompts_of_round(prompts, other, 0)[::3] != line[:4 * count]


@pytest.mark.equation("minibatches", "support.training.minibatches")
def test_minibatches_hold_each_picture_once_and_hardly_differ_in_size():
    for samples, updates in ((10, 1), (10, 3), (6, 6)):
        parts = training.minibatches(samples, updates, 5, 2)
        sizes = [len(part) for part in parts]
        assert len(parts) == updates and max(sizes) - min(sizes) <= 1
        want = np.random.default_rng([5, 6, 2, 0]).permutation(samples)  # 6: "minibatches"
        assert torch.cat(list(parts)).tolist() == want.tolist()
    assert not torch.equal(*(torch.cat(training.minibatches(50, 2, 5, n)) for n in (0, 1)))


def test_spread_evenly():
    assert training.spread_evenly(["a", "b", "c"], 7) == list("abcabca")
    assert training.spread_evenly(list("abcde"), 3) == list("abd")


@pytest.mark.parametrize("fraction, kept", [(1, 10), (0.5, 5), (0.25, 2), (0.01, 1)])
def test_a_fraction_keeps_other_steps_of_each_picture(fraction, kept):
    config = settings(timestep_fraction=fraction)
    i, k = training.step_pairs(torch.arange(200), 10, config, 0)
    steps = {}
    for picture, step in zip(i.tolist(), k.tolist()):
        steps.setdefault(picture, []).append(step)
    assert all(len(s) == len(set(s)) == kept for s in steps.values()) and len(steps) == 200
    assert len({tuple(s) for s in steps.values()}) > 1
    again = training.step_pairs(torch.tensor([7]), 10, config, 0)[1].tolist()
    assert again == steps[7]  # of a picture, whoever stands beside it in the minibatch
    other = settings(timestep_fraction=fraction, seed=1)
    for elsewhere in ((config, 1), (other, 0)):  # another round, another seed
        assert k.tolist() != training.step_pairs(torch.arange(200), 10, *elsewhere)[1].tolist()
