"""The machinery of the benchmarks: quiet samples, the gate, absent rivals, what is written. Nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastattn.benchmarks import attention, law, layer_norm, onnx_graph, ort, plots, publish, report, rivals, run
from fastattn.benchmarks.case import OURS, AbsentError, Case, Contender, Prepared, Problem
from fastattn.benchmarks.machine import Attainable, describe, slug
from fastattn.benchmarks.shapes import AttentionShape, square
from fastattn.benchmarks.timing import ENOUGH, Canary, Samples, measure, summarise, waited_for_a_core


class FakeClock:
    """Time passes only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call_of(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def canary_of(rates: list[float]) -> Canary:
    """Sings `rates` in order, then keeps the last."""
    left = list(rates)
    return Canary(lambda: left.pop(0) if len(left) > 1 else left[0])


# timing


def test_median_of_fake_calls_is_their_duration():
    clock = FakeClock()
    calls = {"fast": clock.call_of(2e-3), "slow": clock.call_of(8e-3)}
    timings = measure(calls, canary_of([100.0]), budget_s=1.0, clock=clock)
    assert timings["fast"].median == pytest.approx(2e-3)
    assert timings["slow"].median == pytest.approx(8e-3)
    assert timings["fast"].quiet >= 3 and not timings["fast"].noisy


def test_enough_quiet_samples_end_a_case_before_its_budget():
    clock = FakeClock()
    timing = measure({"a": clock.call_of(1e-2)}, canary_of([100.0]), budget_s=1e6, clock=clock)["a"]
    assert timing.quiet == ENOUGH
    assert clock.now < 1.0


def test_every_contender_is_sampled_three_times_whatever_the_budget():
    clock = FakeClock()
    timings = measure({n: clock.call_of(5.0) for n in "abc"}, canary_of([100.0]), budget_s=0.0, clock=clock)
    assert [t.samples for t in timings.values()] == [3, 3, 3]


def test_short_calls_are_repeated_within_a_sample():
    clock, count = FakeClock(), [0]

    def call() -> None:
        clock.now += 1e-5
        count[0] += 1

    timing = measure({"a": call}, canary_of([100.0]), budget_s=0.0, clock=clock)["a"]
    assert timing.median == pytest.approx(1e-5)
    assert count[0] >= 3 * 100


def test_contenders_take_turns():
    clock, order = FakeClock(), []

    def call_of(name: str) -> Callable[[], None]:
        def call() -> None:
            clock.now += 1.0
            order.append(name)

        return call

    measure(
        {n: call_of(n) for n in "ab"},
        canary_of([1.0]),
        budget_s=0.0,
        clock=clock,
        shuffle=lambda names: names.reverse(),
    )
    assert order[-6:] == ["b", "a"] * 3


def test_busy_samples_do_not_count():
    canary = canary_of([100.0])
    canary.sing()
    samples = Samples([1.0, 1.0, 1.0, 2.0, 2.0], [(99, 98), (100, 95), (97, 97), (99, 50), (50, 99)])
    timing = summarise(samples, canary)
    assert (timing.median, timing.quiet, timing.samples, timing.noisy) == (1.0, 3, 5, False)


def test_a_better_canary_later_unmasks_early_samples():
    canary = canary_of([50.0, 100.0])
    canary.sing()
    samples = Samples([2.0], [(50, 50)])
    assert samples.quiet(canary) == [2.0]
    canary.sing()
    assert samples.quiet(canary) == []


def test_too_few_quiet_samples_are_called_noisy_and_all_count():
    canary = canary_of([100.0])
    canary.sing()
    timing = summarise(Samples([1.0, 3.0, 3.0], [(100, 100), (40, 40), (40, 40)]), canary)
    assert timing.noisy and timing.median == 3.0 and timing.quiet == 1


def test_a_sample_that_waited_for_a_core_does_not_count():
    clock, waited = FakeClock(), [0.0]

    def interrupted() -> None:
        clock.now += 1.0
        waited[0] += 0.5

    canary = Canary(lambda: 100.0, lambda: waited[0])
    timings = measure({"calm": clock.call_of(1.0), "interrupted": interrupted}, canary, budget_s=0.0, clock=clock)
    assert (timings["calm"].quiet, timings["interrupted"].quiet) == (3, 0)
    without_probe = Canary(None, lambda: waited[0])
    assert measure({"interrupted": interrupted}, without_probe, budget_s=0.0, clock=clock)["interrupted"].noisy


def test_waiting_for_a_core_is_counted_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert 0.0 <= waited_for_a_core() < 1e5
    for name, text in (("1", "7 2000000000 3"), ("2", "9 500000000 1"), ("empty", "")):
        (tmp_path / name).write_text(text)
    threads = [str(tmp_path / name) for name in ("1", "ended", "2", "empty")]
    monkeypatch.setattr("fastattn.benchmarks.timing.glob.glob", lambda pattern: threads)
    assert waited_for_a_core() == 2.5


def test_without_a_canary_every_sample_counts():
    clock = FakeClock()
    timing = measure({"a": clock.call_of(0.5)}, Canary(None), budget_s=0.0, clock=clock)["a"]
    assert timing.quiet == timing.samples == 3


# the law


def test_law_allows_twice_the_plain_error_and_not_more():
    truth = torch.zeros(100, dtype=torch.float64)
    truth[0] = 1.0
    plain = truth.float() + 1e-5
    assert law.judge({"o": truth + 1.99e-5}, {"o": plain}, {"o": truth}).lawful
    once = truth.clone()
    once[7] = 2.1e-5
    for wrong, reason in ((once, "error of o is 2.100e-05"), (truth + 2.04e-5, "RMS error of o")):
        verdict = law.judge({"o": wrong}, {"o": plain}, {"o": truth})
        assert not verdict.lawful and verdict.reason.startswith(reason)
    assert "[7]: got 2.1e-05, truth 0.0 (1 places)" in law.judge({"o": once}, {"o": plain}, {"o": truth}).reason


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_law_refuses_nan_and_infinity(bad: float):
    truth = torch.ones(3, dtype=torch.float64)
    assert not law.judge({"o": torch.tensor([1.0, bad, 1.0])}, {"o": torch.ones(3)}, {"o": truth}).lawful


def test_law_accepts_the_infinities_of_the_truth():
    truth = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert law.judge({"lse": truth.float()}, {"lse": truth.float()}, {"lse": truth}).lawful
    assert not law.judge({"lse": -truth.float()}, {"lse": truth.float()}, {"lse": truth}).lawful


def test_law_refuses_missing_and_misshapen_tensors():
    truth, plain = {"o": torch.ones(3, dtype=torch.float64)}, {"o": torch.ones(3)}
    assert law.judge({}, plain, truth).reason == "o is missing"
    assert "shape" in law.judge({"o": torch.ones(1)}, plain, truth).reason


def test_law_lets_a_correctly_rounded_result_pass_beside_an_exact_plain_one():
    truth = torch.tensor([1.0 + 2.0**-9], dtype=torch.float64)
    assert law.judge({"y": truth.bfloat16()}, {"y": truth.bfloat16()}, {"y": truth}).lawful


# running cases


def _case(*contenders: Contender, factor: float = 2.0) -> Case:
    truth = {"o": torch.ones(8, dtype=torch.float64)}
    problem = Problem(truth, {"o": torch.ones(8) + 1e-6}, list(contenders), factor)
    return Case("attention", "a row", "a label", "fp32", "flops", 1e6, lambda: problem)


def _contender(name: str, error: float = 0.0) -> Contender:
    return Contender(name, lambda: Prepared(lambda: torch.ones(8) + error, lambda o: {"o": o}))


def _absent() -> Prepared:
    raise AbsentError("it is not installed")


def _broken() -> Prepared:
    raise RuntimeError("boom\nsecond line")


@pytest.fixture(scope="module")
def rows() -> dict[str, run.Row]:
    names = (_contender(OURS), _contender("SDPA"), _contender("wrong", 1e-3), Contender("absent", _absent))
    return {row.contender: row for row in run.Runner(0.0).run(_case(*names, Contender("broken", _broken)))}


def test_lawful_contenders_get_times(rows: dict[str, run.Row]):
    for name in (OURS, "SDPA"):
        row = rows[name]
        assert row.status == "ok" and row.seconds is not None and row.seconds > 0
        assert row.rate == pytest.approx(1e6 / row.seconds / 1e9)
    assert rows[OURS].ratio == 1.0


def test_a_wrong_result_gets_no_time(rows: dict[str, run.Row]):
    row = rows["wrong"]
    assert row.status == "WRONG" and "error of o" in row.reason
    assert row.seconds is None and row.rate is None and row.ratio is None
    assert "wrong WRONG" in report.table(rows.values())


def test_our_own_wrong_result_gets_no_time_even_where_rivals_may_be_sloppy():
    found = run.Runner(0.0).run(_case(_contender(OURS, 1e-5), _contender("rival", 1e-5), factor=64.0))
    assert [(row.status, row.seconds is None) for row in found] == [("WRONG", True), ("ok", False)]
    assert "(10x the error)" in report.line(found)[-1]


def test_absent_and_broken_rivals_are_named_with_their_reason(rows: dict[str, run.Row]):
    assert (rows["absent"].status, rows["absent"].reason) == ("absent", "it is not installed")
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "RuntimeError: boom")
    notes = "\n".join(report.notes(rows.values()))
    assert "it is not installed" in notes and "RuntimeError: boom" in notes


