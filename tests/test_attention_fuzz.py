"""Everything at once: hypothesis draws whole calls, and each backend is held to the law against the reference.

FASTATTN_FUZZ_EXAMPLES raises the number of calls; the default is small and always the same. FASTATTN_FUZZ_BACKENDS names
others than cpu, with commas: interpreted and emulated kernels (triton, cuda) take seconds per call.
"""

from __future__ import annotations

import os
from typing import Any

import law
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fastattn import attention
from fastattn.ops.attention import reference
from fastattn.ops.attention.backends import BACKENDS

EXAMPLES = int(os.environ.get("FASTATTN_FUZZ_EXAMPLES", "150"))
BACKENDS_HERE = os.environ.get("FASTATTN_FUZZ_BACKENDS", "cpu").split(",")
CANDIDATES = [b.name for b in BACKENDS if b.name in BACKENDS_HERE]

lengths = st.integers(0, 12) | st.integers(30, 70) | st.sampled_from([1, 16, 17, 127, 128, 129, 200])
HEADDIMS = st.integers(1, 20) | st.sampled_from([32, 40, 64, 72, 96, 128])
TAKEN = {
    "cuda": (law.LOW[1:], st.integers(1, 4).map(lambda n: 8 * n) | st.sampled_from([40, 64, 72, 96, 128, 192, 256]))
}
sides = st.none() | st.integers(0, 40)


@st.composite
def calls(draw: Any, backend: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, keywords) of one valid call that the backend takes; mask travels with the keywords."""
    dtypes, headdims = TAKEN.get(backend, (law.LOW, HEADDIMS))
    seed = draw(st.integers(0, 10**6))
    dtype = draw(st.sampled_from(dtypes))
    nheads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    nheads, headdim, headdim_v = nheads_k * group, draw(headdims), draw(headdims)
    keywords: dict[str, Any] = {"return_lse": True}
    if draw(st.booleans()):
        batch, seqlen_q, seqlen_k = draw(st.integers(1, 3)), draw(lengths), draw(lengths)
        layout = st.sampled_from(law.LAYOUTS)
        q_shape, k_shape = (batch, seqlen_q, nheads), (batch, seqlen_k, nheads_k)
    else:
        lengths_q = draw(st.lists(lengths, min_size=1, max_size=4))
        lengths_k = draw(st.lists(lengths, min_size=len(lengths_q), max_size=len(lengths_q)))
        batch, seqlen_q, seqlen_k = len(lengths_q), max(lengths_q), max(lengths_k)
        layout = st.sampled_from(["contiguous", "transposed"])
        q_shape, k_shape = (sum(lengths_q), nheads), (sum(lengths_k), nheads_k)
        for name, each in (("cu_seqlens_q", lengths_q), ("cu_seqlens_k", lengths_k)):
            keywords[name] = torch.tensor([0, *each]).cumsum(0).int()
    tensors = {
        "q": law.randn(*q_shape, headdim, dtype=dtype, layout=draw(layout), seed=seed),
        "k": law.randn(*k_shape, headdim, dtype=dtype, layout=draw(layout), seed=seed + 1),
        "v": law.randn(*k_shape, headdim_v, dtype=dtype, layout=draw(layout), seed=seed + 2),
    }
    generator = torch.Generator().manual_seed(seed)
    keywords["causal"] = draw(st.sampled_from([False, True, "upper_left"]))
    keywords["window"] = draw(st.none() | st.tuples(sides, sides))
    keywords["scale"] = draw(st.none() | st.floats(-0.5, 0.5))
    keywords["softcap"] = draw(st.none() | st.floats(0.5, 30.0))
    keywords["dropout_p"] = draw(st.just(0.0) | st.floats(0.05, 0.5))
    pairs = [(1, batch), (1, nheads), (1, seqlen_q), (1, seqlen_k)]
    if draw(st.booleans()):
        keywords["mask"] = torch.rand([draw(st.sampled_from(p)) for p in pairs], generator=generator) < draw(
            st.floats(0.2, 1.0)
        )
    if draw(st.booleans()):
        # Over the keys ds sums to almost nothing; test_broadcast_pairs has that case in fp32.
        shape = [*(draw(st.sampled_from(p)) for p in pairs[:3]), seqlen_k][draw(st.integers(0, 3)) :]
        tensors["bias"] = torch.randn(shape, generator=generator).to(draw(st.sampled_from([dtype, torch.float32])))
    if draw(st.booleans()):
        shape = (nheads,) if draw(st.booleans()) else (batch, nheads)
        tensors["alibi_slopes"] = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        tensors["sinks"] = torch.randn(nheads, generator=generator).to(draw(st.sampled_from([dtype, torch.float32])))
    return tensors, keywords


@pytest.mark.parametrize("backend", CANDIDATES)
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 150,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_call(backend: str, data: st.DataObject) -> None:
    tensors, keywords = data.draw(calls(backend))
    note(str({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} | keywords))
    wants = [name for name in tensors if name != "alibi_slopes"]

    def run(*args: Any, **kwargs: Any) -> Any:
        taken = None if kwargs["q"].dtype == torch.float64 else backend
        return attention(*args, **kwargs, backend=taken)

    law.check(run, reference.attention, tensors, keywords, wants=wants, terms=4.0)
