"""The replica that turns a client's request into token ids: template and tokenizer, no torch."""

import logging
import time
from dataclasses import dataclass

from ray import serve

from deployments.actor_options import PREPROCESSOR
from deployments.replica_process import Surroundings, prepare_process
from serve_app.api.backend import ModelCard
from serve_app.config import AppConfig
from serve_app.errors import ContextTooLong, InvalidRequest
from serve_app.loaders.model_files import resolve
from serve_app.messages import GenerateRequest, PromptInput
from serve_app.metrics import Snapshot, process_snapshot
from serve_app.options import SamplingParams
from serve_app.text.chat_template import ChatTemplate, open_chat_template
from serve_app.text.tokenizer import Tokenizer, open_tokenizer

log = logging.getLogger(__name__)

# Room that truncation leaves for the answer when the request names no max_tokens, as mistral.rs does.
ANSWER_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Preparation:
    """What one model needs of a request before its engine sees it. Thread-safe.

    max_seq_len counts prompt and answer. defaults are the model's own sampling parameters; template None: the model has
    no chat template.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: SamplingParams
    max_seq_len: int

    def prepare(self, prompt: PromptInput) -> GenerateRequest:
        """Raises InvalidRequest, and ContextTooLong where the prompt is not to be truncated."""
        ids, text, param = self._encode(prompt)
        sampling = self.defaults.with_overrides(prompt.sampling)
        if len(ids) >= self.max_seq_len:
            if not prompt.truncate_sequence:
                raise ContextTooLong(
                    f"The prompt has {len(ids)} tokens, but the model's context holds {self.max_seq_len}, one of them "
                    "for the answer. Shorten it, or ask for truncate_sequence.",
                    param=param,
                )
            ids = self._truncate(ids, sampling)
        return GenerateRequest(
            prompt.request_id, ids, sampling, prompt.cache_salt, prompt_text=text if prompt.echo else None
        )

    def _encode(self, prompt: PromptInput) -> tuple[list[int], str | None, str]:
        """(ids, the prompt's text where it is to be repeated, the request's field it came from)."""
        if prompt.messages is not None:
            if self.template is None:
                raise InvalidRequest(
                    "This model has no chat template: use /v1/completions, or start the server with --chat-template.",
                    param="messages",
                )
            rendered = self.template.render(prompt.messages, prompt.tools, **prompt.template_options)
            # The template writes BOS itself where the model wants it.
            return self.tokenizer.encode(rendered, add_special=False, parse_special=True), None, "messages"
        if isinstance(prompt.prompt, str):
            return self.tokenizer.encode(prompt.prompt), prompt.prompt, "prompt"
        assert prompt.prompt is not None
        text = self.tokenizer.decode(prompt.prompt, skip_special=False) if prompt.echo else None
        return prompt.prompt, text, "prompt"

    def _truncate(self, ids: list[int], sampling: SamplingParams) -> list[int]:
        """Drops the oldest tokens; a leading BOS stays, for models are lost without it."""
        room = self.max_seq_len - min(sampling.max_tokens or ANSWER_TOKENS, self.max_seq_len - 1)
        bos = self.tokenizer.bos_id
        if bos is not None and ids[0] == bos and room > 1:
            return [bos, *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]


class PreprocessorServer:
    """Preparation for the configured model, whose files it finds by itself."""

    def __init__(self, config: AppConfig) -> None:
        source = config.model.to_source()
        files = resolve(source)
        tokenizer = open_tokenizer(files.tokenizer_source)
        template = open_chat_template(files, tokenizer)
        self._preparation = Preparation(tokenizer, template, files.sampling_defaults(), files.max_seq_len)
        name = config.http.served_model_name or files.model_name
        self._card = ModelCard(name, int(time.time()), files.max_seq_len)

    def prepare(self, prompt: PromptInput) -> GenerateRequest:
        """Serve runs this in a thread: a long prompt does not hold up the others."""
        return self._preparation.prepare(prompt)

    async def snapshot(self) -> Snapshot:
        """This process's metrics."""
        return process_snapshot(PREPROCESSOR)

    async def card(self) -> ModelCard:
        """The served model."""
        return self._card


@serve.deployment(name=PREPROCESSOR)
class Preprocessor(PreprocessorServer):
    """PreprocessorServer as a Serve replica."""

    def __init__(self, config: AppConfig, surroundings: Surroundings) -> None:
        prepare_process(config, surroundings)
        super().__init__(config)
