"""Milliseconds of one decode step, forward and greedy draw, of the embedded model's sizes with random weights.

    python benchmarks/decode_step.py [--threads 1] [--context 256] [--types dense,Q8_0,Q4_K]

Prints a Markdown table: weights, batch, milliseconds a step (median and 10th percentile), Python calls a step.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels import dispatch
from kernels.formats import block_format
from serve_app.batch import ForwardBatch
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler import Sampler
from serve_app.models.llama import LlamaArgs, LlamaForCausalLM
from serve_app.models.rope_config import RopeConfig
from serve_app.options import SamplingParams
from serve_app.quant.packed import PackedWeight, fuse
from serve_app.quant.weight import DenseWeight, Weight

SIZES = LlamaArgs(
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    head_dim=32,
    hidden_size=256,
    intermediate_size=768,
    vocab_size=512,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
)
BLOCK_SIZE = 32


class RandomSource:
    """A WeightSource of random weights, dense or of one block type."""

    def __init__(self, type_name: str) -> None:
        self._type_name = type_name

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See WeightSource."""
        return torch.ones(shape)

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        """See WeightSource."""
        return fuse([self._matrix(out, in_features) for out in out_features])

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return False

    def _matrix(self, out: int, in_features: int) -> Weight:
        if self._type_name == "dense":
            return DenseWeight(torch.randn(out, in_features) / in_features**0.5)
        form = block_format(self._type_name)
        blocks = torch.randint(0, 64, (out, form.row_bytes(in_features)), dtype=torch.uint8)
        blocks.view(-1, form.block_bytes)[:, form.offset("d") + 1] = 32  # scales below 0.01
        return PackedWeight(form, blocks, torch.float32)


def decode_batch(pool: SimpleNamespace, batch: int, context: int) -> ForwardBatch:
    """Every request at the same context length."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(batch * blocks).view(batch, blocks)
    last = context - 1
    return ForwardBatch(
        token_ids=torch.randint(0, 512, (batch,)),
        positions=torch.full((batch,), last),
        slot_mapping=tables[:, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE,
        block_tables=tables.to(torch.int32),
        query_start=torch.arange(batch + 1, dtype=torch.int32),
        context_lens=torch.full((batch,), context, dtype=torch.int32),
        logit_index=torch.arange(batch),
        sample_rows=torch.arange(batch),
        sample_positions=torch.full((batch,), context),
        max_query_len=1,
        max_context_len=context,
        kv=pool,  # type: ignore[arg-type]
    )


def measure(type_name: str, batch: int, context: int, seconds: float) -> tuple[float, float, int]:
    """Median and 10th percentile in milliseconds, and Python calls a step."""
    shape = (batch * -(-context // BLOCK_SIZE), BLOCK_SIZE, SIZES.n_kv_heads, SIZES.head_dim)
    pool = SimpleNamespace(
        k=[torch.randn(shape) for _ in range(SIZES.n_layers)], v=[torch.randn(shape) for _ in range(SIZES.n_layers)]
    )
    sampler = Sampler(SIZES.vocab_size, batch)
    for row in range(batch):
        sampler.set_row(row, SamplingParams(temperature=0.0), 0, [1])
    runner = ModelRunner(LlamaForCausalLM(SIZES, RandomSource(type_name)), sampler, pool, "cpu")  # type: ignore[arg-type]
    step = decode_batch(pool, batch, context)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 20 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        runner.execute(step)
        times.append(time.perf_counter() - start)
    profile = cProfile.Profile()
    profile.runcall(runner.execute, step)
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return statistics.median(times) * 1e3, statistics.quantiles(times, n=10)[0] * 1e3, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--types", default="dense,Q8_0,Q4_K")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    dispatch.set_num_threads(options.threads)
    print(f"{dispatch.native().reason}, {options.threads} threads, context {options.context}\n")
    print("| weights | batch | ms (median) | ms (p10) | Python calls |\n|---|---|---|---|---|")
    for type_name in options.types.split(","):
        for batch in map(int, options.batches.split(",")):
            median, low, calls = measure(type_name, batch, options.context, options.seconds)
            print(f"| {type_name} | {batch} | {median:.3f} | {low:.3f} | {calls} |")


if __name__ == "__main__":
    main()
