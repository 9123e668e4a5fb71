"""Grades a homework: each answer in a process of its own, by this repository's own tests.

RUN `python assignments/grade.py homework` (half a minute): a table of points, and for whatever
fails, why. `--json results.json` also writes the file that Gradescope reads. `--exercises 3.2 3.4`
grades only these, `--chapter 3` that chapter's. WRITES nothing else.

Of a homework only the text of the exercises' functions is read; nothing of it is imported. Each is
put into this repository's own module, beside the correct other functions, so a mistake costs one
exercise and not those that build on it. Students' tests count for nothing. A process that ends
itself, takes too long or too much memory, or whose answer does more than compute (rules.py) gets 0.
"""
import ast
import contextlib
import functools
import gc
import io
import json
import linecache
import multiprocessing
import os
import re
import secrets
import sys
import tempfile
import textwrap
import time
import tokenize
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: each answer has one core
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import cut  # noqa: E402
import rules  # noqa: E402
from exercises import BY_FUNCTION, BY_NUMBER, EXERCISES, split  # noqa: E402
from mutants import MUTANTS  # noqa: E402
from support import flags  # noqa: E402

SECONDS, GIGABYTES = 60, 4  # what an answer may take; the reference takes at most a third
WATCHED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.kill", "subprocess.Popen",
           "socket.connect", "ctypes.dlopen")  # what Python calls that which no answer does


@dataclass(frozen=True)
class Config:
    homework: Annotated[str, tyro.conf.Positional]  # the folder that a student handed in
    exercises: tuple[str, ...] = ()  # grade only these, such as 3.2; default: all
    chapter: int | None = None  # grade only this chapter's
    json: str | None = None  # also write Gradescope's results.json here
    jobs: int = 2  # answers that are graded at the same time
    seconds: int = SECONDS  # time limit of an answer
    why: bool = True  # compare a wrong answer with known mistakes, to say what is wrong
    fail_under: int = 0  # fewer points than this end in exit code 1, which turns a workflow red


# ---- one answer, in a process of its own ----------------------------------------------------


def put(function, text, watch):
    """Puts the function of this text into its module, in the place of the one that is there.

    watch: a list that has something in it while code of the answer runs.
    """
    module_name, name = split(function)
    module = import_module(module_name)
    owner = module
    for word in name.split(".")[:-1]:
        owner = getattr(owner, word)
    last = name.split(".")[-1]
    old = getattr(owner, last)
    tree = reference_of(function)
    decorators = [f"@{ast.unparse(decorator)}\n" for decorator in tree.decorator_list]
    names = {}
    code = compile("".join(decorators) + text, f"<{function}>", "exec")
    watch.append(True)
    exec(code, vars(module), names)  # globals are the module's own: as if it stood there
    watch.clear()
    new = names[last]
    if function in BY_FUNCTION:  # others may be there to change what they are given
        new = left_as_they_were(new, 0 if owner is module else 1)
    setattr(owner, last, new)
    for other in list(sys.modules.values()):  # and where it was imported by name
        for attribute, value in list(getattr(other, "__dict__", {}).items()):
            if value is old and other is not owner:
                setattr(other, attribute, new)


def reference_of(function):
    """The tree of our own answer."""
    module_name, name = split(function)
    file = import_module(module_name).__file__
    return cut.find(cut.parse(Path(file).read_text(encoding="utf-8")), name)


def left_as_they_were(function, skipped):
    """The function, which fails where it has changed numbers that it was given.

    A test compares it with an oracle that gets the same tensors: whoever sets all of them to 0
    would be right with 0. skipped: how many of the first arguments it may change (a method's self).
    """
    @functools.wraps(function)
    def watched(*args, **kwargs):
        given = [*parts_of(args[skipped:]), *parts_of(kwargs)]
        given += [arg for arg in (*args[skipped:], *kwargs.values()) if isinstance(arg, list)]
        before = [copy_of(value) for value in given]
        result = function(*args, **kwargs)
        for was, value in zip(before, given, strict=True):
            said = "it changes what it is given; make something new instead"
            if isinstance(value, list):
                assert list(map(id, value)) == list(map(id, was)), said
            else:
                torch.testing.assert_close(copy_of(value), was, rtol=0, atol=0, equal_nan=True,
                                           msg=said)
        for value in parts_of(result):  # an empty array equals any number, says pytest.approx
            assert len(value.flatten()), "it returns an array without numbers"
            assert value.dtype != object, "it returns an array of objects"
        return result

    return watched


