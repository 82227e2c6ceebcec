"""Peak resident memory of loading: the file's size, at most 15 % more, and the process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernels.formats import BY_NAME
from serve_app.loaders.weight_files import EMBEDDED_MODEL

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 1024, 2816, 16, 4, 4096
PROCESS_MB = 600.0 if torch.version.cuda is None else 700.0  # a build for GPUs has larger libraries
SCRATCH_MB = 24.0  # a converted tensor, a decoded tile, the allocator's slack
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama by their GGUF names."""
    keys = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,), f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HIDDEN, HIDDEN), f"blk.{i}.attn_k.weight": (keys, HIDDEN),
            f"blk.{i}.attn_v.weight": (keys, HIDDEN), f"blk.{i}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate.weight": (INNER, HIDDEN), f"blk.{i}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INNER),
        }  # fmt: skip
    return found


def write_gguf(path: Path, type_name: str, layers: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    counts = {
        "context_length": 64, "embedding_length": HIDDEN, "block_count": layers, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": VOCAB,
    }  # fmt: skip
    for key, value in counts.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    form, kind = BY_NAME[type_name], gguf.GGMLQuantizationType[type_name]
    for name, shape in shapes(layers).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            writer.add_tensor(name, np.zeros((shape[0], form.row_bytes(shape[1])), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_folder(folder: Path, type_name: str, layers: int) -> None:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, shape in shapes(layers).items():
        *layer, stem, _ = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{HF_NAMES[stem]}.weight"] = torch.zeros(shape, dtype=TORCH_DTYPES[type_name])
    save_file(tensors, folder / "model.safetensors")


def write(tmp_path: Path, container: str, type_name: str, layers: int) -> tuple[Path, float]:
    """The model's path and its weights' size in MB."""
    if container == "gguf":
        path = tmp_path / "big.gguf"
        write_gguf(path, type_name, layers)
        return path, path.stat().st_size / 1e6
    folder = tmp_path / "big"
    write_folder(folder, type_name, layers)
    return folder, (folder / "model.safetensors").stat().st_size / 1e6


def measure(path: Path, dtype: str) -> dict[str, Any]:
    probe = Path(__file__).with_name("memory_probe.py")
    command = [sys.executable, str(probe), str(EMBEDDED_MODEL), str(path), dtype]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout))


CASES = [
    ("gguf", "Q8_0", "f32"),
    ("gguf", "F32", "f32"),
    ("gguf", "F16", "f32"),
    ("gguf", "F32", "bf16"),
    ("safetensors", "F32", "f32"),
    ("safetensors", "BF16", "f32"),
    ("safetensors", "BF16", "f16"),
]


def check(tmp_path: Path, container: str, type_name: str, dtype: str, layers: int) -> None:
    path, size_mb = write(tmp_path, container, type_name, layers)
    found = measure(path, dtype)
    assert found["weights"] == 4 * layers + 1
    # Bound from below too: the weights were really read.
    assert 0.4 * size_mb < found["added_mb"] <= 1.15 * size_mb + SCRATCH_MB, (size_mb, found)
    assert found["peak_mb"] <= 1.15 * size_mb + PROCESS_MB, (size_mb, found)


@pytest.mark.parametrize(("container", "type_name", "dtype"), [CASES[0], CASES[5]])
def test_loading_adds_the_file_and_little_more(tmp_path: Path, container: str, type_name: str, dtype: str) -> None:
    check(tmp_path, container, type_name, dtype, layers=4)


@pytest.mark.nightly
@pytest.mark.parametrize(("container", "type_name", "dtype"), CASES)
def test_loading_three_hundred_megabytes(tmp_path: Path, container: str, type_name: str, dtype: str) -> None:
    layers = {"Q8_0": 22, "F32": 6}.get(type_name, 12)
    check(tmp_path, container, type_name, dtype, layers)
