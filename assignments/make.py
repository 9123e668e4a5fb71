"""Makes a homework: a copy of this repository in which students write the exercises' functions.

RUN `python assignments/make.py homework`: all exercises are blank. `--chapter 3`: chapters 1 and 2
are whole, and from 3 on all is blank, so that earlier mistakes cost nothing later, and later code
shows no earlier answer. `--bug-hunt 7`: nothing is blank, but three functions have a mistake each,
drawn by this seed; `--hint` says in which chapters, `--solution` also where and what, and make
nothing. HOMEWORK.md in the copy lists the exercises.

The tests come along, but those which hold a solution in other words, and this folder, do not.
"""
import ast
import difflib
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import cut  # noqa: E402
from exercises import EXERCISES, files_of  # noqa: E402
from mutants import MUTANTS  # noqa: E402
from support import flags  # noqa: E402

BUGS = 3
SOLUTIONS = (  # files and folders that stay here: each holds answers in other words, or runs them
    "assignments", ".ci", "tests/assignments", "tests/runs", "tests/oracles.py",
    "tests/benchmark.py", "tests/benchmark_trl.py", "tests/test_house.py", "tests/test_numbers.py",
    "tests/test_readme.py", "experiments/penalties.py", "experiments/results.py")
ROOMS = ("0*.py", "*.md", "LICENSE", "requirements.txt", "pytest.ini", "support/**/*",
         "experiments/**/*", "tiny_sd/**/*", "tests/**/*")  # of a copy without git


@dataclass(frozen=True)
class Config:
    out: Annotated[str, tyro.conf.Positional]  # the new folder
    chapter: Literal[1, 2, 3, 4, 5] | None = None  # first chapter that is blank; default: all are
    bug_hunt: int | None = None  # plant three mistakes drawn by this seed, and blank nothing
    hint: bool = False  # only say in which chapters the mistakes of --bug-hunt are
    solution: bool = False  # only say where and what the mistakes of --bug-hunt are


def files_to_copy():
    """What git tracks, so that nothing of a course lands in a homework; without git, our rooms."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
        files = [Path(name) for name in listed.stdout.split("\0") if name]
    except OSError:
        files = []
    if Path("01_mdp.py") not in files:
        found = [file for room in ROOMS for file in ROOT.glob(room)]
        files = [file.relative_to(ROOT) for file in sorted(found) if "__pycache__" not in file.parts]
    return [file for file in files if (ROOT / file).is_file()
            and not any(file.is_relative_to(kept) for kept in SOLUTIONS)]


def copy_all(out):
    for file in files_to_copy():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, out / file)


def blank_all(out, exercises):
    for file in {exercise.file for exercise in exercises}:
        source = (out / file).read_text(encoding="utf-8")
        own = [exercise for exercise in exercises if exercise.file == file]
        (out / file).write_text(cut.blank(source, own), encoding="utf-8")


def drawn_bugs(seed):
    """Three mistakes in functions of three different chapters."""
    rng = random.Random(seed)
    chapters = rng.sample(sorted({exercise.chapter for exercise in EXERCISES}), BUGS)
    natural = [mutant for mutant in MUTANTS if mutant.shape not in ("", "...")]
    return [rng.choice([mutant for mutant in natural if mutant.exercise.chapter == chapter])
            for chapter in sorted(chapters)]


def plant(folder, mutant):
    """(source before, source after): a file of this folder, and the same with the mistake in it."""
    before = (folder / mutant.exercise.file).read_text(encoding="utf-8")
    return before, cut.replaced(before, mutant.exercise.name, mutant.text())


def print_solution(mutant):
    """File, line, what stood there and what stands there now, and why it is wrong."""
    before, after = (source.split("\n") for source in plant(ROOT, mutant))
    print(f"{mutant.exercise.file}, {mutant.exercise.name}: {mutant.words}")
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, before, after).get_opcodes():
        if tag != "equal":
            print(f"  line {j + 1} is  ", *after[j:j_end], sep="\n    ")
            print("  and should be", *before[i:i_end], sep="\n    ")


def list_of(exercises):
    """HOMEWORK.md of blank exercises, in Markdown."""
    rows, hints = [], []
    for exercise in exercises:
        source = (ROOT / exercise.file).read_text(encoding="utf-8")
        node = cut.find(ast.parse(source), exercise.name)
        first = (ast.get_docstring(node) or exercise.title).splitlines()[0].replace("|", "\\|")
        tests = [file.relative_to(ROOT) for file in files_of(exercise.function)]
        own = [f"`{file.as_posix()}`" for file in tests if file in files_to_copy()]
        rows.append(f"| {exercise.number} {exercise.title} | {exercise.points} | `{exercise.file}` "
                    f"| `{exercise.name}` | {first} | {', '.join(own) or 'your instructor has it'} |")
        hints.append(f"- **{exercise.number}** {exercise.hint}")
    template = (ROOT / "assignments/homework.md").read_text(encoding="utf-8")
    return template.format(rows="\n".join(rows), hints="\n".join(hints))


HUNT = """# Bug hunt

Three functions of this copy have a mistake each, in different chapters. Find and mend them: the
tests (`python -m pytest tests/equations`) tell where to look, the papers what is right.
"""


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    out = Path(config.out)
    if config.bug_hunt is not None and config.chapter is not None:
        raise ValueError("--chapter and --bug-hunt do not go together")
    if config.hint or config.solution:
        if config.bug_hunt is None:
            raise ValueError("--hint and --solution go with --bug-hunt")
        bugs = drawn_bugs(config.bug_hunt)
        print("There is a mistake in each of the chapters",
              ", ".join(str(mutant.exercise.chapter) for mutant in bugs))
        for mutant in bugs if config.solution else ():
            print_solution(mutant)
        return None
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    copy_all(out)
    if config.bug_hunt is not None:
        for mutant in drawn_bugs(config.bug_hunt):
            (out / mutant.exercise.file).write_text(plant(out, mutant)[1], encoding="utf-8")
        (out / "HOMEWORK.md").write_text(HUNT, encoding="utf-8")
        print(f"{out}: {BUGS} mistakes are planted")
        return out
    exercises = [exercise for exercise in EXERCISES if exercise.chapter >= (config.chapter or 1)]
    blank_all(out, exercises)
    (out / "HOMEWORK.md").write_text(list_of(exercises), encoding="utf-8")
    points = sum(exercise.points for exercise in exercises)
    print(f"{out}: {len(exercises)} exercises, {points} points")
    return out


if __name__ == "__main__":
    flags.run(main)
