"""A conversation with a model: its messages, and how they become a prompt that fits."""

from dataclasses import dataclass, field
from typing import Any

from serve_app.errors import ContextTooLong
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Conversation:
    """What was said. Without a template the model continues texts: each question stands for itself.

    max_prompt_tokens: longer prompts forget the oldest exchanges.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_prompt_tokens: int
    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    def prompt_ids(self, question: str) -> tuple[list[int], int]:
        """The prompt for a question, and how many exchanges had to be forgotten for it.

        Raises ContextTooLong if the question alone is too long, InvalidRequest if the template refuses it.
        """
        num_forgotten = 0
        while len(ids := self._encode(question)) > self.max_prompt_tokens:
            if self.template is None or not self.exchanges:
                raise ContextTooLong(
                    f"This is {len(ids)} tokens long, and the model takes {self.max_prompt_tokens} at most."
                )
            del self.exchanges[0]
            num_forgotten += 1
        return ids, num_forgotten

    def messages(self, question: str) -> list[dict[str, Any]]:
        """The whole conversation with a new question at its end, in OpenAI's form."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.exchanges:
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*found, {"role": "user", "content": question}]

    def _encode(self, question: str) -> list[int]:
        if self.template is None:
            return self.tokenizer.encode(question)
        rendered = self.template.render(self.messages(question))
        # The template writes BOS itself where the model wants it.
        return self.tokenizer.encode(rendered, add_special=False, parse_special=True)
