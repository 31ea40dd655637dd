"""Bad input: each wrong call gives one sentence that names the argument, before any memory is touched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastattn import (
    UnsupportedError,
    attention,
    attention_kvcache,
    attention_weights,
    merge_attention,
    scaled_dot_product_attention,
)

Q, K, V = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6)


def call(**changed: Any) -> dict[str, Any]:
    """A right call of attention with some arguments replaced."""
    return {"q": torch.randn(Q), "k": torch.randn(K), "v": torch.randn(V), **changed}


def cu(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def packed(**changed: Any) -> dict[str, Any]:
    tensors = {"q": torch.randn(10, 4, 8), "k": torch.randn(12, 2, 8), "v": torch.randn(12, 2, 8)}
    return {**tensors, "cu_seqlens_q": cu(0, 4, 10), "cu_seqlens_k": cu(0, 12, 12), **changed}


WRONG = {
    "q rank": (call(q=torch.randn(5, 4, 8)), "q must be [batch, seqlen, nheads, headdim], got shape (5, 4, 8)"),
    "k rank": (call(k=torch.randn(8)), "k must be [batch, seqlen, nheads, headdim], got shape (8,)"),
    "q type": (call(q=None), "q must be a torch.Tensor, got NoneType"),
    "q integer": (
        call(q=torch.ones(Q).int(), k=torch.ones(K).int(), v=torch.ones(V).int()),
        "q must be float32, bfloat16",
    ),
    "k dtype": (call(k=torch.randn(K).half()), "k must be of the dtype of q (torch.float32), got torch.float16"),
    "v device": (call(v=torch.empty(V, device="meta")), "v must be on the device of q (cpu), got meta"),
    "k batch": (call(k=torch.randn(3, 7, 2, 8)), "k must be of the batch size of q (2), got 3"),
    "k headdim": (call(k=torch.randn(2, 7, 2, 9)), "k must be of the headdim of q (8), got 9"),
    "v length": (
        call(v=torch.randn(2, 6, 2, 6)),
        "v must be of k's [batch, seqlen_k, nheads_k] (2, 7, 2), got (2, 6, 2)",
    ),
    "v heads": (
        call(v=torch.randn(2, 7, 1, 6)),
        "v must be of k's [batch, seqlen_k, nheads_k] (2, 7, 2), got (2, 7, 1)",
    ),
    "nheads_k": (
        call(k=torch.randn(2, 7, 3, 8), v=torch.randn(2, 7, 3, 6)),
        "k must be a tensor whose nheads_k divides the nheads of q (4), got 3",
    ),
    "no heads": (call(q=torch.randn(2, 5, 0, 8)), "q must be a tensor with nheads > 0, got 0"),
    "no headdim": (
        call(q=torch.randn(2, 5, 4, 0), k=torch.randn(2, 7, 2, 0)),
        "q must be a tensor with headdim > 0, got 0",
    ),
    "q stride": (
        call(q=torch.randn(2, 5, 4, 16)[..., ::2]),
        "q must be a tensor with unit last stride (call .contiguous())",
    ),
    "v stride": (call(v=torch.randn(2, 7, 6, 2).transpose(2, 3)), "v must be a tensor with unit last stride"),
    "causal": (call(causal="lower"), "causal must be False, True (aligned bottom right) or 'upper_left', got 'lower'"),
    "window number": (call(window=3), "window must be a pair (left, right)"),
    "window negative": (call(window=(-1, 0)), "window must be a pair (left, right) of key counts >= 0 or None"),
    "window float": (call(window=(1.5, 0)), "window must be a pair (left, right) of key counts >= 0 or None"),
    "scale nan": (call(scale=math.nan), "scale must be finite, got nan"),
    "scale text": (call(scale="x"), "scale must be a number, got str"),
    "softcap zero": (call(softcap=0.0), "softcap must be greater than 0.0, got 0.0"),
    "softcap nan": (call(softcap=math.nan), "softcap must be finite, got nan"),
    "dropout one": (call(dropout_p=1.0), "dropout_p must be a probability in [0, 1), got 1.0"),
    "dropout negative": (call(dropout_p=-0.1), "dropout_p must be a probability in [0, 1), got -0.1"),
    "mask dtype": (call(mask=torch.zeros(5, 7)), "mask must be boolean, True where a query may attend (use bias"),
    "mask shape": (
        call(mask=torch.ones(5, 6).bool()),
        "mask must be broadcastable to [batch, nheads, seqlen_q, seqlen_k] (2, 4",
    ),
    "mask rank": (call(mask=torch.ones(1, 1, 1, 1, 7).bool()), "mask must be broadcastable to"),
    "mask device": (
        call(mask=torch.ones(5, 7, device="meta").bool()),
        "mask must be on the device of q (cpu), got meta",
    ),
    "bias dtype": (
        call(bias=torch.zeros(5, 7).double()),
        "bias must be float32 or of the dtype of q (torch.float32), got",
    ),
    "bias shape": (
        call(bias=torch.zeros(3, 5, 7)),
        "bias must be broadcastable to [batch, nheads, seqlen_q, seqlen_k] (2, 4",
    ),
    "alibi dtype": (call(alibi_slopes=torch.zeros(4).half()), "alibi_slopes must be float32, got torch.float16"),
    "alibi shape": (
        call(alibi_slopes=torch.zeros(2)),
        "alibi_slopes must be of shape [nheads] (4,) or [batch, nheads] (2, 4)",
    ),
    "bias negative bit": (
        call(bias=torch.randn(5, 7, dtype=torch.complex64).conj().imag),
        "bias must be a tensor without the negative bit (call .resolve_neg()), got a view with it",
    ),
    "sinks shape": (call(sinks=torch.zeros(2)), "sinks must be of shape [nheads] (4,), got (2,)"),
    "sinks dtype": (call(sinks=torch.zeros(4).double()), "sinks must be float32 or of the dtype of q"),
    "max_seqlen alone": (
        call(max_seqlen_q=5),
        "max_seqlen_q and max_seqlen_k must be None unless cu_seqlens_q is given",
    ),
    "cu_seqlens_k alone": (call(cu_seqlens_k=cu(0, 7)), "cu_seqlens_k must be None unless cu_seqlens_q is given"),
    "packed rank": (
        packed(q=torch.randn(1, 10, 4, 8)),
        "q must be [total, nheads, headdim], because cu_seqlens_q is given",
    ),
    "cu dtype": (
        packed(cu_seqlens_q=cu(0, 4, 10, dtype=torch.int64)),
        "cu_seqlens_q must be a contiguous int32 tensor",
    ),
    "cu rank": (packed(cu_seqlens_q=cu(0, 10)[None]), "cu_seqlens_q must be a contiguous int32 tensor [batch + 1]"),
    "cu empty": (packed(cu_seqlens_q=cu()), "cu_seqlens_q must be a contiguous int32 tensor [batch + 1]"),
    "cu negative": (
        packed(cu_seqlens_q=cu(-1, 4, 10)),
        "cu_seqlens_q must be non-decreasing from 0 to the rows of q (10)",
    ),
    "cu overlapping": (
        packed(cu_seqlens_q=cu(0, 11, 10)),
        "cu_seqlens_q must be non-decreasing from 0 to the rows of q (10)",
    ),
    "cu too long": (
        packed(cu_seqlens_k=cu(0, 4, 13)),
        "cu_seqlens_k must be non-decreasing from 0 to the rows of k (12)",
    ),
    "cu too short": (
        packed(cu_seqlens_k=cu(0, 4, 11)),
        "cu_seqlens_k must be non-decreasing from 0 to the rows of k (12)",
    ),
    "cu count": (packed(cu_seqlens_k=cu(0, 12)), "cu_seqlens_k must be of the length of cu_seqlens_q (3), got 2"),
    "cu_k absent": (packed(cu_seqlens_k=None), "cu_seqlens_k must be given when k has other rows than q (10)"),
    "cu device": (
        packed(cu_seqlens_q=cu(0, 4, 10).to("meta")),
        "cu_seqlens_q must be on the device of q (cpu), got meta",
    ),
    "max_seqlen": (packed(max_seqlen_q=5), "max_seqlen_q must be at least the longest sequence (6), got 5"),
    "packed mask": (packed(mask=torch.ones(2, 1, 10, 12).bool()), "mask must be broadcastable to"),
}


@pytest.mark.parametrize("case", WRONG)
def test_attention(case: str) -> None:
    arguments, sentence = WRONG[case]
    with pytest.raises(ValueError) as error:
        attention(**arguments)
    assert str(error.value).startswith(f"attention: {sentence}"), str(error.value)


def cached(**changed: Any) -> dict[str, Any]:
    tensors = {"q": torch.randn(2, 1, 4, 8), "k_cache": torch.randn(2, 16, 2, 8), "v_cache": torch.randn(2, 16, 2, 6)}
    return {**tensors, "cache_seqlens": cu(3, 15), **changed}


NEW = {"k": torch.randn(2, 1, 2, 8), "v": torch.randn(2, 1, 2, 6)}
TABLES = {"cos": torch.randn(16, 4), "sin": torch.randn(16, 4)}
WRONG_CACHE = {
    "cache rank": (
        cached(k_cache=torch.randn(2, 16, 8)),
        "k_cache must be [batch, seqlen, nheads, headdim], got shape",
    ),
    "cache dtype": (cached(v_cache=torch.randn(2, 16, 2, 6).half()), "v_cache must be of the dtype of q"),
    "cache headdim": (cached(k_cache=torch.randn(2, 16, 2, 9)), "k_cache must be of the headdim of q (8), got 9"),
    "cache sizes": (
        cached(v_cache=torch.randn(2, 15, 2, 6)),
        "v_cache must be of the first three sizes of k_cache (2, 16, 2)",
    ),
    "cache batch": (
        cached(k_cache=torch.randn(3, 16, 2, 8), v_cache=torch.randn(3, 16, 2, 6)),
        "k_cache must be of the batch",
    ),
    "lengths dtype": (
        cached(cache_seqlens=torch.tensor([3, 15])),
        "cache_seqlens must be a contiguous int32 tensor [batch]",
    ),
    "lengths shape": (cached(cache_seqlens=cu(3)), "cache_seqlens must be of shape [batch] (2,), got (1,)"),
    "lengths negative": (cached(cache_seqlens=cu(3, -1)), "cache_seqlens must be at least 0, got -1"),
    "lengths large": (cached(cache_seqlens=cu(3, 17)), "cache_seqlens must be at most 16: the cache holds 16 keys"),
    "no room": (
        cached(**NEW, cache_seqlens=cu(3, 16)),
        "cache_seqlens must be at most 15: the cache holds 16 keys and 1 are",
    ),
    "k without v": (cached(k=NEW["k"]), "v must be given together with k"),
    "k shape": (
        cached(**{**NEW, "k": torch.randn(2, 1, 4, 8)}),
        "k must be of shape [batch, seqlen_new, nheads_k, headdim]",
    ),
    "cos without k": (cached(**TABLES), "k must be given with cos and sin"),
    "cos without sin": (cached(**NEW, cos=TABLES["cos"]), "sin must be given together with cos"),
    "cos wide": (
        cached(**NEW, cos=torch.randn(16, 5), sin=torch.randn(16, 5)),
        "cos must be [seqlen, rotary_dim / 2] with",
    ),
    "cos short": (
        cached(**NEW, cos=torch.randn(15, 4), sin=torch.randn(15, 4)),
        "cos must be a table of at least 16 positions",
    ),
    "num_splits": (cached(num_splits=0), "num_splits must be None (chosen by length) or at least 1, got 0"),
    "block_table dtype": (
        cached(block_table=torch.zeros(2, 2)),
        "block_table must be a contiguous int32 tensor [batch, max_",
    ),
    "block_table high": (
        cached(block_table=cu(0, 2)[:, None]),
        "block_table must be between 0 and 1 (k_cache has 2 blocks), got 2",
    ),
    "block_table low": (
        cached(block_table=cu(0, -1)[:, None]),
        "block_table must be between 0 and 1 (k_cache has 2 blocks), got -1",
    ),
    "block_table shared": (
        cached(**NEW, block_table=cu(1, 1)[:, None], cache_seqlens=cu(3, 3)),
        "block_table must be such that every appended key has a slot of its own, got slot 3 of block 1 for sequences 0 and 1",
    ),
    "block_table repeats": (
        cached(
            **{name: torch.cat([x] * 17, 1) for name, x in NEW.items()},
            block_table=cu(0, 0, 1, 1).view(2, 2),
            cache_seqlens=cu(3, 3),
        ),
        "block_table must be such that every appended key has a slot of its own, got slot 3 of block 0 for sequences 0 and 0",
    ),
    "block_table batch": (cached(block_table=cu(0)[:, None]), "block_table must be of the batch size of q (2), got 1"),
    "num_splits kind": (cached(num_splits=2.5), "num_splits must be None (chosen by length) or an integer, got 2.5"),
    "lengths list": (cached(cache_seqlens=[3, 15]), "cache_seqlens must be a torch.Tensor, got list"),
    "cache gradient": (
        cached(k_cache=torch.randn(2, 16, 2, 8, requires_grad=True)),
        "k_cache must be without gradient (a cache is for inference",
    ),
    "cache twice": (
        cached(k=NEW["k"], v=NEW["k"], **dict.fromkeys(("k_cache", "v_cache"), torch.randn(2, 16, 2, 8))),
        "v_cache must be another tensor than k_cache when k and v are appended",
    ),
    "cache expanded": (
        cached(**NEW, v_cache=torch.randn(1, 16, 2, 6).expand(2, 16, 2, 6)),
        "v_cache must be memory for every slot when k and v are appended, got an expanded tensor",
    ),
    "gradient": (
        cached(q=torch.randn(2, 1, 4, 8, requires_grad=True)),
        "q must be without gradient (a cache is for inference",
    ),
}


def test_sequences_may_share_a_block_whose_slots_they_do_not_share() -> None:
    """A prefix that both read, and one block of which each has a half."""
    new = {"k": torch.randn(2, 2, 2, 8), "v": torch.randn(2, 2, 2, 6), "block_table": cu(0, 1, 0, 1).view(2, 2)}
    attention_kvcache(**cached(**new, cache_seqlens=cu(18, 24)))


@pytest.mark.parametrize("case", WRONG_CACHE)
def test_attention_kvcache(case: str) -> None:
    arguments, sentence = WRONG_CACHE[case]
    before = [arguments[name].detach().clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ValueError) as error:
        attention_kvcache(**arguments)
    assert str(error.value).startswith(f"attention_kvcache: {sentence}"), str(error.value)
    for name, cache in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(arguments[name], cache), f"{name} was written"


def test_attention_weights() -> None:
    q, k = torch.randn(Q), torch.randn(K)
    with pytest.raises(
        ValueError, match=r"attention_weights: lse must be of shape \[batch, nheads, seqlen_q\] \(2, 4, 5\)"
    ):
        attention_weights(q, k, torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="attention_weights: k must be of the headdim of q"):
        attention_weights(q, k[..., :7], torch.randn(2, 4, 5))


def test_merge_attention() -> None:
    o, lse = torch.randn(Q), torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match=r"merge_attention: lse_b must be of shape \[batch, nheads, seqlen_q\] of o_a"):
        merge_attention(o, lse, o, lse.transpose(1, 2))
    with pytest.raises(ValueError, match="merge_attention: o_b must be of shape of o_a"):
        merge_attention(o, lse, o[:1], lse)


def test_scaled_dot_product_attention() -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    with pytest.raises(ValueError, match=r"key must be of the nheads of query \(4\) unless enable_gqa is set, got 2"):
        scaled_dot_product_attention(q, k, k)
    with pytest.raises(ValueError, match="attn_mask must be None when is_causal is set"):
        scaled_dot_product_attention(q, q, q, torch.ones(5, 5).bool(), is_causal=True)
    with pytest.raises(ValueError, match="query must be"):
        scaled_dot_product_attention(q[0, 0], q, q)


def test_unknown_and_absent_backends() -> None:
    with pytest.raises(UnsupportedError, match="attention: backend must be one of those this operation has"):
        attention(**call(backend="vulkan"))
    with pytest.raises(UnsupportedError, match=r"attention_weights: .* \(cpu, triton, reference\), got 'cuda'"):
        attention_weights(torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 2, 3), backend="cuda")


def test_backward_on_its_own() -> None:
    from fastattn.ops.attention import op

    q, k, v = torch.randn(Q), torch.randn(K), torch.randn(V)
    scalars = (None,) * 7 + (None, None, None, None, False, None, None, 0.0, None, None)
    o, lse = op.attention_fwd(q, k, v, *scalars)
    with pytest.raises(ValueError, match="attention_bwd: do must be of shape of the output"):
        op.attention_bwd(torch.randn(2, 5, 4, 7), None, o, lse, q, k, v, *scalars, False, False)
