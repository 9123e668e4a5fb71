"""The course kit: homeworks hold no answer, grades are fair, and wrong answers are found out."""
import ast
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from support.models import HERE as ROOT

sys.path.insert(0, str(ROOT / "assignments"))
import cut  # noqa: E402
import exercises  # noqa: E402
import make  # noqa: E402
import mutants  # noqa: E402
import rules  # noqa: E402
from exercises import BY_NUMBER, EXERCISES  # noqa: E402


def source_of(exercise, folder=ROOT):
    return Path(folder, exercise.file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def homework(tmp_path_factory):
    return make.main([str(tmp_path_factory.mktemp("all") / "homework")])


def test_the_table_has_all_chapters_and_every_exercise_has_tests():
    assert len(EXERCISES) >= 24 and {exercise.chapter for exercise in EXERCISES} == {1, 2, 3, 4, 5}
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*/test_*.py"))
    for exercise in EXERCISES:
        assert f'", "{exercise.function}")' in tests, exercise.number
        node = cut.find(ast.parse(source_of(exercise)), exercise.name)
        assert ast.get_docstring(node) and exercise.points > 0 and exercise.hint[-1] in ".?"
    per_chapter = {}
    for exercise in EXERCISES:
        per_chapter.setdefault(exercise.chapter, []).append(int(exercise.number.split(".")[1]))
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in per_chapter.values())


# ---- the student's copy ---------------------------------------------------------------------


def statements(nodes):
    """Statements with something in them, in Python's own layout; blocks by their parts."""
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)):
                if len(ast.unparse(node)) >= 25:
                    yield ast.unparse(node)


def texts_of(folder):
    texts = {}
    for file in folder.rglob("*"):
        if file.suffix in (".py", ".md", ".txt", ".html", ".json", ".csv"):
            text = file.read_text(encoding="utf-8")
            texts[file.name] = ast.unparse(ast.parse(text)) if file.suffix == ".py" else text
    return texts


def leaks(folder, chapter):
    """(exercise, file) where two statements of an answer stand in one file of the copy."""
    texts, found = texts_of(folder), []
    for exercise in EXERCISES:
        if exercise.chapter >= chapter:
            node = cut.find(ast.parse(source_of(exercise)), exercise.name)
            own = set(statements(cut.answer_of(node)))
            needed = min(2, len(own)) or 9  # answers of short lines only are in no other file
            found += [(exercise.number, name) for name, text in texts.items()
                      if sum(statement in text for statement in own) >= needed]
    return found


def test_no_answer_is_left_in_a_homework(homework):
    assert leaks(homework, 1) == []
    names = {path.name for path in homework.rglob("*")}
    assert not {"tests", "assignments", ".git", "__pycache__", "mutants.py", "oracles.py"} & names
    assert not [name for name in names if name.endswith((".pyc", ".orig", ".patch"))]
    listed = (homework / "HOMEWORK.md").read_text(encoding="utf-8")
    for exercise in EXERCISES:
        text = cut.function_text(source_of(exercise, homework), exercise.name)
        assert cut.is_blank(text) and f"Exercise {exercise.number}: " in text
        assert exercise.number in listed and exercise.hint in listed
    assert leaks(ROOT, 1) != []  # this test can see one


def test_all_but_the_answers_comes_along(homework):
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
    assert (homework / "tiny_sd/unet/diffusion_pytorch_model.safetensors").is_file()


def test_later_chapters_are_blank_and_earlier_ones_whole(tmp_path):
    copy = make.main([str(tmp_path / "third"), "--chapter", "3"])
    assert leaks(copy, 3) == []
    for exercise in EXERCISES:
        text = cut.function_text(source_of(exercise, copy), exercise.name)
        assert cut.is_blank(text) == (exercise.chapter >= 3)
        if exercise.chapter < 3:
            assert text == cut.function_text(source_of(exercise), exercise.name)


def test_a_bug_hunt_has_three_mistakes_in_three_chapters_and_nothing_else(tmp_path, capsys):
    copy = make.main([str(tmp_path / "hunt"), "--bug-hunt", "5"])
    make.main(["nowhere", "--bug-hunt", "5", "--hint"])
    hint = capsys.readouterr().out.splitlines()[-1]
    changed = [exercise for exercise in EXERCISES if cut.function_text(
        source_of(exercise, copy), exercise.name) != cut.function_text(source_of(exercise),
                                                                       exercise.name)]
    assert len(changed) == 3 == len({exercise.chapter for exercise in changed})
    assert hint.endswith(", ".join(str(exercise.chapter) for exercise in changed) + ".")
    planted = {mutant.text() for mutant in make.drawn_bugs(5)}
    assert {cut.function_text(source_of(exercise, copy), exercise.name)
            for exercise in changed} == planted
    assert make.drawn_bugs(5) != make.drawn_bugs(6)


