"""Command line: a dataclass in, a checked Config out; every bad input one message, exit code 2.

A field of the Config is a flag, the comment behind it is the flag's help (the library tyro reads
both). LIMITS holds the range of every number by the name of its field, once for all scripts.
"""
import math
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro

TINY = 1e-12  # stands for "above 0"
LIMITS = {  # field -> smallest and largest value; both allowed
    "advantage_clip": (0, math.inf),
    "alpha": (TINY, math.inf),
    "batch_size": (1, math.inf),
    "best_of": (1, math.inf),
    "beta": (0, math.inf),
    "bert_layer": (0, math.inf),
    "clip_range": (0, 1 - TINY),
    "eta": (0, 1),
    "eval_samples": (2, math.inf),
    "film_pictures": (1, math.inf),
    "guidance_scale": (0, math.inf),
    "jobs": (1, math.inf),
    "keep": (TINY, 1),
    "keep_every": (0, math.inf),
    "kl_bound": (TINY, math.inf),
    "labels": (2, math.inf),
    "learning_rate": (0, math.inf),
    "lora_rank": (0, math.inf),
    "max_grad_norm": (TINY, math.inf),
    "num_steps": (1, 1000),
    "pictures": (100, math.inf),
    "prompts_per_family": (1, math.inf),
    "prompts_per_round": (1, math.inf),
    "rounds": (1, math.inf),
    "samples": (1, math.inf),
    "samples_per_prompt": (1, math.inf),
    "seed": (0, 2**31 - 1),
    "seeds": (1, math.inf),
    "show": (1, math.inf),
    "target_kl": (TINY, math.inf),
    "temperature": (TINY, math.inf),
    "timestep_fraction": (TINY, 1),
    "train_batch_size": (1, math.inf),
    "updates_per_round": (1, math.inf),
    "value_rounds": (1, math.inf),
    "weight_decay": (0, math.inf),
    "betas": (0, math.inf),
    "groups": (2, math.inf),
}
MAY_BE_INFINITE = {"advantage_clip", "max_grad_norm"}  # infinite: never clipped


@dataclass(frozen=True)
class MachineFlags:
    """Where and how every script computes: nothing here changes a result by more than rounding."""
    batch_size: int = 64  # pictures per UNet call where nothing is learned
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights that nobody trains
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


@dataclass(frozen=True)
class TrainFlags(MachineFlags):
    """Memory and folder of every training."""
    train_batch_size: int = 64  # pictures at a step per UNet call in training; memory, not result
    checkpointing: bool = False  # keep few activations and compute them again: a third slower
    plan: bool = False  # only print how much memory this would take, by part, and stop
    eval_samples: int = 128  # pictures on fresh noise, before and after, that the result rests on
    film_pictures: int = 8  # pictures in each row of the film; each column keeps its noise
    keep_every: int = 0  # also keep the weights after every so many rounds; 0: only the last
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs


def parse(Config, doc, argv=None, sd=None, quick=None):
    """Command line -> Config.  sd, quick: settings that are the defaults where --sd, --quick is.

    tyro prints what it cannot read, with the flag that was perhaps meant, and exits with 2;
    ValueError that names the flag for a number out of its range.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    default = Config()
    for name, settings in (("sd", sd), ("quick", quick)):
        if settings and f"--{name}" in words:
            default = replace(default, **settings, **{name: True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tyro.cli(Config, description=doc, args=words, default=default)
    check(config)
    return config


def check(config):
    """ValueError that names the first flag whose number is out of its range, or no number."""
    for field in fields(config):
        if field.name not in LIMITS:
            continue
        value = getattr(config, field.name)
        low, high = LIMITS[field.name]
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is None:
                continue
            endless = number == math.inf and field.name not in MAY_BE_INFINITE
            if not low <= number <= high or endless:
                raise ValueError(f"{flag(field.name)} must be {in_words(low, high)}, not {number}")


def in_words(low, high):
    """A range as a reader writes it: "above 0", "at least 1 and at most 1000"."""
    words = "above 0" if low == TINY else f"at least {low:g}"
    if high == 1 - TINY:
        return words + " and below 1"
    return words if high == math.inf else words + f" and at most {high:g}"


def flag(name):
    """The flag of a field: eval_samples -> --eval-samples."""
    return "--" + name.replace("_", "-")


def as_words(name, value):
    """A field's value as words of a command line: ("eta", 0.5) -> ["--eta", "0.5"]."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + flag(name)[2:]]
    if isinstance(value, tuple):
        return [flag(name), *map(str, value)]
    return [flag(name), str(value)]


def words_of(config, names):
    """The fields of these names as words of a command line."""
    words = []
    for name in names:
        words += as_words(name, getattr(config, name))
    return words


def changed_words(config, Base):
    """Those fields of a Config's base class as words that have not their default value."""
    changed = [field.name for field in fields(Base)
               if getattr(config, field.name) != field.default]
    return words_of(config, changed)


def picture_path(out):
    """--out as a Path whose folder is there: what is wrong with it fails before the work."""
    out = Path(out)
    if out.suffix not in (".png", ".jpg", ".pdf"):
        raise ValueError(f"--out {out}: the name must end in .png, .jpg or .pdf")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def run(main):
    """main(), where bad input becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a log file on Windows may have no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
