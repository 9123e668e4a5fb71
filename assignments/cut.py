"""Cutting functions out of source text: comments and layout of everything else stay."""
import ast
import re
import textwrap


def find(tree, name):
    """The node of a function, "step_pairs" or "Value.fit", in a module's tree; or None."""
    for word in name.split("."):
        named = [node for node in tree.body if getattr(node, "name", None) == word]
        tree = named[-1] if named else None  # the last of two is the one that Python uses
        if tree is None:
            return None
    return tree


def answer_of(node):
    """The statements that a student has to write: what follows docstring and asserts."""
    head = 1 if ast.get_docstring(node, clean=False) is not None else 0
    while head < len(node.body) and isinstance(node.body[head], ast.Assert):
        head += 1
    return node.body[head:]


def blank(source, exercises):
    """Source in which the answers of these exercises are one line each, that raises."""
    lines, tree = source.split("\n"), ast.parse(source)
    nodes = [(find(tree, exercise.name), exercise) for exercise in exercises]
    for node, exercise in sorted(nodes, key=lambda pair: -pair[0].lineno):  # from the end
        answer = answer_of(node)
        first, last = answer[0].lineno, node.end_lineno
        while lines[first - 2].lstrip().startswith("#"):  # comments say how it is done
            first -= 1
        code = [line for line in lines[first - 1:last] if re.match(r"\s*[^\s#]", line)]
        count = "one line" if len(code) == 1 else f"{len(code)} lines"
        task = f"Exercise {exercise.number}: {exercise.title}, about {count}"
        indent = " " * answer[0].col_offset
        demands = textwrap.wrap(exercise.demand, 98, initial_indent=f"{indent}# ",
                                subsequent_indent=f"{indent}# ")
        raised = f'raise NotImplementedError("{task}")'
        lines[first - 1:last] = [*demands, indent + raised]
    return "\n".join(lines)


def function_text(source, name):
    """The text of one function, without its decorators; None where there is none.

    Where the file cannot be parsed, because something else in it is broken, the function ends at
    the first line that is not indented further than its `def`.
    """
    try:
        node = find(ast.parse(source), name)
        if node is None:
            return None
        lines = source.split("\n")[node.lineno - 1:node.end_lineno]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        lines = lines_by_indentation(source.split("\n"), name)
        if lines is None:
            return None
    indent = len(lines[0]) - len(lines[0].lstrip())  # a comment may stand further out
    return "\n".join(line[min(indent, len(line) - len(line.lstrip())):]
                     for line in lines).rstrip() + "\n"


def lines_by_indentation(lines, name):
    head = re.compile(rf"([ \t]*)def {name.rpartition('.')[2]}\b")
    starts = [n for n, line in enumerate(lines) if head.match(line)]
    if not starts:
        return None
    indent = len(head.match(lines[starts[-1]])[1])
    inside = re.compile(rf"[ \t]{{{indent + 1}}}|\s*([)#].*)?$")  # or blank, or a comment
    end = starts[-1] + 1
    while end < len(lines) and inside.match(lines[end]):
        end += 1
    return lines[starts[-1]:end]


def replaced(source, name, text):
    """Source with another text of this function in its place."""
    node = find(ast.parse(source), name)
    lines = source.split("\n")
    new = textwrap.indent(text, " " * node.col_offset)
    lines[node.lineno - 1:node.end_lineno] = new.splitlines()
    return "\n".join(lines)


def is_blank(text):
    """Whether a function's text still has nothing but the line that make.py left."""
    try:
        answer = answer_of(ast.parse(text).body[0])
    except SyntaxError:
        return False
    return (len(answer) == 1 and isinstance(answer[0], ast.Raise)
            and "NotImplementedError" in ast.unparse(answer[0]))
