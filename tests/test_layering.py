"""Imports run one way: kernels, autograd, layers, models, lora and data, training and inference and export, cli."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "slothcore"
MAY_IMPORT = {
    "kernels": {"kernels"},
    "autograd": {"kernels", "autograd"},
    "layers": {"kernels", "autograd", "layers"},
    "models": {"kernels", "autograd", "layers", "models"},
    "lora": {"kernels", "autograd", "layers", "models", "lora"},
    "data": {"data"},
    "inference": {"kernels", "autograd", "layers", "models", "lora", "data", "inference"},
    "export": {"kernels", "autograd", "layers", "models", "lora", "data", "report", "export"},
    "serve": {"kernels", "autograd", "layers", "models", "lora", "data", "inference", "serve"},
    "report": {"report"},
    "training": {"kernels", "autograd", "layers", "models", "lora", "data", "inference", "report", "training"},
}
# What stands above all those folders; each may import what comes before it.
ABOVE_ALL = ("locating", "loading", "run", "commands", "cli", "__main__")
FORBIDDEN_AT_RUN_TIME = {"transformers", "peft", "trl", "unsloth", "datasets", "accelerate", "pickle"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, with relative imports made absolute."""
    package = ["slothcore", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    for module in imported_modules(path):
        parts = module.split(".")
        assert parts[0] not in FORBIDDEN_AT_RUN_TIME, f"{path.name} imports {parts[0]}"
        if parts[0] != "slothcore" or len(parts) == 1 or layer == "__init__.py":
            continue
        if layer in MAY_IMPORT and (PACKAGE / parts[1]).is_dir():
            assert parts[1] in MAY_IMPORT[layer], f"{layer}/{path.name} imports {module}, which is above it"
        if parts[1] in ABOVE_ALL:
            own = layer.removesuffix(".py")
            allowed = ABOVE_ALL[: ABOVE_ALL.index(own)] if own in ABOVE_ALL else ()
            assert parts[1] in allowed or parts[1] == layer, f"{layer}/{path.name} imports {module}, which is above it"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports within functions and for types alone count: they tie what is understood and changed together."""
    names = (".".join(["slothcore", *path.relative_to(PACKAGE).with_suffix("").parts]) for path in FILES)
    modules = dict(zip((name.removesuffix(".__init__") for name in names), FILES, strict=True))
    imports = {name: imported_modules(path) & modules.keys() for name, path in modules.items()}
    found = {name for name in modules if name in reached(imports, name)}
    assert not found, f"in a circle of imports: {sorted(found)}; what two files need goes below both"


def reached(imports: dict[str, set[str]], start: str) -> set[str]:
    """All modules that `start` imports, and those that they import, and so on."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = imports[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def test_every_folder_has_a_place_in_the_order() -> None:
    assert {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"} == {*MAY_IMPORT, "commands"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    limit = 400 if path.parent.name == "kernels" else 300
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_every_kernel_has_an_eager_twin_with_the_same_signatures() -> None:
    """A launcher and its twin share name and parameters, so that one line can choose between them.

    A leading underscore marks what only sweeps and tests use: a forced path, a launch configuration. A file of
    functions for use inside kernels launches nothing and needs no twin.
    """
    for kernel_file in sorted((PACKAGE / "kernels").glob("*.py")):
        twin = kernel_file.with_name(f"{kernel_file.stem}_eager.py")
        source = kernel_file.read_text(encoding="utf-8")
        if "triton.jit" not in source or not launches(ast.parse(source)):
            continue
        assert twin.is_file(), f"{kernel_file.name} has no eager twin"
        fused, eager = public_functions(source), public_functions(twin.read_text(encoding="utf-8"))
        shared = fused.keys() & eager.keys()
        assert shared, f"{kernel_file.name} and its twin share no function"
        for name in shared:
            assert parameters(fused[name]) == parameters(eager[name]), (
                f"{kernel_file.stem}.{name} differs from its twin"
            )
        for name, function in fused.items():
            assert name in shared or not launches(function), f"{kernel_file.stem}.{name} has no twin"


def public_functions(source: str) -> dict[str, ast.FunctionDef]:
    """Every undecorated public function at the top of a module."""
    return {
        node.name: node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and not node.name.startswith("_")
    }


def parameters(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in (*function.args.args, *function.args.kwonlyargs) if not a.arg.startswith("_")]


def launches(code: ast.AST) -> bool:
    """Whether the function or module holds a kernel launch, `kernel[grid](...)`."""
    return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) for node in ast.walk(code))
