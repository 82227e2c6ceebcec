"""Offline use of the engine: prompts in, texts out, in the caller's thread. Needs none of the server's packages."""

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

import torch

from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.speculation.local_engine import local_engine
from serve_app.errors import LaunchError, QueueFull
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.messages import Finish, FinishReason, GenerateRequest, TokenDelta, TokenLogprob
from serve_app.models.base import CausalLM
from serve_app.options import DType, EngineConfig, ModelSource, SamplingParams, SpeculationOptions

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Choice:
    """One answer. token_ids include the stop token that ended it; logprobs is None unless asked for."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class Generation:
    """What one prompt gave: sampling.n choices. The properties speak of the first."""

    prompt_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def token_ids(self) -> list[int]:
        """Output tokens of the first choice."""
        return self.choices[0].token_ids

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Log-probabilities of the first choice's tokens."""
        return self.choices[0].logprobs

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        finish = self.choices[0].finish
        assert finish is not None
        return finish.reason


class LLM:
    """A model and its engine. A context manager; close() frees model and cache."""

    def __init__(
        self,
        model: str | ModelSource | ModelFiles | None = None,
        *,
        dtype: DType = "auto",
        files: Sequence[str] = (),
        tokenizer: str | None = None,
        max_seq_len: int | None = None,
        config: EngineConfig | None = None,
        speculation: SpeculationOptions | None = None,
        draft: str | ModelSource | ModelFiles | None = None,
    ) -> None:
        """model: a hub id, folder or file, a whole ModelSource or its files (the other model options are then unused),
        or None for the embedded model. draft: a smaller one that proposes tokens to it. speculation: how tokens are
        proposed; None: as pays where there is a draft, else not at all.

        Raises ModelFileError when a model cannot be loaded, LaunchError for options that do not go together.
        """
        if not isinstance(model, ModelSource | ModelFiles):
            model = ModelSource(
                model=model, dtype=dtype, files=tuple(files), tokenizer=tokenizer, max_seq_len=max_seq_len
            )
        if isinstance(draft, str):
            draft = ModelSource(model=draft)
        speculation = speculation or SpeculationOptions(use="off" if draft is None else "auto")
        _check_draft(speculation, has_draft=draft is not None)
        self._resources = ExitStack()
        self.engine = self._resources.enter_context(
            local_engine(
                _files(model),
                config or EngineConfig(),
                lambda deltas: None,
                speculation,
                None if draft is None else _files(draft),
            )
        )
        self.tokenizer = self.engine.parts.tokenizer
        self.tokenizer.build_encoder()
        self._num_requests = 0

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """Runs the prompts (texts, or lists of token ids) to their ends, as one changing batch.

        sampling: one for all or one each; the default is the model's generation_config. Raises the ServeError of the
        first request that fails.
        """
        prompts = _as_list(prompts)
        if sampling is None:
            sampling = self.engine.parts.sampling_defaults
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        generations: dict[str, Generation] = {}
        queue: deque[GenerateRequest] = deque()
        for prompt, params in zip(prompts, sampling, strict=True):
            request = self._request(prompt, params)
            choices = [Choice(logprobs=None if params.logprobs is None else []) for _ in range(params.n)]
            generations[request.request_id] = Generation(request.prompt_ids, choices)
            queue.append(request)
        self._run(queue, generations)
        return list(generations.values())

    @property
    def model(self) -> CausalLM:
        """The loaded model."""
        model = cast(ModelRunner, self.engine.parts.runner).model
        assert model is not None
        return model

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The model's raw logits after each of the given tokens, float32 [tokens, vocabulary]."""
        request = self._request(list(token_ids), SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=True))
        chunks = self.engine.parts.collector.raw_logits[request.request_id] = []
        try:
            self._run(deque([request]), {request.request_id: Generation(request.prompt_ids, [Choice()])})
        finally:
            del self.engine.parts.collector.raw_logits[request.request_id]
        return torch.cat(chunks)

    def close(self) -> None:
        """Frees everything. The object is unusable afterwards."""
        self._resources.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, prompt: Prompt, params: SamplingParams) -> GenerateRequest:
        self._num_requests += 1
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return GenerateRequest(f"llm-{self._num_requests}", ids, params)

    def _run(self, queue: deque[GenerateRequest], generations: dict[str, Generation]) -> None:
        engine = self.engine
        try:
            while queue or engine.has_requests:
                try:
                    while queue:
                        engine.add(queue[0])
                        queue.popleft()
                except QueueFull:
                    pass
                for delta in engine.step():
                    _take(generations[delta.request_id], delta)
        except BaseException:
            for request_id in generations:
                engine.abort(request_id)
            engine.step()
            raise


def _files(model: ModelSource | ModelFiles) -> ModelFiles:
    return resolve(model) if isinstance(model, ModelSource) else model


def _check_draft(speculation: SpeculationOptions, *, has_draft: bool) -> None:
    if has_draft and speculation.use not in ("auto", "draft"):
        raise LaunchError(f"speculation.use is {speculation.use!r}, which asks no draft model: leave draft out")
    if not has_draft and speculation.use == "draft":
        raise LaunchError("speculation.use is 'draft', but no draft model is given: name one with draft")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _take(generation: Generation, delta: TokenDelta) -> None:
    choice = generation.choices[delta.choice]
    choice.token_ids += delta.token_ids
    choice.text += delta.text
    if delta.logprobs is not None and choice.logprobs is not None:
        choice.logprobs += delta.logprobs
    if delta.prompt_logprobs is not None:
        generation.prompt_logprobs = delta.prompt_logprobs
    if delta.finish is not None:
        choice.finish = delta.finish
        if delta.finish.error is not None:
            raise delta.finish.error