@pytest.mark.parametrize("words, named", [
    (["."], "already"), (["x", "--chapter", "6"], "--chapter 6"), (["x", "--hint"], "--bug-hunt"),
    (["x", "--chapter", "2", "--bug-hunt", "1"], "--chapter and --bug-hunt")])
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
    twice = good.replace("return a", "raise NotImplementedError") + "\n\n" + good
    assert "return a" in cut.function_text(twice, "first")  # as Python has it
    tabs = good.replace("    ", "\t")
    assert "return 2" in cut.function_text(tabs + "\n\ndef broken(:\n", "C.g")
    outdented = good.replace("        return 2", "# why\n        return 2")
    assert cut.function_text(outdented, "C.g") == "def g(self):\n# why\n    return 2\n"


# ---- grades ---------------------------------------------------------------------------------


def graded(folder, *words):
    """Results by number, by the command that a course would type."""
    command = [sys.executable, str(ROOT / "assignments/grade.py"), str(folder), "--json",
               str(folder / "results.json"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert f"\n{results['score']} of " in done.stdout
    return {test["number"]: test for test in results["tests"]}


def test_untouched_blanks_get_nothing(homework):
    results = graded(homework)
    assert len(results) == len(EXERCISES)
    for test in results.values():
        assert test["score"] == 0 and test["output"] == "not answered yet"


@pytest.mark.slow
def test_the_reference_gets_all_points(tmp_path):
    (tmp_path / "whole").mkdir()
    make.copy_all(tmp_path / "whole/copy")
    results = graded(tmp_path / "whole/copy")
    assert {test["number"]: test["score"] for test in results.values()} == {
        exercise.number: exercise.points for exercise in EXERCISES}


def hand_in(folder, answers):
    """A homework with these answers: number -> the lines below the docstring."""
    for number, lines in answers.items():
        exercise = BY_NUMBER[number]
        file = folder / exercise.file
        source = file.read_text(encoding="utf-8")
        node = cut.find(ast.parse(source), exercise.name)
        rows, answer = source.splitlines(), cut.answer_of(node)
        indent = " " * answer[0].col_offset
        rows[answer[0].lineno - 1:node.end_lineno] = [indent + line for line in lines.splitlines()]
        file.write_text("\n".join(rows) + "\n", encoding="utf-8")


HOSTILE = {  # number -> an answer that wants points for something else, and what is said of it
    "1.1": ("while True:\n    pass", "more than 5 seconds"),
    "1.2": ("import os\nos._exit(0)", "imports os"),
    "1.3": ("torch.testing.assert_close = lambda *a, **k: None\nreturn x_t", "it changes"),
    "1.4": ('print("1 passed in 0.01s")\nraise SystemExit(0)', "SystemExit"),
    "1.5": ('return open("01_mdp.py").read()', "open"),
    "1.6": ("import pytest\npytest.fail = print\nreturn 0", "imports pytest"),
    "1.7": ("return importlib.import_module('x')", "importlib"),
    "1.8": ("return helper(scheduler)", "put all it needs inside"),
    "2.1": ("return (lambda f: f(f))(lambda f: f(f))", "RecursionError"),
    "2.2": ("return torch.zeros(10**12).sum()", "RuntimeError"),
    "2.3": ("return x.__class__", "__class__"),
    "3.1": ("return models.json.loads('1')", "json"),
    "3.2": ("log_prob.data.zero_()\nreturn log_prob * 0", "it changes what it is given"),
    "3.3": ("return training.np.memmap('a')", "np of support"),
    "3.4": ("return (i for i in '').gi_frame.f_back", "gi_frame"),
    "3.5": ("t = torch\nt.add = None\nreturn reward", "as a value"),
    "5.3": ("return getattr(f, 'x\\n\\x1b[1A')", "x"),
    "5.7": ("a.zero_()\nreturn {}", "it changes what it is given"),
    "3.6": ("prompts[:] = 'a' * len(prompts)\nreturn reward", "it changes what it is given"),
    "5.4": ("g = getattr\nreturn g(reward, 'x')", "getattr"),
    "5.5": ("from operator import attrgetter as a\nreturn a('x')", "attrgetter"),
    "5.6": ("[0 for setattr in ()]\nsetattr(math, 'pi', 3)", "setattr"),
    "5.1": ("return return", "cannot read"),
}


def test_hostile_answers_cost_their_own_exercise_only(homework, tmp_path):
    copy = make.main([str(tmp_path / "hostile")])
    hand_in(copy, {number: lines for number, (lines, _) in HOSTILE.items()})
    hand_in(copy, {"4.4": "difference = reward[:, None] - V\n"
                          "return difference - ddpo.mean_of_others(difference, prompts)"})
    results = graded(copy, "--seconds", "5", "--no-why", "--exercises", "4.4", *HOSTILE)
    for number, (_, said) in HOSTILE.items():
        assert results[number]["score"] == 0 and said in results[number]["output"], number
    assert results["4.4"]["score"] == 1
    assert results["5.3"]["output"].startswith("refused: it uses .x\n[1A")  # no escape


WHILE_IT_RUNS = {  # what the rules would refuse, let through: the second line of defense
    "it ends the process": ("import os\nos._exit(0)", "ended before the tests did"),
    "it kills itself": ("import os, signal\nsignal.raise_signal(9)", "ended before"),
    "it crashes": ("import ctypes\nctypes.string_at(0)", "ended before the tests did"),
    "it reads the answer": ("return open('04_dpok.py').read()", "open 04_dpok.py"),
    "it writes": ("open('tests/new.py', 'w')", "open tests/new.py"),
    "it starts another": ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
    "it asks for the shell": ("import os\nos.system('true')", "os.system"),
    "it writes by another name": ("open('/proc/self/cwd/tests/new.py', 'w')", "open /proc"),
    "it goes on after it was caught": (
        "for name in ('/tmp/new', '/tmp/new2'):\n    try:\n        open(name, 'w')\n"
        "    except PermissionError:\n        pass", "open /tmp/new"),
    "it writes beside /dev/null": ("open('/dev/null2', 'w')", "open /dev/null2"),
    "it kills the grader": ("import os\nos.kill(os.getppid(), 9)", "os.kill"),
    "it writes when it is thrown away": (
        "def g(box):\n    try:\n        yield 1\n    finally:\n        open('/tmp/new', 'w')\n"
        "box = []\nit = g(box)\nbox.append(it)\nnext(it)\nreturn math.log(n) - (n - 1) / n",
        "open /tmp/new"),
    "it returns nothing": ("import numpy as np\nreturn np.array([])", "without numbers"),
    "it returns nothing, hidden": (
        "import numpy as np\ne = np.empty(1, 'O')\ne[0] = np.array([])\nreturn e", "of objects"),
    "it writes elsewhere": ("open('/tmp/new', 'w')", "open /tmp/new"),
    "it forges the report": (
        "import io, os\nfor fd in range(3, 99):\n    try:\n        io.FileIO(fd, 'w').write("
        "b'{\"outcomes\": {\"a\": true}}')\n    except OSError:\n        pass\nos._exit(0)",
        "ended before the tests did"),
    "it ends pytest": ("import pytest\npytest.exit('42 passed', 0)", ""),
    "it skips": ("import pytest\npytest.skip('42 passed')", ""),
}


def test_what_the_rules_would_miss_is_caught_while_it_runs():
    texts = ["def best_of_n_kl(n):\n" + "".join(f"    {line}\n" for line in body.splitlines())
             for body, _ in WHILE_IT_RUNS.values()]
    code = ("import sys; sys.path.insert(0, 'assignments'); import grade, rules; "
            "rules.check = lambda *a: None; grade.load_everything(); "
            f"print([grade.grade_text('05_eval.best_of_n_kl', text, 20)[:2] for text in {texts}])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    results = ast.literal_eval(done.stdout.splitlines()[-1])
    for (name, (_, said)), (passed, reason) in zip(WHILE_IT_RUNS.items(), results, strict=True):
        assert not passed and said in reason, (name, reason)
    for path in (ROOT / "tests/new.py", "/tmp/new", "/tmp/new2", "/dev/null2"):
        assert not Path(path).exists()


HONEST = (  # bodies of a function of `05_eval` with the argument x
    "plan, runs = 1, [2]\nranks = plan + runs[0]\nreturn ranks",
    "def _twice(_x):\n    return 2 * _x\nreturn [_twice(_a) for _a in range(3)]",
    "same = torch.eye(3)\nsame.diagonal()[:] = 0\nreturn same",
    "match x:\n    case [a, *b]:\n        return a, b\n    case {'k': v, **rest}:\n"
    "        return v, rest\n    case _:\n        return x",
    "try:\n    return type(0.0)(x)\nexcept OverflowError as error:\n    return str(error)",
    "import bisect, fractions, re, warnings\nwarnings.simplefilter('ignore')\n"
    "return re.compile('a'), bisect.bisect([1], 1), fractions.Fraction(1, 2)",
    "import numpy as np\nfrom math import log\nrng = np.random.default_rng(0)\n"
    "return np.array([log(2)]).mean() + rng.normal()",
    "import torch.nn.functional as F\nfrom torch import nn\nreturn F.logsigmoid(nn.ReLU()(x))",
    "optimizer = torch.optim.Adam(x.parameters())\nfor p in x.parameters():\n    p.grad = None\n"
    "loss = x(torch.ones(1)).sum()\nloss.backward()\noptimizer.step()",
    "from torch.distributions import Normal, kl_divergence\n"
    "return kl_divergence(Normal(x, 1), Normal(0.0, 1.0)), mdp.standardize(x, 0, 1)",
    "if (n := len(x)) > 1:\n    return f'{n:.2f}'\nreturn torch.finfo(x.dtype).eps",
    "import numpy as np\nmost = np.maximum.accumulate(np.asarray(x))\n"
    "return torch.DoubleTensor(most.tolist()), np.random.RandomState(0).rand()",
    "from typing import List\ndef f(a: torch.Tensor) -> List[torch.Tensor]:\n    b: torch.Tensor\n"
    "    b = a if isinstance(a, (torch.Tensor, list)) else torch.Tensor(a)\n    return [b]\n"
    "return torch.func.grad(f)(x), torch.autograd.functional.jacobian(f, x)",
    "@(lambda f: f)\ndef g(a=1, *, b: float = -1.0):\n    return type(a) is int and ord('b')\n"
    "return g()",
    "with torch.set_grad_enabled(True):\n    match x:\n        case float():\n            return 1",
)
REFUSED = (  # the same, of `03_ddpo`: ways over a fence that a reader has tried, and what is said
    ("def unused():\n    from math import pi as models\nreturn models.json", "json of support"),
    ("return [0 for models in models.json]", "json of support"),
    ("(lambda: (models := 1))()\nreturn models.json", "inside a comprehension or lambda"),
    ("def g(m=models):\n    return m.json", "models as a value"),
    ("import math as x\nx = 1", "an import and something else"),
    ("import functools\nfunctools.update_wrapper(x, x)", "update_wrapper"),
    ("T = torch.Tensor\nT.item = None", "the class torch.Tensor"),
    ("self = x\nself.item = None", "it changes self.item"),
    ("from torch import Tensor as T\nT.grad = 1", "the class T"),
    ("x = type(*('Same', (), {}))(1)", "more than type"),
    ("k = int\nreturn type(k)('Same', (list,), {})()", "more than type"),
    ("(eval): int\nreturn eval('1')", "no answer needs that"),
    ("def g(a=lambda eval: 0):\n    return eval('1')", "Python's eval"),
    ("import math\ndef g(a: (math := x)):\n    pass", "something else too"),
    ("import math\ndef g(v):\n    nonlocal math\n    math = v", "something else too"),
    ("def g(math):\n    import math\n    return math", "something else too"),
    ("x.data = x * 0", "it changes x.data"),
    ("x.set_(x * 0)", r"\.set_"),
    ("torch.nn.utils.vector_to_parameters(x, [x])", "vector_to_parameters"),
    ("import numpy as np\nnp.memmap('x')", "memmap"),
    ("x.resize(1, refcheck=False)", r"\.resize"),
    ("from tqdm import tqdm\nstr(tqdm(total=1, bar_format='{n.f_back}'))", "progress bar"),
    ("from tqdm import tqdm\ntqdm(**{'bar_' + 'format': '{n}'})", "progress bar"),
    ("from tqdm import tqdm\nt = tqdm\nt(bar_format='{n}')", "the class tqdm"),
    ("return getattr(*(x, 'gi_frame'), 'shape')", "made while it runs"),
    ("return isinstance([0 for x[0] in [torch.Tensor]], int)", "the class torch.Tensor"),
    ("return isinstance((T := torch.Tensor), T)", "the class torch.Tensor"),
    ("return [y for v in x if (y := v)]", "inside a comprehension"),
    ("return train(Config(reward='mine.py:f'))", "it uses train"),
    ("import numpy as np\nnp.test(tests=['mine.py'])", "test of numpy"),
    ("x.save_lora_weights('x')", "save_lora_weights"),
    ("def f(x, q=lambda eval: 0):\n    return eval('1')\n", "a default value"),
    ("x = 1\n" * 5000, "more than 20000 characters"),
    ("x.scheduler.step = None", "it changes x.scheduler.step"),
    ("torch.pi[0] = 3", "it changes torch.pi"),
    ("return '{0.f_back}'.format(x)", r"\.format"),
    ("return f'{x.gi_frame}'", "gi_frame"),
    ("match x:\n    case Exception(args=a):\n        return a", "class"),
    ("class Same:\n    __eq__ = lambda *a: True\nreturn Same()", "class"),
    ("return type('Same', (), {})()", "more than type"),
    ("t = type\nreturn t('Same', (), {})()", "passes type on"),
    ("import io\nio.FileIO(3, 'w')", "FileIO"),
    ("import typing\ntyping.get_type_hints(x)", "get_type_hints"),
    ("torch.PyTorchFileWriter('x')", "PyTorchFileWriter"),
    ("import numpy as np\nnp.savez_compressed('x')", "savez"),
    ("x.register_forward_hook(x)", "register_forward_hook"),
    ("torch.distributions.register_kl(x, x)", "register_kl"),
    ("return rewards.get_reward('mine.py:r')", "get_reward"),
    ("return models.load_pipeline('x', 'cpu')", "load_pipeline"),
    ("return runs.Path('x').read_text()", "Path"),
    ("return __builtins__['eval']('1')", "__builtins__"),
    ("try:\n    1 / 0\nexcept BaseException:\n    pass", "BaseException"),
)


def function_of(body):
    """A function f(x) with this body, or the one that the body is."""
    if body.startswith("def f("):
        return body
    return "def f(x):\n" + "".join(f"    {line}\n" for line in body.splitlines())


def test_answers_that_only_compute_are_let_through():
    for exercise in EXERCISES:
        text = cut.function_text(source_of(exercise), exercise.name)
        module = rules.importlib.import_module(exercises.split(exercise.function)[0])
        rules.check(text, module, rules.stored(ast.parse(text)))
    for body in HONEST:
        rules.check(function_of(body), rules.importlib.import_module("05_eval"))


@pytest.mark.parametrize("body, said", REFUSED)
def test_what_reaches_for_more_is_refused_before_it_runs(body, said):
    with pytest.raises(rules.Refused, match=said):
        rules.check(function_of(body), rules.importlib.import_module("03_ddpo"))


def test_a_known_mistake_is_named_in_words(tmp_path):
    copy = make.main([str(tmp_path / "homework")])
    hand_in(copy, {
        "1.6": "z = standardize(x_prev, mean, std)\nsigma = std.double().flatten().expand(len(z))\n"
               "safe = torch.where(sigma > 0, sigma, 1)\n"
               "value = -z.square().mean((1, 2, 3)) / 2 - z[0].numel() * safe.log()\n"
               "value = value - z[0].numel() / 2 * math.log(2 * math.pi)\n"
               "return torch.where(sigma > 0, value, 0)",
        "3.2": "r = torch.div(log_prob, old_log_prob)\nlow, high = 1 - clip_range, 1 + clip_range\n"
               "return torch.min(r * advantage, r.clip(low, high) * advantage)",
        "5.8": "import numpy as np\norder = np.argsort(p)\nout = [0.0] * len(p)\n"
               "for i in order:\n    out[i] = min(1.0, len(p) * p[i])\nreturn out"})
    results = graded(copy, "--exercises", "1.6", "3.2", "5.8")
    for number, said in (("1.6", "sum them"), ("3.2", "difference of logs"), ("5.8", "Bonferroni")):
        assert said in results[number]["output"] and results[number]["score"] == 0


# ---- wrong answers --------------------------------------------------------------------------


def test_there_are_many_wrong_answers_and_each_can_be_planted():
    assert len(mutants.MUTANTS) >= 120
    for mutant in mutants.MUTANTS:
        ast.parse(mutant.text())
        assert mutant.words and len(mutant.words) < 200
    assert {mutant.function for mutant in mutants.MUTANTS} >= set(exercises.BY_FUNCTION)


@pytest.mark.slow
def test_wrong_answers_are_noticed():
    """A twelfth, another one each day; with the variable ALL_MUTANTS all, in five minutes."""
    first, step = (0, 1) if "ALL_MUTANTS" in os.environ else (date.today().toordinal() % 12, 12)
    code = ("import sys; sys.path.insert(0, 'assignments'); import mutants; "
            f"print(mutants.survivors(mutants.MUTANTS[{first}::{step}]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=1800)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr[-2000:]
