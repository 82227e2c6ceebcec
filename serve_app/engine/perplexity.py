"""How well a model predicts a text: the exponential of its mean negative log-likelihood."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve_app.engine.llm import LLM
from serve_app.engine.text_chunks import text_chunks
from serve_app.options import SamplingParams

# Logits that one step may have to compute: prompts are scored side by side up to this many.
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True)
class Perplexity:
    """value ± error (one standard error of the mean, as independent tokens would have it) over num_tokens tokens."""

    value: float
    error: float
    num_tokens: int


def perplexity(llm: LLM, text: str, context: int = 512, max_chunks: int | None = None) -> Perplexity:
    """The perplexity of a text, by llama-perplexity's rules, so that figures can be compared.

    The text is cut into chunks of `context` tokens (text_chunks), and the second half of each is scored: tokens
    context / 2 + 1 and after, each with all those of the chunk before it. context is below the model's. ValueError
    where the text has no whole chunk.
    """
    return of_nlls(list(_nlls(llm, text_chunks(llm.tokenizer, text, context, max_chunks), context)))


def of_nlls(nlls: Sequence[float]) -> Perplexity:
    """From the negative log-likelihoods of at least two tokens."""
    mean = math.fsum(nlls) / len(nlls)
    variance = math.fsum((nll - mean) ** 2 for nll in nlls) / len(nlls)
    value = math.exp(mean)
    return Perplexity(value, value * math.sqrt(variance / (len(nlls) - 1)), len(nlls))


def _nlls(llm: LLM, chunks: Sequence[Sequence[int]], context: int) -> Iterator[float]:
    """Of each scored token."""
    at_once = max(1, _LOGITS_AT_ONCE // (context * llm.tokenizer.vocab_size))
    # One token is drawn and thrown away: a request has to have an answer.
    scoring = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=True)
    for i in range(0, len(chunks), at_once):
        for generation in llm.generate(chunks[i : i + at_once], scoring):
            assert generation.prompt_logprobs is not None
            for scored in generation.prompt_logprobs[context // 2 + 1 :]:
                assert scored.logprob is not None
                yield -scored.logprob
