"""Checks by hand that llama.cpp computes with the GGUF of every family what we compute with the folder.

`python tests/tools/llama_cpp_families.py` prints a line for each family: the largest difference of logits beside the
spread of them, the mean KL divergence and how often the likeliest token is the same. Needs: see llama_cpp_logits.
Phi-3.5-MoE is another model there: a renormalised softmax routes it and not, as it was trained, sparsemixer, and its
norms do not subtract the mean. For the comparison we do the same.
"""

import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "tools")]

import numpy as np  # noqa: E402
from family_folders import LLAMAS, MIXTURES, folder_of, some_ids  # noqa: E402
from llama_cpp_logits import llama_cpp_logits  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tiny_llama import full_logits  # noqa: E402

from serve_app.__main__ import main as sirocco  # noqa: E402
from serve_app.layers.norm import Norm  # noqa: E402
from serve_app.layers.step import Routing  # noqa: E402
from serve_app.loaders.load import load_model  # noqa: E402
from serve_app.loaders.model_files import resolve  # noqa: E402
from serve_app.models import phimoe  # noqa: E402
from serve_app.models.layer_weights import LayerWeights  # noqa: E402
from serve_app.options import ModelSource  # noqa: E402

# Not here: biases where llama.cpp has none (Gemma), and windows that it leaves out (Phi-3, StarCoder 2).
DENSE = [
    "llama yarn", "llama dynamic", "mistral", "qwen2", "qwen2, tied", "qwen2, every head its own, yarn", "qwen3",
    "gemma", "gemma2, long window", "gemma3, published pattern", "phi3", "phi3, short", "phi3, long", "phi2",
    "granite", "granite, biases", "starcoder2", "starcoder2, own head",
]  # fmt: skip


def our_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """float32 [tokens, vocabulary]; in full precision."""
    loaded = load_model(resolve(ModelSource(model=str(path))), dtype="f32", device="cpu", is_exact=True)
    found: NDArray[np.float32] = full_logits(loaded.model, ids, "cpu").numpy()
    return found


def agreement(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> dict[str, float]:
    """largest: of the differences, over the standard deviation; kl: mean of each token's; top1: share."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True) for x in (theirs, ours))
    return {
        "largest": float(np.abs(theirs - ours).max() / ours.std()),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
    }


class _WithoutMeans(LayerWeights):
    def layer_norm(self, name: str, width: int, epsilon: float) -> Norm:
        """An RMS norm with a bias."""
        norm = super().layer_norm(name, width, epsilon)
        return Norm(norm._weights.weight, epsilon, norm._weights.bias)


def main() -> None:
    """Prints the lines."""
    phimoe.Routing = lambda used, *_, **__: Routing(used, is_renormalised=True)  # type: ignore[misc,assignment]
    phimoe.LayerWeights = _WithoutMeans  # type: ignore[misc]
    for case in sys.argv[1:] or [*LLAMAS, *DENSE, *MIXTURES]:
        with tempfile.TemporaryDirectory() as name:
            folder, target = folder_of(case, Path(name) / "hf"), Path(name) / "a.gguf"
            if sirocco(["quantize", "-m", str(folder), "--isq", "F32", "-o", str(target)]):
                raise SystemExit(f"{case}: refused")
            ids = some_ids(100)
            context = {"phi3, long": 512, "phimoe, long": 4096}.get(case, 128)
            try:
                theirs = llama_cpp_logits(target, ids, context=context)
            except ValueError as error:
                print(f"{case:34} {error}", flush=True)
                continue
            found = agreement(theirs, our_logits(folder, ids))
            print(f"{case:34} " + "  ".join(f"{key} {value:.2e}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
