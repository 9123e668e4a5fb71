"""Grades a homework: each answer in a process of its own, by this repository's own tests.

RUN `python assignments/grade.py homework` (a minute): a table of points, and for whatever fails,
why. The homework is a folder or a ZIP file, whole or only the files that were changed. `--json
results.json` also writes the file that Gradescope reads, anew after each answer, so that it is
there whatever happens. `--exercises 3.2 3.4` grades only these, `--chapter 3` that chapter's.

Of a homework only the text of the exercises' functions is read; nothing of it is imported. Each is
put into this repository's own module, beside the correct other functions, so a mistake costs one
exercise and not those that build on it. Where an answer fails just as known mistakes do
(mutants.py), they are named; `--known` keeps how these fail, so that they run once for a course.
"""
import ast
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import textwrap
import tokenize
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: each answer has one core
os.environ["HF_HUB_OFFLINE"] = "1"

import tyro  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import check  # noqa: E402
import cut  # noqa: E402
from exercises import BY_FUNCTION, BY_NUMBER, EXERCISES, files_of, split  # noqa: E402
from mutants import MUTANTS  # noqa: E402
from support import flags  # noqa: E402

GIGABYTES = 4  # of memory, beside what all share
LONGEST = 200_000  # bytes of a file: the longest of this repository has a tenth of that


@dataclass(frozen=True)
class Config:
    homework: Annotated[str, tyro.conf.Positional]  # the folder or ZIP file that was handed in
    exercises: tuple[Literal[tuple(BY_NUMBER)], ...] = ()  # grade only these; default: all
    chapter: Literal[1, 2, 3, 4, 5] | None = None  # grade only this chapter's
    json: str | None = None  # also write Gradescope's results.json here
    jobs: int = 2  # answers that are graded at the same time
    seconds: int = 60  # of computing for an answer; the reference takes at most a third
    why: bool = True  # compare a wrong answer with known mistakes, to say what is wrong
    known: str = "runs/known_mistakes.json"  # where it is kept how known mistakes fail
    fail_under: int = 0  # fewer points than this end in exit code 1


# ---- one answer, in a process of its own ----------------------------------------------------


def put(function, text):
    """Puts the function of this text into its module, in the place of the one that is there."""
    module_name, name = split(function)
    module = owner = import_module(module_name)
    *classes, last = name.split(".")
    for word in classes:
        owner = getattr(owner, word)
    old, names = getattr(owner, last), {}
    source = Path(module.__file__).read_text(encoding="utf-8")
    decorators = [f"@{ast.unparse(decorator)}\n"
                  for decorator in cut.find(ast.parse(source), name).decorator_list]
    code = compile("".join(decorators) + text, f"<{function}>", "exec")
    exec(code, vars(module), names)  # globals are the module's own: as if it stood there
    new = changing_nothing(names[last])
    setattr(owner, last, new)
    for other in list(sys.modules.values()):  # and where it was imported by name
        for attribute, value in list(getattr(other, "__dict__", {}).items()):
            if value is old and other is not owner:
                setattr(other, attribute, new)


def changing_nothing(function):
    """The function, which fails where it has changed tensors that it was given.

    A test compares it with an oracle that gets the same ones: set all to 0, and 0 is right.
    """
    import torch

    @functools.wraps(function)
    def watched(*args, **kwargs):
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        before = [value.detach().clone().nan_to_num() for value in given]
        result = function(*args, **kwargs)
        for was, value in zip(before, given):
            assert was.equal(value.detach().nan_to_num()), (
                "it changes what it is given; make something new instead")
        return result

    return watched


class Report:
    """A plugin of pytest's: keeps an exercise's tests only, and what became of each."""

    def __init__(self, exercise):
        self.exercise = exercise
        self.outcomes, self.reasons = {}, []  # test -> whether it passed; tests that never ran: no

    def pytest_collection_modifyitems(self, items):
        if not self.exercise.tests:
            items[:] = [item for item in items if any(
                mark.args[1] == self.exercise.function for mark in item.iter_markers("equation"))]
        self.outcomes = {item.nodeid: False for item in items}

    def pytest_runtest_logreport(self, report):
        if report.when == "call":
            self.outcomes[report.nodeid] = report.passed
        if report.failed:
            self.outcomes[report.nodeid] = False
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr))[:2000].splitlines()
            lines = [line for line in lines if line.strip()][:6]
            lines += [f"({Path(crash.path).name}, line {crash.lineno})"] if crash else []
            self.reasons.append([report.nodeid.rpartition("::")[2], "\n".join(lines)])


