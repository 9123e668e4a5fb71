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
from tqdm import tqdm, trange

import cut
from exercises import EXERCISES

ROOT = Path(__file__).resolve().parents[1]
BUILTINS = set(  # of Python's own functions these, and all exceptions that end no process
    "abs all any bool callable chr complex dict divmod enumerate filter float format frozenset "
    "getattr hasattr hash int isinstance iter len list map max min next ord pow print range repr "
    "reversed round set slice sorted str sum tuple type zip".split())
LIBRARIES = set(  # modules that an answer may use
    "bisect cmath collections contextlib copy fractions functools heapq io itertools math numpy "
    "numpy.linalg numpy.random operator random re statistics torch torch.autograd "
    "torch.autograd.functional torch.distributions torch.func torch.linalg torch.nn "
    "torch.nn.functional torch.nn.utils torch.optim torch.special tqdm typing warnings".split())
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
    "torch.autograd": "backward enable_grad functional grad no_grad",
    "tqdm": "tqdm trange",
    "typing": "Any Callable Dict Iterable List Optional Sequence Tuple Union",
    "warnings": "catch_warnings filterwarnings simplefilter warn"}.items()}
CLASSES = {  # of these modules no other classes
    "torch": (torch.Tensor, torch.Size, torch.Generator, torch.dtype, torch.device, torch.no_grad,
              torch.enable_grad, torch.inference_mode, torch.autocast, torch.finfo, torch.iinfo,
              torch.set_grad_enabled, torch.FloatTensor, torch.DoubleTensor, torch.LongTensor,
              torch.BoolTensor),
    "numpy": (np.generic, np.ndarray, np.dtype, np.errstate, np.finfo, np.iinfo, np.vectorize)}
OURS = ("support.", "experiments.", "tiny_sd.", "01_", "02_", "03_", "04_", "05_")
FORBIDDEN = set(  # what reaches files, other code, or the settings of all
    "ctypes compile dump dumps format format_map from_file from_pretrained fromfile fromregex "
    "genfromtxt load loads loadtxt memmap push_to_hub resize resize_ resize_as_ savetxt savez "
    "savez_compressed set_ setflags share_memory share_memory_ storage test tofile typed_storage "
    "untyped_storage vector_to_parameters".split())
PREFIXES = ("_", "import_", "load_", "parse_", "register_", "save_", "set_")  # of no module's names
KINDS = (torch.Tensor, torch.Generator, torch.nn.Module, torch.optim.AdamW, torch.finfo,
         torch.distributions.Normal, torch.distributions.Categorical, np.ndarray, np.finfo,
         np.random.Generator, np.random.RandomState, np.ufunc, Image.Image, io.BytesIO, Counter,
         deque, bytes, complex, dict, float, int, list, set, slice, str, tuple, BaseException)
LONGEST = 20_000  # characters of an answer; the longest of ours has 2,069
PLAIN = (types.ModuleType, bool, int, float, str, tuple)  # what any name of ours may stand for
BAR_FLAGS = {"delay", "desc", "leave", "total", "unit"}  # tqdm's others can do more than show a bar
LITERAL = (ast.Constant, ast.UnaryOp, ast.unaryop, ast.Tuple, ast.expr_context)
NAMING = (ast.Name, ast.Attribute, ast.Tuple, ast.List, ast.Subscript, ast.Constant, ast.BinOp,
          ast.BitOr, ast.expr_context)  # what an annotation consists of
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LOCAL = object()  # stands for a value that is only known when the answer runs


class Refused(Exception):
    """An answer does what an answer may not do; its text says what, for the student."""


def check(text, module, stores=()):
    """Refused, unless the function in this text only computes.

    module: where it will stand. stores: attributes of its arguments that it is there to set.
    """
    if len(text) > LONGEST:
        raise Refused(f"it has more than {LONGEST} characters")
    body = cut.parse(text).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise Refused("it is more than one function")
    function = body[0]
    for default in [*function.args.defaults, *filter(None, function.args.kw_defaults)]:
        if not all(isinstance(part, LITERAL) for part in ast.walk(default)):
            raise Refused("a default value of it is worked out when it is defined")
    refuse_two_meanings(function)
    arguments = {arg.arg for arg in arguments_of(function)}
    again = {name for node in ast.walk(function) for name in bound_by(node)}
    Reader(module, {store for store in stores
                    if store.partition(".")[0] in arguments - again}).visit(function)


