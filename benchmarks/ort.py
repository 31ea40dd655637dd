"""ONNX Runtime's attention operators as contenders, float32, bound to preallocated memory (which favours them)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import onnx_graph as onnx
from .case import AbsentError, Contender, Prepared
from .shapes import AttentionShape

Tensor = torch.Tensor


def contenders(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sample) -> list[Contender]:
    """Those operators that can express the shape. q, k, v [batch, heads, seqlen, headdim]; `sample` takes o like q."""
    if q.dtype != torch.float32 or shape.packed or shape.window is not None:
        return []
    found = []
    if not shape.causal and shape.seqlen_q > 1 and not shape.nheads_k:
        found.append(Contender("ORT MHA", lambda: _mha(shape, q, k, v, bias, sample)))
    if (shape.causal or shape.seqlen_q == 1) and bias is None and not shape.lengths:
        found.append(Contender("ORT GQA", lambda: _gqa(shape, q, k, v, sample)))
    if not shape.lengths and shape.seqlen_q > 1:
        found.append(Contender("ORT Attention-23", lambda: _attention23(shape, q, k, v, bias, sample)))
    return found


def _tokens(x: Tensor) -> Tensor:
    """[batch, heads, seqlen, headdim] -> [batch, seqlen, heads * headdim], the layout of ORT's own operators."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).contiguous()


def _heads(x: Tensor, nheads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], nheads, -1).transpose(1, 2)


class _Session:
    """A model whose inputs and first output are bound once; `alias` binds more outputs onto inputs (a cache)."""

    def __init__(
        self, model: bytes, feeds: dict[str, Tensor], output: tuple[str, Sequence[int]], alias: dict[str, str]
    ):
        try:
            import onnxruntime as ort
        except ImportError as missing:
            raise AbsentError(f"onnxruntime is not installed ({missing})") from None
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its threads may spin during a run but not into the next contender's sample.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as refusal:  # the operator set depends on the version of onnxruntime
            raise AbsentError(
                f"onnxruntime {ort.__version__} refuses it: {str(refusal).splitlines()[0][:120]}"
            ) from None
        self.values = {name: ort.OrtValue.ortvalue_from_numpy(t.numpy()) for name, t in feeds.items()}
        self.out = torch.empty(*output[1])
        self.binding = self.session.io_binding()
        for name, value in self.values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.out_value = ort.OrtValue.ortvalue_from_numpy(self.out.numpy())
        self.binding.bind_ortvalue_output(output[0], self.out_value)
        for name, source in alias.items():
            self.binding.bind_ortvalue_output(name, self.values[source])

    def __call__(self) -> Tensor:
        self.session.run_with_iobinding(self.binding)
        return torch.from_numpy(self.out_value.numpy())


def _mha(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sample) -> Prepared:
    feeds = {"q": _tokens(q), "k": _tokens(k), "v": _tokens(v)}
    inputs = [(name, onnx.FLOAT, tuple(t.shape)) for name, t in feeds.items()]
    extra: list[onnx.Value | None] = []
    if shape.lengths:
        feeds["lengths"] = (torch.arange(shape.seqlen_k)[None] < torch.tensor(shape.lengths)[:, None]).int()
        extra = [None, ("lengths", onnx.INT32, (shape.batch, shape.seqlen_k))]
    if bias is not None:
        feeds["bias"] = bias.contiguous()
        extra = [None, None, ("bias", onnx.FLOAT, tuple(bias.shape))]
    out = ("o", onnx.FLOAT, tuple(feeds["q"].shape))
    model = onnx.one_node(
        "MultiHeadAttention", "com.microsoft", 1, [*inputs, *extra], [out], {"num_heads": shape.nheads}
    )
    run = _Session(model, feeds, (out[0], out[2]), {})
    return Prepared(run, lambda o: sample(_heads(o, shape.nheads)))


def _gqa(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, sample) -> Prepared:
    """Its cache is shared between input and output. A decoding step appends the last key itself, as it does in use."""
    new = shape.seqlen_k if shape.seqlen_q > 1 else 1
    feeds = {
        "q": _tokens(q),
        "k": _tokens(k[:, :, -new:]),
        "v": _tokens(v[:, :, -new:]),
        "past_k": k.contiguous().clone(),
        "past_v": v.contiguous().clone(),
        "seqlens": torch.full((shape.batch,), shape.seqlen_k - 1, dtype=torch.int32),
        "total": torch.tensor([shape.seqlen_k], dtype=torch.int32),
    }
    kinds = {"seqlens": onnx.INT32, "total": onnx.INT32}
    inputs = [(name, kinds.get(name, onnx.FLOAT), tuple(t.shape)) for name, t in feeds.items()]
    cache = tuple(k.shape)
    outputs = [
        ("o", onnx.FLOAT, tuple(feeds["q"].shape)),
        ("present_k", onnx.FLOAT, cache),
        ("present_v", onnx.FLOAT, cache),
    ]
    attributes = {"num_heads": shape.nheads, "kv_num_heads": shape.kv_heads}
    model = onnx.one_node("GroupQueryAttention", "com.microsoft", 1, inputs, outputs, attributes)
    run = _Session(model, feeds, ("o", outputs[0][2]), {"present_k": "past_k", "present_v": "past_v"})
    return Prepared(run, lambda o: sample(_heads(o, shape.nheads)))


def _attention23(shape: AttentionShape, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sample) -> Prepared:
    feeds = {"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}
    if bias is not None:
        feeds["bias"] = bias.contiguous()
    inputs = [(name, onnx.FLOAT, tuple(t.shape)) for name, t in feeds.items()]
    out = ("o", onnx.FLOAT, tuple(q.shape))
    model = onnx.one_node("Attention", "", 23, inputs, [out], {"is_causal": int(shape.causal)})
    run = _Session(model, feeds, ("o", out[2]), {})
    return Prepared(run, sample)
