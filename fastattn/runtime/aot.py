"""Compiles recorded Triton launches ahead of time for a named architecture, on any machine, and reads the result."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastattn.runtime.audit import dump
from fastattn.runtime.gpu import shared_limit
from fastattn.runtime.launch import Launch, class_of

PARKED = 16  # bytes of stack that are no fault: a scalar or two that the compiler keeps there outside the loop


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture: registers per thread, bytes of stack (spills live there) and shared memory."""

    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    shared: int
    ptx: str

    def count(self, instruction: str) -> int:
        """How often an instruction's name occurs in the PTX, such as "wgmma.mma_async" or "mma.sync"."""
        return len(re.findall(rf"\b{re.escape(instruction)}", self.ptx))

    def faults(self) -> list[str]:
        """Why it should not be used."""
        found = []
        if self.stack > PARKED:
            found.append(f"{self.stack} bytes of stack per thread: it spills")
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
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, unbound = bind(*launch.args, **launch.constants, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, unbound)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=target, options=parsed.__dict__)
    registers, stack, *_ = dump(built.asm["cubin"])
    name = kernel.__name__
    return Compiled(name, arch, launch.num_warps, registers, stack, built.metadata.shared, built.asm["ptx"])