def copy_of(part):
    return part.detach().clone() if isinstance(part, torch.Tensor) else part.copy()


def parts_of(value, depth=4):
    """The tensors and arrays in arguments and their parts; of a network, its weights."""
    if isinstance(value, torch.nn.Module):
        value = tuple(value.parameters())
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif depth and not isinstance(value, (type, ModuleType, str, bytes)):
        inner = [*getattr(value, "__dict__", {}).values()]
        if isinstance(value, Collection):
            inner += value.values() if isinstance(value, Mapping) else value
        for part in inner:
            yield from parts_of(part, depth - 1)


class Report:
    """A plugin of pytest's: keeps an exercise's tests only, and what became of each."""

    def __init__(self, function, watch):
        self.function, self.watch = function, watch
        self.outcomes, self.reasons = {}, []  # test -> whether it passed; tests that never ran: no

    @pytest.hookimpl(trylast=True)  # after pytest's own -k has left some out
    def pytest_collection_modifyitems(self, items):
        if self.function:
            items[:] = [item for item in items if any(
                mark.args[1] == self.function for mark in item.iter_markers("equation"))]
        self.outcomes = {item.nodeid: False for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.watch.append(True)
        try:
            return (yield)
        finally:
            self.watch.clear()

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.outcomes[report.nodeid] = report.passed
        if report.failed:
            self.outcomes[report.nodeid] = False
            crash = getattr(report.longrepr, "reprcrash", None)
            message = (crash.message if crash else str(report.longrepr))[:2000]
            line = line_of_test(report.longrepr)
            message = f"{message}\nin the test: {line}" if line else message
            self.reasons.append([report.nodeid.rpartition("::")[2], message])


def line_of_test(longrepr):
    """The line of the test in which it failed, also where the error came from deeper down."""
    line = ""
    for entry in getattr(getattr(longrepr, "reprtraceback", None), "reprentries", []):
        place = getattr(entry, "reprfileloc", None)
        if place and Path(place.path).name.startswith("test_"):
            line = linecache.getline(str(ROOT / place.path), place.lineno).strip()
    return line


def files_of(function):
    """The files in tests/ which have the marker of this function."""
    return [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py"))
            if f'"{function}"' in file.read_text(encoding="utf-8")]


def limit_memory():
    if sys.platform == "linux":  # elsewhere there is no such limit
        import resource

        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most, (_, hard) = taken + GIGABYTES * 10**9, resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_tests(function, text, tests, secret, answer, folder):
    """Runs in a process of its own: what became of the tests is written to the file `answer`.

    folder: the only one in which tests may write.
    """
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    limit_memory()
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    tempfile.tempdir = folder  # of pytest, too
    watch, broken = [], []

    def look(event, details):
        """Python tells its audit hooks what is done; once set, no code can take them off."""
        name = str(details[0]) if details else ""
        if event == "open":
            path = os.path.realpath(name)
            writes = isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            outside = not f"{path}/".startswith(f"{folder}/") and path != os.devnull
            reads_code = watch and path.startswith(f"{ROOT}/") and path.endswith(".py")
            refused = writes and outside or reads_code
        else:
            refused = event in WATCHED
        if refused:
            broken.append(f"{event} {name}")
            raise PermissionError(broken[-1])

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            sys.addaudithook(look)
            put(function, text, watch)
            report = Report("" if tests else function, watch)
            pytest.main([*(tests.split() or files_of(function)), "-q", "-x", "-p",
                         "no:cacheprovider", "-m", "", "--tb=short", f"--rootdir={ROOT}",
                         f"--basetemp={folder}/tests"], plugins=[report])
            found = {"outcomes": report.outcomes, "reasons": report.reasons, "broken": broken}
        except BaseException as error:  # also SystemExit: an answer must not end the grading
            found = {"outcomes": {}, "broken": broken,
                     "reasons": [["", f"{type(error).__name__}: {error}"]]}
    gc.collect()  # what the answer has left behind ends here, and is still looked at
    answer.write(json.dumps(found | {"secret": secret}).encode())
    answer.flush()
    os._exit(0)  # so that nothing of the answer's runs after this


def in_a_process(function, text, seconds, tests=""):
    """What became of the tests with this answer: outcomes, reasons, or why there are none.

    tests: arguments of pytest; without them, those with the function's marker.
    """
    context = multiprocessing.get_context("fork")  # torch and all else is loaded already
    secret = secrets.token_hex()  # what the process does not write itself lacks it
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=run_tests, daemon=True, args=(
            function, text, tests, secret, answer, os.path.realpath(folder)))
        process.start()
        process.join(seconds)
        why = f"its process ended before the tests did (exit code {process.exitcode})"
        if process.exitcode is None:
            process.kill()
            process.join()
            why = f"it took more than {seconds} seconds"
        answer.seek(0)
        with contextlib.suppress(ValueError, TypeError, KeyError):
            found = json.loads(answer.read(10**6))
            if process.exitcode == 0 and secrets.compare_digest(found["secret"], secret):
                return found
    return {"outcomes": {}, "reasons": [["", why]]}


