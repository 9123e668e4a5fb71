"""The house: which file may import which, what an import may do, and how long a chapter is.

experiments -> chapters (01 to 05) -> support -> tiny_sd: imports run one way only.
"""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(ROOT.glob("0*.py"))
SUPPORT = sorted(ROOT.glob("support/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
HOUSE = [*sorted(ROOT.glob("tiny_sd/*.py")), *SUPPORT, *CHAPTERS,
         *sorted(ROOT.glob("experiments/*.py"))]
KIT = sorted(ROOT.glob("assignments/*.py"))  # the top floor: nothing imports it
FLOORS = {"tiny_sd": 0, "support": 1, "experiments": 3, "tests": 4}
FLOORS |= {file.stem: 2 + int(file.stem[:2]) / 100 for file in CHAPTERS}  # 2.01 to 2.05


def read(file):
    return file.read_text(encoding="utf-8")


def module_of(file):
    """support/flags.py -> support.flags"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source):
    """import x -> x; from x import y -> x.y; import_module("x") -> x. Others raise ValueError."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__"):
                if not isinstance(node.args[0], ast.Constant):
                    raise ValueError(f"line {node.lineno} imports what is not written out")
                names.add(node.args[0].value)
    return names


def floor_of(name):
    """The floor of a dotted name; None for what is not of this house."""
    return FLOORS.get(name.partition(".")[0])


def wrong_imports(module, source):
    """What a module imports from above it."""
    floors = {name: floor_of(name) for name in sorted(imports_of(source))}
    return [name for name, floor in floors.items() if floor and floor > floor_of(module)]


def test_imports_run_downstairs_only():
    for file in HOUSE:
        assert wrong_imports(module_of(file), read(file)) == [], file
    source = "import tiny_sd.judge\ndef f():\n    import_module('02_rewards')\n"
    for other in ("import tests.z", "from experiments import x", "import_module('04_dpok')"):
        assert wrong_imports("03_ddpo", source + other) != [] == wrong_imports("03_ddpo", source)


def test_support_imports_in_no_circle():
    needs = {module_of(file): set() for file in SUPPORT}
    for file in SUPPORT:
        for name in imports_of(read(file)):  # support.flags.parse -> support.flags
            needs[module_of(file)] |= {".".join(name.split(".")[:2])} & set(needs)
    for _ in SUPPORT:
        needs = {module: its for module, its in needs.items() if its & set(needs)}
    assert needs == {}, "these import each other"


def test_importing_any_file_does_nothing(tmp_path):
    """In a process of its own: it reads no flags, prints nothing and draws no random numbers."""
    modules = [module_of(file) for file in HOUSE]
    code = ("import torch, sys, diffusers, peft, transformers\nfrom importlib import import_module"
            "\nsys.argv, before = ['x', '--nonsense'], torch.get_rng_state().tolist()\n"
            f"for name in {modules}:\n    import_module(name)\n"
            "assert torch.get_rng_state().tolist() == before")
    quiet = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path,
                            env=os.environ | quiet, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_chapters_and_readme_can_be_read_in_one_sitting():
    for file in CHAPTERS:
        source = read(file)
        docstring = ast.get_docstring(ast.parse(source))
        assert len(source.splitlines()) <= 300 and 0 < len(docstring.splitlines()) <= 30, file
    assert len(read(ROOT / "README.md").splitlines()) <= 120
    for file in (*HOUSE, *TESTS, *KIT):
        assert max(map(len, [*read(file).splitlines(), ""])) <= 100, file


def test_every_equation_has_a_test_of_its_own_and_every_marker_a_function():
    """An equation is a docstring's first line with " = " and a sign that is not ASCII: σ, −, ½."""
    functions, equations, marked = set(), set(), set()
    for file in HOUSE:
        for node in ast.parse(read(file)).body:
            name = f"{module_of(file)}.{getattr(node, 'name', None)}"
            functions |= {name} | {f"{name}.{method.name}" for method in getattr(node, "body", [])
                                   if isinstance(method, ast.FunctionDef)}
            if isinstance(node, ast.FunctionDef) and file in (*CHAPTERS, *SUPPORT):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if " = " in first and not first.isascii():
                    equations.add(name)
    for file in TESTS:
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "equation":
                marked.add(node.args[1].value)
    assert len(equations) > 20 and equations - marked == set()
    assert marked - functions == set()


def test_the_table_of_equations_is_printed_and_nothing_runs():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--equations",
               "tests/support/test_ballot.py", "tests/equations/test_04_dpok.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "no tests ran" in result.stdout
    assert re.search(r"\| `support.ballot.read_votes` \| rate = .* \| test_\w+ \|", result.stdout)
    assert re.search(r"\| `04_dpok.Value.fit` \| .+ \| test_\w+, test_", result.stdout)


def test_no_paths_of_a_machine_no_pickles_and_a_small_model():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in result.stdout.split("\0") if (ROOT / name).is_file()]
    machine_path = re.compile(rb"/home/|/root/|/work/|/Users/|C:\\\\|C:\\Users")
    text = [file for file in files if file.suffix not in (".png", ".safetensors")]
    assert [file for file in text if file != Path(__file__).resolve()
            and machine_path.search(file.read_bytes())] == []
    pickles = (".pkl", ".pt", ".pth", ".bin", ".ckpt")  # loading these may run code
    assert [file for file in files if file.suffix in pickles] == []
    model = [file.stat().st_size for file in files if file.is_relative_to(ROOT / "tiny_sd")]
    assert sum(model) < 15e6
