"""Measure the source: size, record types, imports, prose, and the modules a run's spec reaches.

    python tools/measure_house.py

`tests/test_house.py` compares the figures with their bounds.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

SOURCE: Final = Path(__file__).parents[1] / "src"
PACKAGE: Final = "bh_routing"
RECORD_DECORATORS: Final = {"dataclass"}
RECORD_BASES: Final = {"NamedTuple", "TypedDict", "BaseModel", "Enum", "StrEnum"}


class House(NamedTuple):
    """Figures of a source tree."""

    lines: int
    """Lines of all Python files, including blank lines and docstrings."""
    files: int
    record_types: int
    """Dataclasses, named tuples, typed dictionaries, pydantic models and enumerations."""
    import_percent: float
    """Percentage of lines that belong to import statements."""
    prose_words: int
    """Words of docstrings and comments."""
    what_per_thousand: float
    beside_per_thousand: float
    """Occurrences per 1,000 words of prose: both are signs of translated English."""
    spec_modules: int
    """Modules that a run's spec, or a value derived from it, is passed to."""


def measure(source: Path = SOURCE) -> House:
    """Measure all Python files below a folder."""
    texts = {
        ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): (
            path.read_text(encoding="utf-8")
        )
        for path in sorted(source.rglob("*.py"))
    }
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = sum(text.count("\n") for text in texts.values())
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    imports = sum(
        node.end_lineno - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.Import | ast.ImportFrom) and node.end_lineno
    )
    words = re.findall(r"[A-Za-z']+", "\n".join(map(prose, texts.values(), trees.values())).lower())
    return House(
        lines=lines,
        files=len(texts),
        record_types=sum(isinstance(node, ast.ClassDef) and is_record(node) for node in nodes),
        import_percent=100 * imports / lines,
        prose_words=len(words),
        what_per_thousand=1000 * words.count("what") / len(words),
        beside_per_thousand=1000 * words.count("beside") / len(words),
        spec_modules=len(modules_visited(trees, f"{PACKAGE}.experiments.run", "run", "spec")),
    )


def prose(text: str, tree: ast.Module) -> str:
    """Return the docstrings, including those of attributes, and the comments of a module."""
    strings = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join(strings + comments)


def is_record(node: ast.ClassDef) -> bool:
    """Return whether a class is a record: it holds values rather than behaviour."""
    decorators = {ast.unparse(each).split("(")[0].split(".")[-1] for each in node.decorator_list}
    bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    return bool(decorators & RECORD_DECORATORS or bases & RECORD_BASES)


Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, str]
"""A module and a function of it; a method is `Class.method`."""


def modules_visited(
    trees: dict[str, ast.Module], module: str, function: str, parameter: str
) -> set[str]:
    """Follow a parameter, and values derived from it, through calls of the package's functions.

    A call is followed if its name is defined in, or imported from, the package: for classes into
    `__init__`, for methods if only one class has a method of that name.
    """
    functions: dict[Place, Function] = {}
    methods: dict[str, list[Place]] = {}
    for home, tree in trees.items():
        for node in tree.body:
            if isinstance(node, Function):
                functions[home, node.name] = node
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, Function) and isinstance(node, ast.ClassDef):
                    place = (home, f"{node.name}.{method.name}")
                    functions[place] = method
                    methods.setdefault(method.name, []).append(place)
    imported = {name: _imported(tree) for name, tree in trees.items()}
    seen: set[tuple[Place, str]] = set()
    queue = deque([((module, function), parameter)])
    while queue:
        visit = queue.popleft()
        if visit in seen:
            continue
        seen.add(visit)
        (home, _), tainted = visit
        for call, argument in _passed(functions[visit[0]], tainted):
            if call.startswith("."):
                places = methods.get(call[1:], [])
                target = places[0] if len(places) == 1 else ("", "")
            else:
                target = imported[home].get(call, (home, call))
                if target not in functions:
                    target = (target[0], f"{target[1]}.__init__")
            parameters = _parameters(functions[target]) if target in functions else []
            if isinstance(argument, str) and argument in parameters:
                queue.append((target, argument))
            elif isinstance(argument, int) and argument < len(parameters):
                queue.append((target, parameters[argument]))
    return {home for (home, _), _ in seen}


def _imported(tree: ast.Module) -> dict[str, Place]:
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def _parameters(node: Function) -> list[str]:
    arguments = node.args
    # Keyword-only parameters come last, so that positions match those of a call.
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [each.arg for each in named]


def _passed(node: Function, parameter: str) -> set[tuple[str, int | str]]:
    """Return the calls, with position or keyword, that receive a value derived from a parameter.

    A method's name begins with a dot. Its object is argument 0, like the new object of a class.
    """
    made = {parameter}

    def is_made(part: ast.AST | None) -> bool:
        return part is not None and any(
            isinstance(n, ast.Name) and n.id in made for n in ast.walk(part)
        )

    size = 0
    while size != len(made):
        size = len(made)
        for part in ast.walk(node):
            match part:
                case ast.Assign(targets=targets, value=value) if is_made(value):
                    found: list[ast.AST] = list(targets)
                case (
                    ast.AnnAssign(target=target, value=value)
                    | ast.For(target=target, iter=value)
                    | ast.comprehension(target=target, iter=value)
                    | ast.NamedExpr(target=target, value=value)
                ) if is_made(value):
                    found = [target]
                case ast.withitem(context_expr=value, optional_vars=target) if is_made(value):
                    found = [target] if target else []
                case _:
                    continue
            made |= {n.id for each in found for n in ast.walk(each) if isinstance(n, ast.Name)}
    calls: set[tuple[str, int | str]] = set()
    for part in ast.walk(node):
        if not isinstance(part, ast.Call):
            continue
        if isinstance(part.func, ast.Name):
            # The first argument is number 0 of a function, and 1 of a class, after its object.
            name, shift = part.func.id, int(part.func.id[:1].isupper())
        elif isinstance(part.func, ast.Attribute):
            name, shift = f".{part.func.attr}", 1
            if is_made(part.func.value):
                calls.add((name, 0))
        else:
            continue
        calls |= {(name, i + shift) for i, each in enumerate(part.args) if is_made(each)}
        calls |= {(name, each.arg) for each in part.keywords if each.arg and is_made(each.value)}
    return calls


if __name__ == "__main__":
    for name, value in measure()._asdict().items():
        print(f"{name:20} {value:,.2f}" if isinstance(value, float) else f"{name:20} {value:,}")