# ---- points, and why ------------------------------------------------------------------------


def grade_text(function, text, seconds=SECONDS, tests=""):
    """(passed, reason in words, signature of the failure) of an answer's text."""
    module = import_module(split(function)[0])
    if text is None:
        return False, "the function is not in the file", None
    if cut.is_blank(text):
        return False, "not answered yet", None
    try:
        cut.parse(text)
        if function in BY_FUNCTION:
            rules.check(text, module, rules.stored(reference_of(function)))
    except SyntaxError as error:
        return False, f"Python cannot read it: {error.msg} (its line {error.lineno})", None
    except rules.Refused as error:
        return False, f"refused: {error}", None
    found = in_a_process(function, text, seconds, tests)
    if found.get("broken"):
        return False, f"refused: while it ran, it did this: {found['broken'][0]}", None
    if found["outcomes"] and all(found["outcomes"].values()):
        return True, "", None
    if not found["reasons"]:
        return False, "not all tests could be run", None
    name, message = found["reasons"][0]
    test = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    lines = [line for line in message.splitlines() if line.strip()]
    lines = [*lines[:6], *lines[6:][-1:]]  # the last is that of the test
    reason = (f"This does not hold: {test}.\n" if test else "") + "\n".join(lines)
    return False, reason, (name, signature(message)) if name else None


def signature(message):
    """A failure's message with its numbers rounded: the same for the same mistake."""
    return re.sub(r"-?\d+\.\d+(e[-+]?\d+)?", lambda n: f"{float(n[0]):.2e}", message)


def known_mistake(function, failure, seconds):
    """In words what is wrong, where a known wrong answer fails with the same numbers; or ""."""
    for mutant in MUTANTS:
        if mutant.function == function:
            if grade_text(function, mutant.text(), seconds)[2] == failure:
                return mutant.words
    return ""


