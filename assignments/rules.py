"""What an answer may do: compute. Everything else is refused before it runs, with the reason.

An answer is one function of a few lines of mathematics. It has no need of files, of processes, of
private names, or of changing what belongs to others: so all of that is refused by looking at its
text. What a reader of the text could miss is caught while it runs (grade.py).
"""
import ast
import builtins
import importlib
import types

BUILTINS = set(  # of Python's own functions these
    "abs all any bool dict divmod enumerate filter float frozenset getattr hasattr int isinstance "
    "iter len list map max min next pow print range reversed round set slice sorted str sum tuple "
    "zip ArithmeticError AssertionError Exception IndexError KeyError NotImplementedError "
    "RuntimeError StopIteration TypeError ValueError ZeroDivisionError".split())
LIBRARIES = set(  # modules that an answer may use
    "math cmath collections contextlib copy functools io itertools numpy numpy.linalg numpy.random "
    "operator random re statistics torch torch.autograd torch.distributions torch.linalg torch.nn "
    "torch.nn.functional torch.nn.utils torch.optim torch.special tqdm".split())
OURS = ("support.", "experiments.", "tiny_sd.", "01_", "02_", "03_", "04_", "05_")
FORBIDDEN = set(  # names that reach files, other code, or a frame behind the function
    "attrgetter compile cr_frame ag_frame eval exec f_back f_builtins f_code f_globals f_locals "
    "fromfile from_file genfromtxt gi_code gi_frame globals import_module load loads loadtxt "
    "locals memmap methodcaller open savetxt savez set_default_dtype set_default_device "
    "set_grad_enabled tb_frame tofile vars".split())


class Refused(Exception):
    """An answer does what an answer may not do; its text says what, for the student."""


def check(text, module):
    """Refused, unless the function in this text only computes; module: where it will stand."""
    body = ast.parse(text).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise Refused("it is more than one function")
    function = body[0]
    for default in [*function.args.defaults, *function.args.kw_defaults]:
        if default and any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(default)):
            raise Refused("a default value of it is worked out when it is defined")
    called = {id(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    for node in ast.walk(function):
        if getattr(node, "id", "") in ("getattr", "hasattr") and id(node) not in called:
            raise Refused("it passes getattr on, which no answer needs")
    known = dict(vars(module))  # what names stand for: the module's own, and what is imported
    local = set()
    for node in ast.walk(function):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= imported(node)
        elif isinstance(node, ast.arg):
            local.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            local.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name:
            local.add(node.name)
    for node in ast.walk(function):
        refuse_names(node, known, local)
        refuse_stores(node, known, local)
    refuse_modules(function, known, local)


def imported(node):
    """The names that an import binds, and what they stand for."""
    names = {}
    for alias in node.names:
        if alias.name in FORBIDDEN or alias.name == "save" or alias.name.startswith("_"):
            raise Refused(f"it imports {alias.name}, which no answer needs")
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module not in LIBRARIES:
                raise Refused(f"it imports from {node.module}; an answer needs no more than "
                              "mathematics")
            value = getattr(importlib.import_module(node.module), alias.name, None)
        else:
            if alias.name not in LIBRARIES:
                raise Refused(f"it imports {alias.name}; an answer needs no more than mathematics")
            value = importlib.import_module(alias.name if alias.asname
                                            else alias.name.partition(".")[0])
        names[alias.asname or alias.name.partition(".")[0]] = value
    return names


def refuse_names(node, known, local):
    name = None
    if isinstance(node, ast.Attribute):
        name = node.attr
    elif isinstance(node, (ast.FunctionDef, ast.arg)):
        name = getattr(node, "name", None) or getattr(node, "arg", None)
    elif isinstance(node, ast.Name):
        name = node.id
        if name not in known and hasattr(builtins, name):
            if name not in BUILTINS:  # also where something local has that name
                raise Refused(f"it uses Python's {name}, which no answer needs")
        elif name not in known and name not in local:
            raise Refused(f"it uses {name}, which is neither in the function nor in the chapter: "
                          "only the function itself is graded, so put all it needs inside")
    elif isinstance(node, (ast.ClassDef, ast.Global, ast.AsyncFunctionDef, ast.Await)):
        raise Refused("it defines a class, or reaches for what is global; no answer needs that")
    elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        if len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
            raise Refused("its getattr has a name that is made while it runs")
        name = str(node.args[1].value)
    private = name and name.startswith("_") and name.strip("_") and name != "__getitem__"
    if private or name in FORBIDDEN:
        raise Refused(f"it uses {name}, which no answer needs")


def refuse_stores(node, known, local):
    """Only what is local may be changed: not torch, not pytest, not the chapter."""
    if not isinstance(node, (ast.Attribute, ast.Subscript)) or isinstance(node.ctx, ast.Load):
        return
    base = node
    while isinstance(base, (ast.Attribute, ast.Subscript)):
        base = base.value
    if not isinstance(base, ast.Name) or base.id not in local or base.id in known:
        raise Refused(f"it changes {ast.unparse(node)}; an answer changes its own variables only")


def refuse_modules(function, known, local):
    """A module is for its functions: it is never a value, and few of them may be used."""
    inner = {id(node.value) for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    for node in ast.walk(function):
        if not isinstance(node, (ast.Name, ast.Attribute)) or id(node) in inner:
            continue
        words = ast.unparse(node).split(".")
        if not all(word.isidentifier() for word in words) or words[0] not in known:
            continue
        value = known[words[0]]
        for word in words[1:]:
            if not isinstance(value, types.ModuleType):
                break
            if not is_allowed(value):
                raise Refused(f"it uses the module {value.__name__}; no answer needs that")
            value = getattr(value, word, None)
        if words[-1] == "save":  # of torch and numpy; a picture's save goes into memory
            raise Refused(f"it uses {ast.unparse(node)}, which no answer needs")
        if isinstance(value, types.ModuleType):
            raise Refused(f"it uses the module {value.__name__} as a value")
        home = getattr(value, "__module__", None) or ""
        if home.partition(".")[0] in ("os", "posix", "subprocess", "pathlib", "shutil", "sys",
                                      "pytest", "_pytest", "unittest", "socket", "importlib"):
            raise Refused(f"it uses {ast.unparse(node)}, which no answer needs")


def is_allowed(module):
    return module.__name__ in LIBRARIES or module.__name__.startswith(OURS)