def set_limits(seconds):
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # not the clock's: it may wait
    if sys.platform == "linux":  # elsewhere there is no limit of memory
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most, (_, hard) = taken + GIGABYTES * 10**9, resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_tests(exercise, text, folder, seconds):
    """Runs in a process of its own: what became of the tests is written into the folder."""
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    set_limits(seconds)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    tempfile.tempdir = folder  # of pytest, too
    report = Report(exercise)
    tests = exercise.tests.split() or map(str, files_of(exercise.function))
    try:
        put(exercise.function, text)
        pytest.main([*tests, "-q", "-x", "-p", "no:cacheprovider", "-m", "", "--tb=short",
                     f"--rootdir={ROOT}", f"--basetemp={folder}/tests"], plugins=[report])
    except BaseException as error:  # also SystemExit: an answer must not end the grading
        report.outcomes, report.reasons = {}, [["", f"{type(error).__name__}: {error}"]]
    found = json.dumps([report.outcomes, report.reasons])
    Path(folder, "report.json").write_text(found, encoding="utf-8")
    os._exit(0)  # so that nothing of the answer's runs after this


def outcome(exercise, text, seconds):
    """(passed, reason in words, failure): the test's name and its message, or None."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")  # torch and all else is loaded already
        process = context.Process(target=run_tests, daemon=True, args=(
            exercise, text, os.path.realpath(folder), seconds))
        process.start()
        process.join(10 * seconds)  # by the clock, for an answer that waits for something
        process.kill()
        process.join()
        report = Path(folder, "report.json")
        if not report.is_file():
            if -process.exitcode in (signal.SIGXCPU, signal.SIGKILL):
                return False, f"it took more than {seconds} seconds", None
            return False, f"its process ended early (exit code {process.exitcode})", None
        tests, reasons = json.loads(report.read_text(encoding="utf-8"))
    if tests and all(tests.values()):
        return True, "", None
    name, message = reasons[0] if reasons else ("", "not all tests could be run")
    if "NameError" in message:
        message += "\nOnly the function itself is graded: put all that it needs inside."
    if not name:
        return False, message, None
    test = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    rounded = re.sub(r"-?\d+\.\d+(e[-+]?\d+)?", lambda n: f"{float(n[0]):.2e}", message)
    return False, f"This does not hold: {test}.\n{message}", [name, rounded]


def outcomes(answers, config):
    """The outcome of each (exercise, text), in order, some at a time."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: F401

    torch.set_num_threads(1)
    for name in {"pytest", *(split(exercise.function)[0] for exercise, _ in answers)}:
        import_module(name)  # once: the processes of the answers are copies of this one
    with ThreadPoolExecutor(config.jobs) as pool:
        yield from pool.map(lambda answer: outcome(*answer, config.seconds), answers)


# ---- what was handed in ---------------------------------------------------------------------


def unpacked(homework, folder):
    """The folder that was handed in; a ZIP file is unpacked into `folder` first."""
    if not zipfile.is_zipfile(homework):
        return Path(homework)
    with zipfile.ZipFile(homework) as packed:
        if sum(info.file_size for info in packed.infolist()) > 500 * 10**6:
            raise ValueError(f"{homework}: it has more than 500 MB when it is unpacked")
        packed.extractall(folder)
    return Path(folder)


def find_file(homework, name):
    """The file "support/models.py" of a hand-in: there, below one more folder, or lying flat."""
    found = [file for file in sorted(homework.rglob(Path(name).name)) if file.is_file()]
    whole = [file for file in found if file.as_posix().endswith(f"/{name}")]
    exact = [file for file in whole if file == homework / name]
    for files in (exact, whole, found):
        if len(files) == 1 and files[0].resolve().is_relative_to(homework.resolve()):
            return files[0]
        if files:
            raise ValueError(f"more than one file could be {name}: {files[0]} and {files[-1]}")
    raise ValueError(f"there is no file {name} in what was handed in")