def arguments_of(function):
    """The arguments of a function or lambda itself, not those of a lambda in its defaults."""
    args = function.args
    found = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg for arg in found if arg]


def bound_by(node):
    """The names that this node itself binds, but for arguments and imports."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, ast.MatchMapping):
        return [node.rest]
    if isinstance(node, (ast.FunctionDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return [node.name]
    return []


def refuse_two_meanings(function):
    """What is imported anywhere in an answer has no other meaning anywhere else in it."""
    imports = {}
    for node in ast.walk(function):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, value in imported(node):
                if imports.setdefault(name, value) is not value:
                    raise Refused(f"its {name} is imported with two meanings")
    for node in ast.walk(function):
        names = [node.arg] if isinstance(node, ast.arg) else bound_by(node)
        names += node.names if isinstance(node, ast.Nonlocal) else []
        for name in imports.keys() & set(names):
            raise Refused(f"its {name} is an import and something else too")


def stored(function):
    """"pipe.unet" and other attributes that a function's tree sets."""
    return {ast.unparse(node) for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


@cache
def attributes(file):
    """Names that may follow a dot: of the kinds of value above, and used in a chapter or here."""
    names = {name for kind in KINDS for name in dir(kind)} | set(vars(DDIMScheduler()))
    for path in {*ROOT.glob("0*.py"), Path(file)}:
        for node in ast.walk(cut.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                names.add(getattr(node.args[1], "value", ""))
    public = {name for name in names if not name.startswith(("_", "register_", "save_"))}
    return public - FORBIDDEN | {"__getitem__"}


@cache
def our_names():
    """Functions of this repository that its own answers use, or that are an exercise."""
    names = {word for exercise in EXERCISES for word in exercise.name.split(".")}
    for exercise in EXERCISES:
        tree = cut.parse((ROOT / exercise.file).read_text(encoding="utf-8"))
        for node in ast.walk(cut.find(tree, exercise.name)):
            if isinstance(node, (ast.Name, ast.Attribute)):
                names.add(getattr(node, "attr", None) or node.id)
    return names


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


def member(module, name):
    """The value of module.name; Refused where no answer needs it."""
    home, value = module.__name__, getattr(module, name, LOCAL)
    refused = Refused(f"it uses {name} of {home}, which no answer needs")
    if home not in LIBRARIES and not home.startswith(OURS):
        raise Refused(f"it uses the module {home}; no answer needs that")
    if home.startswith(OURS):
        allowed = name in our_names()
    elif home in MEMBERS:
        allowed = name in MEMBERS[home]
    elif home in CLASSES and isinstance(value, type):
        allowed = name not in FORBIDDEN and issubclass(value, CLASSES[home])
    else:
        allowed = name not in FORBIDDEN and name != "save" and not name.startswith(PREFIXES)
    if not allowed:
        raise refused
    return value


class Reader(ast.NodeVisitor):
    """Reads an answer from the outside in, and knows what each name stands for where it is used."""

    def __init__(self, module, stores):
        self.module, self.names, self.stores = module, dict(vars(module)), stores
        self.attributes = attributes(module.__file__)
        self.called, self.mentioned, self.inline = set(), set(), 0

    # ---- scopes -----------------------------------------------------------------------------

    def bindings(self, body):
        """What the names stand for that these statements bind: never a global's value."""
        bound, todo = {}, list(body)
        while todo:
            node = todo.pop()
            bound |= dict.fromkeys(bound_by(node), LOCAL)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                bound |= dict(imported(node))
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):  # has a scope of its own
                todo += self.around(node)
            elif not isinstance(node, COMPREHENSIONS):
                todo += ast.iter_child_nodes(node)
        return bound

    def around(self, node):
        """What a function has that belongs to the scope around it: defaults and the like."""
        parts = [*getattr(node, "decorator_list", []), *node.args.defaults, *node.args.kw_defaults,
                 *[arg.annotation for arg in arguments_of(node)], getattr(node, "returns", None)]
        return [part for part in parts if part]

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
        if getattr(node, "type_params", None):
            self.refuse_node(node)
        for arg in arguments_of(node):
            self.mention(arg.annotation)
        self.mention(getattr(node, "returns", None))
        for part in self.around(node):
            self.visit(part)
        arguments = [arg.arg for arg in arguments_of(node)]
        self.visit_in_scope(self.bindings(body) | dict.fromkeys(arguments, LOCAL), body)

    def visit_comprehension_of(self, node):
        first, *others = node.generators
        self.visit(first.iter)
        values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        inside = [first.target, *first.ifs, *others, *values]
        self.inline += 1
        self.visit_in_scope(self.bindings([part.target for part in node.generators]), inside)
        self.inline -= 1

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_of

    def visit_NamedExpr(self, node):
        if self.inline:  # it binds a name of another scope
            raise Refused("it assigns inside a comprehension or lambda; write a loop instead")
        self.generic_visit(node)

    # ---- what is used -----------------------------------------------------------------------

    def is_bar(self, node):
        value = self.value_of(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        return value is tqdm or value is trange

    def mention(self, node):
        """In this part, such as an annotation, a class is only named."""
        parts = list(ast.walk(node)) if node else []
        if all(isinstance(part, NAMING) for part in parts):
            self.mentioned |= set(map(id, parts))

    def refuse_value(self, node):
        """Modules, and classes whose methods could be replaced, are nothing to pass on."""
        value = self.value_of(node)
        if isinstance(value, types.ModuleType):
            raise Refused(f"it uses the module {ast.unparse(node)} as a value")
        is_tensor = isinstance(value, type) and issubclass(value, torch.Tensor)
        if is_tensor or value is tqdm or value is trange:
            if id(node) not in self.called | self.mentioned:
                raise Refused(f"it uses the class {ast.unparse(node)} as a value")

    visit_Name = refuse_value

    def visit_AnnAssign(self, node):
        if not node.simple and node.value is None:  # binds nothing, and looks as if it did
            self.refuse_node(node)
        self.mention(node.annotation)
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.ctx, ast.Load):
            self.refuse_value(node)
        else:
            settable = node.attr in ("grad", "requires_grad") or ast.unparse(
                node) in self.stores
            if not settable:
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
        used = {word.arg for word in node.keywords}
        starred = any(isinstance(arg, ast.Starred) for arg in node.args)
        plain = not used and not starred
        if self.is_builtin(name) and name in ("getattr", "hasattr"):
            if not plain or len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
                raise Refused(f"its {name} has a name that is made while it runs")
            self.refuse_attribute(str(node.args[1].value))
        if self.is_bar(node.func) and (starred or len(node.args) > 2 or used - BAR_FLAGS):
            raise Refused(f"its progress bar has other flags than {', '.join(sorted(BAR_FLAGS))}")
        if self.is_builtin(name) and name == "isinstance":
            self.mention(node.args[-1] if node.args else None)
        if plain and len(node.args) == 1:  # type(x)(y) makes a y of x's kind
            self.mention_type(node.func)
        if self.is_builtin(name) and name == "type" and id(node.func) not in self.mentioned:
            raise Refused("it uses type() for more than type(x)(y) and type(x) is y")
        self.generic_visit(node)

    def mention_type(self, node):
        """Where this is type(x), it is used as it may be."""
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            if isinstance(node.args[0], (ast.Name, ast.Constant)):
                self.mention(node.func)

    def visit_Compare(self, node):
        for side in (node.left, *node.comparators):
            self.mention_type(side)
        self.generic_visit(node)

    def refuse_node(self, node):
        raise Refused("it defines a class, reaches for what is global, or waits for something; no "
                      "answer needs that")

    def visit_MatchClass(self, node):
        if node.kwd_attrs:
            self.refuse_node(node)
        self.mention(node.cls)
        self.generic_visit(node)

    visit_ClassDef = visit_Global = visit_TypeAlias = refuse_node
    visit_AsyncFunctionDef = visit_AsyncFor = visit_AsyncWith = visit_Await = refuse_node

    def is_builtin(self, name):
        return name not in self.names and hasattr(builtins, name)

    def value_of(self, node):
        """What a name, or names with dots, stands for; LOCAL where only running it would tell."""
        if isinstance(node, ast.Name):
            return self.value_of_name(node)
        if isinstance(node, ast.Attribute):
            base = self.value_of(node.value)
            if isinstance(base, types.ModuleType):
                return member(base, node.attr)
            self.refuse_attribute(node.attr)
        else:
            self.visit(node)
        return LOCAL

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
        ours = name in vars(self.module) and value is vars(self.module)[name]
        if ours and not isinstance(value, PLAIN) and name not in our_names():
            raise Refused(f"it uses {name}, which no answer needs")
        return value

    def refuse_attribute(self, name):
        if name == "format":
            raise Refused("it uses .format; write an f-string instead")
        if name not in self.attributes:
            raise Refused(f"it uses .{name}, which no answer needs")
