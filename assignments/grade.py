"""Grades a homework: each answer in a process of its own, by this repository's own tests.

RUN `python assignments/grade.py homework` (a minute): a table of points, and for whatever fails,
why. The homework is a folder or a ZIP file, whole or only the files that were changed. `--json
results.json` also writes the file that Gradescope reads, anew after each answer.

Of a homework only the text of the exercises' functions is read. Each is put into this repository's
own module, beside the correct other functions, so a mistake costs one exercise and not those that
build on it. Where an answer fails just as known mistakes do (mutants.py), they are named; `--known`
keeps how these fail, so that they run once for a course and not for each student.
"""
import ast
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import tokenize
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: each answer has one core
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import tyro  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import check  # noqa: E402
import cut  # noqa: E402
from exercises import BY_NUMBER, EXERCISES, files_of, split  # noqa: E402
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
    known: str = "runs/known_mistakes.json"  # where it is kept how known mistakes fail


# ---- one answer, in a process of its own ----------------------------------------------------


def put(function, text):
    """Puts the function of this text into its module, in the place of the one that is there."""
    module_name, name = split(function)
    module = owner = import_module(module_name)
    *classes, last = name.split(".")
    for word in classes:
        owner = getattr(owner, word)
    old, names = getattr(owner, last), {}
    node = cut.find(ast.parse(Path(module.__file__).read_text(encoding="utf-8")), name)
    decorators = [f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list]
    exec("".join(decorators) + text, vars(module), names)  # as if it stood in the module
    setattr(owner, last, names[last])
    for other in list(sys.modules.values()):  # and where it was imported by name
        for attribute, value in list(getattr(other, "__dict__", {}).items()):
            if value is old and other is not owner:
                setattr(other, attribute, names[last])


class Report:
    """A plugin of pytest's: keeps an exercise's tests only, and what became of each."""

    def __init__(self, function):
        self.function = function
        self.left, self.reasons = {"one at least"}, []  # tests that have not passed, and why

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if any(
            mark.args[1] == self.function for mark in item.iter_markers("equation"))]
        self.left = {item.nodeid for item in items} or self.left

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash else str(report.longrepr)
            lines = [line for line in message[:2000].splitlines() if line.strip()]
            self.reasons.append([report.nodeid.rpartition("::")[2], "\n".join(lines[:6])])
        elif report.when == "call" and report.passed:  # a test that is skipped proves nothing
            self.left.discard(report.nodeid)


def set_limits(seconds):
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # not the clock's: it may wait
    if sys.platform == "linux":  # elsewhere there is no limit of memory
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most, (_, hard) = taken + GIGABYTES * 10**9, resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_tests(function, text, folder, seconds):
    """Runs in a process of its own: what became of the tests is written into the folder."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    set_limits(seconds)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    tempfile.tempdir = folder  # of pytest, too
    report, tests = Report(function), map(str, files_of(function))
    try:
        put(function, text)
        pytest.main([*tests, "-q", "-x", "-p", "no:cacheprovider", "-m", "", "--tb=short",
                     f"--rootdir={ROOT}", f"--basetemp={folder}/tests"], plugins=[report])
    except BaseException as error:  # also SystemExit: an answer must not end the grading
        report.reasons = [["", f"{type(error).__name__}: {error}"]]
    passed = not report.left and not report.reasons
    name, message = (report.reasons or [["", "not all tests could be run"]])[0]
    Path(folder, "report.json").write_text(json.dumps([passed, name, message]), encoding="utf-8")
    os._exit(0)  # so that nothing of the answer's runs after this


def outcome(exercise, text, seconds):
    """(passed, reason in words, failure): the test's name and its message, or None."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")  # torch and all else is loaded already
        process = context.Process(target=run_tests, daemon=True, args=(
            exercise.function, text, os.path.realpath(folder), seconds))
        process.start()
        process.join(10 * seconds)  # by the clock, for an answer that waits for something
        process.kill()
        process.join()
        report = Path(folder, "report.json")
        if not report.is_file():
            if -process.exitcode in (signal.SIGXCPU, signal.SIGKILL):
                return False, f"it took more than {seconds} seconds", None
            return False, f"its process ended early (exit code {process.exitcode})", None
        passed, name, message = json.loads(report.read_text(encoding="utf-8"))
    if passed:
        return True, "", None
    if "NameError" in message:
        message += "\nOnly the function itself is graded: put all that it needs inside."
    if not name or re.match("(NameError|MemoryError)", message):  # no mistake in the mathematics
        return False, message, None
    test = name.partition("[")[0].removeprefix("test_").replace("_", " ")
    rounded = re.sub(r"-?\d+\.\d+(e[-+]?\d+)?", lambda n: f"{float(n[0]):.2e}", message)
    return False, f"This does not hold: {test}.\n{message}", [name, rounded]


