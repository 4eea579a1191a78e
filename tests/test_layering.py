"""Who may use whom: the rules of the layout, checked by reading the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cc"})
PYTHON = sorted(  # phi4edge/converters is a link to converters/, which is installed as phi4edge.converters
    path
    for folder in ("phi4edge", "converters")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "phi4edge" / "converters")
)

# Folder of csrc -> the folders whose headers it may include, next to its own.
MAY_INCLUDE = {
    "base": set(),
    "quant": {"base"},
    "gguf": {"base", "quant"},
    "kernels": {"base", "quant"},
    "decoder": {"base", "quant", "gguf", "kernels"},
}

# Python modules from the bottom up.  Those that are not named have the height of the tokenizer.
HEIGHT = {
    "errors": 0,
    "strict_json": 0,
    "bundle": 1,
    "model": 3,
    "quality": 3,
    "transcription": 3,
    "cli": 4,
    "server": 4,
    "__init__": 4,
    "__main__": 5,
}
DEFAULT_HEIGHT = 2


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def code(path: Path) -> str:
    """A C++ source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def users_of(pattern: str) -> set[str]:
    """The C++ sources with an include that matches."""
    return {name(path) for path in CSRC if any(re.match(pattern, include) for include in includes(path))}


def imports(path: Path, *, also_later: bool = True) -> Iterator[str]:
    """The modules that a Python file imports, with their full names; ``from a import b`` gives ``a`` and ``a.b``.

    Not ``also_later``: only those that importing the file itself imports.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(child)
        for block in ast.walk(tree)
        if isinstance(block, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for child in ast.walk(block)
    }
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(tree):
        if not also_later and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = (
                ".".join([*package[: -node.level], *filter(None, [node.module])]) if node.level else node.module or ""
            )
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def importers_of(module: str) -> set[str]:
    return {name(path) for path in PYTHON if any(f"{found}.".startswith(f"{module}.") for found in imports(path))}


def top(module: str) -> str:
    """``phi4edge.cli.run`` -> ``cli``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_the_sources_are_found() -> None:
    assert {"csrc/module.cc", "csrc/gguf/gguf.h"} <= {name(path) for path in CSRC}
    assert "phi4edge/errors.py" in {name(path) for path in PYTHON}
    assert {path.parent.name for path in CSRC} <= {*MAY_INCLUDE, "csrc"}


def test_1_pybind11_only_in_the_sources_of_the_module() -> None:
    assert users_of("pybind11|Python.h") == {"csrc/module.h"}
    assert users_of(r"module\.h") == {"csrc/module.cc", "csrc/module_session.cc"}


def test_1_core_only_in_model_session_info_and_converters() -> None:
    users = {user for user in importers_of("phi4edge._core") if not user.startswith("converters/")}
    assert users <= {"phi4edge/model.py", "phi4edge/session.py", "phi4edge/info.py"}


def test_2_intrinsics_only_in_the_files_of_their_instruction_sets() -> None:
    assert all(user.startswith("csrc/kernels/x86_") for user in users_of(r"(x86|[a-z]+mm|avx.*)intrin\.h"))
    assert all(user.startswith("csrc/kernels/arm64_") for user in users_of(r"arm_.*\.h"))
    for path in CSRC:
        if not path.name.startswith("x86_"):
            assert not re.search(r"\b_mm(256|512)?_\w+\(|\b__m(128|256|512)", code(path)), name(path)


def test_3_onnxruntime_only_in_encoders() -> None:
    assert importers_of("onnxruntime") <= {"phi4edge/encoders.py"}


def test_3_the_network_only_in_pull() -> None:
    assert importers_of("huggingface_hub") <= {"converters/pull.py", "converters/download.py"}


def test_3_matplotlib_only_where_plots_are_drawn() -> None:
    assert importers_of("matplotlib") <= {"phi4edge/cli/quality_plot.py"}


@pytest.mark.parametrize("peer", ["torch", "transformers", "peft", "llama_cpp", "tokenizers"])
def test_3_peers_only_in_tests_and_benchmarks(peer: str) -> None:
    assert importers_of(peer) == set()


def test_4_kernels_know_no_threads_allocation_exceptions_or_model_words() -> None:
    kernels = [path for path in CSRC if path.parent.name == "kernels" and not path.name.startswith("dispatch")]
    library = r"std::(vector|string|map|function|thread|mutex|atomic)"
    words = rf"\b(throw|new|delete|malloc|free|{library}|layer|vocab|prompt)\b"
    headers = {"thread", "mutex", "atomic", "vector", "string", "memory", "stdexcept", "new"}
    for path in kernels:
        assert not re.search(words, code(path)), name(path)
        assert not headers & set(includes(path)), name(path)


def test_5_a_file_of_an_instruction_set_keeps_its_names_to_itself() -> None:
    for path in CSRC:
        if re.match(r"(x86|arm64)_", path.name):
            assert "namespace {" in code(path), name(path)
            assert not re.search(r"^(inline|extern)\b", code(path), flags=re.MULTILINE), name(path)


def test_6_no_model_names_in_csrc() -> None:
    """Behaviour comes from metadata.  The only place for an architecture's name is where metadata are read."""
    names = re.compile(r"\bphi(?!4edge)\w*|llama|qwen|mistral|smollm|gemma", flags=re.IGNORECASE)
    for path in CSRC:
        if name(path) != "csrc/decoder/config.cc":
            assert not names.findall(code(path)), name(path)


@pytest.mark.parametrize("path", CSRC, ids=name)
def test_7_csrc_folders_include_downwards(path: Path) -> None:
    folder = path.parent.name
    if folder == "csrc":
        return  # the module may include everything
    own = {include.split("/")[0] for include in includes(path) if "/" in include} & set(MAY_INCLUDE)
    assert own <= MAY_INCLUDE[folder] | {folder}


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_7_python_modules_import_downwards(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "converters":
        found = {module for module in imports(path) if module.startswith("phi4edge.")}
        assert {top(module) for module in found} <= {"converters", "bundle", "errors", "strict_json", "_core"}
        return
    height = HEIGHT.get(parts[1], DEFAULT_HEIGHT)
    for module in imports(path):
        if module.startswith("phi4edge.") and top(module) not in {parts[1], "__version__", "_core"}:
            assert HEIGHT.get(top(module), DEFAULT_HEIGHT) <= height, module


def test_7_the_runtime_imports_the_converters_only_when_converting() -> None:
    for path in PYTHON:
        if not name(path).startswith("converters/"):
            found = list(imports(path, also_later=False))
            assert not any(module.startswith("phi4edge.converters") for module in found), name(path)
