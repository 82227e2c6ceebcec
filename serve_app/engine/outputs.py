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
        # Into _ids; and into _counts, which there are where requests drew several.
        self._next = self._next_request = 0
        self._counts: list[int] | None = None
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
        self._next = self._next_request = 0
        self._counts = None if result.counts is None else result.counts.tolist()
        self._logprobs = result.logprobs
        self._prompt_logits = {}
        row = 0
        for i, span in wanted:
            assert result.extra_logits is not None
            logits = result.extra_logits[row : row + len(span)]
            self._prompt_logits[id(schedule.prefill[i][0])] = (span, logits)
            row += len(span)

    def collect(self, request: Request) -> TokenDelta:
        """Puts the next sampled tokens in their place and says what came of them; those after the end are dropped."""
        first, count = self._next, self._count()
        index = request.num_output
        text, finish = "", None
        num_kept = 0
        if self._counts is not None:
            request.num_rejected += len(request.draft) - (count - 1)
        while num_kept < count and finish is None:
            # What is drawn last was not proposed, or it was proposed otherwise.
            num_kept += 1
            request.num_accepted += num_kept < count
            piece, finish = self._take(request, self._ids[first + num_kept - 1], index + num_kept - 1)
            text += piece
        token_ids = self._ids[first : first + num_kept]
        delta = TokenDelta(request.request_id, request.choice, index, token_ids, text, None, finish)
        num_top = request.params.logprobs
        if num_top is not None:
            logprobs = self._logprobs
            assert logprobs is not None
            delta.logprobs = [self._describe(i, num_top, first + n, logprobs) for n, i in enumerate(token_ids)]
        if index == 0 and request.prompt_logprobs is not None and request.choice == 0:
            delta.prompt_logprobs = request.prompt_logprobs
        return delta

    def _count(self) -> int:
        """How many tokens the next request drew; goes on to the one after."""
        count = 1
        if self._counts is not None:
            count = self._counts[self._next_request]
            self._next_request += 1
        self._next += count
        return count

    def _take(self, request: Request, token_id: int, index: int) -> tuple[str, Finish | None]:
        place = request.num_prompt + index
        if place < len(request.token_ids):
            request.token_ids[place] = token_id
        else:
            request.token_ids.append(token_id)
        request.num_output = index + 1
        self.num_output_tokens += 1
        detokenizer = request.detokenizer
        if token_id in request.stop_ids:
            text = detokenizer.flush()
            return text, self._finish(request, "stop", None if token_id in self._eos_ids else token_id)
        text = detokenizer.push(token_id, may_stop=index >= request.params.min_tokens)
        if detokenizer.stopped_by is not None:
            return text, self._finish(request, "stop", detokenizer.stopped_by)
        if request.num_known >= request.max_total_tokens:
            text += detokenizer.flush()
            return text, self._finish(request, "length", None)
        return text, None

    def skip(self) -> None:
        """Drops the next sampled tokens: their request ended before they were drawn."""
        self._count()

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
        usage = Usage(
            request.num_prompt, request.num_output, request.num_cached, request.num_accepted, request.num_rejected
        )
        return Finish(reason, usage, stop_reason)

    def _describe(self, token_id: int, num_top: int, row: int, step: StepLogprobs) -> TokenLogprob:
        text_of = self._tokenizer.token_text
        ids = step.top_ids[row, :num_top].tolist()
        top = list(zip(ids, step.top_logprobs[row, :num_top].tolist(), strict=True))
        return TokenLogprob(token_id, float(step.chosen[row]), top, text_of(token_id), [text_of(i) for i in ids])
