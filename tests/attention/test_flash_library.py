"""Finding operators in distributions by their metadata, and checking their schemas; no such distribution is needed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.attention import flash_library, vllm_flash_backend
from serve_app.attention.flash_library import find_library, load_operator
from serve_app.attention.op_schema import BoundOperator, missing_arguments
from serve_app.attention.vllm_flash_backend import FLASH_2, FLASH_3, bind, load

FLASH_3_SCHEMA = (
    "fwd(Tensor! q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor!? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
    "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, "
    "Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
    "float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap, "
    "bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, "
    "Tensor? s_aux, int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"
)
FLASH_2_SCHEMA = (
    "varlen_fwd(Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, "
    "int max_seqlen_k, float p_dropout, float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool return_softmax, int num_splits, Generator? gen) -> Tensor[]"
)


def parse(schema: str) -> torch.FunctionSchema:
    return torch._C.parse_schema(schema)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages with a distribution "vllm" that carries one library."""
    info = tmp_path / "vllm-0.33.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    files = ["vllm/__init__.py", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm/_vllm_fa2_C.abi3.so"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    (tmp_path / "vllm" / "vllm_flash_attn").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('vllm was imported')\n")
    (tmp_path / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.syspath_prepend(str(tmp_path))
    load.cache_clear()
    yield tmp_path
    load.cache_clear()


def test_a_library_is_found_through_the_metadata_without_importing_the_package(site: Path) -> None:
    assert find_library("_vllm_fa3_C") == site / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    assert "vllm" not in sys.modules


def test_a_library_that_is_recorded_but_gone_is_not_found(site: Path) -> None:
    assert find_library("_vllm_fa2_C") is None
    assert "no installed distribution" in load(FLASH_2).reason


def test_one_that_does_not_load_is_a_reason(site: Path) -> None:
    found = load(FLASH_3)
    assert found.backend is None
    assert found.reason.startswith("_vllm_fa3_C.abi3.so does not load: ")
    assert "vllm" not in sys.modules


def test_nothing_is_installed(tmp_path: Path) -> None:
    assert find_library("_vllm_fa3_C", ["no-such-distribution"]) is None


def test_an_operator_of_a_loaded_library(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    operator, schema = load_operator(Path("/somewhere/lib.so"), "aten", "tanh")
    assert loaded == ["/somewhere/lib.so"]
    assert schema.name == "aten::tanh"
    assert callable(operator)
    with pytest.raises(AttributeError):
        load_operator(Path("/somewhere/lib.so"), "aten", "no_such_operator")


@pytest.mark.parametrize(("version", "schema"), [(FLASH_2, FLASH_2_SCHEMA), (FLASH_3, FLASH_3_SCHEMA)])
def test_the_schemas_of_today_fit(version: vllm_flash_backend.FlashVersion, schema: str) -> None:
    found = bind(version, lambda *values: None, parse(schema))
    assert found.backend is not None, found.reason
    assert found.backend.is_graph_safe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("Tensor? page_table, ", ""), "no Tensor page_table"),
        (("float softcap", "int softcap"), "no float softcap"),
        (("Tensor? s_aux", "Tensor s_aux"), "Tensor s_aux is unknown"),
        (("int sm_margin", "int sm_margin, int new_thing"), "int new_thing is unknown"),
    ],
)
def test_a_schema_of_another_version_is_refused_with_what_is_different(change: tuple[str, str], said: str) -> None:
    found = bind(FLASH_3, lambda *values: None, parse(FLASH_3_SCHEMA.replace(*change)))
    assert found.backend is None
    assert said in found.reason


def test_new_arguments_with_a_default_do_no_harm_and_the_order_does_not_matter() -> None:
    schema = parse("fwd(Tensor v, float scale, Tensor q, bool? packs, int extra=7) -> Tensor[]")
    wanted = {"q": "Tensor", "v": "Tensor", "scale": "float"}
    assert missing_arguments(schema, wanted) == []
    taken: list[tuple[Any, ...]] = []
    BoundOperator(lambda *values: taken.append(values), schema)({"q": 1, "scale": 2.0, "v": 3})
    assert taken == [(3, 2.0, 1, None, 7)]


def test_earlier_versions_without_context_parallelism_fit() -> None:
    schema = FLASH_3_SCHEMA.replace(", int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k", "")
    assert bind(FLASH_3, lambda *values: None, parse(schema)).backend is not None
    schema = FLASH_2_SCHEMA.replace("int num_splits, ", "")
    assert bind(FLASH_2, lambda *values: None, parse(schema)).backend is not None


def test_the_distributions_that_are_searched() -> None:
    assert flash_library.DISTRIBUTIONS[0] == "vllm"
    assert "vllm_flash_attn" in flash_library.DISTRIBUTIONS
