"""What a compiled kernel uses of a GPU that need not be there: registers, stack, shared memory, barriers, instructions.

Reports lie beside the compiled kernels in their cache (docs/cuda.md), under names that differ whenever a kernel's code,
its compiler or this file does, so that an audit compiles what has changed since the last one.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastattn.runtime import cache, env, jit
from fastattn.runtime.gpu import shared_limit

if TYPE_CHECKING:
    from fastattn.runtime import cuda

REGISTERS, BARRIERS = 65536, 16  # per multiprocessor, per block; the same on all that we compile for
SECONDS = 10.0  # of one core, to compile one specialisation
_RESERVED_SHARED = (
    1 << 10
)  # per block from compute capability 9.0 on, beside the limit; the compiler counts it as static
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")
_JUMPS = ("BRA", "BSSY", "CALL", "JMP", "WARPSYNC")  # they may name an address
_ENDS = ("BRA", "BRX", "EXIT", "JMP", "JMX", "RET")  # without a predicate nothing goes on behind them


class Role(NamedTuple):
    """What warpgroups do behind a setmaxnreg: raises or lowers, to so many registers per thread; used: the number of the
    highest register that code names which such a warpgroup can reach, plus 1."""

    raises: bool
    budget: int
    used: int


@dataclass(frozen=True)
class Audited:
    """One specialisation for one target ("sm_90a"). Registers (at first) and stack are per thread, shared memory per block;
    log: what the compiler warns of."""

    kernel: str
    target: str
    threads: int
    registers: int
    stack: int
    shared: int
    barriers: int
    opcodes: collections.Counter[str]
    seconds: float
    log: str = ""
    roles: tuple[Role, ...] = ()

    def count(self, opcode: str) -> int:
        """How often an opcode occurs, with whatever follows it: "HMMA" counts HMMA.16816.F32, "HMMA.16816" only such."""
        return sum(n for name, n in self.opcodes.items() if name == opcode or name.startswith(f"{opcode}."))

    def faults(self, expected: Sequence[str] = ()) -> list[str]:
        """Why it should not be shipped. expected: opcodes that must occur."""
        found = []
        spills = self.count("LDL") + self.count("STL")
        if self.stack or spills:
            found.append(f"{self.stack} bytes of stack per thread and {spills} accesses to it: it spills")
        limit = shared_limit(arch_of(self.target))
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} fit")
        per_warp = -(-self.registers * 32 // 256) * 256  # as they are given out
        if per_warp * -(-self.threads // 32) > REGISTERS:
            found.append(f"{self.threads} threads of {self.registers} registers, {REGISTERS} registers are there")
        found += self._roles_at_fault()
        if self.barriers > BARRIERS:
            found.append(f"{self.barriers} barriers, {BARRIERS} are there")
        found += [f"no {opcode} in it" for opcode in expected if not self.count(opcode)]
        if self.log:  # such as wgmma that ptxas serialises
            found.append(f"the compiler says: {' '.join(self.log.split())}")
        return found

    def _roles_at_fault(self) -> Iterator[str]:
        """A warpgroup waits for ever where the block's registers, those it was launched with, do not suffice for all. One
        lowers its share, the others raise theirs."""
        for role in self.roles:
            if role.used > role.budget:
                yield f"a role of {role.budget} registers uses {role.used}"
        lowered, raised = ([r.budget for r in self.roles if r.raises is way] for way in (False, True))
        asked = 128 * sum(lowered) + (self.threads - 128 * len(lowered)) * max(raised, default=0)
        pool = self.threads * (-(-self.registers // 8) * 8)
        if self.roles and asked > pool:
            yield f"its warpgroups ask for {asked} registers, the block has {pool}"

    def __str__(self) -> str:
        uses = f"{self.registers} registers, {self.stack} B stack, {self.shared} B shared, {self.barriers} barriers"
        uses += "".join(f", {role.used} of {role.budget} in a role" for role in self.roles)
        return f"{self.kernel} {self.target}, {self.threads} threads: {uses}, {self.seconds:.1f} s"


def arch_of(target: str) -> int:
    """ "sm_90a" -> 90."""
    return int(re.sub(r"\D", "", target))


def audit(kernel: cuda.Kernel, target: str, *, fresh: bool = False) -> Audited:
    """What an earlier audit of the same code reported; where there is none, or `fresh`, compiles and disassembles. Raises
    RuntimeError where it does not compile."""
    entry = _entry(kernel, target)
    kept = None if fresh else cache.read(entry)
    facts = json.loads(kept) if kept else _compiled(kernel, target)
    if not kept:
        cache.write(entry, json.dumps(facts).encode())
    shared = facts.pop("static") + kernel.shared
    opcodes, roles = collections.Counter(facts.pop("opcodes")), tuple(Role(*role) for role in facts.pop("roles"))
    return Audited(str(kernel), target, kernel.threads, shared=shared, opcodes=opcodes, roles=roles, **facts)


def is_kept(kernel: cuda.Kernel, target: str) -> bool:
    """Would `audit` compile nothing?"""
    return cache.read(_entry(kernel, target)) is not None


def _entry(kernel: cuda.Kernel, target: str) -> str:
    return f"{jit.entry_of(kernel, target)}.audit-{_reader()}"


@functools.cache
def _reader() -> str:
    """Who reads the compiled code: this file and cuobjdump."""
    facts = Path(__file__).read_bytes(), str(Path(_cuobjdump()).stat().st_size).encode()
    return hashlib.sha256(b"\n".join(facts)).hexdigest()[:16]


def _compiled(kernel: cuda.Kernel, target: str) -> dict[str, Any]:
    """The fields of Audited that the launch does not decide, and the bytes of static shared memory."""
    built, seconds = _timed(kernel, target)
    if seconds > SECONDS:  # whoever shares the core may be to blame
        seconds = min(seconds, _timed(kernel, target)[1])
    registers, stack, static, text = dump(built.image, "-elf", "-sass")
    barriers = re.search(r"EIATTR_NUM_BARRIERS\s+Format:\s+\w+\s+Value:\s+(\w+)", text)
    return {
        "registers": registers,
        "stack": stack,
        "static": max(0, static - _RESERVED_SHARED) if arch_of(target) >= 90 else static,
        "barriers": int(barriers[1], 16) if barriers else 0,
        "opcodes": collections.Counter(_OPCODE.findall(text)),
        "roles": roles_of(text),
        "seconds": seconds,
        "log": built.log,
    }


def roles_of(text: str) -> list[Role]:
    """Of disassembled code: one for each setmaxnreg."""
    if "USETMAXREG" not in text:
        return []
    code = [(int(m[1], 16), m[2], m[3], m[4]) for m in _INSTRUCTION.finditer(text)]
    if any(opcode in ("BRX", "JMX") for _, _, opcode, _ in code):
        raise RuntimeError("audit: an indirect jump in a kernel with roles: which code is whose cannot be told")
    number = {address: i for i, (address, *_) in enumerate(code)}
    roles = []
    for start, (_, _, opcode, operands) in enumerate(code):
        if opcode != "USETMAXREG":
            continue
        reached, waiting, used = {start}, [start], 0
        while waiting:
            at = waiting.pop()
            _, predicate, name, rest = code[at]
            used = max(used, _registers_named(name, rest))
            behind = [] if name in _ENDS and not predicate and "," not in rest else [at + 1]
            if name in _JUMPS and (to := re.search(r"\b0x[0-9a-f]+\s*$", rest)):
                behind.append(number[int(to[0], 16)])
            fresh = {i for i in behind if i < len(code)} - reached
            reached |= fresh
            waiting += fresh
        budget = re.search(r"0x([0-9a-f]+)\s*$", operands)
        if budget is None:
            raise RuntimeError(f"audit: USETMAXREG{operands} names no number of registers")
        roles.append(Role("TRY_ALLOC" in operands, int(budget[1], 16), used))
    return roles


def _registers_named(opcode: str, operands: str) -> int:
    """The highest one plus 1; of a wgmma the last one of its sums, of others the one that is written out."""
    first = [int(n) for n in re.findall(r"\bR(\d+)\b", operands)]
    if not first:
        return 0
    columns = re.match(r"\.64x(\d+)x", operands) if opcode == "HGMMA" else None
    return max(max(first) + 1, first[0] + int(columns[1]) // 2 if columns else 0)


def _timed(kernel: cuda.Kernel, target: str) -> tuple[jit.Compiled, float]:
    start = time.process_time()  # of one core, whatever else the machine does
    built = jit.compile(kernel, target)
    return built, time.process_time() - start


def dump(cubin: bytes, *options: str) -> tuple[int, int, int, str]:
    """Registers and bytes of stack per thread, bytes of static shared memory, and all that cuobjdump says."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", *options, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise RuntimeError(f"audit: cuobjdump did not report resources: {text}")
    return int(found[1]), int(found[2]), int(found[3]), text


@functools.cache
def _cuobjdump() -> str:
    """That of Triton's wheel, which has nvdisasm beside it, else that of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    places = (
        [Path(place) / "backends" / "nvidia" / "bin" for place in (spec.submodule_search_locations or ())]
        if spec
        else []
    )
    places += [Path(env.CUDA_HOME) / "bin"] if env.CUDA_HOME else []
    for place in places:
        if (place / "cuobjdump").is_file():
            return str(place / "cuobjdump")
    found = shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("audit: cuobjdump must be there, from the package triton or the CUDA toolkit (CUDA_HOME)")
    return found
