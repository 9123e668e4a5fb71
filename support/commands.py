"""Runs of other scripts, started as commands that a reader can type; finished ones are kept."""
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from support import flags
from support.models import HERE
from support.scoring import load_module

# Fields that change no trained weight: where a run is, on what, and how it is looked at.
NO_MATTER = ("name", "out", "device", "batch_size", "eval_samples")


def train_missing(commands, out):
    """Starts every command whose run is not finished.  commands: name -> [script, flag, value, ...]

    The run's --name and --out are added. ValueError before anything is started if a flag is wrong
    or a finished run has other settings. A run that was cut short is moved aside, never deleted.
    """
    missing = []
    for name, command in commands.items():
        settings = settings_of(command)
        if is_finished(Path(out, name)):
            check_settings(Path(out, name), settings)
        else:
            missing.append(name)
    for name in missing:
        folder = Path(out, name)
        if folder.exists():
            move_aside(folder)
        command = [*commands[name], "--name", name, "--out", str(out)]
        start(command)
        if not is_finished(folder):
            raise ValueError(f"no finished run in {folder} after {as_typed(command)}")


def is_finished(folder):
    """Whether a run's folder holds its summary, which is written last of all."""
    return Path(folder, "evaluation.json").is_file()


def settings_of(command):
    """Field -> value of the Config that a command's script makes of its flags and defaults."""
    script, *words = command
    module = load_module(HERE / script)  # importing a script does nothing
    config = flags.parse(module.Config, module.__doc__, words, getattr(module, "SD", None))
    return asdict(config)


def check_settings(folder, wanted):
    """ValueError naming the first flag of which a run's config.json holds another value."""
    saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(wanted))  # so that a tuple is a list there too
    for name, value in wanted.items():
        if name in NO_MATTER:
            continue
        if name not in saved:
            raise ValueError(f"{folder} was made by a script without {flags.flag(name)}: move it "
                             "away, or choose another --out")
        if saved[name] != value:
            raise ValueError(f"{folder} was made with {flags.flag(name)} {saved[name]}, not "
                             f"{value}: move it away, or choose another --out")


def move_aside(folder):
    """Renames a folder to the first of NAME-unfinished-1, -2, ... that is free."""
    k = 1
    while folder.with_name(f"{folder.name}-unfinished-{k}").exists():
        k += 1
    folder.rename(folder.with_name(f"{folder.name}-unfinished-{k}"))


def start(command):
    """Prints a command, runs it, and waits for its end; ValueError with the command if it fails."""
    script, *words = command
    print(f"\n$ {as_typed(command)}", flush=True)
    ended = subprocess.run([sys.executable, str(HERE / script), *words])
    if ended.returncode != 0:
        raise ValueError(f"exit code {ended.returncode} of the command {as_typed(command)}")


def as_typed(command):
    """What a reader types in the present folder to do the same."""
    script, *words = command
    return shlex.join(["python", os.path.relpath(HERE / script), *words])


def split_flags(argv, taken):
    """Own flags, and those behind "--", which are for the scripts that are started.

    taken: flags that must not be passed on, because each started run gets its own value of them.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if "--" not in words:
        return words, []
    place = words.index("--")
    own, passed_on = words[:place], words[place + 1:]
    for word in passed_on:
        name = word.partition("=")[0].replace("_", "-")
        if name in taken or name.replace("--no-", "--") in taken:
            raise ValueError(f"{name} behind -- : each run gets its own")
    return own, passed_on
