"""The token that ends an answer as the chat template shows it: many configurations name the end of a text only."""

import logging
import re
from typing import Final

from serve_app.errors import InvalidRequest, ModelFileError
from serve_app.text.chat_template import ChatTemplate, TemplateSources, open_chat_template
from serve_app.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_ANSWER: Final = "An answer of some words"
_TALK: Final = ({"role": "user", "content": "A question"}, {"role": "assistant", "content": _ANSWER})
# What control tokens look like: </s>, <|im_end|>, <end_of_turn>.
_MARK: Final = re.compile(r"<[^<>\s]{1,60}>")


def turn_end_ids(files: TemplateSources, tokenizer: Tokenizer) -> frozenset[int]:
    """See template_end_ids; of a model's files. Empty where they have no template, or one that cannot be opened: who
    renders it says so."""
    try:
        template = open_chat_template(files, tokenizer)
    except ModelFileError as error:
        log.warning("answers end where the configuration says: %s", error)
        return frozenset()
    return frozenset() if template is None else template_end_ids(template, tokenizer)


def template_end_ids(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """The token that the template writes behind an answer, if it writes one that the model has."""
    try:
        text = template.render(_TALK, add_generation_prompt=False)
    except InvalidRequest:  # it wants another kind of conversation
        return frozenset()
    _, found, behind = text.rpartition(_ANSWER)
    match = _MARK.match(behind.lstrip()) if found else None
    end = None if match is None else tokenizer.id_of_text(match[0])
    return frozenset() if end is None else frozenset({end})
