"""How long files and functions may be, how many parameters they take, and that every signature is typed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.architecture.source import PACKAGE, ROOT, FunctionNode, Source, is_triton_kernel, sources

FILE_LINES = 350
FUNCTION_LINES = 60
TRITON_LINES = 120
PARAMETERS = 7
IMPLICIT = ("self", "cls", "ctx")  # ctx: torch.autograd.Function's


def parameters(function: FunctionNode) -> list[ast.arg]:
    given = function.args
    all_of_them = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [arg for arg in all_of_them if arg is not None and arg.arg not in IMPLICIT]


def too_long_files(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{source}: {lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []


def too_long_functions(source: Source) -> list[str]:
    found = []
    for function in source.functions():
        assert function.end_lineno is not None
        lines = function.end_lineno - function.lineno + 1
        budget = TRITON_LINES if is_triton_kernel(function) else FUNCTION_LINES
        if lines > budget:
            found.append(f"{source}:{function.lineno}: {function.name} has {lines} lines, at most {budget}")
    return found


def too_many_parameters(source: Source) -> list[str]:
    return [
        f"{source}:{function.lineno}: {function.name} has {len(parameters(function))} parameters, at most {PARAMETERS}"
        for function in source.functions()
        if len(parameters(function)) > PARAMETERS and not is_triton_kernel(function)
    ]


def untyped_signatures(source: Source) -> list[str]:
    found = []
    for function in source.functions():
        if is_triton_kernel(function):
            continue
        untyped = [arg.arg for arg in parameters(function) if arg.annotation is None]
        if function.returns is None:
            untyped.append("return")
        if untyped:
            found.append(f"{source}:{function.lineno}: {function.name} lacks a type for {', '.join(untyped)}")
    return found


FOLDERS = {
    too_long_files: (PACKAGE, ROOT / "tests", ROOT / "tools"),
    too_long_functions: (PACKAGE, ROOT / "tests", ROOT / "tools"),
    too_many_parameters: (PACKAGE, ROOT / "tools"),
    untyped_signatures: (PACKAGE, ROOT / "tools"),
}


@pytest.mark.parametrize("rule", FOLDERS)
def test_repository_keeps(rule):
    found = [complaint for folder in FOLDERS[rule] for source in sources(folder) for complaint in rule(source)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (too_long_files, "x = 1\n" * (FILE_LINES + 1)),
        (too_long_functions, "def f():\n" + "    x = 1\n" * FUNCTION_LINES),
        (too_long_functions, "@triton.jit\ndef f():\n" + "    x = 1\n" * TRITON_LINES),
        (too_many_parameters, "def f(a, b, c, d, *e, g, **h): ...".replace("c,", "c, c2,")),
        (untyped_signatures, "def f(a: int, *b) -> int: ..."),
        (untyped_signatures, "def f(a: int): ..."),
        (untyped_signatures, "class A:\n    def f(self, a) -> None: ..."),
    ],
)
def test_rules_notice(rule, text):
    source = Source(Path(PACKAGE / "x.py"))
    source.__dict__["text"] = text
    assert len(rule(source)) == 1


def test_rules_accept_what_just_fits():
    source = Source(Path(PACKAGE / "x.py"))
    source.__dict__["text"] = (
        "class A:\n    def f(self, a: int, b: int, c: int, d: int, e: int, *g: int, h: int) -> None:\n"
        + ("        x = 1\n" * (FUNCTION_LINES - 1))
    )
    for rule in FOLDERS:
        assert rule(source) == []
