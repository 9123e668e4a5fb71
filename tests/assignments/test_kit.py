"""The course kit: homeworks hold no answer, grades are fair, and wrong answers are found out."""
import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.test_house import ROOT, imports_of

sys.path.insert(0, str(ROOT / "assignments"))
import check  # noqa: E402
import cut  # noqa: E402
import exercises  # noqa: E402
import grade  # noqa: E402
import make  # noqa: E402
import mutants  # noqa: E402
from exercises import BY_NUMBER, EXERCISES  # noqa: E402


def text_of(exercise, folder=ROOT):
    source = Path(folder, exercise.file).read_text(encoding="utf-8")
    return cut.function_text(source, exercise.name)


@pytest.fixture(scope="module")
def homework(tmp_path_factory):
    return make.main([str(tmp_path_factory.mktemp("all") / "homework")])


def test_every_exercise_has_a_number_tests_and_wrong_answers():
    assert len(EXERCISES) >= 34
    wrong = {mutant.exercise.function for mutant in mutants.MUTANTS}
    chapters = Counter()
    for exercise in EXERCISES:
        chapters[exercise.chapter] += 1
        assert exercise.number == f"{exercise.chapter}.{chapters[exercise.chapter]}"
        assert exercises.files_of(exercise.function), exercise.number
        assert ast.get_docstring(ast.parse(text_of(exercise)).body[0]), exercise.number
        assert exercise.function in wrong and exercise.points > 0 and exercise.hint[-1] in ".?"
    files = {exercise.file for exercise in EXERCISES}
    assert len({Path(file).name for file in files}) == len(files)  # so that they may lie flat


# ---- the student's copy ---------------------------------------------------------------------


def statements(nodes):
    """Statements with something in them, in Python's own layout; blocks by their parts."""
    for node in (node for top in nodes for node in ast.walk(top)):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
            if len(ast.unparse(node)) >= 25:
                yield ast.unparse(node)


@functools.cache
def unparsed(text):
    return ast.unparse(ast.parse(text))


