"""PTX text into a module of kernels, each a list of statements. Whatever is not understood is an error."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(ValueError):
    """PTX that this translator does not take; the text says which line of which kernel."""


# --- operands ---


@dataclass(frozen=True)
class Register:
    """A register, or a predicate where an instruction has one: `%r1`, `low`, `!%p1`."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine: `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Integer:
    """An integer constant."""

    value: int


@dataclass(frozen=True)
class Float:
    """A floating constant, by its bits: `0f3F800000`."""

    bits: int
    width: int


@dataclass(frozen=True)
class Symbol:
    """A variable, parameter, label or table by name."""

    name: str


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`; None stands for the sink `_`."""

    items: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Integer
    offset: int = 0


@dataclass(frozen=True)
class Pair:
    """`d|p`: a result and a predicate, or two predicates; None stands for the sink `_`."""

    first: Register | None
    second: Register | None


Operand = Register | Special | Integer | Float | Symbol | Vector | Address | Pair


# --- statements ---


@dataclass(frozen=True)
class Instruction:
    """One instruction with the predicate that guards it."""

    opcode: str
    operands: tuple[Operand | None, ...]
    guard: Register | None
    text: str


@dataclass(frozen=True)
class Label:
    """A place to branch to."""

    name: str


@dataclass(frozen=True)
class ScopeOpen:
    """`{`: registers and labels declared from here on are known until its `}` only."""


@dataclass(frozen=True)
class ScopeClose:
    """`}`."""


@dataclass(frozen=True)
class Registers:
    """`.reg .b32 %r<9>;` with its names spelled out."""

    type: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """A variable of a state space: bytes of shared, local, global or const memory."""

    space: str
    name: str
    align: int
    size: int  # 0: as much as the launch gives (dynamic shared memory)
    initial: bytes = b""


@dataclass(frozen=True)
class BranchTargets:
    """The labels that a `brx.idx` chooses from."""

    name: str
    labels: tuple[str, ...]


Statement = Instruction | Label | ScopeOpen | ScopeClose | Registers | Variable | BranchTargets


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter and where it lies in the parameter block."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One `.entry`."""

    name: str
    parameters: list[Parameter]
    max_threads: int  # of .maxntid; 0 where none is given
    body: list[Statement]

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        return max((p.offset + p.size for p in self.parameters), default=0)


@dataclass
class Module:
    """One file of PTX."""

    target: int  # 80 for sm_80
    variables: list[Variable] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


def type_size(name: str) -> int:
    """Bytes of an element of a PTX type: 4 for `f32` and `f16x2`."""
    match = re.fullmatch(r"(?:b|u|s|f|bf)(8|16|32|64)(x2)?", name)
    if not match:
        raise PtxError(f"unknown PTX type .{name}")
    return int(match[1]) // 8 * (2 if match[2] else 1)


# --- reading ---

_NAME = r"[A-Za-z_$%][\w$]*"
_INTEGER = r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?"
_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid)\.[xyz]|%(?:laneid|warpid|lanemask_(?:eq|le|lt|ge|gt))")


def parse(text: str) -> Module:
    """The module that `text`, the output of `nvcc -ptx`, holds."""
    text = re.sub(r"/\*.*?\*/", " ", re.sub(r"//[^\n]*", "", text), flags=re.S)
    target = re.search(r"^\.target\s+sm_(\d+)", text, re.M)
    if not target:
        raise PtxError("no .target sm_<number> in this PTX")
    module = Module(int(target[1]))
    position = 0
    directive = re.compile(r"\s*(?:\.(?:version|target|address_size)[^\n]*\n)")
    while position < len(text.rstrip()):
        if match := directive.match(text, position):
            position = match.end()
            continue
        end = min((i for i in (text.find(c, position) for c in ";(") if i >= 0), default=-1)
        head = text[position:end].strip()
        if end < 0:
            raise PtxError(f"PTX outside of any kernel: {text[position:].strip()[:200]}")
        if re.search(r"\.entry\b", head):
            kernel, position = _kernel(text, position)
            module.kernels.append(kernel)
        elif text[end] == ";":
            module.variables.append(_variable(head))
            position = end + 1
        else:
            raise PtxError(f"only kernels (.entry) and variables are taken outside of kernels, not: {head[:200]}")
    return module


def _kernel(text: str, position: int) -> tuple[Kernel, int]:
    """The kernel whose text begins at `position`, and the position behind it."""
    pattern = rf"\s*(?:\.(?:visible|weak)\s+)?\.entry\s+({_NAME})\s*\(([^)]*)\)([^{{]*)\{{"
    head = re.compile(pattern).match(text, position)
    if not head:
        raise PtxError(f"kernel head: {text[position : position + 200].strip()}")
    depth, end = 1, head.end()
    while depth:
        if end >= len(text):
            raise PtxError(f"kernel {head[1]} has no end")
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    try:
        threads = re.search(r"\.maxntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", head[3])
        unknown = set(re.findall(r"\.(\w+)", head[3])) - {"maxntid", "minnctapersm"}
        if unknown:
            raise PtxError(f"kernel directives {sorted(unknown)}")
        maximum = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1) if threads else 0
        body = [_statement(piece) for piece in _pieces(text[head.end() : end - 1])]
        kernel = Kernel(head[1], _parameters(head[2]), maximum, [s for s in body if s is not None])
    except PtxError as error:
        raise PtxError(f"kernel {head[1]}: {error}") from None
    return kernel, end


def _parameters(text: str) -> list[Parameter]:
    """Parameters with the offsets of the C layout."""
    parameters: list[Parameter] = []
    offset = 0
    for piece in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(
            rf"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?"
            rf"({_NAME})(?:\[(\d+)\])?",
            piece,
        )
        if not match:
            raise PtxError(f"parameter: {piece}")
        element = type_size(match[2])
        align, size = int(match[1] or element), element * int(match[4] or 1)
        offset = -(-offset // align) * align
        parameters.append(Parameter(match[3], offset, size))
        offset += size
    return parameters


def _pieces(body: str):
    """Braces of scopes, labels and statements without their semicolons, in order."""
    position = 0
    label = re.compile(rf"({_NAME})\s*:(?!:)")
    while position < len(body):
        if body[position].isspace() or body[position] == ";":
            position += 1
        elif body[position] in "{}":
            yield body[position]
            position += 1
        elif match := label.match(body, position):
            position = match.end()
            # A table's name stands like a label before its directive.
            table = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(body, position)
            if table:
                position = table.end()
                yield f"{match[1]}: .branchtargets {' '.join(table[1].split())}"
            else:
                yield f"{match[1]}:"
        else:
            end = body.find(";", position)
            if end < 0:
                raise PtxError(f"no ';' behind: {body[position : position + 200].strip()}")
            yield " ".join(body[position:end].split())
            position = end + 1


def _statement(piece: str) -> Statement | None:
    if piece == "{":
        return ScopeOpen()
    if piece == "}":
        return ScopeClose()
    if match := re.fullmatch(rf"({_NAME}):", piece):
        return Label(match[1])
    if match := re.fullmatch(rf"({_NAME}): \.branchtargets (.*)", piece):
        return BranchTargets(match[1], tuple(name.strip() for name in match[2].split(",")))
    if match := re.fullmatch(r"\.reg \.(\w+) (.*)", piece):
        names = (name for item in match[2].split(",") for name in _register_names(item.strip()))
        return Registers(match[1], tuple(names))
    if piece.startswith(".pragma") or piece.startswith(".loc "):
        return None
    if piece.startswith("."):
        return _variable(piece)
    return _instruction(piece)


def _register_names(item: str) -> list[str]:
    """`%r<3>` stands for %r0, %r1, %r2."""
    if match := re.fullmatch(rf"({_NAME})<(\d+)>", item):
        return [f"{match[1]}{i}" for i in range(int(match[2]))]
    if not re.fullmatch(_NAME, item):
        raise PtxError(f"register declaration: {item}")
    return [item]


def _variable(text: str) -> Variable:
    text = " ".join(text.split())
    match = re.fullmatch(
        rf"(?:\.(?:extern|visible|weak) )?\.(shared|local|global|const) (?:\.align (\d+) )?\.(\w+) "
        rf"({_NAME})(?:\[(\d*)\])?(?: ?= ?(.*))?",
        text,
    )
    if not match:
        raise PtxError(f"directive: {text[:200]}")
    space, align, kind, name, count, initial = match.groups()
    element = type_size(kind)
    size = element * (1 if count is None else int(count or 0))
    content = b""
    if initial is not None:
        try:
            values = [int(v, 0) for v in initial.strip("{} ").split(",") if v.strip()]
        except ValueError:
            raise PtxError(f"initial value: {text[:200]}") from None
        content = b"".join((v % (1 << 8 * element)).to_bytes(element, "little") for v in values).ljust(size, b"\0")
    return Variable(space, name, int(align or element), size, content)


def _instruction(text: str) -> Instruction:
    match = re.fullmatch(rf"(?:@(!?)({_NAME}) )?([a-z][\w.:]*)(?: (.*))?", text)
    if not match:
        raise PtxError(f"statement: {text}")
    guard = Register(match[2], bool(match[1])) if match[2] else None
    operands = tuple(_operand(item) for item in _split(match[4] or ""))
    return Instruction(match[3], operands, guard, text)


def _split(text: str) -> list[str]:
    """Operands at the commas outside of all brackets."""
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    return [*(item.strip() for item in items), text[start:].strip()] if text.strip() else []


def _operand(text: str) -> Operand | None:
    if text == "_":
        return None
    if text.startswith("{"):
        return Vector(tuple(_operand(item) for item in _split(text[1:-1])))
    if text.startswith("["):
        return _address(text[1:-1].strip())
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Float(int(match[1] or match[2], 16), 32 if match[1] else 64)
    if re.fullmatch(_INTEGER, text):
        return Integer(int(text.rstrip("U"), 0))
    if _SPECIAL.fullmatch(text):
        return Special(text)
    if match := re.fullmatch(rf"(_|{_NAME})\|(_|{_NAME})", text):
        return Pair(*(None if name == "_" else Register(name) for name in match.groups()))
    if match := re.fullmatch(rf"(!?)({_NAME})", text):
        # Whether a plain name is a register or a symbol is known where it is used, from the declarations.
        return Register(match[2], bool(match[1])) if match[1] or match[2].startswith("%") else Symbol(match[2])
    raise PtxError(f"operand: {text}")


def _address(text: str) -> Address:
    match = re.fullmatch(rf"({_NAME}|{_INTEGER}) ?(?:\+ ?({_INTEGER})|(-\d+))?", text)
    if not match:
        raise PtxError(f"address: [{text}]")
    base = _operand(match[1])
    assert isinstance(base, Register | Symbol | Integer)
    return Address(base, int((match[2] or match[3] or "0").rstrip("U"), 0))
