"""Prints, as JSON, what Triton's compiler tells a Hopper GPU for products whose operands TMA brings: the descriptors of wgmma
without their addresses, the immediates behind them, and the swizzles of the tensor maps. A second opinion for
tests/test_emulator_witness.py, which runs this in a process of its own: Triton must not be in interpreter mode."""

from __future__ import annotations

import json
import os
import re

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, c, M, N, K, A_TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [M, N] = a [M, K] · b [K, N]; with A_TURNED a lies as [K, M]."""
    if A_TURNED:
        a_tiles = tl.make_tensor_descriptor(a, [K, M], [M, 1], [BK, BM])
    else:
        a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    b_tiles = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = a_tiles.load([k, m]).T if A_TURNED else a_tiles.load([m, k])
        sums = tl.dot(x, b_tiles.load([k, n]), sums)
    tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN]).store([m, n], sums.to(tl.bfloat16))


def facts(a_turned: bool, m: int, n: int, k: int, warps: int = 4) -> dict[str, list]:
    names = {**dict.fromkeys("abc", "*bf16"), **dict.fromkeys("MNK", "i32")}
    constants = {"A_TURNED": a_turned, "BM": m, "BN": n, "BK": k}
    source = ASTSource(product, names | dict.fromkeys(constants, "constexpr"), constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": 1})
    ptx = built.asm["ptx"]
    known = {d: int(x) % (1 << 64) for d, x in re.findall(r"(?:or|add)\.[bs]64\s+(%rd\d+), %rd\d+, (-?\d+);", ptx)}
    products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (%rd\d+), (%rd\d+), %p\d+, (.*?);", ptx)
    return {
        "a": [known[x] for x, _, _ in products],
        "b": [known[x] for _, x, _ in products],
        "immediates": [x for _, _, x in products],
        "shapes": re.findall(r"mma_async\.sync\.aligned\.(\w+)", ptx),
        "swizzles": [int(x, 16) for x in re.findall(r"swizzle_mode\S+ \[.*?\], (0x\d);", ptx)],
    }


if __name__ == "__main__":
    print(json.dumps([facts(False, 64, 128, 128), facts(True, 64, 32, 64), facts(False, 64, 64, 64, warps=8)]))
