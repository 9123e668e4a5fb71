"""Runs of other scripts, started as commands that a reader can type; finished ones are kept."""
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

from support import flags, runs, training
from support.models import HERE
from support.runs import CHECKPOINT, is_finished
from support.scoring import load_module


def train_missing(commands, out, jobs=1):
    """Starts every command whose run is not finished.  commands: name -> [script, flag, value, ...]

    The run's --name and --out are added. ValueError before anything is started if a flag is wrong
    or a run that is there has other settings. A run that was cut short goes on from its checkpoint;
    one that has none yet is moved aside, never deleted. After one that fails none is started.
    jobs: more than 1 runs that many side by side, each with its output in OUT/NAME.log.
    """
    if training.processes() > 1:
        raise ValueError("this script starts others: start it without torchrun")
    missing = {}
    for name, command in commands.items():
        folder = Path(out, name)
        new = [*command, "--name", name, "--out", str(out)]
        settings = settings_of(new)
        if is_finished(folder):
            check_settings(folder, settings)
        elif Path(folder, CHECKPOINT).is_file():
            check_settings(folder, settings)
            missing[folder] = [*command, "--resume", str(folder)]
        else:
            missing[folder] = new
    running = {}  # folder -> process
    try:
        for folder, command in missing.items():
            if "--resume" not in command:
                move_aside(folder)
            running[folder] = begin(command, f"{folder}.log", jobs)
            while len(running) == jobs:
                take_ended(running, missing)
        while running:
            take_ended(running, missing)
    finally:
        for process in running.values():  # Ctrl-C has reached them too
            process.wait()


def take_ended(running, commands):
    """Waits a moment, and takes out what has ended; ValueError if it left no finished run."""
    time.sleep(0.1)
    for folder in [folder for folder, process in running.items() if process.poll() is not None]:
        del running[folder]
        if not is_finished(folder):
            message = f"no finished run in {folder} after {as_typed(commands[folder])}"
            if Path(f"{folder}.log").is_file():
                message += f"; its output is in {folder}.log"
            raise ValueError(message)


def settings_of(command):
    """Field -> value of the Config that a command's script makes of its flags and defaults.

    ValueError for a flag that stands twice: one that was passed on would replace the run's own.
    """
    script, *words = command
    names = [word.partition("=")[0].replace("_", "-").replace("--no-", "--") for word in words
             if word.startswith("--")]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} behind -- : each run gets its own")
    module = load_module(HERE / script)  # importing a script does nothing
    return asdict(flags.parse(module.Config, module.__doc__, words, getattr(module, "SD", None)))


def check_settings(folder, wanted):
    """ValueError naming the first flag of which a run's config.json holds another value."""
    saved = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    runs.check_settings(folder, saved, wanted, "move it away, or choose another --out")


def move_aside(folder):
    """Renames a folder, if there is one, to the first free name of NAME-unfinished-1, -2, ..."""
    k = 1
    while folder.with_name(f"{folder.name}-unfinished-{k}").exists():
        k += 1
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-unfinished-{k}"))


def start(command):
    """Prints a command, runs it, and waits for its end; ValueError with the command if it fails."""
    code = begin(command).wait()
    if code != 0:
        raise ValueError(f"exit code {code} of the command {as_typed(command)}")


def begin(command, log=None, jobs=1):
    """Prints a command and starts it; of several jobs, the output is added to the file `log`."""
    print(f"\n$ {as_typed(command)}", flush=True)
    script, *words = command
    words = [sys.executable, "-u", str(HERE / script), *words]  # -u: errors at their place in a log
    if jobs == 1:
        return subprocess.Popen(words)
    # Each gets its share of the cores. Two processes with two OpenMP threads each run 10 to 30
    # times slower on two cores: threads spin on a core while they wait for one that has none.
    threads = str(max(1, torch.get_num_threads() // jobs))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}  # no bars in a log
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        print(f"$ {as_typed(command)}", file=file, flush=True)
        return subprocess.Popen(words, env=env, stdout=file, stderr=subprocess.STDOUT)


def as_typed(command):
    """What a reader types in the present folder to do the same."""
    script, *words = command
    return shlex.join(["python", os.path.relpath(HERE / script), *words])


def words_of(config, names):
    """The fields of these names as words of a command line: eta -> ["--eta", "0.5"]."""
    words = []
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool):
            words.append(flags.flag(name) if value else "--no-" + flags.flag(name)[2:])
        elif isinstance(value, tuple):
            words += [flags.flag(name), *map(str, value)]
        elif value is not None:
            words += [flags.flag(name), str(value)]
    return words


def changed_words(config, Base):
    """Those fields of a Config's base class as words that have not their default value."""
    changed = [field.name for field in fields(Base)
               if getattr(config, field.name) != field.default]
    return words_of(config, changed)
