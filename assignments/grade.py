"""Grades a homework: each answer in a process of its own, by this repository's own tests.

RUN `python assignments/grade.py homework` (about two minutes): a table of points, and for whatever
fails, why. `--json results.json` also writes the file that Gradescope reads. `--exercises 3.2 3.4`
grades only these. WRITES nothing else.

Of a homework only the text of the exercises' functions is read; nothing of it is imported. Each is
put into this repository's own module, beside the correct other functions, so a mistake costs one
exercise and not those that build on it. Students' tests count for nothing. A process that ends
itself, takes too long or too much memory, or whose answer does more than compute (rules.py) gets 0.
"""
import ast
import contextlib
import io
import json
import linecache
import multiprocessing
import os
import re
import resource
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: each answer has one core
os.environ["HF_HUB_OFFLINE"] = "1"

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
WATCHED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen",
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


# ---- one answer, in a process of its own ----------------------------------------------------


def put(function, text):
    """Puts the function of this text into its module, in the place of the one that is there."""
    module_name, name = split(function)
    module = import_module(module_name)
    owner = module
    for word in name.split(".")[:-1]:
        owner = getattr(owner, word)
    last = name.split(".")[-1]
    old = getattr(owner, last)
    tree = cut.find(ast.parse(Path(module.__file__).read_text(encoding="utf-8")), name)
    decorators = [f"@{ast.unparse(decorator)}\n" for decorator in tree.decorator_list]
    names = {}
    code = compile("".join(decorators) + text, f"<{function}>", "exec")
    exec(code, vars(module), names)  # globals are the module's own: as if it stood there
    new = names[last]
    setattr(owner, last, new)
    for other in list(sys.modules.values()):  # and where it was imported by name
        for attribute, value in list(getattr(other, "__dict__", {}).items()):
            if value is old and other is not owner:
                setattr(other, attribute, new)


class Report:
    """A plugin of pytest's: keeps an exercise's tests only, and what became of each."""

    def __init__(self, function, watch):
        self.function, self.watch = function, watch
        self.outcomes, self.reasons = {}, []  # test -> whether it passed; tests that never ran: no

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
            self.reasons.append([report.nodeid.rpartition("::")[2],
                                 (crash.message if crash else str(report.longrepr))[:2000]])


def files_of(function):
    """The files in tests/ which have the marker of this function."""
    return [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py"))
            if f'"{function}"' in file.read_text(encoding="utf-8")]


def run_tests(function, text, tests, pipe):
    """Runs in a process of its own: what became of the tests goes through the pipe."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIGABYTES * 10**9,) * 2)
    os.chdir(ROOT)
    watch, broken = [], []

    def look(event, details):
        """Python tells its audit hooks what is done; once set, no code can take them off."""
        if not watch or broken:
            return
        name = str(details[0]) if details else ""
        found = ""
        if event in WATCHED:
            found = f"{event} {name}"
        elif event == "open" and os.path.abspath(name).startswith(str(ROOT)):
            writes = isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or name.endswith(".py"):
                found = f"open {os.path.relpath(name, ROOT)}"
        if found:
            broken.append(found)
            raise PermissionError(found)

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            put(function, text)
            sys.addaudithook(look)
            report = Report("" if tests else function, watch)
            pytest.main([*(tests.split() or files_of(function)), "-q", "-x", "-p",
                         "no:cacheprovider", "-m", "", "--tb=short", f"--rootdir={ROOT}"],
                        plugins=[report])
            found = {"outcomes": report.outcomes, "reasons": report.reasons, "broken": broken}
        except BaseException as error:  # also SystemExit: an answer must not end the grading
            found = {"outcomes": {}, "broken": broken,
                     "reasons": [["", f"{type(error).__name__}: {error}"]]}
    pipe.send_bytes(json.dumps(found).encode())
    pipe.close()


def in_a_process(function, text, seconds, tests=""):
    """What became of the tests with this answer: outcomes, reasons, or why there are none.

    tests: arguments of pytest; without them, those with the function's marker.
    """
    context = multiprocessing.get_context("fork")  # torch and all else is loaded already
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_tests, args=(function, text, tests, theirs), daemon=True)
    process.start()
    theirs.close()
    found = None
    try:
        if ours.poll(seconds):
            found = json.loads(ours.recv_bytes())
        else:
            process.kill()
            found = {"outcomes": {}, "reasons": [["", f"it took more than {seconds} seconds"]]}
    except EOFError:
        pass  # it ended without a word
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()
    if found is None:
        found = {"outcomes": {}, "reasons": [["", "its process ended before the tests did "
                                              f"(exit code {process.exitcode})"]]}
    return found


# ---- points, and why ------------------------------------------------------------------------


def grade_text(function, text, seconds=SECONDS, tests=""):
    """(passed, reason in words, signature of the failure) of an answer's text."""
    module = import_module(split(function)[0])
    if text is None:
        return False, "the function is not in the file", None
    if cut.is_blank(text):
        return False, "not answered yet", None
    try:
        ast.parse(text)
        rules.check(text, module)
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
    lines = [line for line in message.splitlines() if line.strip()][:6]
    reason = (f"This does not hold: {test}.\n" if test else "") + "\n".join(lines)
    return False, reason, (name, signature(message))


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


def grade_exercise(exercise, homework, config):
    """A dict: points, and the reason where they are 0."""
    started = time.perf_counter()
    file = Path(homework, exercise.file)
    text = None
    if file.is_file() and file.resolve().is_relative_to(Path(homework).resolve()):  # no link
        text = cut.function_text(file.read_text(encoding="utf-8", errors="replace"), exercise.name)
    try:
        passed, reason, failure = grade_text(exercise.function, text, config.seconds)
    except (Exception, RecursionError) as error:  # whatever it is, it costs this exercise only
        passed, reason, failure = False, f"it cannot be graded: {type(error).__name__}", None
    if failure and config.why:
        words = known_mistake(exercise.function, failure, config.seconds)
        reason = f"{words}\n{reason}" if words else reason
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
    for file in ROOT.rglob("*.py"):  # what a warning or a traceback shows is read here, not there
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
    if not hasattr(os, "fork"):
        raise ValueError("grading needs fork(), which Windows lacks; use WSL or a container")
    results = grade(Path(config.homework), config, print_result)
    points = sum(result["points"] for result in results)
    print(f"\n{points} of {sum(result['exercise'].points for result in results)} points")
    if config.json:
        Path(config.json).write_text(json.dumps(gradescope(results), indent=1), encoding="utf-8")
    return results


if __name__ == "__main__":
    flags.run(main)
