"""What an answer may do: compute. Everything else is refused before it runs, with the reason.

An answer is one function of a few lines of mathematics. It needs no files, processes or private
names, and changes nothing that belongs to others. Its text is read with what each name stands for
at that place, and all that is used must be on a list: Python's functions, the members of a module,
the attributes of numbers, texts, tensors, and those that the chapters use themselves. What a reader
of the text could still miss is caught while it runs (grade.py).
"""
import ast
import builtins
import importlib
import io
import types
from collections import Counter, deque
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BUILTINS = set(  # of Python's own functions these, and all exceptions that end no process
    "abs all any bool dict divmod enumerate filter float frozenset getattr hasattr int isinstance "
    "iter len list map max min next pow print range reversed round set slice sorted str sum tuple "
    "type zip".split())
LIBRARIES = set(  # modules that an answer may use
    "bisect cmath collections contextlib copy fractions functools heapq io itertools math numpy "
    "numpy.linalg numpy.random operator random re statistics torch torch.autograd "
    "torch.distributions torch.linalg torch.nn torch.nn.functional torch.nn.utils torch.optim "
    "torch.special tqdm typing warnings".split())
MEMBERS = {module: set(names.split()) for module, names in {  # of these modules no more than this
    "collections": "ChainMap Counter OrderedDict defaultdict deque",
    "contextlib": "ExitStack contextmanager nullcontext suppress",
    "copy": "copy deepcopy",
    "fractions": "Fraction",
    "functools": "cache lru_cache partial reduce",
    "io": "BytesIO StringIO",
    "operator": "add and_ eq floordiv ge gt itemgetter le lt matmul mod mul ne neg or_ pow sub "
                "truediv",
    "re": "compile escape findall finditer fullmatch match search split sub",
    "statistics": "fmean mean median pstdev pvariance stdev variance",
    "torch.autograd": "backward enable_grad grad no_grad",
    "tqdm": "tqdm trange",
    "typing": "Any Callable Iterable Optional Sequence",
    "warnings": "catch_warnings filterwarnings simplefilter warn"}.items()}
CLASSES = {  # of these modules no other classes
    "torch": (torch.Tensor, torch.Size, torch.Generator, torch.dtype, torch.device, torch.no_grad,
              torch.enable_grad, torch.inference_mode, torch.autocast, torch.finfo, torch.iinfo),
    "numpy": (np.generic, np.ndarray, np.dtype, np.errstate, np.finfo, np.iinfo, np.vectorize)}
OURS = ("support.", "experiments.", "tiny_sd.", "01_", "02_", "03_", "04_", "05_")
FORBIDDEN = set(  # what reaches files, other code, or the settings of all
    "ctypes compile dump dumps format format_map from_file fromfile fromregex genfromtxt "
    "get_reward load load_module loads loadtxt main memmap reward_from_file savetxt savez "
    "savez_compressed setflags share_memory share_memory_ storage tofile typed_storage "
    "untyped_storage".split())
PREFIXES = ("_", "import_", "load_", "parse_", "register_", "set_")  # of no module's members
KINDS = (torch.Tensor, torch.Generator, torch.nn.Module, torch.optim.AdamW, torch.finfo,
         torch.distributions.Normal, torch.distributions.Categorical, np.ndarray, np.finfo,
         np.random.Generator, Image.Image, io.BytesIO, Counter, deque, bytes, complex, dict, float,
         int, list, set, slice, str, tuple, BaseException)
HOMES = set(  # a name of ours that was imported from here is no part of an answer
    "_pytest concurrent importlib inspect multiprocessing os pathlib posix pytest safetensors "
    "shutil socket subprocess sys tempfile threading types unittest urllib".split())
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOCAL = object()  # stands for a value that is only known when the answer runs


class Refused(Exception):
    """An answer does what an answer may not do; its text says what, for the student."""


def check(text, module, stores=()):
    """Refused, unless the function in this text only computes.

    module: where it will stand. stores: attributes of its arguments that it is there to set.
    """
    body = ast.parse(text).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise Refused("it is more than one function")
    function = body[0]
    for default in [*function.args.defaults, *function.args.kw_defaults]:
        if default and any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(default)):
            raise Refused("a default value of it is worked out when it is defined")
    Reader(module, set(stores)).visit(function)


