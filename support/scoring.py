"""A reward from its name, as a weighted sum or out of a file; and its numbers, checked.

Nothing here is a lesson. Which names there are, chapter 2 says: its table comes in as an argument.
"""
import copy
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from support import parallel
from support.flags import MachineFlags
from support.models import pick_device
from support.reward_models import find
from tiny_sd import judge


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


# ---- by name --------------------------------------------------------------------------------


def get_reward(spec, table, models, device=None, flag="--reward"):
    """A reward by its name in the table, from path/to/file.py:function, or a weighted sum.

    table: name -> a function of (images, prompts), or a class that is called with (models, device)
    and gives one: its weights are loaded here, once. ValueError names the flag and what is wrong.
    """
    if is_sum(spec):
        return weighted_sum(spec, table, models, device, flag)
    if ".py:" in spec:
        return reward_from_file(spec, flag)
    if spec not in table:
        raise ValueError(f"{flag} {spec}: unknown; choose from {', '.join(table)}, a sum "
                         "such as alignment=1,aesthetic=0.2, or path/to/file.py:function")
    if isinstance(table[spec], type):
        if models.reward_device:
            device = pick_device(models.reward_device, "--reward-device")
        return in_batches(table[spec](models, pick_device(device)), spec, models.reward_batch_size)
    return table[spec]


def is_sum(spec):
    """Whether it has weights: name=weight. An = in the path of a file is none."""
    return "=" in spec.rpartition(":")[2]


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


def weighted_sum(spec, table, models, device, flag):
    """r = Σ_k weight_k · r_k  from "name=weight,name=weight"."""
    weights, terms = [], []
    for part in spec.split(","):
        name, _, weight = part.rpartition("=")
        try:
            weights.append(float(weight))
            terms.append(get_reward(name, table, models, device, flag))
        except ValueError as error:
            raise ValueError(f"{flag} {spec}: {error}") from error

    def reward(images, prompts):
        total = 0
        for weight, term in zip(weights, terms):
            total = total + weight * checked_numbers(term, images, prompts)  # names a bad term
        return total

    reward.__name__ = spec
    return reward


# ---- from a file of one's own ---------------------------------------------------------------


def reward_from_file(spec, flag="--reward"):
    """One's own reward: the function of that name in that file, which may import its neighbors.

    Whatever goes wrong inside becomes one ValueError that says what, and in which line.
    """
    file, _, name = spec.rpartition(":")
    try:
        function = getattr(load_module(file), name)
        if not callable(function):
            raise TypeError(f"{name} is not a function")
    except (Exception, SystemExit) as error:  # whatever the reader's own file raises
        raise ValueError(f"{flag} {spec}: {explain(error, file)}") from error

    def reward(images, prompts):
        try:
            # Copies, for what it does to its lists or its pictures must change no one else's.
            values = function(*copy.deepcopy((images, prompts)))
            # A generator runs only when it is read, so it is read here, where errors are explained;
            # one number too many is enough to see that it gives too many.
            return list(islice(values, len(images) + 1)) if isinstance(values, Iterator) else values
        except (Exception, SystemExit) as error:
            # Without a line of its own: its arguments did not fit, and its first line is shown.
            code = getattr(function, "__code__", None)
            raise ValueError(f"reward {spec}: {explain(error, file, code)}") from error

    reward.__name__ = spec
    return reward


def load_module(file):
    module_spec = importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # a dataclass in the file looks itself up there
    sys.path.append(str(Path(file).resolve().parent))
    module_spec.loader.exec_module(module)
    return module


def explain(error, file, code=None):
    """The type and message of an error in one line, and the last line of that file it came by."""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    lines = [code.co_firstlineno] if code else []
    for frame in traceback.extract_tb(error.__traceback__):
        if Path(frame.filename).resolve() == Path(file).resolve():
            lines.append(frame.lineno)
    return f"{message} ({file}:{lines[-1]})" if lines else message


# ---- its numbers ----------------------------------------------------------------------------


@torch.no_grad()
def score(reward, images, prompts, folder="runs"):
    """The reward's B numbers as a float64 tensor (B,); ValueError unless there are B finite ones.

    The picture that got no finite number is saved in the folder. Of several processes each asks
    the reward about its own share of the pictures.
    """
    numbers = torch.zeros(len(images), dtype=torch.float64)
    for rows in parallel.share(len(images), len(images)):
        own_images, own_prompts = [images[i] for i in rows], [prompts[i] for i in rows]
        numbers[rows] = checked_numbers(reward, own_images, own_prompts, folder)
    parallel.total(numbers)
    return numbers


def checked_numbers(reward, images, prompts, folder="runs"):
    """What `score` gives, of the pictures of one process."""
    name = getattr(reward, "__name__", str(reward))
    values = reward(images, prompts)
    numbers = []
    try:
        for value in values:
            numbers.append(float(value))  # whole numbers too, and so in every later average
    except Exception as error:  # of no loop over None, of a tensor with two numbers, of a word
        raise ValueError(f"reward {name}: not a number for each picture ({error})") from error
    if len(numbers) != len(images):
        raise ValueError(f"reward {name}: {len(numbers)} numbers for {len(images)} pictures, "
                         f"the first of {prompts[0]!r}")
    numbers = torch.tensor(numbers, dtype=torch.float64)
    for number, image, prompt in zip(numbers, images, prompts):
        if not number.isfinite():
            file = Path(folder, "bad_reward.png")
            if image is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
            raise ValueError(f"reward {name}: gave {number.item()} for a picture of {prompt!r}: "
                             f"see {file}")
    return numbers


# ---- questions of vlm_strict ----------------------------------------------------------------


def read_questions(file):
    """prompt -> [[question, right answer], ...], from a JSON file, else the shape world's."""
    if file is None:
        return judge.questions
    try:
        known = json.loads(Path(find(file) or file).read_text(encoding="utf-8"))
        for pairs in known.values():
            for pair in pairs:
                if not isinstance(pair, list) or [type(word) for word in pair] != [str, str]:
                    raise ValueError(f"{pair} is no pair of strings")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"--vlm-questions {file}: it must read {{prompt: [[question, answer]]}}, "
                         f"but {error}") from error

    def questions(prompt):
        if not known.get(prompt):
            raise ValueError(f"--vlm-questions {file}: nothing for the prompt {prompt!r}")
        return known[prompt]

    return questions
