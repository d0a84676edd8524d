"""Registers, constants and addresses of one kernel as C++ expressions.

A register is a C++ local of its declared width (`.b32` is uint32_t, `.f32` is float); an instruction reads it as the
type that its own name gives, which changes the interpretation of the bits, never the bits.
"""

from __future__ import annotations

from .parser import (
    Address,
    Float,
    Integer,
    Kernel,
    Operand,
    Parameter,
    PtxError,
    Register,
    Special,
    Symbol,
    Variable,
    Vector,
    type_size,
)

SPECIALS = {
    **{f"%tid.{axis}": f"ptx::thread_index().{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"ptx::block_size().{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"ptx::block_index().{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"ptx::grid_size().{axis}" for axis in "xyz"},
    "%laneid": "ptx::lane()",
    "%warpid": "ptx::warp_index()",
    "%lanemask_eq": "(1u << ptx::lane())",
    "%lanemask_lt": "((1u << ptx::lane()) - 1)",
    "%lanemask_le": "((2u << ptx::lane()) - 1)",
    "%lanemask_gt": "~((2u << ptx::lane()) - 1)",
    "%lanemask_ge": "~((1u << ptx::lane()) - 1)",
}


def width(kind: str) -> int:
    """Bits of a PTX type; 1 for predicates."""
    return 1 if kind == "pred" else 8 * type_size(kind)


HALVES = ("f16", "f16x2", "bf16", "bf16x2")


def untyped(kind: str) -> str:
    """The type that is only bits, of the same width."""
    return f"b{width(kind)}"


def half_struct(kind: str) -> str:
    """What runtime/half.hpp calls a 16-bit float."""
    return "ptx::BFloat" if kind.startswith("bf") else "ptx::Half"


def is_float(kind: str) -> bool:
    """Whether values of the type are C++ floating values; 16-bit floats are carried as their bits."""
    return kind in ("f32", "f64")


def cpp_type(kind: str) -> str:
    """The C++ type of an instruction's operand."""
    if kind == "pred":
        return "bool"
    if is_float(kind):
        return {"f32": "float", "f64": "double"}[kind]
    return f"{'' if kind[0] == 's' else 'u'}int{width(kind)}_t"


def storage_type(kind: str) -> str:
    """The C++ type of a register declared with this PTX type."""
    return cpp_type(kind) if kind == "pred" or is_float(kind) else f"uint{width(kind)}_t"


def reinterpret(expression: str, target: str) -> str:
    """The bits of a C++ value as the C++ type `target` of the same size."""
    return f"ptx::bits<{target}>({expression})"


def identifier(name: str) -> str:
    """A C++ name for a PTX name; those of nvcc's registers stay as they are."""
    plain = name.replace("$", "_").replace("%", "_")
    return plain[1:] if name.startswith("%") else f"x_{plain}"


class Names:
    """What the names in a kernel mean, by scope."""

    def __init__(self, kernel: Kernel, variables: list[Variable]):
        self.parameters: dict[str, Parameter] = {p.name: p for p in kernel.parameters}
        self.parameter_bytes = kernel.parameter_bytes
        self.variables: dict[str, Variable] = {v.name: v for v in variables}
        self.shared_offsets: dict[str, int] = {}
        self.scopes: list[dict[str, str]] = [{}]  # register name: declared type
        self.labels: list[dict[str, str]] = [{}]  # label: its C++ name
        self.tables: dict[str, tuple[str, ...]] = {}
        self.used: set[str] = set()
        self.barriers = 0  # so far: each gets a number of its own

    def declared(self, name: str) -> str | None:
        """The type a register was declared with, or None where no such register is in scope."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def register(self, name: str) -> tuple[str, str]:
        """C++ name and declared type of a register."""
        kind = self.declared(name)
        if kind is None:
            raise PtxError(f"no register {name} is declared")
        if name in self.scopes[0]:
            self.used.add(name)
        return identifier(name), kind

    def label(self, name: str) -> str:
        """The C++ label for a PTX label."""
        for scope in reversed(self.labels):
            if name in scope:
                return scope[name]
        raise PtxError(f"no label {name}")

    # --- values ---

    def read(self, operand: Operand | None, kind: str) -> str:
        """The value of `operand` as PTX type `kind`, a C++ expression of cpp_type(kind)."""
        target = cpp_type(kind)
        if isinstance(operand, Symbol) and self.declared(operand.name):
            operand = Register(operand.name)
        if isinstance(operand, Register):
            return self._read_register(operand, kind)
        if isinstance(operand, Integer):
            return _integer(operand.value, kind)
        if isinstance(operand, Float):
            if operand.width != width(kind):
                raise PtxError(f"a constant of {operand.width} bits where .{kind} is read")
            suffix = "u" if operand.width == 32 else "ull"
            literal = f"{operand.bits:#x}{suffix}"
            return reinterpret(literal, target) if is_float(kind) else f"{target}({literal})"
        if isinstance(operand, Special):
            return f"{target}({SPECIALS[operand.name]})"
        if isinstance(operand, Symbol):
            return f"{target}({self.symbol(operand.name)})"
        raise PtxError(f"{operand} cannot be read as .{kind}")

    def _read_register(self, operand: Register, kind: str) -> str:
        name, declared = self.register(operand.name)
        if (declared == "pred") != (kind == "pred"):
            raise PtxError(f"register {operand.name} of type .{declared} where .{kind} is read")
        if kind == "pred":
            return f"!{name}" if operand.negated else name
        if operand.negated:
            raise PtxError(f"'!' before {operand.name}, which is no predicate")
        if width(declared) < width(kind):
            raise PtxError(f"register {operand.name} of type .{declared} is too narrow for .{kind}")
        if cpp_type(kind) == storage_type(declared):
            return name
        if width(declared) > width(kind):  # the low bits
            if is_float(declared) or is_float(kind):
                raise PtxError(f"register {operand.name} of type .{declared} where .{kind} is read")
            return f"{cpp_type(kind)}({name})"
        if is_float(declared) != is_float(kind):
            return reinterpret(name, cpp_type(kind))
        return f"{cpp_type(kind)}({name})"

    def write(self, operand: Operand | None, expression: str, kind: str) -> str:
        """A C++ statement that gives the register `operand` a value of PTX type `kind`.

        A register wider than the type gets the value extended: by its sign for signed types, else by zeros.
        """
        if operand is None:
            return f"(void)({expression});"
        if isinstance(operand, Symbol):
            operand = Register(operand.name)
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"{operand} cannot be written")
        name, declared = self.register(operand.name)
        if (declared == "pred") != (kind == "pred"):
            raise PtxError(f"register {operand.name} of type .{declared} where .{kind} is written")
        if width(declared) < width(kind):
            raise PtxError(f"register {operand.name} of type .{declared} is too narrow for .{kind}")
        if kind == "pred" or storage_type(declared) == cpp_type(kind):
            return f"{name} = {expression};"
        if width(declared) > width(kind) and (is_float(declared) or is_float(kind)):
            raise PtxError(f"register {operand.name} of type .{declared} where .{kind} is written")
        if is_float(declared) != is_float(kind):
            same = expression if is_float(kind) else f"{cpp_type(kind)}({expression})"
            return f"{name} = {reinterpret(same, storage_type(declared))};"
        return f"{name} = {storage_type(declared)}({cpp_type(kind)}({expression}));"

    def items(self, operand: Operand | None, count: int) -> tuple[Operand | None, ...]:
        """The registers of a vector operand of known length; a single register is a vector of one."""
        items = operand.items if isinstance(operand, Vector) else (operand,)
        if len(items) != count:
            raise PtxError(f"a vector of {len(items)} where {count} are wanted")
        return items

    # --- addresses ---

    def symbol(self, name: str) -> str:
        """The address that the name of a variable or parameter stands for."""
        if name in self.parameters:
            return f"(uintptr_t(parameters) + {self.parameters[name].offset})"
        variable = self.variables.get(name)
        if variable is None:
            raise PtxError(f"nothing is called {name}")
        if variable.space == "shared":
            return f"{self.shared_offsets[name]}u"
        return f"uintptr_t({identifier(name)})"

    def address(self, operand: Operand | None, kind: str) -> str:
        """An address operand as an integer expression of type `kind`: u32 for shared memory, else u64."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} where an address is wanted")
        base = operand.base
        if isinstance(base, Register) and kind == "u32":
            declared = self.register(base.name)[1]
            text = self.read(base, "u64" if width(declared) == 64 else "u32")
            text = f"uint32_t({text})" if width(declared) == 64 else text
        elif isinstance(base, Register):
            text = self.read(base, "u64")
        elif isinstance(base, Symbol) and (declared := self.declared(base.name)):
            text = self.read(Register(base.name), "u64" if width(declared) == 64 else "u32")
        else:
            text = self.read(base, kind)
        return f"{text} + {_integer(operand.offset, kind)}" if operand.offset else text

    def pointer(self, operand: Operand | None, space: str, kind: str, count: int) -> str:
        """A checked C++ pointer to `count` elements of `kind`: bounds where they are known, alignment always."""
        element = f"{storage_type(kind)}, {count}"
        if space == "shared":
            return f"ptx::shared<{element}>({self.address(operand, 'u32')})"
        address = self.address(operand, "u64")
        if space == "param":
            return f"ptx::parameter<{element}>(parameters, {self.parameter_bytes}, {address})"
        if space == "local":
            local = [v for v in self.variables.values() if v.space == "local"]
            if len(local) != 1:
                return f"ptx::global<{element}>({address})"
            return f"ptx::local<{element}>({identifier(local[0].name)}, {local[0].size}, {address})"
        return f"ptx::{'generic' if space == 'generic' else 'global'}<{element}>({address})"


def _integer(value: int, kind: str) -> str:
    """An integer constant as a C++ literal of cpp_type(kind), its low bits where it has too many."""
    bits = width(kind)
    if kind == "pred":
        return "true" if value else "false"
    value %= 1 << bits
    if is_float(kind):
        return reinterpret(f"{value}{'u' if bits == 32 else 'ull'}", cpp_type(kind))
    if kind[0] == "s" and value >> (bits - 1):
        value -= 1 << bits
    if value == -(1 << 63):
        return "INT64_MIN"
    if kind[0] == "s":
        if value == -(1 << 31) and bits == 32:
            return "INT32_MIN"
        literal = f"({value}{'ll' if bits == 64 else ''})"
        return literal if bits >= 32 else f"{cpp_type(kind)}{literal}"
    return f"{value}{'u' if bits == 32 else 'ull'}" if bits >= 32 else f"{cpp_type(kind)}({value}u)"
