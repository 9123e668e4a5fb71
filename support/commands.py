"""Runs of other scripts, started as commands that a reader can type; finished ones are kept."""
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from support import flags
from support.models import HERE
from support.scoring import load_module

# Fields that change no trained weight: where a run is, on what, and how it is looked at.
NO_MATTER = ("name", "out", "device", "batch_size", "train_batch_size", "eval_samples",
             "keep_every", "plan")


def train_missing(commands, out, jobs=1):
    """Starts every command whose run is not finished.  commands: name -> [script, flag, value, ...]

    The run's --name and --out are added. ValueError before anything is started if a flag is wrong
    or a finished run has other settings. A run that was cut short is moved aside, never deleted.
    jobs: more than 1 runs that many side by side, each with its output in OUT/NAME.log.
    """
    missing = {}
    for name, command in commands.items():
        settings = settings_of(command)
        if is_finished(Path(out, name)):
            check_settings(Path(out, name), settings)
        else:
            missing[Path(out, name)] = [*command, "--name", name, "--out", str(out)]
    if jobs > 1 and missing:
        return train_side_by_side(missing, jobs)
    for folder, command in missing.items():
        if folder.exists():
            move_aside(folder)
        start(command)
        if not is_finished(folder):
            raise ValueError(f"no finished run in {folder} after {as_typed(command)}")


def train_side_by_side(commands, jobs):
    """Runs `jobs` commands at a time.  commands: folder -> command; its output is in FOLDER.log

    After one that fails none is started; those that run are waited for, then ValueError.
    """
    waiting, running, failed = list(commands), {}, {}
    bar = tqdm(total=len(commands), desc="runs", unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                folder = waiting.pop(0)
                running[folder] = start_logged(commands[folder], folder, jobs)
            time.sleep(0.1)
            for folder in [folder for folder in running if running[folder].poll() is not None]:
                code = running.pop(folder).returncode
                if code == 0 and is_finished(folder):
                    bar.update()
                else:
                    failed[folder] = code
                    waiting.clear()
    finally:
        bar.close()
        for process in running.values():  # after Ctrl-C none is left
            process.terminate()
            process.wait()
    for folder, code in failed.items():  # the first of them
        text = Path(f"{folder}.log").read_text(encoding="utf-8", errors="replace")
        raise ValueError(f"exit code {code} of the command {as_typed(commands[folder])}\n"
                         f"{folder}.log ends with: {text.strip().splitlines()[-1]}")


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


def start_logged(command, folder, jobs):
    """The process of one of `jobs` commands; its output goes behind what is in FOLDER.log."""
    if folder.exists():
        move_aside(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tqdm.write(f"$ {as_typed(command)}")
    sys.stdout.flush()
    # Each gets its share of the cores. Two processes with two OpenMP threads each run 10 to 30
    # times slower on two cores: threads spin on a core while they wait for one that has none.
    threads = str(max(1, torch.get_num_threads() // jobs))
    env = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}  # no bars in a log
    script, *words = command
    with open(f"{folder}.log", "a", encoding="utf-8") as log:
        print(f"$ {as_typed(command)}", file=log, flush=True)
        return subprocess.Popen([sys.executable, "-u", str(HERE / script), *words],  # -u: in order
                                env=env, stdout=log, stderr=subprocess.STDOUT)


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
