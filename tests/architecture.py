"""The written rules of the house as functions: a source tree goes in, violations come out.

`test_architecture.py` runs each on the real tree, and on a small bad tree to see that it bites.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "bh_routing"

FLOORS: Mapping[str, int] = {
    "errors": 1,
    "demo": 1,
    "results": 2,
    "stats": 2,
    "multitest": 2,
    "nulls": 3,
    "rules": 4,
    "kernels": 5,
    "models": 6,
    "engine": 7,
    "experiments": 8,
    "integrations": 9,
    "serving": 9,
    "cli": 10,
    "api": 10,
    "__main__": 11,
}
"""The running tower: a module may import its own package and what lies on lower floors."""

READING: Mapping[str, int] = {
    "errors": 1,
    "results": 2,
    "stats": 2,
    "analysis": 7,
    "report": 8,
    "cli": 9,
    "api": 9,
}
"""The reading tower. The command line and the Python interface are the roof of both."""

HOMES_OF: Mapping[str, frozenset[str]] = {
    # Family knowledge lives in one place; the adapter to lm-eval subclasses its model class.
    "transformers": frozenset({"models", "integrations"}),
    "triton": frozenset({"kernels"}),
    "lm_eval": frozenset({"integrations"}),
    "typer": frozenset({"cli"}),
    "vllm": frozenset({"serving"}),
}
NEVER_IN_READING = frozenset({"torch", "transformers", "safetensors.torch", "tokenizers", "triton"})
NEVER_ANYWHERE = frozenset({"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
SWITCHES = frozenset({"TYPE_CHECKING", "__name__ == '__main__'"})
NAMELESS = frozenset({"utils", "util", "helpers", "common", "misc"})

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_INIT_LINES = 40


@dataclass(frozen=True, slots=True)
class Module:
    """One source file, parsed."""

    name: str
    """Dotted name; a package's `__init__` carries the package's name."""
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def home(self) -> str:
        """The package or module right below the root, "" for the root itself."""
        return [*self.name.split("."), ""][1]


Modules = Mapping[str, Module]


def read_modules(source: Path) -> dict[str, Module]:
    """Parse all of the package below `source`."""
    modules = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path.read_text(encoding="utf-8"))
    return modules


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name and where it stands."""

    target: str
    line: int
    inside_function: bool
    only_for_types: bool

    @property
    def root(self) -> str:
        return self.target.split(".")[0]


def imports_of(module: Module) -> Iterator[Import]:
    """Every import of a module; `from a import b` gives `a.b`."""
    yield from _walk_imports(module.tree, inside_function=False, only_for_types=False)


def _walk_imports(
    node: ast.AST, *, inside_function: bool, only_for_types: bool
) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        names: list[str] = []
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            names = [f"{base}.{alias.name}" for alias in child.names]
        for name in names:
            yield Import(name, getattr(child, "lineno", 0), inside_function, only_for_types)
        in_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _walk_imports(
            child,
            inside_function=inside_function or in_function,
            only_for_types=only_for_types or for_types,
        )


def own_target(found: Import, modules: Modules) -> str | None:
    """The module of ours that an import reaches, None for somebody else's."""
    if found.root != PACKAGE:
        return None
    return found.target if found.target in modules else found.target.rpartition(".")[0]


def relative_imports(modules: Modules) -> list[str]:
    """Relative imports: they hide from a reader, and from the checks below, what is reached."""
    return [
        f"{module.name}:{found.line} imports {found.target}"
        for module in modules.values()
        for found in imports_of(module)
        if found.target.startswith(".")
    ]


def upward_imports(modules: Modules) -> list[str]:
    """Imports of a higher floor, of a neighbour on the same floor, or of the other tower."""
    wrong = []
    for module in modules.values():
        if module.home == "":
            continue
        for found in imports_of(module):
            target = own_target(found, modules)
            if target is None or found.target in (PACKAGE, f"{PACKAGE}.__version__"):
                continue
            reached = Module(target, "").home
            if reached != module.home and not _may_import(module.home, reached):
                wrong.append(f"{module.name}:{found.line} imports {found.target}")
    return wrong


