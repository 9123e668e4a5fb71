"""Command line: a dataclass in, a checked Config out; every bad input one message, exit code 2.

A field of the Config is a flag, the comment behind it is the flag's help (the library tyro reads
both). Settings that --sd makes the defaults are in published.toml, a section for each script.
"""
import json
import os
import shlex
import sys
import tomllib
import warnings
from dataclasses import asdict, dataclass, fields, replace
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
    "kl_bound": (TINY, 1e30),
    "labels": (2, 10**6),
    "lora_rank": (0, 10**6),
    "max_grad_norm": (TINY, inf),
    "num_steps": (1, 1000),
    "pictures": (100, 10**6),
    "seed": (0, 2**31 - 1),
    "target_kl": (TINY, 1e30),
    "temperature": (TINY, 1e30),
    "timestep_fraction": (TINY, 1),
}
NOT_EMPTY = ("rewards", "prompts", "lora_targets", "name", "resume")  # if they are given at all
# Fields that change no trained weight: where a run is, on what, and how it is looked at.
NO_MATTER = ("name", "out", "device", "batch_size", "train_batch_size", "checkpointing",
             "reward_batch_size", "reward_device", "eval_samples", "keep_every", "resume")
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
    """What every training has, whatever it learns by."""
    model: str = "tiny_sd"  # Stable Diffusion 1.x/2.x: a folder, a finished run, or a hub name
    num_steps: int = 10  # denoising steps T
    eta: float = 1.0  # noise of a step: 1 is DDPM's
    guidance_scale: float = 1.0  # classifier-free guidance; 1 means none, at half the cost
    weight_decay: float = 1e-4  # of AdamW
    seed: int = 0  # seed of everything
    train_batch_size: int = 64  # (picture, step) pairs per UNet call in training; memory only
    checkpointing: bool = False  # keep few activations and compute them again: a third slower
    eval_samples: int = 128  # pictures on fresh noise, before and after, that the result rests on
    film_pictures: int = 8  # pictures in each row of the film; each column keeps its noise
    keep_every: int = 0  # also keep the weights after every so many rounds; 0: only the last
    name: str | None = None  # the run's folder in --out; default: made from what is run
    out: str = "runs"  # folder of all runs
    resume: str | None = None  # folder of a run that was cut short: goes on where it stopped
    sd: bool = False  # the published settings for the full model become the defaults


def published(script):
    """Field -> value of what --sd makes the defaults of a script, such as "03_ddpo"."""
    with open(PUBLISHED, "rb") as file:
        settings = tomllib.load(file)[script]
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()}


def parse(Config, doc, argv=None, sd=None, quick=None):
    """Command line -> Config.  sd, quick: settings that are the defaults where --sd, --quick is.

    With --resume, a run's own settings are. tyro prints what it cannot read, with the flag that was
    perhaps meant, and exits with 2; ValueError that names the flag for a number out of its range.
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
    check(config)
    folder = getattr(config, "resume", None)
    if folder:
        saved = saved_config(folder, Config)
        config = read(Config, doc, words, saved)
        check(config)
        check_settings(f"--resume {folder}: it", asdict(saved), asdict(config),
                       "it goes on as it began", MAY_CHANGE)
    return config


def read(Config, doc, words, default):
    """tyro's Config of a command line; default: the values of flags that are not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tyro.cli(Config, description=doc, args=words, default=default)


def saved_config(folder, Config):
    """The Config in a run's config.json; ValueError unless this script began that run."""
    try:
        saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        del saved["method"]
        config = Config(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in saved.items()})
        check(config)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume {folder}: no run that this script began: {error}") from error
    return config


def check_settings(source, saved, wanted, advice, ignored=NO_MATTER):
    """ValueError naming the first flag of which a run's saved settings hold another value."""
    wanted, saved = json.loads(json.dumps([wanted, saved]))  # a tuple becomes a list, as when saved
    for name, value in wanted.items():
        if name not in ignored and saved.get(name) != value:
            raise ValueError(f"{source} was made with {flag(name)} {saved.get(name)}, not {value}: "
                             f"{advice}")


def check(config):
    """ValueError that names the first flag whose value is out of its range."""
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_EMPTY and value is not None and not value:
            raise ValueError(f"{flag(field.name)} is empty")
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


def words_of(config, names):
    """The fields of these names as words of a command line: eta -> ["--eta", "0.5"]."""
    words = []
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool):
            words.append(flag(name) if value else "--no-" + flag(name)[2:])
        elif isinstance(value, tuple):
            words += [flag(name), *map(str, value)]
        elif value is not None:
            words += [flag(name), str(value)]
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
