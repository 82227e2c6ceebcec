"""A client's request → the engine's requests, one a choice; what the engine cannot do is refused here."""

import hashlib
import secrets
import time
from dataclasses import dataclass

from serve_app.engine.request import Request
from serve_app.errors import ContextTooLong, InvalidRequest
from serve_app.messages import GenerateRequest
from serve_app.text.detokenizer import Detokenizer, DetokenizerTable


@dataclass(frozen=True, slots=True)
class RequestFactory:
    """Knows the model's limits. pool_tokens: what the KV pool holds; seed: for requests that name none."""

    table: DetokenizerTable
    eos_ids: frozenset[int]
    vocab_size: int
    max_seq_len: int
    pool_tokens: int
    seed: int | None = None

    def make(self, source: GenerateRequest) -> list[Request]:
        """The choices of a request. Raises ContextTooLong or InvalidRequest."""
        self._check(source)
        params = source.sampling
        limit = min(self.max_seq_len, self.pool_tokens)
        if params.max_tokens is not None:
            limit = min(limit, len(source.prompt_ids) + params.max_tokens)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.eos_ids
        arrival_s = time.monotonic()
        base_seed = self._base_seed(source)
        return [
            Request(
                source,
                choice,
                seed=base_seed if choice == 0 else _derive(base_seed, choice),
                stop_ids=stop_ids,
                max_total_tokens=limit,
                detokenizer=Detokenizer(self.table, params.stop, source.prompt_ids),
                arrival_s=arrival_s,
            )
            for choice in range(params.n)
        ]

    def _check(self, source: GenerateRequest) -> None:
        num_prompt = len(source.prompt_ids)
        if num_prompt == 0:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if num_prompt >= min(self.max_seq_len, self.pool_tokens):
            limit, what = self.max_seq_len, "the model's context"
            if self.pool_tokens < limit:
                limit, what = self.pool_tokens, "the KV cache"
            raise ContextTooLong(
                f"the prompt has {num_prompt} tokens, but {what} holds {limit}, one of them for the answer",
                param="prompt",
            )
        if min(source.prompt_ids) < 0 or max(source.prompt_ids) >= self.vocab_size:
            raise InvalidRequest(f"prompt token ids must lie in 0 … {self.vocab_size - 1}", param="prompt")
        for token_id, _ in source.sampling.logit_bias:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"logit_bias names token {token_id}, the model has 0 … {self.vocab_size - 1}", param="logit_bias"
                )

    def _base_seed(self, source: GenerateRequest) -> int:
        if source.sampling.seed is not None:
            return source.sampling.seed & 0x7FFF_FFFF_FFFF_FFFF
        if self.seed is not None:
            digest = hashlib.blake2b(
                source.request_id.encode(), digest_size=8, key=self.seed.to_bytes(8, "little", signed=True)
            )
            return int.from_bytes(digest.digest(), "little") >> 1
        return secrets.randbits(63)


def _derive(seed: int, choice: int) -> int:
    digest = hashlib.blake2b(choice.to_bytes(4, "little"), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") >> 1
