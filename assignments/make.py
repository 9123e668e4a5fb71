"""Makes a homework: a copy of this repository in which students write the exercises' functions.

RUN `python assignments/make.py homework`: all exercises are blank. `--chapter 3`: chapters 1 and 2
are whole, and from 3 on all is blank, so that earlier mistakes cost nothing later, and later code
shows no earlier answer. `--bug-hunt 7`: nothing is blank, but three functions have a mistake each,
drawn by this seed; `--hint` says in which chapters, `--solution` also what, and make nothing.

The tests and this folder stay here, for they hold the answers in other words. HOMEWORK.md in the
copy lists the exercises.
"""
import ast
import random
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import cut  # noqa: E402
from exercises import EXERCISES  # noqa: E402
from mutants import MUTANTS  # noqa: E402
from support import flags  # noqa: E402

LEFT_OUT = {"tests", "assignments", "runs", "pytest.ini", "__pycache__",
            "penalties.py", "results.py"}  # one repeats 4's answers, one runs it
BUGS = 3


@dataclass(frozen=True)
class Config:
    out: Annotated[str, tyro.conf.Positional]  # the new folder
    chapter: int | None = None  # first chapter that is blank; default: all are
    bug_hunt: int | None = None  # plant three mistakes drawn by this seed, and blank nothing
    hint: bool = False  # only say in which chapters the mistakes of --bug-hunt are
    solution: bool = False  # only say what the mistakes of --bug-hunt are


def copy_all(out):
    """A copy without history, tests, runs, other homeworks and whatever Python has made."""
    def is_left_out(path):
        made = (path / "HOMEWORK.md").exists() or (path / "pyvenv.cfg").exists()
        return (path.name in LEFT_OUT or path.name.startswith(".") or made
                or path.resolve() == out.resolve())

    def ignore(folder, names):
        return [name for name in names if is_left_out(Path(folder, name))]

    shutil.copytree(ROOT, out, ignore=ignore)


def blank_all(out, exercises):
    for file in {exercise.file for exercise in exercises}:
        source = (out / file).read_text(encoding="utf-8")
        own = [exercise for exercise in exercises if exercise.file == file]
        (out / file).write_text(cut.blank(source, own), encoding="utf-8")


def drawn_bugs(seed):
    """Three mistakes in functions of three different chapters."""
    rng = random.Random(seed)
    chapters = rng.sample(sorted({exercise.chapter for exercise in EXERCISES}), BUGS)
    return [rng.choice([mutant for mutant in MUTANTS if mutant.chapter == chapter])
            for chapter in sorted(chapters)]


def plant(out, mutant):
    """The mistake in its file; only the lines that differ change."""
    file = out / mutant.file
    source = file.read_text(encoding="utf-8")
    name = mutant.function.removeprefix(mutant.file[:-3].replace("/", ".") + ".")
    node = cut.find(ast.parse(source), name)
    lines = source.split("\n")
    wrong = textwrap.indent(mutant.text(), " " * node.col_offset)
    lines[node.lineno - 1:node.end_lineno] = wrong.splitlines()
    file.write_text("\n".join(lines), encoding="utf-8")


def list_of(exercises):
    """HOMEWORK.md of blank exercises, in Markdown."""
    lines = ["# Homework", "",
             "Write the functions below. Each raises `NotImplementedError` now; its docstring",
             "says what it is given and what it returns, and a comment in it what else is",
             "graded. Write all that an answer needs inside the function, imports too",
             "(mathematics, numpy and torch only): graded is the function alone, beside correct",
             "other ones. It computes and does nothing else: no files, no processes. It changes",
             "what it is given only where docstring or comment say so. Hand in the whole folder,",
             "or the files that you changed.",
             "",
             "README.md is that of the whole repository: its tests/ and assignments/ are not here.",
             "",
             "| exercise | points | file | function | equation or task |",
             "| --- | --- | --- | --- | --- |"]
    for exercise in exercises:
        source = (ROOT / exercise.file).read_text(encoding="utf-8")
        node = cut.find(ast.parse(source), exercise.name)
        first = (ast.get_docstring(node) or exercise.title).splitlines()[0].replace("|", "\\|")
        lines.append(f"| {exercise.number} {exercise.title} | {exercise.points} | "
                     f"`{exercise.file}` | `{exercise.name}` | {first} |")
    lines += ["", "## Hints", ""]
    lines += [f"- **{exercise.number}** {exercise.hint}" for exercise in exercises]
    return "\n".join(lines) + "\n"


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    out = Path(config.out)
    chapters = sorted({exercise.chapter for exercise in EXERCISES})
    if config.chapter is not None and config.chapter not in chapters:
        raise ValueError(f"--chapter {config.chapter}: there are {chapters[0]} to {chapters[-1]}")
    if config.bug_hunt is not None and config.chapter is not None:
        raise ValueError("--chapter and --bug-hunt do not go together")
    if config.hint or config.solution:
        if config.bug_hunt is None:
            raise ValueError("--hint and --solution go with --bug-hunt")
        for mutant in drawn_bugs(config.bug_hunt) if config.solution else ():
            print(f"{mutant.function} ({mutant.file}): {mutant.words}\n    {mutant.new}")
        hunted = [str(mutant.chapter) for mutant in drawn_bugs(config.bug_hunt)]
        print(f"There is a mistake in each of the chapters {', '.join(hunted)}.")
        return None
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    copy_all(out)
    if config.bug_hunt is not None:
        for mutant in drawn_bugs(config.bug_hunt):
            plant(out, mutant)
        text = (f"# Bug hunt\n\n{BUGS} functions of this copy have a mistake each, in different "
                "chapters. Find and mend them.\n")
        print(f"{out}: {BUGS} mistakes are planted")
    else:
        first = config.chapter or chapters[0]
        exercises = [exercise for exercise in EXERCISES if exercise.chapter >= first]
        blank_all(out, exercises)
        text = list_of(exercises)
        points = sum(exercise.points for exercise in exercises)
        print(f"{out}: {len(exercises)} exercises, {points} points")
    (out / "HOMEWORK.md").write_text(text, encoding="utf-8")
    return out


if __name__ == "__main__":
    flags.run(main)
