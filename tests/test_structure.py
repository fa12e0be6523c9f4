"""The shape of the code: imports point downward, importing is lean, every op is in every room, nothing is undone."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastreg
from fastreg import _library
from specs import SPECS

pytestmark = pytest.mark.backend_independent

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastreg"
DROPOUT_ADD_NORMS = ["dropout_add_layer_norm", "dropout_add_rms_norm"]
OPS = [spec.name for spec in SPECS] + ["drop_block", "dropout", *DROPOUT_ADD_NORMS]
FUNCTIONS = list(fastreg.functional.__all__)
SOURCES = sorted(PACKAGE.rglob("*.py"))
each_op = pytest.mark.parametrize("op", OPS)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}

# Longest prefix first wins; a module may import from its own row (the rooms named in one row) and from lower ones.
LAYERS = (
    ("fastreg.__main__",),
    ("fastreg.cli",),
    ("fastreg",),
    ("fastreg.convert",),
    ("fastreg.fuse",),
    ("fastreg.nn",),
    ("fastreg.functional",),
    ("fastreg.ops",),
    ("fastreg._library",),
    ("fastreg.backends",),
    ("fastreg.backends.reference", "fastreg.backends.triton", "fastreg.backends.native"),
    ("fastreg._native", "fastreg._channels", "fastreg._activations", "fastreg._units"),
)


def layer_of(module: str) -> tuple[int, str]:
    """The layer of a module, 0 at the top, and the room in it."""
    rooms = [(len(room), depth, room) for depth, layer in enumerate(LAYERS) for room in layer]
    fitting = [each for each in rooms if each[2] == "fastreg" and module == "fastreg"]
    fitting += [
        each
        for each in rooms
        if each[2] != "fastreg" and (module == each[2] or module.startswith(each[2] + "."))
    ]
    assert fitting, f"{module} is in no room: give it one in LAYERS"
    _, depth, room = max(fitting)
    return depth, room


def imports(path: Path) -> Iterator[str]:
    """The modules of fastreg that a file imports, anywhere in it, each by its longest name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastreg")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "fastreg":
                for alias in node.names:
                    longer = f"{node.module}.{alias.name}"
                    yield longer if longer in MODULES else node.module
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("fastreg.")
        ):
            # importlib.import_module("fastreg...")
            yield from {node.value} & set(MODULES)


@pytest.mark.parametrize("module", list(MODULES))
def test_imports_point_downward(module: str) -> None:
    depth, room = layer_of(module)
    for imported in imports(MODULES[module]):
        if imported == module:
            continue
        other_depth, other_room = layer_of(imported)
        # The command line reads fastreg's version and public names from the top.
        allowed = other_depth > depth or other_room == room
        assert allowed, (
            f"{module} imports {imported}, which is {'above it' if other_depth < depth else 'beside it'}"
        )


def test_an_upward_import_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "kernel.py"
    source.write_text("def f():\n    from fastreg.ops import layer_norm\n    from fastreg import backends\n")
    found = list(imports(source))
    assert found == ["fastreg.ops.layer_norm", "fastreg.backends"]
    assert all(layer_of(each)[0] < layer_of("fastreg.backends.triton.layer_norm")[0] for each in found)


def fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_lean() -> None:
    """Nothing is imported beside fastreg itself and what torch and the standard library bring."""
    extra = fresh_python(
        "import sys, torch; before = set(sys.modules)\n"
        "import fastreg\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.ops.loaded_libraries, torch.ops.loaded_libraries\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - {'fastreg', 'torch'} - set(sys.stdlib_module_names)))"
    )
    assert extra.split() == []


