"""Compiles recorded Triton launches ahead of time for a named architecture, on any machine, and reads the result."""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass
from typing import Any

from fastattn.runtime.audit import REGISTERS, dump
from fastattn.runtime.gpu import shared_limit
from fastattn.runtime.launch import OPTIONS, Launch, class_of

PARKED = 16  # bytes of stack that are no fault: a scalar or two that the compiler keeps there outside the loop
SPILLED = 160  # nor are so many, where no loop spends more than SHARE of its instructions on them
SHARE = 0.01
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: registers per thread, bytes of stack (spills live there) and shared memory.

    looped: where more than PARKED bytes are on the stack, the largest share of a loop's instructions that reach for them
    """

    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    ptx: str
    looped: float = 0.0

    def count(self, instruction: str) -> int:
        """How often an instruction's name occurs in the PTX, such as "wgmma.mma_async" or "mma.sync"."""
        return len(re.findall(rf"\b{re.escape(instruction)}", self.ptx))

    def faults(self) -> list[str]:
        """Why it should not be used."""
        found = []
        if self.stack > (PARKED if self.looped > SHARE else SPILLED):
            found.append(f"{self.stack} bytes of stack per thread, {self.looped:.1%} of a loop: it spills")
        if self.num_warps * -(-self.registers // 8) * 256 > REGISTERS:  # a warp's, as they are given out
            found.append(f"{self.num_warps} warps of {self.registers} registers, {REGISTERS} registers are there")
        if self.shared > shared_limit(self.arch):
            found.append(f"{self.shared} bytes of shared memory, {shared_limit(self.arch)} fit")
        return found

    def __str__(self) -> str:
        name = f"{self.kernel} sm_{self.arch}, {self.num_warps} warps"
        return f"{name}: {self.registers} registers, {self.stack} B stack, {self.shared} B shared"


def key(launch: Launch) -> tuple[Any, ...]:
    """Launches with equal keys compile to the same code."""
    constants = tuple(launch.constants.items())
    return launch.kernel.__name__, launch.num_warps, launch.num_stages, constants, *map(class_of, launch.args)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile as Triton would on a GPU of compute capability `arch` (90 means sm_90). Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **OPTIONS}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, unbound = bind(*launch.args, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, unbound)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=target, options=parsed.__dict__)
    registers, stack, *_ = dump(built.asm["cubin"])
    looped = spent_on_stack(dump(built.asm["cubin"], "-sass")[-1]) if stack > PARKED else 0.0
    return Compiled(
        kernel.__name__, arch, launch.num_warps, registers, stack, built.metadata.shared, built.asm["ptx"], looped
    )


def spent_on_stack(sass: str) -> float:
    """Of the disassembled code's loops, the largest share of instructions that read or write the stack. Each access counts
    for the smallest loop it stands in, and that loop with the loops within it."""
    code = [(int(m[1], 16), m[2], m[3]) for m in _LINE.finditer(sass)]
    jumps = ((at, re.search(r"\b0x([0-9a-f]+)\s*$", rest)) for at, opcode, rest in code if opcode == "BRA")
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    accesses = collections.Counter[tuple[int, int]]()
    for at, opcode, _ in code:
        if opcode in ("LDL", "STL"):
            around = [(first, last) for first, last in loops if first <= at <= last]
            if around:
                accesses[min(around, key=lambda loop: loop[1] - loop[0])] += 1
    return max((n / sum(a <= at <= b for at, *_ in code) for (a, b), n in accesses.items()), default=0.0)
