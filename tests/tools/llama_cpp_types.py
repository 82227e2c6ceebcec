"""Checks every type by hand against llama.cpp, and makes tests/data/llama_cpp.

`python tests/tools/llama_cpp_types.py` quantises a random Llama-shaped model, whose rows are whole blocks of 256, to
every type, with llama.cpp's quantiser and with ours. For each file there are three logits: theirs are llama.cpp's,
which rounds activations to 8 bits; plain are its own over the same weights, which its quantiser has decoded to float32;
ours are our exact ones. Printed are the largest difference over the standard deviation, and the mean KL divergence.
`--golden` writes the data instead. Needs: see llama_cpp_logits.
"""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "tools")]

import numpy as np  # noqa: E402
from family_folders import some_ids, write_tokenizer  # noqa: E402
from llama_cpp_families import agreement, our_logits  # noqa: E402
from llama_cpp_logits import llama_cpp_logits  # noqa: E402
from llama_cpp_quantize import llama_cpp_quantize  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tiny_llama import hf_llama  # noqa: E402

from kernels.formats import BY_NAME  # noqa: E402
from serve_app.__main__ import main as sirocco  # noqa: E402

SHAPE = {
    "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 64,
    "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip
# Rows of 32 behind attention and MLP, where types of 32 weights stand: all types in a file of some 200 kB.
SMALL_SHAPE = SHAPE | {
    "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1, "head_dim": 32,
    "num_key_value_heads": 1,
}  # fmt: skip
# llama.cpp's numbers of file types.
FILE_TYPES = {
    "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ1_S": 24,
    "IQ1_M": 31, "IQ2_XXS": 19, "IQ2_XS": 20, "IQ2_S": 28, "IQ2_M": 29, "IQ3_XXS": 23, "IQ3_XS": 22, "IQ3_S": 26,
    "IQ3_M": 27, "IQ4_NL": 25, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
OURS = [
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M",
    "Q5_K_S", "Q5_K_M", "Q6_K", "Q4_K", "MXFP4",
]  # fmt: skip
OF_256 = [
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "NVFP4",
]  # fmt: skip
OF_32 = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "BF16"]
STORIES = TESTS / "data" / "models" / "stories3M" / "stories3M-F32.gguf"
STORY_IDS = [1, *range(263, 286)]


def quantise(source: Path, target: Path, name: str, *options: str) -> Path:
    """With our command."""
    if sirocco(["quantize", "-m", str(source), "--isq", name, "-o", str(target), *options]):
        raise SystemExit(f"{name}: refused")
    return target


def random_model(folder: Path, shape: dict[str, int]) -> Path:
    """A GGUF in float32."""
    model = hf_llama(**shape)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.3)  # else the softmaxes are all but steps, and what is rounded grows without bounds
    model.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    return quantise(folder / "hf", folder / "model.gguf", "F32")


def three_ways(path: Path, ids: list[int], folder: Path) -> dict[str, NDArray[np.float32]]:
    """float32 [tokens, vocabulary] by name."""
    plain = folder / "plain.gguf"
    llama_cpp_quantize(path, plain, 0)
    return {
        "theirs": llama_cpp_logits(path, ids),
        "plain": llama_cpp_logits(plain, ids),
        "ours": our_logits(path, ids),
    }


def report(label: str, found: dict[str, NDArray[np.float32]]) -> None:
    """A line."""
    parts = []
    for one, other in (("theirs", "plain"), ("ours", "plain"), ("ours", "theirs")):
        values = agreement(found[one], found[other])
        parts.append(f"{one}-{other} {values['largest']:.1e} kl {values['kl']:.1e} top1 {values['top1']:.2f}")
    print(f"{label:18} " + " | ".join(parts), flush=True)


def check(folder: Path) -> None:
    """Prints the lines of all types."""
    source, ids = random_model(folder, SHAPE), some_ids(64)
    for name, number in FILE_TYPES.items():
        path = folder / "theirs.gguf"
        llama_cpp_quantize(source, path, number, has_imatrix=name.startswith(("IQ", "Q2_K_S")))
        report(f"llama {name}", three_ways(path, ids, folder))
    for name in OURS:
        report(f"sirocco {name}", three_ways(quantise(source, folder / "ours.gguf", name), ids, folder))


def every_type(folder: Path) -> Path:
    """One file with a tensor of each type, by llama.cpp's quantiser."""
    source = random_model(folder, SMALL_SHAPE)
    wide = [f"blk.{i}.{n}.weight" for i in range(4) for n in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
    narrow = [f"blk.{i}.{n}.weight" for i in range(4) for n in ("attn_output", "ffn_down")]
    types = {name: OF_256[i % len(OF_256)] for i, name in enumerate(wide)}
    types |= dict(zip(narrow, OF_32, strict=True))
    numbers = {name.replace(".", r"\."): BY_NAME[kind].type_id for name, kind in types.items()}
    llama_cpp_quantize(source, folder / "every.gguf", FILE_TYPES["Q4_0"], numbers, has_imatrix=True)
    return folder / "every.gguf"


def golden(folder: Path, target: Path) -> None:
    """Writes every_type.gguf, every_type.npz and written.npz."""
    target.mkdir(exist_ok=True)
    path, ids = every_type(folder), some_ids(16)
    (target / "every_type.gguf").write_bytes(path.read_bytes())
    found = three_ways(path, ids, folder)
    report("every type", found)
    np.savez_compressed(
        target / "every_type.npz", token_ids=ids, theirs=found["theirs"].astype(np.float16), plain=found["plain"]
    )
    written = {"token_ids": np.array(STORY_IDS)}
    for name in OURS:
        path = quantise(STORIES, folder / "ours.gguf", name)
        found = three_ways(path, STORY_IDS, folder)
        report(f"sirocco {name}", found)
        written |= {f"{name} theirs": found["theirs"][-1].astype(np.float16), f"{name} plain": found["plain"][-1]}
    np.savez_compressed(target / "written.npz", **written)


def main() -> None:
    """See above."""
    with tempfile.TemporaryDirectory() as name:
        if "--golden" in sys.argv:
            golden(Path(name), TESTS / "data" / "llama_cpp")
        else:
            check(Path(name))


if __name__ == "__main__":
    main()
