"""Runs of other scripts, started as commands that a reader can type; finished ones are kept."""
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, fields
from pathlib import Path
from threading import Event

import torch
from tqdm import tqdm

from support import flags, runs, training
from support.models import HERE
from support.scoring import load_module


def train_missing(commands, out, jobs=1):
    """Starts every command whose run is not finished.  commands: name -> [script, flag, value, ...]

    The run's --name and --out are added. ValueError before anything is started if a flag is wrong
    or a run that is there has other settings. A run that was cut short goes on where it stopped.
    jobs: more than 1 runs that many side by side, each with its output in OUT/NAME.log. After one
    that fails none is started.
    """
    if training.processes() > 1:
        raise ValueError("this script starts others: start it without torchrun")
    missing, total = {}, 0
    for name, command in commands.items():
        folder = Path(out, name)
        new = [*command, "--name", name, "--out", str(out)]
        settings = settings_of(new)
        begun = (folder / "config.json").is_file()
        if begun:
            runs.check_settings(folder, settings, "move it away, or choose another --out")
        if not runs.is_finished(folder):
            go_on = [*command, "--resume", str(folder)]
            missing[folder] = go_on if begun else new
            total += settings["rounds"]
    failed = Event()

    def run(folder):
        if not failed.is_set():
            try:
                start(missing[folder], f"{folder}.log", jobs)
            except Exception:
                failed.set()
                raise

    with ThreadPoolExecutor(jobs) as pool:  # waits for all that run, also where one has failed
        running = [pool.submit(run, folder) for folder in missing]
        going_on = running
        silent = jobs == 1 or not missing
        with tqdm(total=total, desc="trainings", unit="round", disable=silent) as bar:
            while going_on:
                going_on = wait(running, timeout=2).not_done
                rounds = [runs.read_rows(folder / "metrics.csv") for folder in missing]
                bar.update(sum(map(len, rounds)) - bar.n)
        for job in running:
            job.result()  # raises what has failed


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


def start(command, log=None, jobs=1):
    """Prints a command, runs it, and waits for its end; ValueError with the command if it fails.

    Of several jobs, the output is added to the file `log`.
    """
    place = "" if jobs == 1 else f" >> {shlex.quote(log)}"
    print(f"\n$ {as_typed(command)}{place}", flush=True)
    script, *words = command
    words = [sys.executable, "-u", str(HERE / script), *words]  # -u: errors at their place in a log
    if jobs == 1:
        code, where = subprocess.run(words).returncode, ""
    else:
        # Each gets its share of the cores. Two processes with two OpenMP threads each run 10 to 30
        # times slower on two cores: threads spin on a core while they wait for one that has none.
        threads = str(max(1, torch.get_num_threads() // jobs))
        env = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}  # no bars in a log
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            print(f"$ {as_typed(command)}", file=file, flush=True)
            code = subprocess.run(words, env=env, stdout=file, stderr=file).returncode
        *_, reason = Path(log).read_text(encoding="utf-8").splitlines()
        where = f": {reason} (all of its output is in {log})"
    if code != 0:
        raise ValueError(f"exit code {code} of the command {as_typed(command)}{where}")


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


def common_words(script, config, own=("prompts", "out")):
    """The flags that a script has too, and where its default is another value; --sd first of all.

    own: what the script gets of its own.
    """
    module = load_module(HERE / script)
    sd = ["--sd"] if config.sd else []
    default = flags.parse(module.Config, module.__doc__, sd, getattr(module, "SD", None))
    names = [field.name for field in fields(default)
             if field.name not in own and hasattr(config, field.name)
             and getattr(config, field.name) != getattr(default, field.name)]
    return sd + words_of(config, names)
