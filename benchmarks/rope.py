"""rope_qk against the rotate-half formula of Hugging Face's models, eager and compiled."""

from __future__ import annotations

from functools import partial

import torch

import fastattn
from fastattn.ops.rope import reference

from . import rivals
from .case import DTYPES, OURS, Case, Contender, Prepared, Problem
from .law import Results
from .shapes import ROPE, rope_bytes

Tensor = torch.Tensor


def cases(quick: bool = False) -> list[Case]:
    found = []
    for shape in ROPE[1:2] if quick else ROPE:
        batch, seqlen, nheads, nheads_k, headdim = shape
        label = f"{batch}x{seqlen}x{nheads}/{nheads_k}x{headdim}"
        for dtype in ("fp32", "bf16"):
            size = 4 if dtype == "fp32" else 2
            work = rope_bytes(batch, seqlen, nheads + nheads_k, headdim, size)
            build = partial(_problem, shape, DTYPES[dtype])
            found.append(Case("rope", "forward", label, dtype, "copy", work, build, malloc="pinned"))
            if batch * seqlen * nheads * headdim * size >= 32 << 20:
                found.append(Case("rope", "large output", label, dtype, "copy", work, build))
    return found


def tables(seqlen: int, headdim: int) -> tuple[Tensor, Tensor]:
    """cos, sin [seqlen, headdim / 2] float32, base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, headdim, 2, dtype=torch.float64) / headdim)
    angle = torch.outer(torch.arange(seqlen, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def _problem(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    """q, k as a projection leaves them: memory [batch, seqlen, heads, headdim]; the formula gets bhsd views of it."""
    batch, seqlen, nheads, nheads_k, headdim = shape
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, seqlen, h, headdim, generator=g).to(dtype) for h in (nheads, nheads_k))
    cos, sin = (t.to(dtype) for t in tables(seqlen, headdim))
    cos_full, sin_full = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def law(dtype: torch.dtype) -> Results:
        return _named(reference.rope_qk(q.to(dtype), k.to(dtype), cos.to(dtype), sin.to(dtype)))

    def formula(compile_it: bool) -> Prepared:
        function = rivals.compiled(rivals.rotate_half_rope) if compile_it else rivals.rotate_half_rope
        q_, k_ = q.transpose(1, 2), k.transpose(1, 2)
        call = partial(function, q_, k_, cos_full, sin_full)
        return Prepared(call, lambda pair: _named(tuple(x.transpose(1, 2) for x in pair)))

    contenders = [
        Contender(OURS, lambda: Prepared(partial(fastattn.rope_qk, q, k, cos, sin), _named)),
        Contender("rotate-half", lambda: formula(False)),
        Contender("compiled", lambda: formula(True)),
    ]
    return Problem(law(torch.float64), _plain(q, k, cos_full, sin_full), contenders)


def _plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Results:
    """Plain PyTorch rounds after every operation; the reference rounds once."""
    pair = rivals.rotate_half_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return _named(tuple(x.transpose(1, 2) for x in pair))


def _named(pair) -> Results:
    return {"q": pair[0], "k": pair[1]}
