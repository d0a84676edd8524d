"""One instruction in translation: its modifiers are taken one by one, and one that nobody takes is an error."""

from __future__ import annotations

import re

from .operands import Names, cpp_type
from .parser import Address, Instruction, Operand, Pair, PtxError, Register

_TYPE = re.compile(r"pred|(?:b|u|s)(?:8|16|32|64)|f(?:16|16x2|32|64)|bf16|bf16x2|tf32")


class Operation:
    """An instruction with the names that it may use."""

    def __init__(self, instruction: Instruction, names: Names):
        self.operands = instruction.operands
        self.names = names
        self.family, *self.modifiers = instruction.opcode.split(".")

    # --- modifiers ---

    def flag(self, *names: str) -> bool:
        """Take these modifiers where they stand; whether one of them did."""
        found = [m for m in self.modifiers if m in names]
        self.modifiers = [m for m in self.modifiers if m not in names]
        return bool(found)

    def choose(self, *names: str, default: str | None = None) -> str:
        """Take the one of these modifiers that stands here."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return name
        if default is None:
            raise PtxError(f"one of .{', .'.join(names)} is wanted")
        return default

    def type(self) -> str:
        """Take the last modifier, a type."""
        if not self.modifiers or not _TYPE.fullmatch(self.modifiers[-1]):
            raise PtxError("a type is wanted at the end")
        return self.modifiers.pop()

    def types(self, count: int) -> list[str]:
        """Take the last `count` modifiers, all types, in their order."""
        return [self.type() for _ in range(count)][::-1]

    # --- operands ---

    def read(self, index: int, kind: str) -> str:
        """Operand `index` as a value of PTX type `kind`."""
        if index >= len(self.operands):
            raise PtxError(f"operand {index + 1} is missing")
        return self.names.read(self.operands[index], kind)

    def write(self, expression: str, kind: str) -> str:
        """The statement that gives operand 0 its value."""
        return self.names.write(self.operands[0], expression, kind)

    def vector(self, index: int, count: int) -> tuple[Operand | None, ...]:
        """The registers of a vector operand."""
        return self.names.items(self.operands[index], count)

    def read_array(self, index: int, count: int, kind: str, name: str) -> str:
        """The declaration of a C++ array with the values of a vector operand."""
        values = ", ".join(self.names.read(item, kind) for item in self.vector(index, count))
        return f"const {cpp_type(kind)} {name}[{count}] = {{{values}}};"

    def write_array(self, index: int, count: int, kind: str, name: str) -> str:
        """Statements that store a C++ array into the registers of a vector operand."""
        items = self.vector(index, count)
        return " ".join(
            self.names.write(item, f"{name}[{i}]", kind) for i, item in enumerate(items) if item is not None
        )

    def pointer(self, index: int, space: str, kind: str, count: int = 1) -> str:
        """A checked pointer from an address operand."""
        return self.names.pointer(self.operands[index], space, kind, count)

    def shared_address(self, index: int) -> str:
        """An address operand in shared memory, as uint32_t."""
        return self.names.address(self.operands[index], "u32")

    def global_address(self, index: int) -> str:
        """An address operand in global memory, as uint64_t."""
        return self.names.address(self.operands[index], "u64")

    def pair(self, index: int) -> tuple[Operand | None, Operand | None]:
        """The two registers of `d|p`, or one and None."""
        operand = self.operands[index]
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def expect(self, *counts: int) -> None:
        """Raise unless the number of operands is one of these."""
        if len(self.operands) not in counts:
            raise PtxError(f"{len(self.operands)} operands where {' or '.join(map(str, counts))} are wanted")

    def is_register(self, operand: Operand | None) -> bool:
        """Whether an operand is a register, not a constant, a symbol or an address."""
        return isinstance(operand, Register) and not isinstance(operand, Address)
