"""A module of PTX as one C++ translation unit: a function a kernel, and its entry in the table of kernels."""

from __future__ import annotations

from . import arithmetic, memory, movement, warp  # noqa: F401 - they enter their families
from .families import FAMILIES
from .operands import Names, identifier, storage_type
from .operation import Operation
from .parser import (
    BranchTargets,
    Instruction,
    Kernel,
    Label,
    Module,
    PtxError,
    Registers,
    ScopeClose,
    ScopeOpen,
    Statement,
    Variable,
    parse,
)


def translate(text: str) -> str:
    """C++ for the output of `nvcc -ptx`; PtxError where anything in it is not known."""
    return emit(parse(text))


def emit(module: Module) -> str:
    """The translation unit of a module."""
    for variable in module.variables:
        if variable.space not in ("global", "const", "shared"):
            raise PtxError(f"variable {variable.name} of .{variable.space} outside of kernels")
    lines = ['#include "ptx.hpp"', "", "namespace {", ""]
    lines += [_array(v) for v in module.variables if v.space != "shared"]
    for index, kernel in enumerate(module.kernels):
        try:
            lines += _kernel(kernel, module, index)
        except PtxError as error:
            raise PtxError(f"kernel {kernel.name}: {error}") from None
    return "\n".join([*lines, "}  // namespace", ""])


def _array(variable: Variable) -> str:
    """Bytes of local, global or const memory."""
    initial = f" = {{{', '.join(map(str, variable.initial))}}}" if variable.initial else ""
    storage = "" if variable.space == "local" else "static "
    return f"alignas({variable.align}) {storage}unsigned char {identifier(variable.name)}[{variable.size}]{initial};"


def _kernel(kernel: Kernel, module: Module, index: int) -> list[str]:
    own = [s for s in kernel.body if isinstance(s, Variable)]
    names = Names(kernel, [*module.variables, *own])
    static_shared = _place_shared(names)
    code = _body(kernel.body, names)
    head = [f"// {kernel.name}", f"void kernel_{index}([[maybe_unused]] const unsigned char* parameters) {{"]
    for local in (v for v in own if v.space == "local"):
        head += [_array(local), f"std::memset({identifier(local.name)}, 0xff, {local.size});"]
    head += _declarations(names)
    offsets = ", ".join(f"{{{p.offset}, {p.size}}}" for p in kernel.parameters)
    entry = (
        f'const ptx::Registration registration_{index}({{{module.target}, "{kernel.name}", kernel_{index}, '
        f"{{{offsets}}}, {kernel.parameter_bytes}, {kernel.max_threads}, {static_shared}}});"
    )
    return [*head, *code, "}", entry, ""]


def _place_shared(names: Names) -> int:
    """Give each shared variable its offset, dynamic ones behind the others; the bytes of those others."""
    variables = [v for v in names.variables.values() if v.space == "shared"]
    offset = 0
    for variable in (v for v in variables if v.size):
        offset = -(-offset // variable.align) * variable.align
        names.shared_offsets[variable.name] = offset
        offset += variable.size
    if not offset:
        start = 0
    else:  # aligned for whatever the dynamic ones want
        start = -(-offset // 128) * 128
    for variable in (v for v in variables if not v.size):
        names.shared_offsets[variable.name] = start
    return start


def _declarations(names: Names) -> list[str]:
    """The registers that the kernel uses. What nothing has been written to is NaN, or all ones."""
    lines = []
    by_type: dict[str, list[str]] = {}
    for name, kind in names.scopes[0].items():
        if name in names.used:
            by_type.setdefault(storage_type(kind), []).append(identifier(name))
    for kind, registers in by_type.items():
        for start in range(0, len(registers), 8):
            chunk = ", ".join(f"{name} = ptx::poison<{kind}>" for name in registers[start : start + 8])
            lines.append(f"{kind} {chunk};")
    return lines


def _body(body: list[Statement], names: Names) -> list[str]:
    names.tables = {s.name: s.labels for s in body if isinstance(s, BranchTargets)}
    labels = _labels_by_scope(body)
    names.labels = [labels[0]]
    scope = 0
    lines = []
    for statement in body:
        if isinstance(statement, ScopeOpen):
            scope += 1
            names.scopes.append({})
            names.labels.append(labels[scope])
            lines.append("{")
        elif isinstance(statement, ScopeClose):
            names.scopes.pop()
            names.labels.pop()
            lines.append("}")
        elif isinstance(statement, Label):
            lines.append(f"{names.label(statement.name)}:;")
        elif isinstance(statement, Registers):
            for name in statement.names:
                names.scopes[-1][name] = statement.type
            if len(names.scopes) > 1:
                lines += [f"{storage_type(statement.type)} {identifier(n)};" for n in statement.names]
        elif isinstance(statement, Instruction):
            lines.append(_instruction(statement, names))
    return lines


def _labels_by_scope(body: list[Statement]) -> list[dict[str, str]]:
    """For each scope, in the order in which they open, its labels and their C++ names."""
    scopes: list[dict[str, str]] = [{}]
    inside = [0]
    for statement in body:
        if isinstance(statement, ScopeOpen):
            inside.append(len(scopes))
            scopes.append({})
        elif isinstance(statement, ScopeClose):
            inside.pop()
        elif isinstance(statement, Label):
            # C++ labels belong to the function: the scope's number keeps those of inline asm apart.
            scopes[inside[-1]][statement.name] = f"{identifier(statement.name)}_{inside[-1]}"
    return scopes


def _instruction(instruction: Instruction, names: Names) -> str:
    try:
        operation = Operation(instruction, names)
        handler = FAMILIES.get(operation.family)
        if handler is None:
            raise PtxError("no such instruction is known")
        code = handler(operation)
        if operation.modifiers:
            raise PtxError(f"unknown modifier .{', .'.join(operation.modifiers)}")
        if instruction.guard:
            code = f"if ({names.read(instruction.guard, 'pred')}) {{ {code} }}"
        return code
    except PtxError as error:
        raise PtxError(f"{error}: {instruction.text}") from None