def test_using_the_cpu_imports_neither_triton_nor_cuda() -> None:
    said = fresh_python(
        "import sys, torch, fastreg\n"
        "fastreg.functional.layer_norm(torch.randn(2, 3), (3,)); fastreg.nn.RMSNorm(3)(torch.randn(2, 3))\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    assert said.split() == ["False", "False"]


# --- every op in every room ---


@each_op
@pytest.mark.parametrize(
    "room",
    [
        "fastreg/ops/{}.py",
        "fastreg/nn/{}.py",
        "fastreg/backends/reference/{}.py",
        "fastreg/backends/triton/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cuda/{}.cuh",
        "csrc/cuda/{}.cu",
        "tests/test_{}.py",
        "bench/bench_{}.py",
    ],
)
def test_every_op_has_its_file_in_every_room(op: str, room: str) -> None:
    assert (ROOT / room.format(op)).is_file()


def test_every_public_function_is_in_the_suite() -> None:
    homes = {getattr(fastreg.functional, name).__module__ for name in FUNCTIONS}
    assert homes == {f"fastreg.ops.{op}" for op in OPS}
    tested = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    assert all(spec.name in FUNCTIONS for spec in SPECS)
    assert all(re.search(rf"\b{name}\b", tested) for name in FUNCTIONS)
    assert sorted(operators_of(op) for op in OPS) == sorted(
        [
            ["layer_norm_fwd", "layer_norm_bwd"],
            ["rms_norm_fwd", "rms_norm_bwd"],
            ["batch_norm_fwd", "batch_norm_eval", "batch_norm_bwd"]
            + [f"batch_norm_{half}" for half in ("moments", "apply", "sums", "bwd_apply")],
            ["group_norm_fwd", "group_norm_bwd"],
            # Its backward is group norm's.
            ["instance_norm_fwd"],
            ["dropout_fwd", "dropout_inplace", "dropout_bwd"],
            ["drop_block_mask", "drop_block_apply", "drop_block_inplace"],
            *([f"{op}_fwd", f"{op}_bwd"] for op in DROPOUT_ADD_NORMS),
        ]
    )
    assert sum(len(operators_of(op)) for op in OPS) == len(_library.OPERATORS)


def operators_of(op: str) -> list[str]:
    return [name for name, operator in _library.OPERATORS.items() if operator.op == op]


def native_schemas() -> dict[str, str]:
    """The schemas in csrc/ops.cpp, which need not be compiled for it."""
    text = (ROOT / "csrc/ops.cpp").read_text()
    found = {}
    for strings in re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", text):
        schema = "".join(re.findall(r"\"([^\"]*)\"", strings))
        name, _, rest = schema.partition("(")
        found[name] = "(" + rest
    return found


def test_native_and_python_schemas_are_the_same_text() -> None:
    prefixes = tuple(f"{op}_" for op in OPS)
    native = {name: schema for name, schema in native_schemas().items() if name.startswith(prefixes)}
    assert native == {name: operator.schema for name, operator in _library.OPERATORS.items()}


def _names_in(schema: str) -> list[str]:
    return [argument.split()[-1] for argument in schema[1 : schema.index(") ->")].split(", ")]


@each_op
@pytest.mark.parametrize("room", ["reference", "triton"])
def test_backends_export_functions_with_the_schemas_arguments(op: str, room: str) -> None:
    tree = ast.parse((PACKAGE / "backends" / room / f"{op}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for operator in operators_of(op):
        arguments = functions[operator].args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        assert names == _names_in(_library.OPERATORS[operator].schema)


# --- documentation ---


@each_function
def test_a_public_docstring_has_every_part(name: str) -> None:
    function = getattr(fastreg.functional, name)
    text = inspect.getdoc(function) or ""
    first = text.split("\n\n")[0]
    assert first.endswith(".")
    assert "\n" not in first
    assert re.search(r"^Equivalent to ``", text, re.M)
    if hasattr(torch.nn.functional, name):
        assert re.search(rf"``(activation\()?torch\.nn\.functional\.{name}\(", text)
    assert re.search(r"^Formula::\n\n    .*=", text, re.M)
    assert re.search(r"^where\n    - ", text, re.M)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^    {argument}: ", arguments, re.M), argument
    tensors = [
        argument
        for argument, each in inspect.signature(function).parameters.items()
        if "Tensor" in str(each.annotation)
    ]
    assert arguments.count("Shape: ") == len(tensors)
    for part in ("Raises:", "Accumulation is in fp32", "Deterministic", "Reference: ", "arXiv:"):
        assert part in text, part


def public_objects() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [(f"fastreg.{name}", getattr(fastreg, name)) for name in fastreg.__all__]
    for module in (fastreg.functional, fastreg.nn):
        found += [(f"{module.__name__}.{name}", getattr(module, name)) for name in module.__all__]
    for name, member in vars(fastreg.backends).items():
        own = getattr(member, "__module__", None) == "fastreg.backends"
        if own and not name.startswith("_"):
            found.append((f"fastreg.backends.{name}", member))
    return [(name, each) for name, each in found if name != "fastreg.__version__"]


@pytest.mark.parametrize(
    ("name", "documented"), public_objects(), ids=lambda each: each if isinstance(each, str) else ""
)
def test_everything_public_is_documented(name: str, documented: Any) -> None:
    text = inspect.getdoc(documented) or ""
    assert len(text.split()) >= 4, name
    own_text = vars(documented).get("__doc__") if inspect.isclass(documented) else text
    assert own_text, f"{name} only inherits its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


# --- habits ---


def nodes(kind: Any, wrong: Callable[[Any], bool]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kind) and wrong(node)
    ]


def test_kernels_are_launched_in_one_place() -> None:
    launching = re.compile(r"<<<|cudaLaunch\w*Kernel\w*\(")
    found = {path.name for path in (ROOT / "csrc").rglob("*.*") if launching.search(path.read_text())}
    assert found == {"launch.cuh"}


def test_no_assert_checks_the_user() -> None:
    """python -O removes asserts; one that only tells the type checker ``x is not None`` may stay."""

    def checks(node: ast.Assert) -> bool:
        return not re.fullmatch(r"[\w.]+ is not None", ast.unparse(node.test))

    assert nodes(ast.Assert, checks) == []


def test_no_exception_is_swallowed() -> None:
    def swallows(node: ast.ExceptHandler) -> bool:
        return node.type is None or all(isinstance(each, ast.Pass | ast.Continue) for each in node.body)

    assert nodes(ast.ExceptHandler, swallows) == []


def test_nothing_is_a_stub() -> None:
    """Every function has a body, those that a Protocol describes aside."""
    described: set[ast.AST] = set()

    def stub(node: ast.ClassDef | ast.FunctionDef) -> bool:
        if isinstance(node, ast.ClassDef):
            if "Protocol" in map(ast.unparse, node.bases):
                described.update(node.body)
            return False
        body = [
            each
            for each in node.body
            if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        ]
        return node not in described and (not body or any(isinstance(each, ast.Pass) for each in body))

    assert nodes((ast.ClassDef, ast.FunctionDef), stub) == []


def project_files() -> list[Path]:
    """Every text file of the project; build outputs and virtual environments are none."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    paths = [ROOT / name for name in names] or [
        *SOURCES,
        *ROOT.glob("csrc/**/*.*"),
        *ROOT.glob("tests/**/*.py"),
    ]
    return [path for path in paths if path.is_file() and path.suffix not in (".png", ".so", ".lock")]


def test_no_path_of_one_machine() -> None:
    places = "|".join(("home", "root", "work", "Users", "workspace", "mnt", "scratch"))
    # A path, not a word in a text: it starts a word and something follows the slash.
    private = re.compile(rf"(?<![\w./}}\])<*-])/(?:{places})/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in project_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []


def test_no_work_is_left_as_a_remark() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in project_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []
