"""The whole command: our engine in its process, llama.cpp played by a script, a tiny model."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import cpu, models
from benchmarks.cpu_speed import machine
from kernels.cpu import _native

LLAMA_BENCH = """#!{python}
import json, sys
print("llama-bench: benchmark 1/1: generation run 1/1", file=sys.stderr, flush=True)
value = lambda name: int(sys.argv[sys.argv.index(name) + 1])
print(json.dumps({{"build_commit": "abc", "build_number": 1, "model_type": "tiny", "avg_ns": 1, "samples_ns": [10**9],
                  "n_prompt": value("-p"), "n_gen": value("-n")}}))
"""
BATCHED_BENCH = """#!{python}
print('{{"tg": 16, "t_tg": 1.0}}')
"""


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", 8 << 20)
    models.main(["tiny", str(tmp_path), "--formats", "gguf"])
    for name, body in (("llama-bench", LLAMA_BENCH), ("llama-batched-bench", BATCHED_BENCH)):
        (tmp_path / name).write_text(body.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    options = ["--models", "tiny", "--types", "BF16", "--quick", "--threads", "1"]
    options += ["--llama-bench", str(tmp_path / "llama-bench"), "--json", str(tmp_path / "out.json")]
    cpu.main([str(tmp_path), *options])
    report = json.loads((tmp_path / "out.json").read_text())
    (run,) = report["runs"]
    assert run["errors"] == {}
    share = run["cells"].pop(2)
    assert [cell["cell"] for cell in run["cells"]] == ["prefill 128", "decode at 0", "batch 8"]
    assert share["cell"] == "decode at 0, reading in turn"
    assert share["read_GB_per_s"] > 0
    assert share["engines"].keys() == {"Sirocco"}
    assert share["engines"]["Sirocco"]["share_of_bandwidth"] > 0
    for cell in run["cells"]:
        ours, theirs = cell["engines"]["Sirocco"], cell["engines"]["llama.cpp"]
        assert len(ours["samples"]) == len(theirs["samples"]) == 2
        assert ours["tok_per_s"]["low"] > 0
        assert cell["to_better_peer"]["peer"] == "llama.cpp"
    assert run["cells"][2]["engines"]["llama.cpp"]["tok_per_s"]["median"] == 128.0
    assert report["machine"]["dot_G_products_per_s"].keys() <= {"int8", "bf16", "f32"}
    assert "### tiny BF16" in capsys.readouterr().out


def test_a_model_that_is_not_there_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cpu.main([str(tmp_path), "--models", "tiny", "--types", "Q8_0", "--no-sirocco", "--quick", "--threads", "1"])
    assert "tiny-Q8_0.gguf is not there" in capsys.readouterr().err


def test_the_probes_give_a_rate_for_each_pass() -> None:
    reader = _native.ReadProbe(8 << 20, 2)
    assert [len(reader.rates(passes)) for passes in (3, 1)] == [3, 1]
    rates = reader.rates(2)
    assert all(rate > 0 for rate in rates)
    assert all(rate > 0 for rate in _native.probe_dot("int8", 1, 2))
    for bad in ((1024, 1), (8 << 20, 0), (8 << 20, 8)):
        with pytest.raises(ValueError, match="at least 2 MiB"):
            _native.ReadProbe(*bad)
    with pytest.raises(ValueError, match="at least one pass"):
        reader.rates(0)
    with pytest.raises(ValueError, match="int8, bf16 or f32"):
        _native.probe_dot("int3", 1, 1)