def test_absent_onnxruntime_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    q = torch.randn(1, 2, 8, 16)
    shape = square(1, 2, 8, 16)
    contender = ort.contenders(shape, q, q, q, None, lambda o: {"o": o})[0]
    with pytest.raises(AbsentError, match="onnxruntime is not installed"):
        contender.prepare()


def test_absent_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(AbsentError, match="C\\+\\+ compiler"):
        rivals.compiled(torch.sin)


def test_quick_names_what_it_leaves_out():
    found = run.Runner(0.0, quick=True).run(_case(_contender(OURS), Contender("compiled", _broken)))
    assert found[1].status == "absent" and "--quick" in found[1].reason


# shapes


@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        (square(2, 3, 5, 8), 2 * 3 * 25),
        (square(1, 1, 5, 8, causal=True), 15),
        (AttentionShape(1, 1, 2, 5, 8, causal=True), 4 + 5),
        (square(1, 1, 6, 8, causal=True, window=1), 1 + 2 * 5),
        (square(2, 1, 4, 8, lengths=(4, 1)), 16 + 4),
        (square(1, 1, 5, 8, lengths=(2, 3), packed=True), 4 + 9),
        (square(1, 1, 5, 8, lengths=(2, 3), packed=True, causal=True), 3 + 6),
    ],
)
def test_only_visible_pairs_count(shape: AttentionShape, pairs: int):
    seen = shape.visible(torch.arange(shape.seqlen_q)).expand(shape.batch, shape.nheads, -1, -1)
    assert shape.pairs() == pairs == int(seen.sum())
    assert shape.forward_flops() == 4 * pairs * 8 and shape.backward_flops() == 10 * pairs * 8


