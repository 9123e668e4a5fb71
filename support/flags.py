"""Command line: a dataclass in, a checked Config out; every bad input one message, exit code 2.

A field of the Config is a flag, the comment behind it is the flag's help (the library tyro reads
both). Settings that --sd makes the defaults are in published.toml, a section for each script.
"""
import os
import shlex
import sys
import tempfile
import tomllib
import warnings
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Literal

import tyro

from support import training

PUBLISHED = Path(__file__).with_name("published.toml")
TINY = 1e-12  # stands for "above 0"
WHOLE = (1, 10**6)  # the range of a whole number that is not in RANGES
REAL = (0, 1e30)  # and of any other number
RANGES = {  # field -> smallest and largest value; both allowed
    "advantage_clip": (0, inf),  # infinite: never clipped
    "alpha": (TINY, 1e30),
    "bert_layer": (0, 10**6),
    "clip_range": (0, 1 - TINY),
    "eta": (TINY, 1),  # without noise there is no density
    "eval_samples": (2, 10**6),
    "groups": (2, 10**6),
    "guidance_scale": (1, 1e30),  # 1 is none; below, the prompt would count less than without it
    "keep": (TINY, 1),
    "keep_every": (0, 10**6),
    "kl_bound": (TINY, inf),
    "labels": (2, 10**6),
    "lora_rank": (0, 10**6),
    "max_grad_norm": (TINY, inf),
    "noise": (TINY, 1e30),
    "noise_steps": (0, 1000),
    "num_steps": (1, 1000),
    "pictures": (100, 10**6),
    "seed": (0, 2**31 - 1),
    "temperature": (TINY, 1e30),
    "timestep_fraction": (TINY, 1),
}
# If they are given at all; and in a list each stands once:
NOT_EMPTY = ("rewards", "prompts", "methods", "lora_targets", "betas", "families", "name", "resume")

unfinished = None  # folder of the run that is being trained, which --resume can go on with


@dataclass(frozen=True)
class MachineFlags:
    """Where and how every script computes: nothing here changes a result by more than rounding."""
    batch_size: int = 64  # pictures per UNet call where nothing is learned
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of weights that are not trained
    device: str | None = None  # cpu, cuda, ...; default: a GPU if there is one


def published(script):
    """Field -> value of what --sd makes the defaults of a script, such as "03_ddpo"."""
    with open(PUBLISHED, "rb") as file:
        settings = tomllib.load(file)[script]
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()}


def parse(Config, doc, argv=None, sd=None, quick=None, default=None):
    """Command line -> Config.  sd, quick: settings that are the defaults where --sd, --quick is.

    default: a Config, in place of the class's own values. tyro prints what it cannot read, with the
    flag that was perhaps meant, and exits with 2; ValueError for a number out of its range.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        if word != word.encode(errors="ignore").decode():
            raise ValueError(f"{word!r}: this is no text in UTF-8")
    default = default or Config()
    for name, settings in (("sd", sd), ("quick", quick)):
        if settings and f"--{name}" in words:
            default = replace(default, **settings, **{name: True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tyro.cli(Config, description=doc, args=words, default=default)
    check(config)
    return config


def check(config):
    """ValueError that names the first flag whose value is out of its range."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_EMPTY and value is not None:
            if not value:
                raise ValueError(f"{flag(field.name)} is empty")
            if isinstance(value, tuple) and len(set(value)) < len(value):
                raise ValueError(f"{flag(field.name)}: one of them stands there twice")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                low, high = RANGES.get(field.name, WHOLE if isinstance(number, int) else REAL)
                if not low <= number <= high:
                    raise ValueError(f"{flag(field.name)} must be {in_words(low, high)}, not "
                                     f"{number}")


def in_words(low, high):
    """A range as a reader writes it: "above 0", "at least 1 and at most 1000"."""
    words = "above 0" if low == TINY else f"at least {low:g}"
    if high == 1 - TINY:
        return words + " and below 1"
    return words if high == inf else f"{words} and at most {high:g}"


def flag(name):
    """The flag of a field: eval_samples -> --eval-samples."""
    return "--" + name.replace("_", "-")


def make_folder(out):
    """Makes the folder; OSError, before any work is done, where nothing can be written in it."""
    Path(out).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def picture_path(out):
    """--out as a Path whose folder is there: what is wrong with it fails before the work."""
    out = Path(out)
    if out.suffix not in (".png", ".jpg", ".pdf") or out.is_dir():
        raise ValueError(f"--out {out}: it must be a file's name, in .png, .jpg or .pdf")
    make_folder(out.parent)
    return out


def run(main):
    """main(), where bad input becomes one line on stderr and exit code 2; no memory left, too.

    Ctrl-C gives one line and 130, as shells have it. The line says how to go on where a training
    was cut short. Of several processes the first alone prints, but each says what it fails by.
    """
    global unfinished
    unfinished, stderr = None, sys.stderr
    if not training.is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):  # a log file on Windows may have no β
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        return
    except (ValueError, OSError) as error:
        message, code = str(error), 2
    except (MemoryError, RuntimeError) as error:
        # torch has a RuntimeError of its own for each device; all say what they could not allocate.
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        message, code = (f"out of memory; try a smaller --batch-size or --train-batch-size, or "
                         f"fewer pictures ({reason})"), 2
    except KeyboardInterrupt:
        message, code = "stopped", 130
    if unfinished:
        command = shlex.join(["python", sys.argv[0], "--resume", str(unfinished)])
        message += f"; what it has finished is kept, go on with: {command}"
    # Only here is all of main gone, its progress bar too: the line gets a line of its own.
    print(f"{Path(sys.argv[0]).name}: {message}", file=stderr)
    sys.exit(code)
