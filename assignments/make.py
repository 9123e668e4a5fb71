"""Makes a homework: a copy of this repository in which students write the exercises' functions.

RUN `python assignments/make.py homework`: all exercises are blank, and HOMEWORK.md lists them.
`--chapter 3`: chapters 1 and 2 are whole, and from 3 on all is blank, so that earlier mistakes cost
nothing later, and later code shows no earlier answer. `--bug-hunt 7`: nothing is blank, but three
functions have a mistake each, drawn by this seed; `--hint` says in which chapters, and
`--solution` where and what. The tests come along, but for those which hold a solution.
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

SOLUTIONS = (  # files and folders that stay here: each holds answers in other words, or runs them
    "assignments", ".ci", "tests/assignments", "tests/runs", "tests/oracles.py",
    "tests/benchmark.py", "tests/benchmark_trl.py", "tests/test_house.py", "tests/test_numbers.py",
    "tests/test_readme.py")
ROOMS = ("0*.py", "*.md", "LICENSE", "requirements.txt", "pytest.ini", "support/**/*",
         "experiments/**/*", "tiny_sd/**/*", "tests/**/*")  # of a copy without git
HUNT = ("# Bug hunt\n\nThree functions of this copy, in different chapters, have a mistake each. "
        "Mend them:\nthe tests say where to look, and the papers what is right.\n")


@dataclass(frozen=True)
class Config:
    out: Annotated[str, tyro.conf.Positional]  # the new folder
    chapter: Literal[1, 2, 3, 4, 5] = 1  # the first chapter that is blank
    bug_hunt: int | None = None  # plant three mistakes drawn by this seed, and blank nothing
    hint: bool = False  # only say in which chapters the mistakes of --bug-hunt are
    solution: bool = False  # only say where and what the mistakes of --bug-hunt are


def files_to_copy():
    """What git tracks, so that nothing of a course lands in a homework; without git, our rooms."""
    listed = ""
    if shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True,
                                text=True).stdout
    files = [Path(name) for name in listed.split("\0") if name]
    if Path("01_mdp.py") not in files:
        found = [file for room in ROOMS for file in sorted(ROOT.glob(room))]
        files = [file.relative_to(ROOT) for file in found if "__pycache__" not in file.parts]
    return [file for file in files if (ROOT / file).is_file()
            and not any(file.is_relative_to(solution) for solution in SOLUTIONS)]


def copy_all(out):
    for file in files_to_copy():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, out / file)


def drawn_bugs(seed):
    """Three mistakes in functions of three different chapters."""
    rng = random.Random(seed)
    natural = [mutant for mutant in MUTANTS if mutant.shape not in ("", "...")]
    return [rng.choice([mutant for mutant in natural if mutant.exercise.chapter == chapter])
            for chapter in sorted(rng.sample(range(1, 6), 3))]


def print_solution(mutant):
    """File, line, what stands there now and what should, and why."""
    right = (ROOT / mutant.exercise.file).read_text(encoding="utf-8")
    wrong = cut.replaced(right, mutant.exercise.name, mutant.text()).split("\n")
    right = right.split("\n")
    print(f"{mutant.exercise.file}, {mutant.exercise.name}: {mutant.words}")
    for tag, i, i_end, j, j_end in difflib.SequenceMatcher(None, right, wrong).get_opcodes():
        if tag != "equal":
            print(f"  line {j + 1} is", *wrong[j:j_end], "  and should be", sep="\n")
            print(*right[i:i_end], sep="\n")


def list_of(exercises):
    """HOMEWORK.md of blank exercises, in Markdown."""
    rows, hints, copied = [], [], set(files_to_copy())
    for exercise in exercises:
        source = (ROOT / exercise.file).read_text(encoding="utf-8")
        doc = ast.get_docstring(cut.find(ast.parse(source), exercise.name)) or exercise.title
        tests = {file.relative_to(ROOT) for file in files_of(exercise.function)} & copied
        cells = [f"{exercise.number} {exercise.title}", str(exercise.points), f"`{exercise.file}`",
                 f"`{exercise.name}`", doc.splitlines()[0].replace("|", "\\|"),
                 ", ".join(f"`{file.as_posix()}`" for file in sorted(tests))]
        rows.append(f"| {' | '.join(cells)} |")
        hints.append(f"- **{exercise.number}** {exercise.hint}")
    template = (ROOT / "assignments/homework.md").read_text(encoding="utf-8")
    return template.format(rows="\n".join(rows), hints="\n".join(hints))


def main(argv=None):
    config = tyro.cli(Config, description=__doc__, args=argv)
    out, bugs = Path(config.out), []
    if config.bug_hunt is not None:
        bugs = drawn_bugs(config.bug_hunt)
    if config.hint or config.solution:
        if not bugs:
            raise ValueError("--hint and --solution go with --bug-hunt")
        print("There is a mistake in each of the chapters",
              ", ".join(str(mutant.exercise.chapter) for mutant in bugs))
        for mutant in bugs if config.solution else ():
            print_solution(mutant)
        return None
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")
    copy_all(out)
    blank = [exercise for exercise in EXERCISES if exercise.chapter >= config.chapter and not bugs]
    for file in {exercise.file for exercise in blank} | {mutant.exercise.file for mutant in bugs}:
        source = (out / file).read_text(encoding="utf-8")
        source = cut.blank(source, [exercise for exercise in blank if exercise.file == file])
        for mutant in bugs:
            if mutant.exercise.file == file:
                source = cut.replaced(source, mutant.exercise.name, mutant.text())
        (out / file).write_text(source, encoding="utf-8")
    (out / "HOMEWORK.md").write_text(HUNT if bugs else list_of(blank), encoding="utf-8")
    points = sum(exercise.points for exercise in blank)
    print(f"{out}: {len(blank)} exercises, {points} points" if blank else f"{out}: happy hunting")
    return out


if __name__ == "__main__":
    flags.run(main)