def test_every_case_has_its_own_key_and_work():
    for quick in (True, False):
        cases = run.select(quick=quick)
        assert len({case.key for case in cases}) == len(cases)
        assert all(case.work > 0 or case.bound == "latency" for case in cases)
        assert {case.room for case in cases} == set(run.ROOMS)


def test_the_full_set_covers_every_row():
    rows = {case.row for case in attention.cases()}
    assert rows >= {
        *("forward dense", "forward causal", "short", "prefill", "decode", "padding mask", "additive bias", "window"),
        *("backward", "head dims", "strided", "packed", "over seqlen", "over batch", "over threads"),
    }
    norm = {(case.row, case.malloc) for case in layer_norm.cases()}
    assert norm == {("forward", "pinned"), ("backward", "pinned"), ("large output", "default")}


# real problems in miniature: every contender that can run agrees with float64

SMALL = [
    ("forward dense", square(2, 4, 33, 16)),
    ("forward causal", square(2, 4, 33, 16, causal=True)),
    ("prefill", square(1, 4, 32, 16, nheads_k=2, causal=True)),
    ("padding mask", square(2, 2, 24, 16, lengths=(24, 9))),
    ("additive bias", square(2, 2, 24, 16, bias="heads")),
    ("additive bias", square(2, 2, 24, 16, bias="batch")),
    ("window", square(1, 2, 48, 16, causal=True, window=7)),
    ("packed", square(1, 2, 24, 16, lengths=(5, 19), packed=True, causal=True)),
    ("strided", square(1, 2, 24, 16, layout="qkv")),
    ("strided", square(1, 2, 24, 16, layout="bshd")),
]


