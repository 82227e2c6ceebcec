"""From a client's request to token ids, with the embedded model."""

import pytest

from deployments.preprocessor import ANSWER_TOKENS, Preparation, PreprocessorServer
from serve_app.config import AppConfig, HttpConfig, ModelConfig
from serve_app.errors import ContextTooLong, InvalidRequest
from serve_app.messages import PromptInput
from serve_app.options import RequestSpeculation

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server() -> PreprocessorServer:
    return PreprocessorServer(AppConfig(model=ModelConfig(chat_template=TEMPLATE)))


def test_text_ids_and_messages_become_ids(server):
    ids = server.prepare(PromptInput("r", prompt="Once upon a time")).prompt_ids
    assert server.prepare(PromptInput("r", prompt=ids)).prompt_ids == ids
    tokenizer = server._preparation.tokenizer
    chat = server.prepare(PromptInput("r", messages=[{"role": "user", "content": "Once"}])).prompt_ids
    assert tokenizer.decode(chat) == tokenizer.decode(tokenizer.encode("<user>Once"))


def test_the_clients_parameters_go_over_the_models(server):
    request = server.prepare(PromptInput("r", prompt="a", sampling={"temperature": 0.25, "max_tokens": 3}))
    assert (request.sampling.temperature, request.sampling.max_tokens, request.sampling.top_k) == (0.25, 3, 0)
    assert request.sampling.speculation == RequestSpeculation()
    wish = RequestSpeculation(max_tokens=2)
    assert server.prepare(PromptInput("r", prompt="a", sampling={"speculation": wish})).sampling.speculation == wish


def test_echo_brings_the_prompts_text(server):
    assert server.prepare(PromptInput("r", prompt="Once upon", echo=True)).prompt_text == "Once upon"
    ids = server.prepare(PromptInput("r", prompt="Once upon")).prompt_ids
    assert "Once upon" in server.prepare(PromptInput("r", prompt=ids, echo=True)).prompt_text
    assert server.prepare(PromptInput("r", prompt="Once upon")).prompt_text is None


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_prompt_over_the_context_names_its_field(server, field):
    text = "word " * 2000
    prompt = (
        PromptInput("r", prompt=text)
        if field == "prompt"
        else PromptInput("r", messages=[{"role": "user", "content": text}])
    )
    with pytest.raises(ContextTooLong) as caught:
        server.prepare(prompt)
    assert caught.value.param == field
    assert str(server._preparation.max_seq_len) in caught.value.message


@pytest.mark.parametrize("max_tokens", [None, 1, 50, 10**6])
def test_truncation_keeps_the_newest_tokens_and_room_for_the_answer(server, max_tokens):
    preparation = server._preparation
    ids = preparation.tokenizer.encode("word " * 2000)
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    cut = server.prepare(PromptInput("r", prompt=ids, truncate_sequence=True, sampling=sampling)).prompt_ids
    room = preparation.max_seq_len - min(max_tokens or ANSWER_TOKENS, preparation.max_seq_len - 1)
    assert len(cut) == room
    assert cut[-1] == ids[-1]
    if room > 1:
        assert cut[0] == preparation.tokenizer.bos_id == ids[0]


def test_a_model_without_template_says_what_to_do(server):
    preparation = Preparation(server._preparation.tokenizer, None, server._preparation.defaults, 64)
    with pytest.raises(InvalidRequest, match="--chat-template"):
        preparation.prepare(PromptInput("r", messages=[{"role": "user", "content": "x"}]))


async def test_the_card_has_the_served_name():
    server = PreprocessorServer(AppConfig(http=HttpConfig(served_model_name="storyteller")))
    card = await server.card()
    assert (card.id, card.max_model_len) == ("storyteller", 512)
