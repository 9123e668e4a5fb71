"""A reward from its name, as a weighted sum or out of a file; and its numbers, checked.

Nothing here is a lesson. Which names there are, chapter 2 says: its table comes in as an argument.
"""
import copy
import importlib
import math
import os
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from support import models, training
from support.flags import MachineFlags


@dataclass(frozen=True)
class RewardFlags(MachineFlags):
    """Weights of the learned rewards: flags of every chapter that has a reward."""
    clip: str = "tiny_sd/clip"  # CLIPModel of aesthetic: a folder or hub name
    aesthetic_weights: str = "tiny_sd/aesthetic.safetensors"  # LAION's: file, or OWNER/REPO/FILE
    image_reward_weights: str = "tiny_sd/image_reward/model.safetensors"  # file, or OWNER/REPO/FILE
    vlm: str = "tiny_sd/vlm"  # who looks: a LLaVA (folder or hub name), or judge (shape world)
    vlm_questions: str | None = None  # JSON file {prompt: [[question, answer], ...]} of vlm_strict
    bert: str = "tiny_sd"  # BERTScore's encoder: folder or hub name of a BERT, RoBERTa, DeBERTa
    bert_layer: int | None = None  # its layer; default: bert-score's choice, else the last
    reward_batch_size: int = 32  # pictures that a learned reward looks at together
    reward_device: str | None = None  # of learned rewards: cpu leaves room for the UNet


def get_reward(table, spec, config=RewardFlags(), device=None, flag="--reward"):
    """A reward by its name in the table, from path/to/file.py:function, or a weighted sum.

    table: name -> a function of (images, prompts), or a class that is called with (config, device)
    and gives one: its weights are loaded here, once. ValueError names the flag and what is wrong.
    """
    if is_sum(spec):
        return weighted_sum(table, spec, config, device, flag)
    if ".py:" in spec:
        return reward_from_file(spec, flag)
    if spec not in table:
        raise ValueError(f"{flag} {spec}: unknown; choose from {', '.join(table)}, a sum "
                         "such as alignment=1,aesthetic=0.2, or path/to/file.py:function")
    if not isinstance(table[spec], type):
        return table[spec]
    device = models.pick_device(config.reward_device or device or config.device, "--reward-device")
    return in_batches(table[spec](config, device), spec, config.reward_batch_size)


def is_sum(spec):
    """Whether it has weights: name=weight. An = in the path of a file is none."""
    return "=" in spec.rpartition(":")[2]


def weighted_sum(table, spec, config, device, flag):
    """r = Σ_k weight_k · r_k  from "name=weight,name=weight"."""
    weights, terms = [], []
    for part in spec.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights.append(float(weight))
        except ValueError:
            raise ValueError(f"{flag} {spec}: {weight!r} is no weight") from None
        terms.append(get_reward(table, name, config, device, flag))

    def reward(images, prompts):
        return sum(w * checked_numbers(r, images, prompts) for w, r in zip(weights, terms))

    reward.__name__ = spec
    return reward


def in_batches(scorer, name, batch_size):
    """The same reward, but a network sees at most batch_size pictures at a time."""
    def reward(images, prompts):
        values = []
        for first in range(0, len(images), batch_size):
            batch = slice(first, first + batch_size)
            values.extend(scorer(images[batch], prompts[batch]))
        return values

    reward.__name__ = name
    return reward


# ---- from a file of one's own ---------------------------------------------------------------


def reward_from_file(spec, flag):
    """One's own reward: the function of that name in that file, which may import its neighbors."""
    file, _, name = spec.rpartition(":")
    function = getattr(load_module(file, f"{flag} {spec}"), name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: the file has no function of that name")

    def reward(images, prompts):
        with own_code(f"reward {spec}"):
            # Copies, for what it does to its lists or its pictures must change no one else's.
            values = function(*copy.deepcopy((images, prompts)))
            return [float(value) for value in values]  # here, since a generator runs as it is read

    reward.__name__ = spec
    return reward


def load_module(file, label=None):
    """The module of a Python file, under the file's own name, by which a process pool finds it."""
    file, label = Path(models.find(file) or file).resolve(), label or file
    if not file.is_file():
        raise ValueError(f"{label}: there is no file {file}")
    sys.path.append(str(file.parent))
    with own_code(label):
        module = importlib.import_module(file.stem)
    found = getattr(module, "__file__", None)
    if found != str(file):
        raise ValueError(f"{label}: rename {file}, for Python finds {found} where {file.stem!r} is "
                         "imported")
    return module


PROCESS = (  # what code may change for the whole process: how to read it, and to set it back
    (os.getcwd, os.chdir), (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),
    (torch.get_num_threads, torch.set_num_threads),
    (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    (partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")))


@contextmanager
def own_code(label):
    """Around code of the reader's own: sets back what it changes, and says whose errors it has."""
    before = [read() for read, _ in PROCESS]
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(f"{label} failed:\n{traceback.format_exc().strip()}") from error
    finally:
        for (_, set_back), value in zip(PROCESS, before):
            set_back(value)


# ---- its numbers ----------------------------------------------------------------------------


@torch.no_grad()
def score(reward, images, prompts):
    """r (B,), the reward's numbers in float64; ValueError unless there are B finite ones.

    Of several processes each scores the pictures that it drew; images may be None in the others'
    places.
    """
    r = torch.zeros(len(images), dtype=torch.float64)
    mine = training.mine(len(images))
    if len(mine):
        r[mine] = checked_numbers(reward, [images[i] for i in mine], [prompts[i] for i in mine])
    training.total(r)
    return r


def checked_numbers(reward, images, prompts):
    """What `score` gives, of the pictures of one process; the picture of a bad number is saved."""
    name = getattr(reward, "__name__", reward)
    r = torch.tensor([float(value) for value in reward(images, prompts)], dtype=torch.float64)
    if len(r) != len(images):
        raise ValueError(f"reward {name}: {len(r)} numbers for {len(images)} pictures")
    for number, image, prompt in zip(r.tolist(), images, prompts):
        if not math.isfinite(number):
            _, file = tempfile.mkstemp(".png")
            image.save(file)
            raise ValueError(f"reward {name}: {number} for a picture of {prompt!r}, see {file}")
    return r
