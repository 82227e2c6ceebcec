"""What quantisation costs a model: how far its predictions move away from those of the model as it is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from serve_app.engine.llm import LLM
from serve_app.engine.perplexity import Perplexity, of_nlls
from serve_app.engine.reference_logits import ReferenceLogits, scored_logits
from serve_app.engine.text_chunks import text_chunks
from serve_app.engine.weight_probe import WeightProbe
from serve_app.errors import LaunchError
from serve_app.loaders.model_files import ModelFiles
from serve_app.loaders.number_formats import KV_DTYPES
from serve_app.options import EngineConfig, KvDType

CHUNK_TOKENS = 512
# Numbers of each model that are compared at a time, in float64.
_NUMBERS_AT_ONCE = 1 << 23


@dataclass(frozen=True, slots=True)
class Size:
    """bits_per_weight: of all matrices, embedding and head included; weight_bytes: what they take in memory."""

    bits_per_weight: float
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class Distance:
    """A model beside its reference over the same tokens.

    kl_divergence ± kl_error: mean of sum p log(p / q) in nats, p the reference's probabilities; its standard error.
    top1_agreement: the fraction of tokens where both find the same token likeliest.
    """

    perplexity: Perplexity
    reference_perplexity: Perplexity
    kl_divergence: float
    kl_error: float
    top1_agreement: float


def open_model(files: ModelFiles, config: EngineConfig, chunk_tokens: int) -> LLM:
    """A model to be scored, with a cache of one chunk."""
    # The scheduler wants room for the token that an answer begins with.
    tokens = chunk_tokens + config.block_size
    config = replace(
        config, max_seqs=1, pool_mb=None, pool_fraction=None, pool_tokens=tokens, prefix_cache_n=0, cuda_graphs=False
    )
    return LLM(files, config=config)


def with_cache_of(llm: LLM, config: EngineConfig) -> EngineConfig:
    """The options with keys and values kept as llm has them: what is compared are weights, not caches."""
    names: dict[torch.dtype, KvDType] = {dtype: name for name, dtype in KV_DTYPES.items()}
    return replace(config, kv_cache_dtype=names[llm.engine.parts.kv.dtype], pa_cache_type="auto")


def size_of(llm: LLM) -> Size:
    """What the model's matrices take."""
    probe = WeightProbe.of(llm.model)
    return Size(probe.bits_per_weight, probe.nbytes)


def chunks_of(llm: LLM, text: str, chunk_tokens: int, most: int | None) -> list[list[int]]:
    """See text_chunks; LaunchError where the text has no whole chunk."""
    try:
        return text_chunks(llm.tokenizer, text, chunk_tokens, most)
    except ValueError as error:
        raise LaunchError(f"Quality: {error}.") from None


def compare(reference: ReferenceLogits, variant: LLM, on_chunk: Callable[[], object] = lambda: None) -> Distance:
    """The distance over all chunks. Never more than one chunk's logits are held; on_chunk is called after each.

    The second half of each chunk is scored, as llama-perplexity does it: tokens chunk / 2 + 1 and after, each with all
    those before it in its chunk.
    """
    scores = _Scores()
    for number, chunk in enumerate(reference.chunks):
        theirs, ours = reference(number), scored_logits(variant, chunk)
        step = max(1, _NUMBERS_AT_ONCE // theirs.shape[1])
        targets = torch.tensor(chunk[-len(theirs) :], device=theirs.device)
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            scores.add(theirs[part], ours[part].to(theirs.device), targets[part])
        on_chunk()
    return scores.distance()


class _Scores:
    def __init__(self) -> None:
        self._reference_nlls: list[float] = []
        self._nlls: list[float] = []
        self._divergences: list[float] = []
        self._num_agreed = 0

    def add(self, reference: Tensor, variant: Tensor, targets: Tensor) -> None:
        """Logits [n, vocab] of both, and the tokens [n] that did follow."""
        p, q = (torch.log_softmax(logits.double(), -1) for logits in (reference, variant))
        self._reference_nlls += (-p.gather(1, targets[:, None])[:, 0]).tolist()
        self._nlls += (-q.gather(1, targets[:, None])[:, 0]).tolist()
        # A token that the reference rules out (logit -inf) adds nothing.
        terms = torch.where(torch.isneginf(p), 0.0, p.exp() * (p - q))
        self._divergences += terms.sum(-1).tolist()
        self._num_agreed += int((p.argmax(-1) == q.argmax(-1)).sum())

    def distance(self) -> Distance:
        """Over all tokens so far, at least two."""
        count = len(self._nlls)
        mean = math.fsum(self._divergences) / count
        variance = math.fsum((d - mean) ** 2 for d in self._divergences) / (count - 1)
        return Distance(
            of_nlls(self._nlls), of_nlls(self._reference_nlls), mean, math.sqrt(variance / count),
            self._num_agreed / count,
        )  # fmt: skip