def answer_in(homework, exercise):
    """(text of the answer, "") or (None, why it is not run)."""
    try:
        file = find_file(homework, exercise.file)
        if file.stat().st_size > LONGEST:
            return None, f"{file.name} has more than {LONGEST} bytes"
        with tokenize.open(file) as opened:  # in the encoding that its first lines may name
            text = cut.function_text(opened.read(), exercise.name)
        if text is None:
            return None, "the function is not in the file"
        if cut.is_blank(text):
            return None, "not answered yet"
        refusal = check.refusal(text)
        return (None, f"refused: {refusal}") if refusal else (text, "")
    except SyntaxError as error:
        return None, f"Python cannot read it: {error.msg} (its line {error.lineno})"
    except Exception as error:  # whatever it is, it costs this exercise only
        return None, f"it cannot be graded: {error or type(error).__name__}"


# ---- points, and why ------------------------------------------------------------------------


def known_mistakes(functions, config):
    """Function -> (failure, words, reason) of its mutants; in a file, for the next homework."""
    rooms = ("*.py", "support/*.py", "experiments/*.py", "assignments/*.py", "tests/*/*.py")
    files = [file for room in rooms for file in sorted(ROOT.glob(room))]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    table, kept = {}, ROOT / config.known
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(kept.read_text(encoding="utf-8"))
    if table.get("key") != key:  # it is of another state of this repository
        table = {"key": key}
    new = [mutant for mutant in MUTANTS
           if mutant.function in functions and mutant.function not in table]
    answers = [(BY_FUNCTION[mutant.function], mutant.text()) for mutant in new]
    for mutant, (_, reason, failure) in zip(new, outcomes(answers, config)):
        table.setdefault(mutant.function, []).append([failure, mutant.words, reason])
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(table), encoding="utf-8")
    return table


def grade(homework, wanted, config):
    """Yields the results anew after each answer: number -> points, reason, failure."""
    texts = {exercise: answer_in(homework, exercise) for exercise in wanted}
    results = {exercise.number: (0, why or "not graded yet", None)
               for exercise, (_, why) in texts.items()}
    yield results
    answers = [(exercise, text) for exercise, (text, _) in texts.items() if text]
    for (exercise, _), found in zip(answers, outcomes(answers, config) if answers else ()):
        passed, reason, failure = found
        results[exercise.number] = exercise.points * passed, reason, failure
        yield results
    wrong = {number: result for number, result in results.items() if result[2]}
    if wrong and config.why:
        table = known_mistakes({BY_NUMBER[number].function for number in wrong}, config)
        for number, (points, reason, failure) in wrong.items():
            words = [f"It fails as this does: {words}.\n"
                     for known, words, _ in table[BY_NUMBER[number].function] if known == failure]
            results[number] = points, "".join(words) + reason, failure
        yield results


def write_results(results, file):
    """Gradescope's results.json: https://gradescope-autograders.readthedocs.io"""
    tests = []
    for number, (points, reason, _) in results.items():
        exercise = BY_NUMBER[number]
        tests.append({"number": number, "name": exercise.title, "score": points,
                      "max_score": exercise.points, "output": reason or "correct"})
    scores = {"score": sum(test["score"] for test in tests), "visibility": "visible"}
    Path(file).write_text(json.dumps(scores | {"tests": tests}, indent=1), encoding="utf-8")


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    if not hasattr(os, "fork"):
        raise ValueError("grading needs fork(), which Windows lacks; use WSL or a container")
    if not Path(config.homework).exists():
        raise ValueError(f"{config.homework}: there is no such folder or file")
    wanted = [exercise for exercise in EXERCISES
              if (not config.exercises or exercise.number in config.exercises)
              and config.chapter in (None, exercise.chapter)]
    with tempfile.TemporaryDirectory() as folder:
        for results in grade(unpacked(config.homework, folder), wanted, config):
            if config.json:
                write_results(results, config.json)
    for exercise in wanted:
        points, reason, _ = results[exercise.number]
        print(f"{exercise.number:5}{exercise.title:50}{points:3} of {exercise.points}")
        reason = "".join(sign for sign in reason if sign.isprintable() or sign == "\n")
        print(textwrap.indent(reason, "       "), end="\n" if reason else "")
    points = sum(points for points, _, _ in results.values())
    print(f"\n{points} of {sum(exercise.points for exercise in wanted)} points")
    if points < config.fail_under:
        sys.exit(1)
    return results


if __name__ == "__main__":
    flags.run(main)
