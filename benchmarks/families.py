"""Whether any family decodes slower than Llama: milliseconds a token and byte of weights, on the CPU, batch 1.

    python -m benchmarks.families [--only Phi3,Qwen3Moe] [--rounds 9] [--tokens 24] [--threads 2]

Random bfloat16 models of about 300 million parameters (of mixtures: about as many that a token uses), made with
transformers. Each is measured in turn with Llama, and the quotient is taken pair by pair. What a token reads: every
matrix once, the embedding only where it is the head too, of the experts those that are taken.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from safetensors import safe_open

from benchmarks.cpu_speed.intervals import paired_ratio
from benchmarks.random_models.folder_writer import write_tokenizer
from benchmarks.random_models.shapes import SHAPES
from benchmarks.random_models.vocabulary import make_vocabulary
from serve_app.cpu_info import num_physical_cores
from serve_app.engine.llm import LLM
from serve_app.messages import GenerateRequest
from serve_app.options import EngineConfig, SamplingParams

VOCABULARY = 32_000
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MIXTURE = {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 1024},
    "Qwen2": {},
    "Qwen3": {"head_dim": 64},
    "Gemma": {"head_dim": 64},
    "Gemma2": {"head_dim": 64, "sliding_window": 512},
    "Gemma3": {"head_dim": 64, "sliding_window": 512},
    "Phi": {"num_key_value_heads": 16},
    "Phi3": {},
    "Starcoder2": {},
    "Granite": {},
    "Mixtral": {"num_hidden_layers": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": MIXTURE | {"shared_expert_intermediate_size": 2048},
    "Qwen3Moe": MIXTURE | {"head_dim": 64, "norm_topk_prob": True},
    "Phimoe": {"num_hidden_layers": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
}
EXPERTS_THERE = ("num_local_experts", "num_experts")


def write_model(folder: Path, family: str) -> None:
    """The family's random model, with a tokenizer whose texts are noise."""
    name = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**(SIZES | FAMILIES[family]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, SHAPES["tiny"].context, make_vocabulary(VOCABULARY))


def bytes_of_a_token(folder: Path) -> int:
    """What of the weights is read to decode one token."""
    config = json.loads((folder / "config.json").read_text())
    there = next((config[key] for key in EXPERTS_THERE if key in config), 1)
    taken = config.get("num_experts_per_tok", 1)
    total = 0.0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            is_tied = not any("lm_head" in name for name in names)
            for name in names:
                if "embed_tokens" in name and not is_tied:
                    continue
                size = 2 * torch.Size(file.get_slice(name).get_shape()).numel()
                total += size * taken / there if ".experts." in name else size
    return round(total)


class Decoder:
    """A model that decodes one request."""

    def __init__(self, folder: Path, threads: int, length: int) -> None:
        config = EngineConfig(device="cpu", max_seqs=1, num_threads=threads, pool_tokens=length + 64)
        self.llm = LLM(str(folder), config=config, max_seq_len=length + 64)
        self.bytes = bytes_of_a_token(folder)
        self._count = 0

    def seconds(self, tokens: int) -> float:
        """Of a token, the mean of `tokens` behind a short prompt."""
        self._count += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens + 4, ignore_eos=True)
        engine = self.llm.engine
        engine.add(GenerateRequest(str(self._count), list(range(5, 21)), sampling))
        for _ in range(4):
            engine.step()
        start = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = time.perf_counter() - start
        assert not engine.has_requests
        return seconds / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(FAMILIES)[1:])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=num_physical_cores())
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with TemporaryDirectory() as temporary:
        folders = {family: Path(temporary) / family for family in ["Llama", *options.only]}
        for family, folder in folders.items():
            write_model(folder, family)
        llama = Decoder(folders["Llama"], options.threads, options.tokens + 32)
        print("| family | MB a token | ms a token | GB/s | time a byte over Llama's |\n|---|---|---|---|---|")
        for family in options.only:
            other = Decoder(folders[family], options.threads, options.tokens + 32)
            theirs, ours = [], []
            for _ in range(options.rounds):
                theirs.append(llama.seconds(options.tokens))
                ours.append(other.seconds(options.tokens))
            scale = llama.bytes / other.bytes
            ratio = paired_ratio([seconds * scale for seconds in ours], theirs)
            middle = sorted(ours)[len(ours) // 2]
            print(
                f"| {family} | {other.bytes / 1e6:.0f} | {middle * 1e3:.2f} | {other.bytes / middle / 1e9:.1f} "
                f"| {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] |",
                flush=True,
            )
            other.llm.close()
        llama.llm.close()


if __name__ == "__main__":
    main()