def read(file):
    """A file's text as Python reads it, in the encoding that its first lines may name."""
    try:
        with tokenize.open(file) as opened:
            return opened.read()
    except (SyntaxError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8", errors="replace")


def grade_exercise(exercise, homework, config):
    """A dict: points, and the reason where they are 0."""
    started = time.perf_counter()
    file = Path(homework, exercise.file)
    if not file.is_file() or not file.resolve().is_relative_to(Path(homework).resolve()):
        return {"exercise": exercise, "points": 0, "seconds": 0,
                "reason": f"there is no file {exercise.file} in the folder"}
    try:
        text = cut.function_text(read(file), exercise.name)
        passed, reason, failure = grade_text(exercise.function, text, config.seconds)
    except (Exception, RecursionError) as error:  # whatever it is, it costs this exercise only
        passed, reason, failure = False, f"it cannot be graded: {type(error).__name__}", None
    if failure and config.why:
        words = known_mistake(exercise.function, failure, config.seconds)
        reason = f"{words}\n{reason}" if words else reason
    reason = "".join(sign for sign in reason if sign.isprintable() or sign == "\n")
    return {"exercise": exercise, "points": exercise.points * passed, "reason": reason,
            "seconds": time.perf_counter() - started}


def load_everything():
    """Imports all that tests need, once: the processes of the answers are copies of this one."""
    torch.set_num_threads(1)
    for function in {split(exercise.function)[0] for exercise in EXERCISES}:
        import_module(function)
    for name in ("diffusers", "transformers", "peft", "matplotlib.pyplot", "scipy"):
        with contextlib.suppress(ImportError):
            import_module(name)
    for folder in (".", "support", "experiments", "tiny_sd", "tests", "tests/*"):
        for file in ROOT.glob(f"{folder}/*.py"):  # what a traceback shows is read here, not there
            linecache.getlines(str(file))
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401


def grade(homework, config, report=lambda result: None):
    """The result of each exercise, in order."""
    wanted = [exercise for exercise in EXERCISES
              if (not config.exercises or exercise.number in config.exercises)
              and config.chapter in (None, exercise.chapter)]
    load_everything()
    results = []
    with ThreadPoolExecutor(config.jobs) as pool:
        for result in pool.map(lambda exercise: grade_exercise(exercise, homework, config), wanted):
            report(result)
            results.append(result)
    return results


def print_result(result):
    exercise = result["exercise"]
    print(f"{exercise.number:5}{exercise.title:44}{result['points']:3} of {exercise.points}"
          f"{result['seconds']:8.1f} s", flush=True)
    if result["reason"]:
        print(textwrap.indent(result["reason"], "       "), flush=True)


def gradescope(results):
    """Gradescope's results.json: https://gradescope-autograders.readthedocs.io"""
    tests = [{"number": result["exercise"].number, "name": result["exercise"].title,
              "score": result["points"], "max_score": result["exercise"].points,
              "output": result["reason"] or "correct"} for result in results]
    return {"score": sum(test["score"] for test in tests), "visibility": "visible",
            "tests": tests}


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    if not Path(config.homework).is_dir():
        raise ValueError(f"{config.homework}: no such folder")
    unknown = set(config.exercises) - set(BY_NUMBER)
    if unknown:
        raise ValueError(f"--exercises {sorted(unknown)[0]}: no such exercise; there are "
                         f"{', '.join(BY_NUMBER)}")
    if config.chapter not in (None, *(exercise.chapter for exercise in EXERCISES)):
        raise ValueError(f"--chapter {config.chapter}: there is no such chapter")
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise ValueError(f"--json {config.json}: its folder does not exist")
    if not hasattr(os, "fork"):
        raise ValueError("grading needs fork(), which Windows lacks; use WSL or a container")
    if not any(Path(config.homework, exercise.file).is_file() for exercise in EXERCISES):
        raise ValueError(f"{config.homework}: none of the files with exercises is in this folder")
    results = grade(Path(config.homework), config, print_result)
    points = sum(result["points"] for result in results)
    print(f"\n{points} of {sum(result['exercise'].points for result in results)} points")
    if config.json:
        Path(config.json).write_text(json.dumps(gradescope(results), indent=1), encoding="utf-8")
    if points < config.fail_under:
        sys.exit(1)
    return results


if __name__ == "__main__":
    flags.run(main)
