"""The command line: what it prints and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.benchmarks import run as bench_run
from fastattn.cli import doctor, main, matrix, scenarios, verify
from fastattn.runtime import native

needs_native = pytest.mark.skipif(native.error() is not None, reason=str(native.error()))


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    return int(ended.value.code or 0)


def test_module_entry_point_prints_help():
    done = subprocess.run([sys.executable, "-m", "fastattn", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("doctor", "verify", "bench"))


@pytest.mark.parametrize("argv", [(), ("nonsense",), ("bench", "--op", "nonsense"), ("verify", "--dtype", "int8")])
def test_bad_arguments_exit_with_2(argv: tuple[str, ...]):
    assert exit_code(*argv) == 2


@pytest.mark.parametrize("argv", [["doctor"], ["verify", "--op", "rope", "--dtype", "fp32"], ["doctor", "--help"]])
def test_a_reader_that_leaves_ends_it_quietly(argv: list[str], monkeypatch, capsys: pytest.CaptureFixture[str]):
    """As `fastattn doctor | head -1` does; nothing else that breaks is hidden."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(argv) == 141
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_of_something_else_is_no_quiet_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken(arguments) -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(doctor, "run", broken)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError, match="of a worker"):
            main(["doctor"])


# doctor


@needs_native
def test_doctor_names_versions_isa_threads_and_backends(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and fastattn.__version__ in text
    assert native.module().isa() in text
    listed = dict(line.split(maxsplit=1) for line in text.partition("backends of attention, ")[2].splitlines()[1:])
    assert listed == dict.fromkeys(("cpu", "cuda", "triton", "reference"), "ready")


@needs_native
def test_doctor_json_is_one_object(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__ and facts["attention"]["reference"] == "ready"


def test_doctor_says_why_native_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(native, "error", lambda: "no compiler was found")
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "  cpu         missing, no compiler was found" in captured.out
    assert "doctor: no compiler was found" in captured.err


@needs_native
def test_matrix_is_what_the_backends_say(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "--matrix"]) == 0
    text = capsys.readouterr().out
    assert "| causal | fp32, bf16, fp16 | bf16, fp16 | fp32, bf16, fp16 | fp32, bf16, fp16, fp64 |" in text
    assert all(f"## {op}" in text for op in scenarios.OPS)


def test_every_backend_of_every_room_is_listed():
    listed = dict(matrix.rooms())
    assert set(listed) == {"attention", "layer_norm", "rms_norm", "rope"}
    assert all(backends[-1].name == "reference" for backends in listed.values())
    assert doctor._state(SimpleNamespace(name="x", module="fastattn.ops.no_such_file")).startswith("missing, No module")


# verify


def test_verify_prints_ratios_and_keeps_the_law(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--op", "rms_norm", "--dtype", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["op", "option", "dtype"]
    assert sum(line.startswith("rms_norm") for line in lines) == len(scenarios.rms_norm())
    assert "0 broken" in lines[-1]


def test_verify_json_lines(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--op", "rope", "--dtype", "fp32", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {f["option"] for f in found} == {s.option for s in scenarios.rope()}
    assert all(f["status"] == "ok" and f["to_plain"] is not None for f in found)


def test_verify_on_the_reference_is_plain_pytorch():
    finding = verify.examine(scenarios.layer_norm()[0], "fp32", "reference")
    assert finding.status == "ok" and finding.to_plain is not None and finding.to_plain <= 1.0


def test_verify_exits_with_1_when_the_law_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    honest = fastattn.rms_norm
    monkeypatch.setattr(fastattn, "rms_norm", lambda *a, **k: _scaled(honest(*a, **k)))
    assert main(["verify", "--op", "rms_norm", "--dtype", "fp32"]) == 1
    assert "BROKEN: error of" in capsys.readouterr().out


def _scaled(y):
    return tuple(t * 1.001 for t in y) if isinstance(y, tuple) else y * 1.001


def test_verify_on_another_device_sends_everything_there_and_back():
    class Ops:
        def attention_kvcache(self, q, k_cache, v_cache, *, mask):
            assert {x.device.type for x in (q, k_cache, v_cache, mask)} == {"meta"}
            return q, mask

    q, cache, mask = torch.ones(2, requires_grad=True), torch.zeros(3), torch.ones(2)
    with pytest.raises(NotImplementedError, match="meta"):  # nothing comes back from there
        scenarios.Placed(Ops(), "meta").attention_kvcache(q, cache, cache, mask=mask)
    found = scenarios.Placed(fastattn, "cpu").rms_norm(torch.ones(2, 8), torch.ones(8), residual=torch.ones(2, 8))
    assert len(found) == 2 and torch.equal(found[1], torch.full((2, 8), 2.0))


@pytest.mark.parametrize(
    "options",
    [
        ["--batch", "b.json"],
        ["--model", "m:f", "--op", "rope"],
        ["--model", "m:f", "--backend", "triton"],
        ["--model", "m:f", "--device", "meta"],
        ["--model", "m:f", "--dtype", "fp32", "--dtype", "bf16"],
    ],
)
def test_verify_refuses_options_that_would_do_nothing(options, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", *options]) == 2
    assert "--model" in capsys.readouterr().err


def test_verify_refuses_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--device", "nowhere"]) == 2
    assert "--device must be one that torch can use" in capsys.readouterr().err


def test_verify_with_a_backend_that_refuses_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "--op", "attention", "--dtype", "fp32", "--backend", "cuda"]) == 1
    assert "unsupported" in capsys.readouterr().out


def test_verify_reports_a_call_that_fails_and_goes_on(monkeypatch, capsys: pytest.CaptureFixture[str]):
    honest = fastattn.rms_norm

    def failing(*args, **options):
        if "residual" in options:
            raise RuntimeError("CUDA error: an illegal\ninstruction was encountered")
        return honest(*args, **options)

    monkeypatch.setattr(fastattn, "rms_norm", failing)
    assert main(["verify", "--op", "rms_norm", "--dtype", "fp32"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAILED: RuntimeError: CUDA error: an illegal instruction" in line]
    assert 0 < len(failed) < len(scenarios.rms_norm()) == sum(line.startswith("rms_norm") for line in lines)
    assert lines[-1].endswith(f"0 broken, {len(failed)} failed")


@pytest.mark.parametrize("op", list(scenarios.OPS))
def test_every_scenario_is_lawful(op: str):
    for scenario in scenarios.OPS[op]():
        for dtype in ("fp32", "bf16"):
            finding = verify.examine(scenario, dtype)
            assert finding.status == "ok", finding


def test_sdpa_expresses_the_scenarios_that_claim_so():
    compared = [s for s in scenarios.attention() if s.sdpa is not None]
    assert len(compared) >= 10
    for scenario in compared:
        finding = verify.examine(scenario, "fp32")
        assert finding.to_sdpa is not None and finding.to_sdpa < 4, finding


# bench


def _row(contender: str, status: str, **facts: float) -> bench_run.Row:
    place = ("latency", "one token", "x", "fp32", "default", 2, "latency", "", 0)
    return bench_run.Row(*place, contender, status, **facts)


def _bench(monkeypatch: pytest.MonkeyPatch, out: Path, rows: list[bench_run.Row]) -> int:
    def run_all(cases, *, budget_s, progress, quick) -> Iterator[list[bench_run.Row]]:
        progress("a case")
        yield rows

    monkeypatch.setattr(bench_run, "run_all", run_all)
    return main(["bench", "--op", "latency", "--out", str(out)])


def test_bench_writes_table_jsonl_plots_and_report(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    rows = [
        _row("fastattn", "ok", seconds=1e-6, p20=1e-6, p80=1e-6, ratio=1.0),
        _row("F.x", "ok", seconds=2e-6, ratio=2.0),
    ]
    assert _bench(monkeypatch, tmp_path, rows) == 0
    assert "F.x 2.00x" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "report.md", "ratios.png"}


def test_bench_exits_with_1_when_fastattn_is_wrong(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    assert _bench(monkeypatch, tmp_path, [_row("fastattn", "WRONG", error=1.0)]) == 1
    captured = capsys.readouterr()
    assert "WRONG" in captured.out and "fastattn WRONG" in captured.err


def test_bench_forgives_a_rival_that_is_wrong(tmp_path: Path, monkeypatch):
    rows = [_row("fastattn", "ok", seconds=1e-6, p20=1e-6, p80=1e-6, ratio=1.0), _row("F.x", "WRONG")]
    assert _bench(monkeypatch, tmp_path, rows) == 0


@pytest.mark.parametrize(
    "argv",
    [("--row", "nonsense"), ("--budget", "-1"), ("--op", "latency", "--dtype", "fp16")],
    ids=lambda argv: argv[0],
)
def test_bench_arguments_that_select_nothing_exit_with_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *argv]) == 2
    assert capsys.readouterr().err.startswith("bench: ")


@pytest.mark.slow
def test_bench_for_real_in_this_process_and_with_malloc_pinned(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["bench", "--quick", "--budget", "0.05", "--out", str(tmp_path)]
    assert main([*arguments, "--op", "rope", "--op", "latency", "--dtype", "fp32"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    assert {(row["room"], row["malloc"]) for row in rows} == {("rope", "pinned"), ("latency", "default")}
    assert all(row["seconds"] for row in rows if row["contender"] == "fastattn")
