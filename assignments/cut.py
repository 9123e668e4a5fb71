"""Cutting functions out of source text, and putting others into their place.

All of it works on text by line numbers from Python's own parser, so that comments and layout of
everything else stay as they are.
"""
import ast
import os
import re
import textwrap
from threading import Lock

READING = Lock()
if hasattr(os, "register_at_fork"):  # a process that is copied meanwhile must find it free
    os.register_at_fork(before=READING.acquire, after_in_parent=READING.release,
                        after_in_child=READING.release)


def parse(text):
    """ast.parse for more than one thread: Python 3.11's fails when two are in it at once."""
    with READING:
        return ast.parse(text)


def find(tree, name):
    """The node of a function, "accumulate" or "Value.fit", in a module's tree; or None."""
    for word in name.split("."):
        named = [node for node in tree.body if getattr(node, "name", None) == word]
        tree = named[-1] if named else None  # the last of two is the one that Python uses
        if tree is None:
            return None
    return tree


def head_of(node):
    """How many of a function's first statements are its docstring and asserts of shapes."""
    count = 1 if ast.get_docstring(node, clean=False) is not None else 0
    while count < len(node.body) and isinstance(node.body[count], ast.Assert):
        count += 1
    return count


def answer_of(node):
    """The statements that a student has to write: what follows docstring and asserts."""
    return node.body[head_of(node):]


def blank(source, exercises):
    """Source in which the answers of these exercises are one line each, that raises."""
    lines, tree = source.split("\n"), parse(source)
    nodes = [(find(tree, exercise.name), exercise) for exercise in exercises]
    for node, exercise in sorted(nodes, key=lambda pair: -pair[0].lineno):  # from the end
        answer = answer_of(node)
        first, last = answer[0].lineno, node.end_lineno
        while lines[first - 2].lstrip().startswith("#"):  # comments say how it is done
            first -= 1
        count = len(code_lines(lines[first - 1:last]))
        task = (f"Exercise {exercise.number}: {exercise.title}, "
                f"about {count} line{'s' * (count > 1)}")
        indent = " " * answer[0].col_offset
        demands = textwrap.wrap(exercise.demand, 98, initial_indent=f"{indent}# ",
                                subsequent_indent=f"{indent}# ")
        raised = f'raise NotImplementedError("{task}")'
        lines[first - 1:last] = [*demands, indent + raised]
    return "\n".join(lines)


def code_lines(lines):
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def function_text(source, name):
    """The text of one function, without its decorators; None where there is none.

    Where the file cannot be parsed, because something else in it is broken, the function ends at
    the first line that is not indented further than its `def`.
    """
    try:
        node = find(parse(source), name)
        if node is None:
            return None
        lines = source.split("\n")[node.lineno - 1:node.end_lineno]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines = lines_by_indentation(source.split("\n"), name)
        if lines is None:
            return None
    indent = len(lines[0]) - len(lines[0].lstrip())  # a comment may stand further out
    return "\n".join(line[min(indent, len(line) - len(line.lstrip())):] for line in lines) + "\n"


def lines_by_indentation(lines, name):
    start, indent = 0, -1
    for word in name.split("."):  # a method's `def` stands further in than its class
        pattern = re.compile(rf"([ \t]*)(def|class) {word}\b")
        for start in range(start, len(lines)):
            match = pattern.match(lines[start])
            if match and len(match[1]) > indent:
                indent = len(match[1])
                break
        else:
            return None
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].lstrip().startswith(")")
                                or len(lines[end]) - len(lines[end].lstrip()) > indent):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    return lines[start:end]


def is_blank(text):
    """Whether a function's text still has nothing but the line that make.py left."""
    try:
        answer = answer_of(parse(text).body[0])
    except SyntaxError:
        return False
    return (len(answer) == 1 and isinstance(answer[0], ast.Raise)
            and "NotImplementedError" in ast.unparse(answer[0]))