def _settled(problem: Problem) -> dict[str, str]:
    """Contender -> status, without timing and without those that compile."""
    chosen = [c for c in problem.contenders if c.name not in ("Flex", "compiled")]
    return {c.name: run.admit(c, problem)[0]["status"] for c in chosen}


@pytest.mark.parametrize(("row", "shape"), SMALL, ids=[f"{row}: {shape.label}" for row, shape in SMALL])
def test_attention_contenders_agree_with_float64(row: str, shape: AttentionShape):
    pytest.importorskip("onnxruntime")
    statuses = _settled(attention._forward(row, shape, "fp32"))
    assert OURS in statuses and "SDPA" in statuses
    assert set(statuses.values()) <= {"ok", "absent"}, statuses


def test_decode_and_backward_contenders_agree_with_float64():
    decode = _settled(attention._decode("decode", AttentionShape(2, 4, 1, 64, 16, nheads_k=2), "fp32"))
    assert set(decode.values()) <= {"ok", "absent"} and len(decode) >= 4
    assert set(_settled(attention._backward("backward", square(1, 4, 33, 16, causal=True), "fp32")).values()) == {"ok"}


def test_the_gate_catches_a_rival_that_ignores_the_mask():
    shape = square(2, 2, 24, 16, lengths=(24, 9))
    problem = attention._forward("padding mask", shape, "fp32")
    q, k, v = attention.tensors(shape, torch.float32)
    blind = Contender(
        "blind", lambda: Prepared(lambda: F.scaled_dot_product_attention(q, k, v), attention.Sample(shape).output)
    )
    assert run.admit(blind, problem)[0]["status"] == "WRONG"


def test_norm_and_rope_contenders_agree_with_float64(monkeypatch: pytest.MonkeyPatch):
    from fastattn.benchmarks import _norm, latency, rms_norm, rope

    monkeypatch.setattr(_norm, "NORMS", [(32, 64)])
    monkeypatch.setattr(rope, "ROPE", [(1, 8, 4, 2, 16)])
    cases = [case for module in (layer_norm, rms_norm, rope, latency) for case in module.cases()]
    assert len(cases) == 4 + 4 + 2 + 5
    for case in cases:
        assert set(_settled(case.build()).values()) == {"ok"}, case.key