def outcomes(answers, config):
    """The outcome of each (exercise, text), in order, some at a time."""
    if not answers:
        return
    from diffusers import StableDiffusionPipeline  # noqa: F401
    for exercise, _ in answers:  # loaded once: the answers' processes are copies of this one
        import_module(split(exercise.function)[0])
    with ThreadPoolExecutor(config.jobs) as pool:
        yield from pool.map(lambda answer: outcome(*answer, config.seconds), answers)


# ---- what was handed in ---------------------------------------------------------------------


def unpacked(homework, folder):
    """The folder that was handed in; a ZIP file is unpacked into `folder` first."""
    if Path(homework).is_dir():
        return Path(homework)
    shutil.unpack_archive(homework, folder, "zip")
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
            raise ValueError(f"{name} could be more than one file, or is a link: {files[0]}, "
                             f"{files[-1]}")
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
    table, kept = {}, Path(config.known)
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(kept.read_text(encoding="utf-8"))
    if table.get("key") != key:  # it is of another state of this repository
        table = {"key": key}
    wanted = set(functions) - set(table)
    new = [mutant for mutant in MUTANTS if mutant.exercise.function in wanted]
    found = outcomes([(mutant.exercise, mutant.text()) for mutant in new], config)
    for mutant, (_, reason, failure) in zip(new, found):
        table.setdefault(mutant.exercise.function, []).append([failure, mutant.words, reason])
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(table), encoding="utf-8")
    return table


def grade(homework, wanted, config):
    """Yields the results anew after each answer: exercise -> points, reason, failure."""
    results, answers = {}, []
    for exercise in wanted:
        text, why = answer_in(homework, exercise)
        results[exercise] = 0, why or "not graded yet", None
        answers += [(exercise, text)] if text else []
    yield results
    for (exercise, _), (passed, *why) in zip(answers, outcomes(answers, config)):
        results[exercise] = exercise.points * passed, *why
        yield results
    wrong = {exercise: result for exercise, result in results.items() if result[2]}
    table = known_mistakes([exercise.function for exercise in wrong], config)
    for exercise, (points, reason, failure) in wrong.items():
        words = [f"It fails as this does: {words}.\n"
                 for known, words, _ in table[exercise.function] if known == failure]
        results[exercise] = points, "".join(words) + reason, failure
    yield results


def write_results(results, file):
    """Gradescope's results.json: https://gradescope-autograders.readthedocs.io"""
    tests = []
    for exercise, (points, reason, _) in results.items():
        tests.append({"number": exercise.number, "name": exercise.title, "score": points,
                      "max_score": exercise.points, "output": reason or "correct"})
    scores = {"score": sum(test["score"] for test in tests), "visibility": "visible"}
    Path(file).write_text(json.dumps(scores | {"tests": tests}, indent=1), encoding="utf-8")


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    if not hasattr(os, "fork") or not Path(config.homework).exists():
        raise ValueError(f"{config.homework} must be there; and Windows lacks the fork() that this "
                         "needs: use WSL or a container")
    wanted = [exercise for exercise in EXERCISES
              if (not config.exercises or exercise.number in config.exercises)
              and config.chapter in (None, exercise.chapter)]
    with tempfile.TemporaryDirectory() as folder:
        for results in grade(unpacked(config.homework, folder), wanted, config):
            if config.json:
                write_results(results, config.json)
    for exercise, (points, reason, _) in results.items():
        print(f"{exercise.number:5}{exercise.title:50}{points:3} of {exercise.points}")
        reason = "".join(sign for sign in reason if sign.isprintable() or sign == "\n")
        print(textwrap.indent(reason, "       "), end="\n" if reason else "")
    points = sum(points for points, _, _ in results.values())
    print(f"\n{points} of {sum(exercise.points for exercise in wanted)} points")
    return results


if __name__ == "__main__":
    flags.run(main)
