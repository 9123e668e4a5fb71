"""Command line: a dataclass in, a checked Config out; every bad input one message, exit code 2.

A field of the Config is a flag, the comment behind it is the flag's help (the library tyro reads
both). LIMITS holds the range of every number by the name of its field, once for all scripts.
"""
import json
import math
import os
import shlex
import sys
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro

from support import parallel

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
    "reward_batch_size": (1, math.inf),
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
MANY, HUGE = 10**6, 1e30  # instead of an infinite limit, of whole numbers and of others
NOT_EMPTY = {"rewards", "lora_targets"}  # flags with words behind them, of which one is needed
# Fields that change no trained weight: where a run is, on what, and how it is looked at.
NO_MATTER = ("name", "out", "device", "batch_size", "train_batch_size", "checkpointing",
             "reward_batch_size", "reward_device", "eval_samples", "keep_every", "resume",
             "plan")
MAY_CHANGE = set(NO_MATTER) - {"name", "out"}  # as a run goes on: its folder has them already

unfinished = None  # folder of the run that is being trained, which --resume can go on with


@dataclass(frozen=True)
class MachineFlags:
    """Where and how every script computes: nothing here changes a result by more than rounding."""
    batch_size: int = 64  # pictures per UNet call where nothing is learned
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights that are not trained
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


@dataclass(frozen=True)
class TrainFlags(MachineFlags):
    """Memory and folder of every training."""
    train_batch_size: int = 64  # (picture, step) pairs per UNet call in training; memory only
    checkpointing: bool = False  # keep few activations and compute them again: a third slower
    plan: bool = False  # only print how much memory this would take, by part, and stop
    eval_samples: int = 128  # pictures on fresh noise, before and after, that the result rests on
    film_pictures: int = 8  # pictures in each row of the film; each column keeps its noise
    keep_every: int = 0  # also keep the weights after every so many rounds; 0: only the last
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs
    resume: str | None = None  # folder of a run that was cut short: goes on where it stopped


def parse(Config, doc, argv=None, sd=None, quick=None):
    """Command line -> Config.  sd, quick: settings that are the defaults where --sd, --quick is.

    tyro prints what it cannot read, with the flag that was perhaps meant, and exits with 2;
    ValueError that names the flag for a number out of its range.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        if word != word.encode(errors="ignore").decode():
            raise ValueError(f"{word!r}: this is no text in UTF-8")
    default = Config()
    for name, settings in (("sd", sd), ("quick", quick)):
        if settings and f"--{name}" in words:
            default = replace(default, **settings, **{name: True})
    config = read(Config, doc, words, default)
    for name in ("resume", "name"):
        if getattr(config, name, None) == "":
            raise ValueError(f"{flag(name)} is empty")
    folder = getattr(config, "resume", None)
    if folder:
        saved = saved_config(folder, Config)
        config = read(Config, doc, words, saved)
        check_settings(f"--resume {folder}: it", asdict(saved), asdict(config),
                       "it goes on as it began", MAY_CHANGE)
    check(config)
    return config


def read(Config, doc, words, default):
    """tyro's Config of a command line; default: the values of flags that are not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tyro.cli(Config, description=doc, args=words, default=default)


def saved_config(folder, Config):
    """The Config in a run's config.json; ValueError unless this script began that run."""
    try:
        saved = dict(json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--resume {folder}: no run; its config.json cannot be read") from error
    saved.pop("method", None)
    if saved.keys() != {field.name for field in fields(Config)}:
        raise ValueError(f"--resume {folder}: another script began this run, or another version")
    config = Config(**{name: tuple(value) if isinstance(value, list) else value  # for JSON's lists
                       for name, value in saved.items()})
    try:
        check(config)
    except TypeError as error:  # text where a number belongs
        raise ValueError(f"--resume {folder}: its config.json was changed: {error}") from error
    return config


def check_settings(source, saved, wanted, advice, ignored=NO_MATTER):
    """ValueError naming the first flag of which a run's saved settings hold another value."""
    wanted = json.loads(json.dumps(wanted))  # so that a tuple is a list, as in what was saved
    saved = json.loads(json.dumps(saved))
    for name, value in wanted.items():
        if name in ignored:
            continue
        if name not in saved:
            raise ValueError(f"{source} was made by a script without {flag(name)}: {advice}")
        if saved[name] != value:
            raise ValueError(f"{source} was made with {flag(name)} {saved[name]}, not {value}: "
                             f"{advice}")


def check(config):
    """ValueError that names the first flag whose number is out of its range, or no number."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_EMPTY and not value:
            raise ValueError(f"{flag(field.name)}: at least one is needed")
        if field.name not in LIMITS:
            continue
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is None:
                continue
            low, high = LIMITS[field.name]
            if high == math.inf and field.name not in MAY_BE_INFINITE:
                high = MANY if isinstance(number, int) else HUGE
            if not low <= number <= high:
                raise ValueError(f"{flag(field.name)} must be {in_words(low, high)}, not {number}")


def in_words(low, high):
    """A range as a reader writes it: "above 0", "at least 1 and at most 1000"."""
    words = "above 0" if low == TINY else f"at least {low:g}"
    if high == 1 - TINY:
        return words + " and below 1"
    if high == math.inf:
        return words
    return words + (f" and at most {high}" if isinstance(high, int) else f" and at most {high:g}")


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


def how_to_go_on():
    """The command that goes on with the run that is being trained, in words; or nothing."""
    if unfinished is None:
        return ""
    command = shlex.join(["python", sys.argv[0], "--resume", str(unfinished)])
    return f"; what it has finished is kept, go on with: {command}"


def run(main):
    """main(), where bad input becomes one line on stderr and exit code 2; no memory left, too.

    Ctrl-C gives one line and 130, as shells have it. The line says how to go on where a training
    was cut short. Of several processes the first alone prints, but each says what it fails by.
    """
    global unfinished
    unfinished, stderr = None, sys.stderr
    if not parallel.is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):  # a log file on Windows may have no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    script = Path(sys.argv[0]).name
    try:
        main()
        return
    except (ValueError, OSError) as error:
        message, code = str(error), 2
    except (MemoryError, RuntimeError) as error:
        # torch has a RuntimeError of its own for each device; all say what they could not allocate.
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        reason = str(error).split("\n")[0][:200]
        message, code = (f"out of memory; try a smaller --batch-size or --train-batch-size, or "
                         f"fewer pictures ({reason})"), 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    # Only here is all of main gone, its progress bar too: the line gets a line of its own.
    print(f"{script}: {message}{how_to_go_on()}", file=stderr)
    sys.exit(code)