def _may_import(home: str, reached: str) -> bool:
    return any(
        home in tower and reached in tower and tower[reached] < tower[home]
        for tower in (FLOORS, READING)
    )


def homeless_modules(modules: Modules) -> list[str]:
    """Packages and modules that stand on no floor."""
    homes = {module.home for module in modules.values()} - {""}
    return sorted(homes - FLOORS.keys() - READING.keys())


def strangers(modules: Modules) -> list[str]:
    """Libraries imported outside the packages that may know them."""
    wrong = []
    for module in modules.values():
        is_reading = module.home == "results" or (
            module.home in READING and module.home not in FLOORS
        )
        for found in imports_of(module):
            away = found.root in HOMES_OF and module.home not in HOMES_OF[found.root]
            banned = NEVER_ANYWHERE | (NEVER_IN_READING if is_reading else frozenset())
            if away or any(f"{found.target}.".startswith(f"{name}.") for name in banned):
                wrong.append(f"{module.name}:{found.line} imports {found.target}")
    return wrong


def cycles(modules: Modules) -> list[str]:
    """One cycle of imports among our modules, if there is any."""
    graph = {
        module.name: {
            target
            for found in imports_of(module)
            if not found.only_for_types and (target := own_target(found, modules))
        }
        for module in modules.values()
        if module.home != ""
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def own_imports_inside_functions(modules: Modules) -> list[str]:
    """Imports of our own modules inside functions: they hide cycles. The command line may."""
    return [
        f"{module.name}:{found.line} imports {found.target}"
        for module in modules.values()
        if module.home not in ("", "cli")
        for found in imports_of(module)
        if found.inside_function and found.root == PACKAGE
    ]


def work_at_import(modules: Modules) -> list[str]:
    """Statements at module level that do something other than define."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.AnnAssign,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
    )
    return [
        f"{module.name}:{node.lineno} does {ast.unparse(node).splitlines()[0]!r}"
        for module in modules.values()
        if module.home != "cli"
        for node in module.tree.body
        if not isinstance(node, allowed)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.If) and ast.unparse(node.test) in SWITCHES)
    ]


def nameless_files(modules: Modules) -> list[str]:
    """Files named after nothing."""
    return [name for name in modules if name.rpartition(".")[2] in NAMELESS]


def long_files(files: Mapping[str, str]) -> list[str]:
    """Files over the ceiling."""
    sizes = {name: len(text.splitlines()) for name, text in files.items()}
    return [f"{name} has {size} lines" for name, size in sizes.items() if size > MAX_FILE_LINES]


def long_functions(files: Mapping[str, str]) -> list[str]:
    """Functions over the ceiling: docstring and decorators don't count, nor do the parameters of
    a command, which are the table of its options.
    """
    wrong = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                ceiling = MAX_INIT_LINES if node.name == "__init__" else MAX_FUNCTION_LINES
                size = _counted_lines(node, is_command="/cli/" in name)
                if size > ceiling:
                    wrong.append(f"{name}:{node.lineno} {node.name} has {size} lines")
    return wrong


def _counted_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_command: bool) -> int:
    size = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if is_command:
        size -= first.lineno - node.lineno
    if ast.get_docstring(node) is not None:
        size -= (first.end_lineno or first.lineno) - first.lineno + 1
    return size


def forbidden_syntax(files: Mapping[str, str]) -> list[str]:
    """Bare excepts, star imports, remote code, and loading what can execute."""
    wrong = []
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            what = _forbidden(node)
            if what:
                wrong.append(f"{name}:{getattr(node, 'lineno', 0)} {what}")
    return wrong


def _forbidden(node: ast.AST) -> str:
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        return "star import"
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        trusted = not (isinstance(node.value, ast.Constant) and node.value.value is False)
        return "trust_remote_code" if trusted else ""
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("torch.load", "torch.save", "eval", "exec"):
            return called
    return ""
