"""Addresses of random numbers, and the prompts of a round."""
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support import flags, training


def test_no_two_addresses_share_a_stream():
    seeds = (0, 1, 2, 7, 10, flags.RANGES["seed"][1])
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
    assert torch.equal(training.gaussians(torch.tensor([4, 9]), (2, 3), 5, "film", 7)[1], z)
    # A new purpose goes to the end: in the middle it would change the noise of every old run.
    assert training.PURPOSES[:11] == (
        "train", "evaluate", "film", "compare", "examples", "prompts", "minibatches",
        "timesteps", "adapters", "value", "value batches")
    with pytest.raises(ValueError):
        training.random_stream(0, "nonsense")


@pytest.mark.parametrize("per_round, count", [(1, 4), (2, 5), (7, 3)])
def test_every_prompt_comes_before_any_comes_again(per_round, count):
    prompts = [f"prompt {j}" for j in range(count)]
    config = SimpleNamespace(seed=0, prompts_per_round=per_round, samples_per_prompt=3)
    line = []
    for n in range(4 * count):
        chosen = training.prompts_of_round(prompts, config, n)
        line += chosen[::3]
        assert chosen == [prompt for prompt in chosen[::3] for _ in range(3)]
    assert len(line) == 4 * count * per_round
    passes = [tuple(line[first:first + count]) for first in range(0, len(line), count)]
    assert all(sorted(one) == sorted(prompts) for one in passes)
    assert len(set(passes)) > 1, "all passes in the same order"
    config.seed = 1
    other = [training.prompts_of_round(prompts, config, n)[::3] for n in range(4 * count)]
    assert sum(other, []) != line


@pytest.mark.parametrize("prompts, samples, spread", [
    ("abc", 7, "abcabca"), ("abcde", 3, "abd"), ("", 3, "")])
def test_prompts_are_spread_evenly(prompts, samples, spread):
    assert training.spread_evenly(list(prompts), samples) == list(spread)