def stored(function):
    """"pipe.unet" and other attributes that a function's tree sets."""
    return {ast.unparse(node) for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


@cache
def attributes(file):
    """Names that may follow a dot: of the kinds of value above, and used in a chapter or here."""
    names = {name for kind in KINDS for name in dir(kind)} | set(vars(DDIMScheduler()))
    for path in {*ROOT.glob("0*.py"), Path(file)}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names.add(getattr(node.args[1], "value", ""))
    public = {name for name in names if not name.startswith(("_", "register_"))}
    return public - FORBIDDEN | {"__getitem__"}


def imported(node):
    """(name, value) of all that an import binds."""
    for alias in node.names:
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module not in LIBRARIES:
                raise Refused(f"it imports from {node.module}; an answer needs no more than "
                              "mathematics")
            yield alias.asname or alias.name, member(importlib.import_module(node.module),
                                                     alias.name)
        elif alias.name not in LIBRARIES:
            raise Refused(f"it imports {alias.name}; an answer needs no more than mathematics")
        else:
            name = alias.asname or alias.name.partition(".")[0]
            yield name, importlib.import_module(alias.name if alias.asname else name)


def member(module, name, used=()):
    """The value of module.name; Refused where no answer needs it.  used: by the file itself."""
    home, value = module.__name__, getattr(module, name, LOCAL)
    refused = Refused(f"it uses {name} of {home}, which no answer needs")
    if home not in LIBRARIES and not home.startswith(OURS):
        raise Refused(f"it uses the module {home}; no answer needs that")
    if home in MEMBERS:
        allowed = name in MEMBERS[home]
    else:
        allowed = name not in FORBIDDEN and name != "save" and not name.startswith(PREFIXES)
    if not allowed:
        raise refused
    if home in CLASSES and isinstance(value, type) and not issubclass(value, CLASSES[home]):
        raise refused
    if home.startswith(OURS) and not home[0].isdigit() and name not in used:
        raise refused
    return value


class Reader(ast.NodeVisitor):
    """Reads an answer from the outside in, and knows what each name stands for where it is used."""

    def __init__(self, module, stores):
        self.names, self.stores = dict(vars(module)), stores
        self.attributes = attributes(module.__file__)
        self.called, self.inline = set(), 0

    # ---- scopes -----------------------------------------------------------------------------

    def bindings(self, body):
        """What the names stand for that these statements bind: never a global's value."""
        bound, todo = {}, list(body)
        while todo:
            node = todo.pop()
            found = []
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found = list(imported(node))
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                found = [(node.id, LOCAL)]
            elif isinstance(node, (ast.FunctionDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
                found = [(node.name, LOCAL)]
            elif isinstance(node, ast.MatchMapping):
                found = [(node.rest, LOCAL)]
            for name, value in found:
                if bound.setdefault(name, value) is not value:
                    raise Refused(f"its {name} is an import and something else too")
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):  # has a scope of its own
                todo += [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            elif not isinstance(node, COMPREHENSIONS):
                todo += ast.iter_child_nodes(node)
        return bound

    def visit_in_scope(self, bound, nodes):
        self.names, outer = self.names | bound, self.names
        for node in nodes:
            self.visit(node)
        self.names = outer

    def visit_FunctionDef(self, node):
        self.visit_function(node, node.body)

    def visit_Lambda(self, node):
        self.inline += 1
        self.visit_function(node, [node.body])
        self.inline -= 1

    def visit_function(self, node, body):
        for outside in [*getattr(node, "decorator_list", []), node.args,
                        getattr(node, "returns", None)]:
            if outside:
                self.visit(outside)  # defaults and annotations belong to the scope around it
        arguments = [arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
        self.visit_in_scope(self.bindings(body) | dict.fromkeys(arguments, LOCAL), body)

    def visit_comprehension_of(self, node):
        first, *others = node.generators
        self.visit(first.iter)
        values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        inside = [*values, first.target, *first.ifs, *others]
        self.inline += 1
        self.visit_in_scope(self.bindings([part.target for part in node.generators]), inside)
        self.inline -= 1

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_of

    def visit_NamedExpr(self, node):
        if self.inline:  # it binds a name of another scope
            raise Refused("it assigns inside a comprehension or lambda; write a loop instead")
        self.generic_visit(node)

    # ---- what is used -----------------------------------------------------------------------

    def visit_Name(self, node):
        if isinstance(self.value_of(node), types.ModuleType):
            raise Refused(f"it uses the module {node.id} as a value")

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            if isinstance(self.value_of(node), types.ModuleType):
                raise Refused(f"it uses the module {ast.unparse(node)} as a value")
        else:
            settable = node.attr in ("grad", "requires_grad", "data") or ast.unparse(
                node) in self.stores
            if not settable and ast.unparse(node.value) != "self":
                raise Refused(f"it changes {ast.unparse(node)}; an answer changes its own "
                              "variables only")
            self.refuse_attribute(node.attr)
            self.visit(node.value)

    def visit_Subscript(self, node):
        if not isinstance(node.ctx, ast.Load):
            base = node
            while not isinstance(base, ast.Name):
                base = getattr(base, "value", getattr(base, "func", None))
                if base is None:
                    raise Refused(f"it changes {ast.unparse(node)}")
            if self.value_of(base) is not LOCAL:
                raise Refused(f"it changes {ast.unparse(node)}; an answer changes its own "
                              "variables only")
        self.generic_visit(node)

    def visit_Call(self, node):
        name = getattr(node.func, "id", "")
        self.called.add(id(node.func))
        if self.is_builtin(name) and name in ("getattr", "hasattr"):
            if len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
                raise Refused(f"its {name} has a name that is made while it runs")
            self.refuse_attribute(str(node.args[1].value))
        if self.is_builtin(name) and name == "type" and len(node.args) + len(node.keywords) != 1:
            raise Refused("it makes a class; no answer needs that")
        self.generic_visit(node)

    def refuse_node(self, node):
        raise Refused("it defines a class, reaches for what is global, or waits for something; no "
                      "answer needs that")

    visit_ClassDef = visit_Global = visit_MatchClass = visit_TypeAlias = refuse_node
    visit_AsyncFunctionDef = visit_AsyncFor = visit_AsyncWith = visit_Await = refuse_node

    def is_builtin(self, name):
        return name not in self.names and hasattr(builtins, name)

    def value_of(self, node):
        """What a name, or names with dots, stands for; LOCAL where only running it would tell."""
        if isinstance(node, ast.Name):
            value = self.value_of_name(node)
        elif isinstance(node, ast.Attribute):
            base = self.value_of(node.value)
            if not isinstance(base, types.ModuleType):
                self.refuse_attribute(node.attr)
                return LOCAL
            value = member(base, node.attr, self.attributes)
        else:
            self.visit(node)
            return LOCAL
        home = getattr(value, "__module__", None) or ""
        if str(home).partition(".")[0] in HOMES:
            raise Refused(f"it uses {ast.unparse(node)}, which no answer needs")
        return value

    def value_of_name(self, node):
        name = node.id
        if not isinstance(node.ctx, ast.Load):
            return LOCAL
        if self.is_builtin(name):
            value = getattr(builtins, name)
            harmless = isinstance(value, type) and issubclass(value, Exception)
            if name not in BUILTINS and not harmless:
                raise Refused(f"it uses Python's {name}, which no answer needs")
            if name in ("getattr", "hasattr", "type") and id(node) not in self.called:
                raise Refused(f"it passes {name} on, which no answer needs")
            return LOCAL
        if name not in self.names:
            raise Refused(f"it uses {name}, which is neither in the function nor in the chapter: "
                          "only the function itself is graded, so put all it needs inside")
        value = self.names[name]
        if value is not LOCAL and (name.startswith("__") or name in FORBIDDEN):
            raise Refused(f"it uses {name}, which no answer needs")
        return value

    def refuse_attribute(self, name):
        if name not in self.attributes:
            raise Refused(f"it uses .{name}, which no answer needs")
