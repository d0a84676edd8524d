"""PTX, as nvcc writes it, into C++ that runs on the emulator's fibers: one C++ function a kernel.

parser.py reads the text; operands.py writes registers, numbers and addresses as C++; arithmetic.py, movement.py,
memory.py and warp.py have a function for each instruction family; emit.py puts a translation unit together. Their
run-time half is runtime/ptx.hpp.
"""

from .emit import translate
from .parser import PtxError, parse

__all__ = ["PtxError", "parse", "translate"]
