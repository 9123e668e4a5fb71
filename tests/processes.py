"""Processes for tests that really end: forked from a server that has imported what takes long."""
import csv
import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

from support import flags

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["04_dpok", "tests.oracles", "pytest"])


def start(function, log, **limits):
    """A process that does this as a script's main; what it prints goes to the file `log`."""
    process = CONTEXT.Process(target=live, args=(function, log), kwargs=limits)
    process.start()
    return process


def ended(function, log, **limits):
    """The same, when it has ended.  -> its exit code; minus the signal that killed it"""
    process = start(function, log, **limits)
    process.join()
    return process.exitcode


def live(function, log, environment=None, die_at=None, largest_file=None):
    """die_at: SIGKILL comes before the change of a file with this number.

    largest_file: what a file has beyond these bytes cannot be written, as on a full disk.
    """
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["03_ddpo.py"]
    os.environ.update(environment or {})
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if die_at is not None:
        changes = iter(range(die_at))

        def count(event, arguments):
            writes = event == "open" and isinstance(arguments[1], str) and "r" not in arguments[1]
            if writes or event in ("os.mkdir", "os.rename", "os.remove"):
                if next(changes, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
    flags.run(function)


def left_behind(folder):
    """Path -> what is in a finished run's folder; without times, names and drawn figures."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path.name in ("reward.png", "film.png", "before_after.png"):
            continue
        content = path.read_bytes()
        if path.name == "metrics.csv":
            content = list(csv.DictReader(content.decode().splitlines()))
            for row in content:
                del row["seconds"]
        if path.name in ("config.json", "evaluation.json"):
            content = json.loads(content)
            for name in ("seconds", "name", "out"):
                content.pop(name, None)
        found[path.relative_to(folder).as_posix()] = content
    return found
