import json
from pathlib import Path

import pytest
import torch

from kernels.dispatch import NativeModule
from serve_app import cpu_info
from serve_app.commands import doctor
from serve_app.commands.doctor import Finding


def test_the_report_has_what_was_promised(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    found = {title: {finding["name"]: finding for finding in findings} for title, findings in report.items()}
    assert found["cpu"]["cores"]["value"] >= 1
    assert isinstance(found["cpu"]["flags"]["value"], list)
    assert found["memory"]["free_bytes"]["value"] > 2**20
    assert found["memory"]["dev_shm_free_bytes"]["value"] > 0
    assert found["torch"]["version"]["value"]
    assert found["gpu"]["devices"]["note"] or found["gpu"]["devices"]["value"]
    assert found["ray"]["ray"]["value"].startswith("2.")
    assert not any(name == "examination" for findings in found.values() for name in findings)


def test_attention_backends_each_have_a_reason_and_one_is_chosen() -> None:
    findings = doctor.examine()["attention"]
    assert [finding.value for finding in findings].count("chosen") == 1
    assert all(finding.note for finding in findings)
    assert "torch" in {finding.name for finding in findings}


def test_which_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in doctor.examine()["kernels"]}
    assert found["native_kernels"].value is True
    assert "generic" in found["instruction_sets"].value
    assert found["native_kernels"].note.removeprefix("native ") in found["instruction_sets"].value
    assert found["matrices"].value == "native"
    monkeypatch.setattr("kernels.dispatch.native", lambda: NativeModule(None, "it is not built"))
    without = {finding.name: finding for finding in doctor.examine()["kernels"]}
    assert (without["native_kernels"].value, without["native_kernels"].note) == (False, "it is not built")
    assert without["matrices"].value == "torch"


def test_a_gpu_that_torch_sees_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    found = {finding.name: finding for finding in doctor.examine()["gpu"]}
    assert found["devices"].value == ["GPU 0"]
    assert (found["used"].value, found["used"].note) == (True, "--device auto takes cuda")


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"cpu", "memory", "torch", "gpu", "kernels", "attention", "ray"} <= set(lines)
    assert any("GiB" in line for line in lines)


def test_a_broken_part_is_a_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise ImportError("libfoo.so is missing")

    monkeypatch.setattr(doctor, "_torch", broken)
    report = doctor.examine()
    assert report["torch"] == [Finding("examination", "failed", "ImportError: libfoo.so is missing")]
    assert report["ray"]


def test_cpu_of_x86_and_arm(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "proc" / "cpuinfo"
    cpuinfo.parent.mkdir()
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast One\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t: none\n")
    assert cpu_info.cpu_name(tmp_path) == "Fast One"
    assert cpu_info.cpu_flags(tmp_path) == {"fpu", "avx2"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: asimd sve\n")
    assert cpu_info.cpu_flags(tmp_path) == {"asimd", "sve"}
    assert cpu_info.cpu_name(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "cores"),
    [
        ("cpu.max", "150000 100000\n", 1.5),
        ("cpu.max", "max 100000\n", None),
        ("none", "", None),
    ],
)
def test_cpu_quota(tmp_path: Path, file: str, text: str, cores: float | None) -> None:
    folder = tmp_path / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / file).write_text(text)
    assert cpu_info.quota_cores(tmp_path) == cores


def test_cpu_quota_of_the_first_cgroup_version(tmp_path: Path) -> None:
    folder = tmp_path / "sys/fs/cgroup/cpu"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("200000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_info.quota_cores(tmp_path) == 2.0
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_info.quota_cores(tmp_path) is None


def test_hyper_threads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_info.os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6})
    for cpu, siblings in {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 6: "2,6"}.items():
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    assert cpu_info.num_physical_cores(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("150000 100000\n")
    assert cpu_info.num_physical_cores(tmp_path) == 1
    assert cpu_info.num_physical_cores(Path("/nothing/here")) == 5


def test_lists_the_model_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(as_json=True, lists_models=True) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert found["gemma2"]["value"] == ["Gemma2ForCausalLM", "gemma2"]
    assert found["mistral"]["value"] == ["MistralForCausalLM"]
    assert all(row["note"] for row in found.values())
