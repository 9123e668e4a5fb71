"""The house: which file may import which, what an import may do, and how dense a chapter is.

experiments, assignments -> chapters (01 to 05) -> support -> tiny_sd: imports run one way only.
"""
import ast
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"}


def files_of_the_repository():
    """What git tracks, or would; in a copy without git, what is no environment, run or cache."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = [ROOT / name for name in done.stdout.split("\0")]
    else:
        found = [path for path in ROOT.rglob("*")
                 if not NOT_OURS & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in found if path.is_file())


FILES = files_of_the_repository()
PYTHON = [file for file in FILES if file.suffix == ".py"]
CHAPTERS = [file for file in PYTHON if file.parent == ROOT and file.name[0] == "0"]
FLOORS = {"tiny_sd": 0, "support": 1, "experiments": 3, "assignments": 3, "tests": 4}
FLOORS |= {file.stem: 2 + int(file.stem[:2]) / 100 for file in CHAPTERS}  # 2.01 to 2.05


def module_of(file):
    """support/flags.py -> support.flags"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_of(file): file.read_text(encoding="utf-8") for file in PYTHON}
HOUSE = [name for name in SOURCES if FLOORS.get(name.partition(".")[0], 4) < 4]


def imports_of(source):
    """import x -> x; from x import y -> x.y; import_module("x") -> x."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    return names


def wrong_imports(module, source):
    """What a module imports from above it."""
    own = FLOORS[module.partition(".")[0]]
    return [name for name in imports_of(source) if FLOORS.get(name.partition(".")[0], 0) > own]


@pytest.mark.parametrize("module", HOUSE)
def test_imports_run_downstairs_only(module):
    assert wrong_imports(module, SOURCES[module]) == []


def test_figures_alone_import_matplotlib():
    """support/figures.py makes what a shell or notebook has set for it not matter."""
    for module in HOUSE:
        found = any(name.startswith("matplotlib") for name in imports_of(SOURCES[module]))
        assert found == (module == "support.figures"), module


def test_importing_any_file_does_nothing(tmp_path):
    """In a process of its own: it reads no flags, prints nothing and draws no random numbers."""
    code = ("import torch, sys, diffusers, peft, transformers\nfrom importlib import import_module"
            "\nsys.argv, before = ['x', '--nonsense'], torch.get_rng_state().tolist()\n"
            f"for name in {HOUSE}:\n    import_module(name)\n"
            "assert torch.get_rng_state().tolist() == before")
    quiet = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
             "MPLBACKEND": "nonsense"}  # as a notebook hands on what is not here
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path,
                            env=os.environ | quiet, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.name)
def test_a_chapter_is_thin(file):
    """At most 9.5 tokens a line of code, few wide lines, at most 320 lines."""
    source = SOURCES[module_of(file)]
    lines, count = source.splitlines(), Counter()
    with open(file, "rb") as stream:
        for token in tokenize.tokenize(stream.readline):
            prose = token.type in (tokenize.COMMENT, tokenize.ENCODING)
            if token.string.strip() and not prose and not token.line.lstrip().startswith('"""'):
                count[token.start[0]] += 1
    wide = [number for number in count if len(lines[number - 1]) >= 90]
    assert sum(count.values()) / len(count) < 9.55
    assert len(wide) <= 0.04 * len(count)
    assert len(lines) <= 320
    assert len(ast.get_docstring(ast.parse(source)).splitlines()) <= 36


@pytest.mark.parametrize("module", SOURCES)
def test_no_line_is_wider_than_100(module):
    wide = [line for line in SOURCES[module].splitlines() if len(line) > 100]
    assert wide == []


def test_every_equation_has_a_test_of_its_own_and_every_marker_a_function():
    """An equation is a docstring's first line with " = " and a sign that is not ASCII: σ, −, ½."""
    functions, equations, marked = set(), set(), set()
    for module in HOUSE:
        for node in ast.parse(SOURCES[module]).body:
            name = f"{module}.{getattr(node, 'name', None)}"
            functions |= {name} | {f"{name}.{method.name}" for method in getattr(node, "body", [])
                                   if isinstance(method, ast.FunctionDef)}
            if isinstance(node, ast.FunctionDef) and not module.startswith("experiments"):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if " = " in first and not first.isascii():
                    equations.add(name)
    for module in set(SOURCES) - set(HOUSE):
        for node in ast.walk(ast.parse(SOURCES[module])):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "equation":
                marked.add(node.args[1].value)
    assert len(equations) > 20
    assert equations - marked == set(), "equations without a test"
    assert marked - functions == set(), "markers of no function"


@pytest.mark.slow
def test_the_table_of_equations_is_printed_and_nothing_runs():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--equations",
               "tests/equations/test_04_dpok.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "no tests ran" in result.stdout
    assert re.search(r"\| `04_dpok.path_kl` \| KL_t = .* \| test_\w+ \|", result.stdout)
    assert re.search(r"\| `04_dpok.Value.fit` \| .+ \| test_\w+, test_", result.stdout)


def test_no_paths_of_a_machine_no_pickles_and_a_small_model():
    machine_path = re.compile(rb"/home/|/root/|/work/|/Users/|C:\\\\|C:\\Users")
    for file in FILES:
        if file.suffix not in (".png", ".safetensors") and file != Path(__file__).resolve():
            assert not machine_path.search(file.read_bytes()), file
        # Loading these may run code.
        assert file.suffix not in (".pkl", ".pt", ".pth", ".bin", ".ckpt"), file
    model = [file.stat().st_size for file in FILES if file.is_relative_to(ROOT / "tiny_sd")]
    assert sum(model) < 15e6