def test_onnx_models_carry_their_node():
    model = onnx_graph.one_node(
        "Attention",
        "",
        23,
        [("q", onnx_graph.FLOAT, (1, 2)), None],
        [("o", onnx_graph.FLOAT, (1, 2))],
        {"is_causal": 1},
    )
    assert b"Attention" in model and b"is_causal" in model
    runtime = pytest.importorskip("onnxruntime")
    relu = onnx_graph.one_node("Relu", "", 14, [("x", onnx_graph.FLOAT, (2,))], [("y", onnx_graph.FLOAT, (2,))], {})
    session = runtime.InferenceSession(relu, providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": torch.tensor([-1.0, 2.0]).numpy()})[0].tolist() == [0.0, 2.0]


# what is written


def _sweep() -> list[run.Row]:
    place = {
        "room": "attention",
        "row": "over seqlen",
        "dtype": "fp32",
        "malloc": "default",
        "threads": 2,
        "bound": "flops",
    }
    return [
        run.Row(
            **place, label=f"1x1x{n}", axis="seqlen", x=n, contender=name, status="ok", seconds=n * cost, p20=n * cost,
            p80=n * cost, rate=1 / cost, attainable=30.0, share=0.5, ratio=cost,
        )
        for n in (128, 256)
        for name, cost in ((OURS, 1.0), ("SDPA", 2.0))
    ]  # fmt: skip


def test_jsonl_is_read_as_it_was_written(tmp_path: Path, rows: dict[str, run.Row]):
    written = describe()
    report.write_jsonl(tmp_path / "r.jsonl", written, rows.values())
    machine, again = report.read_jsonl(tmp_path / "r.jsonl")
    assert machine == written and again == list(rows.values())
    assert all(isinstance(json.loads(line), dict) for line in (tmp_path / "r.jsonl").read_text().splitlines())


def test_plots_are_png_files(tmp_path: Path, rows: dict[str, run.Row]):
    pytest.importorskip("matplotlib")
    drawn = plots.draw([*rows.values(), *_sweep()], tmp_path)
    assert [path.name for path in drawn] == ["attention_over_seqlen.png", "ratios.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_report_names_machine_results_plots_and_absences(rows: dict[str, run.Row]):
    text = report.markdown(describe(), list(rows.values()), ["ratios.png"])
    assert describe().cpu in text and "torch" in text and "![ratios](ratios.png)" in text
    assert "absent absent (attention a row fp32): it is not installed" in text


def test_durations_have_three_digits():
    assert [report.duration(s) for s in (2.5, 0.0123, 1.234e-4, 5e-8)] == ["2.5 s", "12.3 ms", "123 µs", "50 ns"]


def test_publish_writes_the_readme_from_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, run.Row]
):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(f"head\n{publish.BEGIN}\nold\n{publish.END}\ntail\n")
    Path("bench").mkdir()
    report.write_jsonl(Path("bench/results.jsonl"), describe(), rows.values())
    Path("bench/report.md").write_text("report")
    assert publish.main(["bench"]) == 0
    text = Path("README.md").read_text()
    assert "old" not in text and "a row: a label" in text and text.startswith("head") and text.endswith("tail\n")
    assert (Path("benchmarks/results") / describe().slug / "results.jsonl").is_file()
    assert publish.main(["nowhere"]) == 2


def test_publish_names_whoever_was_faster():
    ours, theirs = _sweep()[:2]
    assert publish.summary(describe(), [ours, theirs]).endswith("faster than fastattn: none.")
    text = publish.summary(describe(), [ours, replace(theirs, ratio=0.9)])
    assert text.endswith("faster than fastattn: SDPA in attention, over seqlen: 1x1x128 fp32 (0.90 x).")


def test_publish_refuses_wrong_results(tmp_path: Path, rows: dict[str, run.Row]):
    report.write_jsonl(tmp_path / "results.jsonl", describe(), [replace(rows["wrong"], contender=OURS)])
    assert publish.main([str(tmp_path)]) == 1


def test_machine_folder_name():
    assert slug("AMD EPYC, family 25 model 17", 2) == "amd-epyc-family-25-model-17-2t"


def test_attainable_keeps_the_best(monkeypatch: pytest.MonkeyPatch):
    rates = iter([1.0, 5.0, 2.0, 3.0, 3.0, 3.0])
    attainable = Attainable()
    monkeypatch.setattr("fastattn.runtime.native.error", lambda: None)
    monkeypatch.setattr("fastattn.runtime.native.module", lambda: None)
    assert [attainable._measure("copy", 1, 1, lambda m: next(rates)) for _ in range(2)] == [5.0, 5.0]
