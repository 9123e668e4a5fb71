"""The house: which file may import which, what an import may do, and how long a chapter is.

experiments -> chapters (01 to 05) -> support -> tiny_sd: imports run one way only.
"""
import ast
import os
import re
import subprocess
import sys
import unicodedata
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(ROOT.glob("0*.py"))
SUPPORT = sorted(ROOT.glob("support/*.py"))
EXPERIMENTS = sorted(ROOT.glob("experiments/*.py"))
GROUND = sorted(ROOT.glob("tiny_sd/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
HOUSE = [*GROUND, *SUPPORT, *CHAPTERS, *EXPERIMENTS]
FLOORS = {"tiny_sd": 0, "support": 1, "experiments": 3, "tests": 4}  # chapters are 2


def read(file):
    return file.read_text(encoding="utf-8")


def name_of(file):
    return str(file.relative_to(ROOT))


def module_of(file):
    """support/flags.py -> support.flags"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def each(files):
    return pytest.mark.parametrize("file", files, ids=name_of)


# ---- imports --------------------------------------------------------------------------------


def imports_of(file):
    """Dotted names of what a file imports, found in its source.

    import x -> x; from x import y -> x.y; import_module("x") -> x. A call of import_module with a
    name that is not written out raises ValueError.
    """
    names = set()
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = resolve_name("." * node.level + base, file.parent.name)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function not in ("import_module", "__import__"):
                continue
            if not isinstance(node.args[0], ast.Constant):
                raise ValueError(f"{file.name}:{node.lineno} imports what is not written out")
            names.add(node.args[0].value)
    return names


def floor_of(name):
    """The floor of a dotted name, 2.01 to 2.05 for chapters; None for what is not of this house."""
    room = name.partition(".")[0]
    if re.match(r"0\d_", room):
        return 2 + int(room[:2]) / 100
    return FLOORS.get(room)


def wrong_imports(file, module):
    """Imported names that `module`, whose source is in file, must not import."""
    own = floor_of(module)
    is_chapter = 2 < own < 3
    wrong = []
    for name in sorted(imports_of(file)):
        floor = floor_of(name)
        if floor is None or floor < own or floor == own and not is_chapter:
            continue
        wrong.append(name)
    return wrong


@each(HOUSE)  # tests may import all
def test_imports_run_downstairs_only(file):
    assert wrong_imports(file, module_of(file)) == []


def test_support_imports_in_no_circle():
    needs = {module_of(file): set() for file in SUPPORT}
    for file in SUPPORT:
        for name in imports_of(file):
            # from support import flags -> support.flags; from support.flags import parse too.
            needs[module_of(file)] |= {".".join(name.split(".")[:2])} & set(needs)
    for _ in SUPPORT:
        free = [module for module in needs if not needs[module] & set(needs)]
        for module in free:
            del needs[module]
    assert needs == {}, "these import each other"


WAYS_UP = {
    "import experiments.sft": "experiments.sft",
    "import experiments.sft as sft": "experiments.sft",
    "from experiments import sft": "experiments.sft",
    "from tests.oracles import closed_form": "tests.oracles.closed_form",
    "def f():\n    from experiments.sft import train": "experiments.sft.train",
    "ddpo = import_module('03_ddpo')": "03_ddpo",
    "ddpo = importlib.import_module('03_ddpo')": "03_ddpo",
    "ddpo = __import__('03_ddpo')": "03_ddpo",
}


@pytest.mark.parametrize("source, name", WAYS_UP.items())
def test_a_way_up_is_found(tmp_path, source, name):
    file = tmp_path / "flags.py"
    file.write_text(source)
    assert wrong_imports(file, "support.flags") == [name]


def test_the_order_of_floors(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import torch, tiny_sd.judge\nfrom support import flags, runs\n"
                    "mdp, dpok = import_module('01_mdp'), import_module('04_dpok')\n"
                    "from experiments import sft\nfrom tests import oracles\n")
    below = ["01_mdp", "04_dpok", "experiments.sft", "support.flags", "support.runs",
             "tests.oracles"]
    assert wrong_imports(file, "tiny_sd.shapes") == below
    assert wrong_imports(file, "support.x") == [n for n in below if "support" not in n]
    assert wrong_imports(file, "03_ddpo") == ["04_dpok", "experiments.sft", "tests.oracles"]
    assert wrong_imports(file, "05_eval") == ["experiments.sft", "tests.oracles"]
    assert wrong_imports(file, "experiments.x") == ["tests.oracles"]
    assert wrong_imports(file, "tests.x") == []
    file.write_text("from . import runs\nfrom .flags import parse\n")
    (tmp_path / "support").mkdir()
    file = file.rename(tmp_path / "support" / "x.py")
    assert imports_of(file) == {"support.runs", "support.flags.parse"}


# In a process of its own. Libraries are imported first: what they do is not this house's doing.
IMPORT_ALL = """
import random, sys
from importlib import import_module
import diffusers, matplotlib, numpy, peft, torch, transformers, tyro

def states():
    name, keys, *rest = numpy.random.get_state()
    return torch.get_rng_state().tolist(), keys.tolist(), rest, random.getstate()

modules, sys.argv = sys.argv[1:], ["x", "--nonsense"]
for module in modules:
    before = states()
    import_module(module)
    assert states() == before, f"importing {module} draws random numbers"
"""


def test_importing_any_file_does_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *map(module_of, HOUSE)],
        cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout + result.stderr == ""
    assert list(tmp_path.iterdir()) == []


# ---- sizes ----------------------------------------------------------------------------------


@each(CHAPTERS)
def test_a_chapter_has_at_most_300_lines_and_30_of_docstring(file):
    source = read(file)
    docstring = ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 300
    assert docstring and len(docstring.splitlines()) <= 30


def test_readme_has_at_most_120_lines():
    assert len(read(ROOT / "README.md").splitlines()) <= 120


@each([*HOUSE, *TESTS])
def test_no_line_is_over_100_characters(file):
    lines = read(file).splitlines()
    assert [k + 1 for k, line in enumerate(lines) if len(line) > 100] == []


@each(CHAPTERS)
def test_no_function_is_over_40_lines_but_train_which_may_have_60(file):
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.FunctionDef):
            limit = 60 if node.name == "train" else 40
            length = node.end_lineno - node.lineno + 1
            assert length <= limit, f"{node.name} has {length} lines"


# ---- equations ------------------------------------------------------------------------------


def is_equation(line):
    """Whether a docstring's first line has " = " and a sign of mathematics.

    Such signs are Greek letters, what Unicode calls a symbol of mathematics (− √ ∇ ∂ ≈ ‖ and so
    on, but for ASCII's + < = > | ~) and · ½ ².
    """
    if " = " not in line:
        return False
    for sign in line:
        symbol = ord(sign) > 127 and unicodedata.category(sign) == "Sm"
        if symbol or "GREEK" in unicodedata.name(sign, "") or sign in "‖·½²":
            return True
    return False


def equations_of(files):
    """{"03_ddpo.advantages": first line of its docstring}, for functions that hold an equation."""
    equations = {}
    for file in files:
        for node in ast.parse(read(file)).body:
            if isinstance(node, ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if is_equation(first):
                    equations[f"{module_of(file)}.{node.name}"] = first
    return equations


def marked_functions():
    """Functions named by @pytest.mark.equation(label, function), found in the tests' source."""
    functions = set()
    for file in TESTS:
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "equation":
                label, function = node.args
                functions.add(function.value)
    return functions


@pytest.mark.parametrize("line, expected", [
    ("r = −kB: smooth, plain pictures pay.", True),
    ("J = E[ Σ_t log p · A ]   (DDPO_SF).", True),
    ("z = (x − μ)/σ, and 0 where σ = 0.", True),
    ("c = text_encoder(prompt).  B strings -> (B, L, D)", False),
    ("The mean ± spread of σ over rounds.", False),
])
def test_what_counts_as_an_equation(line, expected):
    assert is_equation(line) == expected


def test_every_equation_has_a_test_of_its_own():
    missing = set(equations_of([*CHAPTERS, *SUPPORT])) - marked_functions()
    assert sorted(missing) == []


def test_every_equation_marker_names_a_function_that_is_there():
    functions = set()
    for file in HOUSE:
        for node in ast.parse(read(file)).body:
            functions.add(f"{module_of(file)}.{getattr(node, 'name', None)}")
    assert sorted(marked_functions() - functions) == []


def test_the_table_of_equations_is_printed_and_nothing_runs():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--equations",
               "tests/support/test_ballot.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "no tests ran" in result.stdout
    row = r"\| preference rate \| `support.ballot.read_votes` \| rate = .* \| test_rates_by_hand \|"
    assert re.search(row, result.stdout)


# ---- what is in the repository --------------------------------------------------------------


def repository_files():
    """Files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git repository")
    files = [ROOT / name for name in result.stdout.split("\0")]
    return [file for file in files if file.is_file()]


def test_no_file_holds_a_path_of_somebodys_machine():
    machine_path = re.compile(r"/home/|/root/|/work/|/Users/|C:\\\\|C:\\Users")
    found = []
    for file in repository_files():
        try:
            text = read(file)
        except UnicodeDecodeError:
            continue  # a picture, or weights
        if file != Path(__file__).resolve() and machine_path.search(text):
            found.append(name_of(file))
    assert found == []


def test_weights_are_safetensors_only():
    endings = (".pkl", ".pt", ".pth", ".bin", ".ckpt")  # loading these may run code
    assert [name_of(file) for file in repository_files() if file.suffix in endings] == []


def test_tiny_sd_is_under_15_megabytes():
    sizes = [file.stat().st_size for file in repository_files()
             if file.is_relative_to(ROOT / "tiny_sd")]
    assert sum(sizes) < 15e6