def leaks(folder):
    """(exercise, file) where two statements of an answer, or most of a loop's, are in a file."""
    texts = {file: unparsed(file.read_text(encoding="utf-8")) for file in folder.rglob("*.py")}
    found = []
    for exercise in EXERCISES:
        own = set(statements(cut.answer_of(ast.parse(text_of(exercise)).body[0])))
        needed = min(2 if len(own) < 12 else len(own) * 2 // 3, len(own)) or 9
        found += [(exercise.number, file.name) for file, text in texts.items()
                  if sum(statement in text for statement in own) >= needed]
    return found


def test_no_answer_is_left_in_a_homework(homework, tmp_path):
    assert leaks(homework) == []
    for solution in make.SOLUTIONS:
        assert not (homework / solution).exists()
    listed = (homework / "HOMEWORK.md").read_text(encoding="utf-8")
    for exercise in EXERCISES:
        text = text_of(exercise, homework)
        assert f"Exercise {exercise.number}: " in text and exercise.hint in listed
        assert grade.answer_in(homework, exercise) == (None, "not answered yet")
    make.copy_all(tmp_path / "whole")
    assert leaks(tmp_path / "whole") != []  # this test can see one


def test_all_but_the_answers_comes_along_and_needs_nothing_that_does_not(homework):
    for file in {exercise.file for exercise in EXERCISES}:
        whole, left = (ast.parse(Path(folder, file).read_text(encoding="utf-8"))
                       for folder in (ROOT, homework))
        for exercise in EXERCISES:
            if exercise.file == file:
                node, blank = cut.find(whole, exercise.name), cut.find(left, exercise.name)
                assert ast.get_docstring(node) == ast.get_docstring(blank)
                assert ast.dump(node.args) == ast.dump(blank.args)
                node.body = blank.body = []
        assert ast.dump(whole) == ast.dump(left)
    for file in homework.rglob("*.py"):
        for name in imports_of(file.read_text(encoding="utf-8")):
            path = Path(*name.split("."))  # of a module, or of what is in it
            for solution in map(Path, make.SOLUTIONS):
                assert not path.is_relative_to(solution.with_suffix("")), file


def test_a_copy_without_git_leaves_out_what_a_course_keeps_beside_it(tmp_path, monkeypatch):
    files = ["01_mdp.py", "support/models.py", "tests/equations/test_01_mdp.py", "README.md"]
    others = ["grades.csv", "hand-ins/anna/01_mdp.py", ".venv/x.py", "runs/a/config.json",
              "assignments/exercises.py", "tests/oracles.py", "support/__pycache__/models.pyc"]
    for name in files + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    assert sorted(map(str, make.files_to_copy())) == sorted(files)


def test_later_chapters_are_blank_and_earlier_ones_whole(tmp_path):
    copy = make.main([str(tmp_path / "third"), "--chapter", "3"])
    for exercise in EXERCISES:
        text = text_of(exercise, copy)
        assert cut.is_blank(text) == (exercise.chapter >= 3)
        assert exercise.chapter >= 3 or text == text_of(exercise)


def test_a_bug_hunt_has_three_mistakes_in_three_chapters_and_nothing_else(tmp_path, capsys):
    copy = make.main([str(tmp_path / "hunt"), "--bug-hunt", "5"])
    make.main(["nowhere", "--bug-hunt", "5", "--solution"])
    solution = capsys.readouterr().out
    changed = [exercise for exercise in EXERCISES if text_of(exercise, copy) != text_of(exercise)]
    assert len(changed) == 3 == len({exercise.chapter for exercise in changed})
    bugs = make.drawn_bugs(5)
    assert {text_of(exercise, copy) for exercise in changed} == {bug.text() for bug in bugs}
    places = re.findall(r"^(\S+), (\S+): (.+)\n  line (\d+) is\n(.*)", solution, re.MULTILINE)
    assert len(places) == 3
    for bug, (file, name, words, number, line) in zip(bugs, places):
        assert (file, name, words) == (bug.exercise.file, bug.exercise.name, bug.words)
        assert (copy / file).read_text(encoding="utf-8").split("\n")[int(number) - 1] == line


@pytest.mark.parametrize("words, named", [(["."], "already"), (["x", "--hint"], "--bug-hunt")])
def test_bad_flags_of_make_are_named_and_nothing_is_made(words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        make.main(words)
    assert list(tmp_path.iterdir()) == []


def test_a_function_is_found_also_beside_what_python_cannot_read():
    good = 'def first(a,\n          b):\n    """x"""\n\n    return a\n\n\nclass C:\n'
    good += "    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n"
    for source in (good, good + "\n\ndef broken(:\n    !!\n", "import (\n\n" + good):
        assert cut.function_text(source, "first") == good.partition("\n\n\nclass")[0] + "\n"
        assert cut.function_text(source, "C.g") == "def g(self):\n    return 2\n"
        assert cut.function_text(source, "missing") is None
    tabs = good.replace("    ", "\t")
    assert "return 2" in cut.function_text(tabs + "\n\ndef broken(:\n", "C.g")
    outdented = good.replace("        return 2", "# why\n        return 2")
    assert cut.function_text(outdented, "C.g") == "def g(self):\n# why\n    return 2\n"


# ---- what is handed in ----------------------------------------------------------------------


def test_a_hand_in_may_lie_flat_or_in_a_folder_or_be_a_zip_file_of_it(tmp_path):
    exercise, good = BY_NUMBER["4.6"], (ROOT / BY_NUMBER["4.6"].file).read_text(encoding="utf-8")
    for name in ("flat/models.py", "whole/support/models.py", "deep/anna/support/models.py",
                 "deep/anna/.venv/lib/models.py", "two/a/models.py", "two/b/models.py",
                 "large/models.py", "empty/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        long = "# x\n" * 10**6 if name.startswith("large") else ""
        (tmp_path / name).write_text(good + long, encoding="utf-8")
    shutil.make_archive(tmp_path / "packed", "zip", tmp_path / "deep")
    for name in ("flat", "whole", "deep", "packed.zip"):
        folder = grade.unpacked(tmp_path / name, tmp_path / "unpacked")
        assert grade.answer_in(folder, exercise) == (text_of(exercise), ""), name
    for name, said in (("two", "more than one file"), ("empty", "there is no file"),
                       ("large", "more than 200000 bytes")):
        assert said in grade.answer_in(tmp_path / name, exercise)[1]


HONEST = (  # bodies of a function with the arguments x and pipe
    "def _twice(_x):\n    return 2 * _x\nreturn [_twice(_a) for _a in range(3)]",
    "class Off:\n    def __init__(self):\n        self._x = x\n    def __enter__(self):\n"
    "        pipe.unet.disable_lora()\n    def __exit__(self, *error):\n"
    "        pipe.unet.set_adapters('default')\nwith Off():\n    return x",
    "import io\nfrom PIL import Image\nfile = io.BytesIO()\nImage.new('RGB', (1, 1)).convert('L')",
    "device = 'cuda' if torch.cuda.is_available() else 'cpu'\nreturn '{}: {}'.format(device, x)",
    "from torch.distributions.kl import kl_divergence\nD = torch.distributions\n"
    "return kl_divergence(D.Normal(x, 1), D.Normal(0.0, 1.0))",
    "import numpy as np\nfrom math import log\nrng = np.random.default_rng(0)\n"
    "return np.array([log(2)]).mean() + rng.normal(), getattr(pipe.unet, 'peft_config', None)",
    "optimizer = torch.optim.Adam(x.parameters())\nfor p in x.parameters():\n    p.grad = None\n"
    "x.eval()(torch.ones(1)).sum().backward()\noptimizer.step()\noptimizer.zero_grad()",
    "tuned = pipe.unet\npipe.unet = x\nsame = torch.eye(3)\nsame.diagonal()[:] = 0\n"
    "same[0, 1] += 1\npipe.unet = tuned\nreturn super(type(x), x).__init__.__name__",
)
REFUSED = (  # what an answer has no need for, and what is said of it
    ("import os\nos._exit(0)", "imports os"), ("from tests.oracles import ddpo", "imports tests"),
    ("return open('01_mdp.py').read()", "open"), ("eval('1')", "eval"),
    ("return x.__class__", "__class__"), ("return __builtins__['eval']", "__builtins__"),
    ("return (i for i in '').gi_frame", "gi_frame"), ("torch._C.x()", "_C"),
    ("return '{0.__globals__}'.format(x)", "__globals__"),
    ("import torch\ntorch.testing.assert_close = print", "it changes torch.testing"),
    ("mdp.log_prob = x", "it changes mdp.log_prob"), ("torch.pi[0] = 3", "it changes torch.pi"),
    ("import numpy as np\nnp.load('x')", "load"), ("from numpy import fromfile", "fromfile"),
    ("from operator import attrgetter as a", "attrgetter"), ("models.os.getcwd()", "os"),
    ("global torch\ntorch = None", "changes global torch"),
)


def function_of(body):
    return "def f(x, pipe):\n" + "".join(f"    {line}\n" for line in body.splitlines())


def test_answers_that_only_compute_are_let_through():
    for exercise in EXERCISES:
        assert check.refusal(text_of(exercise)) == "", exercise.number
    for body in HONEST:
        assert check.refusal(function_of(body)) == "", body


@pytest.mark.parametrize("body, said", REFUSED)
def test_what_reaches_for_more_is_refused_before_it_runs(body, said):
    assert said in check.refusal(function_of(body))


# ---- grades ---------------------------------------------------------------------------------


def graded(folder, *words):
    """Results by number, by the command that a course would type."""
    command = [sys.executable, str(ROOT / "assignments/grade.py"), str(folder), "--json",
               str(folder / "results.json"), "--known", str(folder / "known.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert f"\n{results['score']} of " in done.stdout
    return {test["number"]: test for test in results["tests"]}


@pytest.mark.slow
def test_the_reference_gets_all_points(tmp_path):
    """In every second exercise; with ALL_MUTANTS set, in all."""
    asked = EXERCISES[::1 if "ALL_MUTANTS" in os.environ else 2]
    make.copy_all(tmp_path / "copy")
    results = graded(tmp_path / "copy", "--exercises", *[exercise.number for exercise in asked])
    scores = {number: test["score"] for number, test in results.items()}
    assert scores == {exercise.number: exercise.points for exercise in asked}


def hand_in(folder, answers):
    """A homework with these answers: number -> the lines below the docstring."""
    for number, body in answers.items():
        exercise = BY_NUMBER[number]
        file = folder / exercise.file
        text = mutants.planted(text_of(exercise, folder), "...", body)
        file.write_text(cut.replaced(file.read_text(encoding="utf-8"), exercise.name, text),
                        encoding="utf-8")


ANSWERS = {  # number -> an answer, and what is said of it
    "2.1": ("file = io.BytesIO()\nimage.convert('RGB').save(file, 'JPEG', quality=quality)\n"
            "return len(file.getvalue()) / 1024",
            "It fails as this does: a kilobyte has 1000 bytes here.\nThis does not hold: "),
    "2.2": ("return [0] * 10**10", "MemoryError"),
    "2.3": ("return helper(x)", "put all that it needs inside"),
    "1.7": ("d = mean_p - mean_q\nreturn (d / std).pow(2).flatten(1).sum(1) / 2", "correct"),
    "1.3": ("import os\nos._exit(0)", "refused: it imports os"),
    "1.2": ("return return", "Python cannot read it"),
}


def test_each_answer_is_graded_alone_and_what_is_wrong_is_said_in_words(tmp_path):
    copy = make.main([str(tmp_path / "homework")])
    hand_in(copy, {number: body for number, (body, _) in ANSWERS.items()})
    results = graded(copy, "--exercises", *ANSWERS)
    for number, (_, said) in ANSWERS.items():
        assert said in results[number]["output"], (number, results[number]["output"])
        assert (results[number]["score"] > 0) == (said == "correct")
    known = json.loads((copy / "known.json").read_text(encoding="utf-8"))
    assert set(known) == {"key", "02_rewards.jpeg_kilobytes"}  # only these had to be run, once
    assert all(failure for failure, _, _ in known["02_rewards.jpeg_kilobytes"])


def test_an_answer_that_never_ends_is_ended():
    endless = "def best_of_n_kl(n):\n    while True:\n        pass"
    outcome = grade.outcome(BY_NUMBER["5.4"], endless, 1)
    assert outcome == (False, "it took more than 1 seconds", None)


def test_gradescope_gets_its_file_whatever_happens(tmp_path):
    for source, said in ((ROOT, "there is no file"), (tmp_path, "tell your instructor")):
        folders = {f"AUTOGRADER_{name}": str(tmp_path / name) for name in ("SUBMISSION", "RESULTS")}
        (tmp_path / "SUBMISSION").mkdir(exist_ok=True)
        subprocess.run(["bash", str(ROOT / "assignments/run_autograder")], env={
            **os.environ, **folders, "AUTOGRADER_SOURCE": str(source)}, capture_output=True)
        results = (tmp_path / "RESULTS/results.json").read_text(encoding="utf-8")
        assert said in results and json.loads(results)["score"] == 0
        shutil.rmtree(tmp_path / "RESULTS")


# ---- wrong answers --------------------------------------------------------------------------


def test_there_are_many_wrong_answers_and_each_can_be_planted():
    assert len(mutants.MUTANTS) >= 230
    texts = {(mutant.exercise, unparsed(mutant.text())) for mutant in mutants.MUTANTS}
    right = {(exercise, unparsed(text_of(exercise))) for exercise in EXERCISES}
    assert len(texts) == len(mutants.MUTANTS) and not texts & right
    assert all(mutant.words and len(mutant.words) < 120 for mutant in mutants.MUTANTS)


def test_a_mistake_outlives_a_rewording_of_its_line():
    text = "def f(x):\n    # why\n    y = (x - 1).sum(\n     0) * 2  # é\n    return y, x.sum()\n"
    assert mutants.planted(text, "_a.sum(...)", "_a.mean(...)") == (
        "def f(x):\n    # why\n    y = (x - 1).mean(0) * 2  # é\n    return y, x.mean()\n")
    assert "y = (x - 1 + x) * 2" in mutants.planted(text, "_a.sum(0)", "_a + x")  # in brackets
    assert mutants.planted(text, "", "x = 1").splitlines()[2:] == [
        "    x = 1", *text.splitlines()[2:]]
    with pytest.raises(ValueError, match="nothing has the shape"):
        mutants.planted(text, "_a.max()", "_a")


@pytest.mark.slow
def test_wrong_answers_are_noticed(tmp_path):
    """Those of every twelfth exercise; with ALL_MUTANTS set, of all."""
    first, step = (0, 1) if "ALL_MUTANTS" in os.environ else (1, 12)
    functions = [exercise.function for exercise in EXERCISES[first::step]]
    done = subprocess.run([sys.executable, str(ROOT / "assignments/mutants.py"), *functions],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("0 "), done.stdout + done.stderr[-2000:]
