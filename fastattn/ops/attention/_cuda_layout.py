"""Where the elements of a call's tensors lie, for the host code of the CUDA kernels.

Everything but the addresses of a call's tensors follows from its specification and its `Layout`. So each backend keeps, by
these two, a plan of a call: the specialisation of the kernel, the grid, and all numbers of the parameter struct.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastattn.ops.attention._arguments import dropout, edges, is_float, pair_strides, slopes_stride

Tensor = torch.Tensor
Ints = tuple[int, ...]
_NO_PAIRS = (0, 0, 0, 0)


class BwdTensors(NamedTuple):
    """The tensors of AttentionBwdParams, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    do: Tensor
    lse: Tensor
    dlse: Tensor | None
    lse_log2: Tensor
    delta: Tensor
    dq: Tensor
    dq_sums: Tensor
    dq_turns: Tensor | None
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    philox: Tensor | None


class OptionsLayout(NamedTuple):
    """Of mask and bias the strides over batch, head, query and key, 0 where it broadcasts; float: 1, the type of q: 0."""

    mask: Ints = _NO_PAIRS
    bias: Ints = _NO_PAIRS
    bias_aligned: bool = False  # to 16 bytes
    bias_float: int = 0
    alibi: int = 0  # stride over batch
    sinks_float: int = 0


class Layout(NamedTuple):
    """Where the elements of a call's tensors lie.

    strides  as the tensors have them; of which tensors, the plan says
    totals   the first sizes of q and k: all rows of a packed call
    aligned  are the addresses of what is read in pieces of 16 bytes multiples of that?
    dbias    its sizes and strides over batch, head, query and key, if it is wanted
    """

    strides: tuple[Ints, ...]
    totals: tuple[int, int]
    aligned: bool
    options: OptionsLayout
    dbias: tuple[Ints, Ints] | None = None


_NO_OPTIONS = OptionsLayout()


def options_layout(
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, *_: Tensor | None
) -> OptionsLayout:
    if mask is None and bias is None and alibi_slopes is None and sinks is None:
        return _NO_OPTIONS
    return OptionsLayout(
        pair_strides(mask),
        pair_strides(bias),
        bias is not None and not bias.data_ptr() & 15,
        is_float(bias),
        slopes_stride(alibi_slopes),
        is_float(sinks),
    )


def pair_layout(t: Tensor | None) -> tuple[Ints, Ints] | None:
    """Sizes and strides over batch, head, query and key."""
    return None if t is None else ((*(1,) * (4 - t.dim()), *t.shape), pair_strides(t))


def row_sizes(spec: Any, layout: Layout) -> tuple[Ints, Ints]:
    """The sizes of q and of k without columns."""
    if spec.packed:
        return (layout.totals[0], spec.nheads), (layout.totals[1], spec.nheads_k)
    return (spec.batch, spec.seqlen_q, spec.nheads), (spec.batch, spec.seqlen_k, spec.nheads_k)


def rows_aligned(sizes: Ints, strides: Ints) -> bool:
    """Does every row of a tensor of 16-bit elements start at a multiple of 16 bytes, if the first one does?"""
    # the stride of a dimension with one entry may be anything
    return all(size == 1 or stride % 8 == 0 for size, stride in zip(sizes, strides, strict=False))


def row_strides(strides: Ints) -> tuple[int, int, int]:
    """Over batch, seqlen and head."""
    return (strides[0], strides[1], strides[2]) if len(strides) == 4 else (0, strides[0], strides[1])


def statistics_strides(strides: Ints) -> tuple[int, int]:
    """Of lse, over batch and head; () is no tensor."""
    return (strides[0], strides[1]) if len(strides) == 3 else (0, strides[0] if strides else 0)


def scores(spec: Any) -> tuple[Any, ...]:
    """scale, softcap (0: none), and dropout's threshold and factor."""
    return float(spec.scale), float(spec.softcap or 0.0), *dropout(spec)


def forward_numbers(spec: Any, layout: Layout) -> tuple[Any, ...]:
    """The fields of a forward's parameters from q_stride to dropout_scale; strides: of q, k, v, o, lse."""
    *rows, lse = layout.strides
    options = layout.options
    return (
        *(stride for strides in rows for stride in row_strides(strides)), *statistics_strides(lse),
        *options.mask, *options.bias, options.alibi,
        spec.batch, spec.nheads, spec.nheads_k, spec.headdim, spec.headdim_v, spec.seqlen_q, spec.seqlen_k,
        *edges(spec), int(spec.upper_left), options.bias_float, options.sinks_float, *scores(spec),
    )  # fmt: skip
