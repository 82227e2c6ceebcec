"""Tokens a second of the whole engine, decoding batches on a model of true size; and transformers beside it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.random_model import random_llama
from benchmarks.gpu.sizes import Sizes
from benchmarks.random_models.vocabulary import make_vocabulary
from serve_app.engine.assembly import assemble, ledger
from serve_app.engine.engine import Engine
from serve_app.engine.graph_forward import GraphLimits
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler import Sampler
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.messages import GenerateRequest, TokenDelta
from serve_app.options import EngineConfig, SamplingParams
from serve_app.text.tokenizer import Tokenizer, open_tokenizer

BLOCK = 32
NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests at a time behind prompts of so many tokens."""

    batch: int
    prompt: int


LOADS = (Load(1, 128), Load(64, 1024), Load(16, 128), Load(256, 256))


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """seconds for `tokens` decoded tokens; step_bytes: weights and cache that one step reads."""

    engine: str
    layout: str
    load: Load
    tokens: int
    seconds: float
    step_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.tokens / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Read by the steps."""
        return self.step_bytes * self.tokens / self.load.batch / self.seconds


class EngineUnderTest:
    """An engine over a random model, stepped by the measurement itself."""

    def __init__(
        self,
        sizes: Sizes,
        layout: str,
        device: torch.device,
        loads: tuple[Load, ...],
        new_tokens: int,
        *,
        has_graphs: bool = True,
    ) -> None:
        most = max(load.batch * (-(-(load.prompt + new_tokens) // BLOCK) + 1) for load in loads)
        longest = max(load.prompt for load in loads) + new_tokens + 1
        self.sizes, self.layout, self.new_tokens = sizes, layout, new_tokens
        self.model, self.weight_bytes = random_llama(sizes, layout, device, longest)
        max_seqs = max(load.batch for load in loads)
        config = EngineConfig(
            device=str(device), max_seqs=max_seqs, max_batched_tokens=max(2048, max_seqs), prefix_cache_n=0
        )
        kv = KvPool.on_device(device, most, BLOCK, sizes.layers, sizes.kv_heads, sizes.head_dim, torch.bfloat16)
        tokenizer = _tokenizer(sizes.vocabulary)
        sampler = Sampler(sizes.vocabulary, max_seqs, device)
        # On the CPU, where this is only tried out, the native kernels know no planes.
        attention = "auto" if device.type == "cuda" else "triton"
        graphs = GraphLimits(max_seqs, longest) if has_graphs else None
        runner = ModelRunner(self.model, sampler, kv, device, attention, graphs=graphs, overlaps=True)
        parts = assemble(
            runner, ledger(config, most, b"measured"), kv, tokenizer, config, longest, frozenset(), SamplingParams()
        )
        self.engine = Engine(parts, config, lambda deltas: None)
        self._num_requests = 0

    def start(self, load: Load, seed: int) -> None:
        """Adds the requests and steps until each has its first token."""
        rng = np.random.default_rng(seed)
        sampling = SamplingParams(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True)
        for _ in range(load.batch):
            self._num_requests += 1
            ids = rng.integers(0, self.sizes.vocabulary, load.prompt).tolist()
            self.engine.add(GenerateRequest(f"measured-{self._num_requests}", ids, sampling))
        waiting = load.batch
        while waiting:
            waiting -= sum(delta.index == 0 for delta in self._step())

    def finish(self) -> None:
        """Steps until nothing runs."""
        while self.engine.has_requests:
            self._step()

    def step(self) -> int:
        """One step; the number of tokens that came."""
        return sum(len(delta.token_ids) for delta in self._step())

    def _step(self) -> list[TokenDelta]:
        deltas = self.engine.step()
        for delta in deltas:
            if delta.finish is not None and delta.finish.error is not None:
                raise delta.finish.error
        return deltas

    def close(self) -> None:
        """Frees everything."""
        self.engine.stop()


def measure(
    sizes: Sizes,
    layouts: tuple[str, ...],
    device: torch.device,
    has_time: Callable[[], bool],
    loads: tuple[Load, ...] = LOADS,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[SpeedRow]:
    """Layout by layout, until the time is up."""
    for layout in layouts:
        # Without graphs the first load says enough: there the host is what is waited for.
        for has_graphs, some in ((True, loads), (False, loads[:1])):
            if not has_time():
                return
            tested = EngineUnderTest(sizes, layout, device, some, new_tokens, has_graphs=has_graphs)
            try:
                for load in some:
                    if not has_time():
                        return
                    yield _decode(tested, load, "Sirocco" if has_graphs else "Sirocco, no graphs")
            finally:
                tested.close()
                del tested
                _empty(device)


def _decode(tested: EngineUnderTest, load: Load, name: str) -> SpeedRow:
    # Kernels are compiled and memory is taken in a round of its own; requests that got ahead wait for the others.
    for seed in (0, 1):
        tested.start(load, seed)
        start, tokens = time.perf_counter(), 0
        while tested.engine.has_requests:
            tokens += tested.step()
        seconds = time.perf_counter() - start
    sizes = tested.sizes
    step_bytes = tested.weight_bytes + load.batch * (load.prompt + tested.new_tokens // 2) * sizes.kv_bytes_per_token
    return SpeedRow(name, tested.layout, load, tokens, seconds, step_bytes)


def transformers_row(
    sizes: Sizes, device: torch.device, load: Load, new_tokens: int = NEW_TOKENS, *, compiles: bool = False
) -> SpeedRow | None:
    """transformers' generate with a static cache, on a model of the same sizes; None without it. compiles: as it does
    by itself on a GPU, in the mode that the row names; on a CPU it never does."""
    try:
        from transformers import CompileConfig, LlamaConfig
        from transformers import LlamaForCausalLM as Theirs
    except ImportError:
        return None
    config = LlamaConfig(
        hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim, intermediate_size=sizes.intermediate,
        vocab_size=sizes.vocabulary, tie_word_embeddings=sizes.is_tied,
        max_position_embeddings=load.prompt + new_tokens + 1, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Theirs(config).eval()
    finally:
        torch.set_default_dtype(default)
    ids = torch.randint(0, sizes.vocabulary, (load.batch, load.prompt), device=device)
    seconds = []
    # All is compiled, and the cache as long as it gets, when the last two are timed.
    for count in (new_tokens, new_tokens, 1, new_tokens):
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                cache_implementation="static", disable_compile=not compiles,
            )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    tokens = load.batch * (new_tokens - 1)
    read = sum(p.nbytes for name, p in model.named_parameters() if sizes.is_tied or "embed_tokens" not in name)
    step_bytes = read + load.batch * (load.prompt + new_tokens // 2) * sizes.kv_bytes_per_token
    del model
    _empty(device)
    how = f"compiled: {CompileConfig().mode}" if compiles else "not compiled"
    return SpeedRow(
        f"transformers (static cache, {how})", "bf16", load, tokens, max(1e-9, seconds[3] - seconds[2]), step_bytes
    )


def _tokenizer(vocabulary: int) -> Tokenizer:
    return open_tokenizer(make_vocabulary(vocabulary).metadata(), encodes=False)


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
