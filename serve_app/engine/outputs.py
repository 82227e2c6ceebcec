"""What a step's sampled ids mean for each request: text, log-probabilities, the end."""

from collections.abc import Sequence

import torch

from serve_app.engine.model_runner import StepResult
from serve_app.engine.request import Request
from serve_app.engine.sampler import StepLogprobs
from serve_app.engine.scheduler import Schedule
from serve_app.errors import ServeError
from serve_app.messages import Finish, FinishReason, TokenDelta, TokenLogprob, Usage
from serve_app.text.tokenizer import Tokenizer


class OutputCollector:
    """Turns one step's result into TokenDeltas, request by request in the order of the schedule.

    raw_logits: a request id put there by the caller gets the logits of all its prompt's tokens, chunk by chunk.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int]) -> None:
        self.num_output_tokens = 0
        self.raw_logits: dict[str, list[torch.Tensor]] = {}
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._ids: list[int] = []
        self._next = 0
        self._logprobs: StepLogprobs | None = None
        # By identity of the request: its positions and their logits in this step.
        self._prompt_logits: dict[int, tuple[range, torch.Tensor]] = {}

    def wanted_logits(self, schedule: Schedule) -> list[tuple[int, range]]:
        """The prompt tokens of this step whose logits must come back: (index of the prefill, positions)."""
        wanted: list[tuple[int, range]] = []
        for i, (request, num_tokens) in enumerate(schedule.prefill):
            if request.prompt_logprobs is None:
                continue
            end = request.num_computed + num_tokens
            if request.request_id not in self.raw_logits:
                # The last prompt token's logits score no prompt token.
                end = min(end, request.num_prompt - 1)
            first = max(request.num_computed, len(request.prompt_logprobs) - 1)
            if first < end:
                wanted.append((i, range(first, end)))
        return wanted

    def begin(self, schedule: Schedule, result: StepResult, wanted: Sequence[tuple[int, range]]) -> None:
        """Takes a step's result; collect and collect_prompt then read it."""
        self._ids = result.token_ids.tolist()
        self._next = 0
        self._logprobs = result.logprobs
        self._prompt_logits = {}
        row = 0
        for i, span in wanted:
            assert result.extra_logits is not None
            logits = result.extra_logits[row : row + len(span)]
            self._prompt_logits[id(schedule.prefill[i][0])] = (span, logits)
            row += len(span)

    def collect(self, request: Request) -> TokenDelta:
        """Puts the next sampled token in its place and says what came of it."""
        sample = self._next
        self._next = sample + 1
        token_id = self._ids[sample]
        index = request.num_output
        request.num_output = index + 1
        request.token_ids[request.num_prompt + index] = token_id
        self.num_output_tokens += 1
        detokenizer = request.detokenizer
        finish: Finish | None = None
        if token_id in request.stop_ids:
            text = detokenizer.flush()
            finish = self._finish(request, "stop", None if token_id in self._eos_ids else token_id)
        else:
            text = detokenizer.push(token_id, may_stop=index >= request.params.min_tokens)
            if detokenizer.stopped_by is not None:
                finish = self._finish(request, "stop", detokenizer.stopped_by)
            elif request.num_known >= request.max_total_tokens:
                text += detokenizer.flush()
                finish = self._finish(request, "length", None)
        delta = TokenDelta(request.request_id, request.choice, index, [token_id], text, None, finish)
        if request.params.logprobs is not None:
            assert self._logprobs is not None
            delta.logprobs = [self._describe(token_id, request.params.logprobs, sample, self._logprobs)]
        if index == 0 and request.prompt_logprobs is not None and request.choice == 0:
            delta.prompt_logprobs = request.prompt_logprobs
        return delta

    def skip(self) -> None:
        """Drops the next sampled token: its request ended before it was drawn."""
        self._next += 1

    def collect_prompt(self, request: Request) -> None:
        """Scores the prompt tokens whose logits this step computed, if the request wants that."""
        if id(request) not in self._prompt_logits:
            return
        span, logits = self._prompt_logits[id(request)]
        raw = self.raw_logits.get(request.request_id)
        if raw is not None:
            raw.append(logits.clone())
            return
        collected = request.prompt_logprobs
        assert collected is not None
        scores = torch.log_softmax(logits.float(), dim=-1)
        targets = torch.tensor([request.token_ids[i + 1] for i in span], device=logits.device)
        chosen = scores.gather(1, targets[:, None])[:, 0]
        best, best_ids = scores.topk(max(request.params.logprobs or 0, 1), dim=-1)
        if not collected:
            first = request.token_ids[0]
            collected.append(TokenLogprob(first, None, [], self._tokenizer.token_text(first)))
        step = StepLogprobs(chosen.numpy(force=True), best_ids.numpy(force=True), best.numpy(force=True))
        for row, position in enumerate(span):
            token_id = request.token_ids[position + 1]
            collected.append(self._describe(token_id, request.params.logprobs or 0, row, step))

    def end(self, request: Request, reason: FinishReason, error: ServeError | None) -> TokenDelta:
        """The last delta of a request that ends without a token: aborted, expired or failed."""
        finish = self._finish(request, reason, None)
        finish.error = error
        return TokenDelta(request.request_id, request.choice, request.num_output, [], "", None, finish)

    def _finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None) -> Finish:
        usage = Usage(request.num_prompt, request.num_output, request.num_cached)
        return Finish(reason, usage, stop_reason)

    def _describe(self, token_id: int, num_top: int, row: int, step: StepLogprobs) -> TokenLogprob:
        text_of = self._tokenizer.token_text
        ids = step.top_ids[row, :num_top].tolist()
        top = list(zip(ids, step.top_logprobs[row, :num_top].tolist(), strict=True))
        return TokenLogprob(token_id, float(step.chosen[row]), top, text_of(token_id), [text_of(i) for i in ids])
