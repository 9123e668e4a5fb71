"""A small check of an answer's text, before it is run.

It is no sandbox: whoever wants to get around it can. It refuses what no answer needs and what an
honest mistake may reach for: files, processes, other modules, Python's own insides, and changes of
what the tests are made of. Mathematics with torch, numpy, PIL and the standard library passes.
"""
import ast
import re

MODULES = set("""PIL bisect cmath collections contextlib copy dataclasses decimal diffusers enum
    fractions functools heapq io itertools math numbers numpy operator peft random re scipy
    statistics string support torch tqdm typing warnings""".split())
BUILTINS = set("""breakpoint compile delattr eval exec exit globals input locals open quit setattr
    vars""".split())  # as names only: net.eval() and torch.compile are something else
WORDS = set("""FileIO Path attrgetter builtins ctypes fromfile genfromtxt hub import_module
    importlib inspect linecache load loadtxt memmap methodcaller open open_code os pickle pytest
    read_bytes read_text savetxt savez savez_compressed shutil socket subprocess sys system
    tofile write_bytes write_text""".split())  # as names, attributes and imports
INSIDES = re.compile(r"__\w*|(f|tb|gi|cr|ag)_(back|builtins|code|frame|globals|locals|next)")
METHODS = set("__init__ __enter__ __exit__ __call__ __len__ __getitem__ __name__".split())


def refusal(text):
    """Why an answer is not run, in words; "" where nothing speaks against it."""
    nodes = list(ast.walk(ast.parse(text)))
    bound = {getattr(node, "arg", "") or getattr(node, "name", "") for node in nodes
             if isinstance(node, (ast.arg, ast.FunctionDef, ast.ClassDef))}
    bound |= {node.id for node in nodes
              if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        words, root = [], node
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            words = [getattr(node, "module", None) or ""] + [alias.name for alias in node.names]
            words = [word for name in words for word in name.split(".") if word]
            if words[0] not in MODULES:
                return f"it imports {words[0]}; an answer needs no more than mathematics"
        elif isinstance(node, ast.Name) and node.id not in bound:
            words = [node.id]
        elif isinstance(node, ast.Attribute):
            is_own = not node.attr.startswith("_") or getattr(node.value, "id", "") == "self"
            words = [node.attr if is_own or node.attr in METHODS else f"__{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words = [word for word in re.findall(r"\w+", node.value) if INSIDES.fullmatch(word)]
        for word in words:
            if (word in WORDS or INSIDES.fullmatch(word) and word not in METHODS
                    or isinstance(node, ast.Name) and word in BUILTINS):
                return f"it uses {word}, which no answer needs"
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        is_changed = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        is_other = isinstance(root, ast.Name) and root.id not in bound
        if isinstance(node, ast.Global) or is_changed and is_other:
            return f"it changes {ast.unparse(node)}; an answer changes its own variables only"
    return ""
