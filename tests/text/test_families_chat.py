"""Chat of each family: prompts have transformers' ids, one BOS at most, and answers end at the family's own token."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from serve_app.gguf_file import open_gguf
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource
from serve_app.text.chat_template import ChatTemplate, open_chat_template
from serve_app.text.gguf_vocab import vocabulary_from_gguf
from serve_app.text.tokenizer import Tokenizer, open_tokenizer
from serve_app.text.turn_ends import template_end_ids, turn_end_ids

DATA = Path(__file__).parents[1] / "data"
TEMPLATES = DATA / "chat_templates"
GPT2, LLAMA2, LLAMA3 = "ggml-vocab-gpt-2.gguf", "ggml-vocab-llama-spm.gguf", "built-vocab-llama-bpe.gguf"
PHI3 = "ggml-vocab-phi-3.gguf"
TALK = [
    {"role": "user", "content": "Is 1 < 2?\n"},
    {"role": "assistant", "content": "Yes, Zoë!"},
    {"role": "user", "content": "<b>Tell</b> me  more."},
]


@dataclass(frozen=True)
class Chat:
    """template, vocabulary: files of tests/data. bos, eos: by name, as tokenizer_config.json has them. ends: what must
    end an answer. added: control tokens that the vocabulary (another model's, where the family's own cannot be here)
    lacks."""

    template: str
    vocabulary: str
    bos: str | None
    eos: str
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
CHATS = {
    "llama 3": Chat(
        "chujiezheng/llama-3-instruct.jinja", LLAMA3, "<|begin_of_text|>", "<|end_of_text|>",
        ("<|eot_id|>", "<|end_of_text|>"),
    ),
    "llama 2": Chat("chujiezheng/llama-2-chat.jinja", LLAMA2, "<s>", "</s>", ("</s>",)),
    "mistral": Chat("chujiezheng/mistral-instruct.jinja", LLAMA2, "<s>", "</s>", ("</s>",)),
    "zephyr": Chat("chujiezheng/zephyr.jinja", LLAMA2, "<s>", "</s>", ("</s>",)),
    "phi 3": Chat("chujiezheng/phi-3.jinja", PHI3, "<s>", "<|endoftext|>", ("<|end|>", "<|endoftext|>")),
    "phi 3.5": Chat(
        "llama.cpp/microsoft-Phi-3.5-mini-instruct.jinja", PHI3, "<s>", "<|endoftext|>", ("<|end|>", "<|endoftext|>")
    ),
    "gemma": Chat("chujiezheng/gemma-it.jinja", GPT2, "<bos>", "<eos>", ("<end_of_turn>", "<eos>"), GEMMA),
    "gemma 2": Chat("llama.cpp/google-gemma-2-2b-it.jinja", GPT2, "<bos>", "<eos>", ("<end_of_turn>", "<eos>"), GEMMA),
    "qwen 2.5": Chat(
        "llama.cpp/Qwen-Qwen2.5-7B-Instruct.jinja", GPT2, None, "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), CHATML
    ),
    "qwen 3": Chat(
        "llama.cpp/Qwen-Qwen3-0.6B.jinja", GPT2, None, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"), CHATML
    ),
    "chatml": Chat("chujiezheng/chatml.jinja", GPT2, None, "<|endoftext|>", ("<|im_end|>",), CHATML),
    "granite": Chat(
        "llama.cpp/ibm-granite-granite-3.3-2B-Instruct.jinja", GPT2, None, "<|end_of_text|>", ("<|end_of_text|>",),
        ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
    ),
    "an end that only the template names": Chat(
        "an end of its own", GPT2, None, "<|endoftext|>", ("<turn/over>",), ("<turn/over>",)
    ),
}  # fmt: skip
OWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn/over>\n{% endfor %}"


def template_text(chat: Chat) -> str:
    path = TEMPLATES / chat.template
    if not path.exists():
        return OWN
    text = path.read_text(encoding="utf-8")
    return str(json.loads(text)["chat_template"]) if path.suffix == ".json" else text


@pytest.fixture(scope="module")
def metadata_of() -> Callable[[Chat], dict[str, Any]]:
    """The GGUF metadata of a chat; vocabularies are read once."""
    read: dict[str, dict[str, Any]] = {}

    def get(chat: Chat) -> dict[str, Any]:
        if chat.vocabulary not in read:
            with open_gguf(DATA / "vocab" / chat.vocabulary) as file:
                read[chat.vocabulary] = file.metadata
        metadata = dict(read[chat.vocabulary])
        key = "tokenizer.ggml."
        texts = [*metadata[f"{key}tokens"], *(t for t in chat.added if t not in metadata[f"{key}tokens"])]
        types = [*metadata[f"{key}token_type"], *[3] * (len(texts) - len(metadata[f"{key}tokens"]))]
        metadata |= {f"{key}tokens": texts, f"{key}token_type": types, f"{key}eos_token_id": texts.index(chat.eos)}
        metadata.pop(f"{key}bos_token_id")
        if chat.bos is not None:
            # As converters write it, whatever the template does.
            metadata |= {f"{key}bos_token_id": texts.index(chat.bos), f"{key}add_bos_token": True}
        return {**metadata, "tokenizer.chat_template": template_text(chat)}

    return get


@pytest.fixture(scope="module")
def folder_of(
    metadata_of: Callable[[Chat], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Chat], Path]:
    """A folder with the same tokenizer, its configuration naming the end of a text only."""
    written: dict[Chat, Path] = {}

    def get(chat: Chat) -> Path:
        if chat in written:
            return written[chat]
        folder = written[chat] = tmp_path_factory.mktemp("chat")
        metadata = metadata_of(chat)
        backend = vocabulary_from_gguf(metadata).make_backend()
        special = [text for text in (chat.bos, chat.eos) if text]
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        backend.save(str(folder / "tokenizer.json"))
        config = {"eos_token": chat.eos, "chat_template": template_text(chat), "add_bos_token": chat.bos is not None}
        config |= {"bos_token": chat.bos} if chat.bos else {}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        eos = metadata["tokenizer.ggml.tokens"].index(chat.eos)
        (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": eos}))
        (folder / "model.safetensors").touch()
        return folder

    return get


def opened(chat: Chat, folder: Path) -> tuple[Tokenizer, ChatTemplate, set[int]]:
    """Our tokenizer and template of a folder, and the ids that end an answer, as the engine puts them together."""
    files = resolve(ModelSource(model=str(folder)))
    tokenizer = open_tokenizer(files.tokenizer_source)
    template = open_chat_template(files, tokenizer)
    assert template is not None
    return tokenizer, template, {*files.eos_ids, *tokenizer.eos_ids, *turn_end_ids(files, tokenizer)}


def has_bos_twice(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Side by side: Llama 2's template begins every exchange with one."""
    return tokenizer.bos_id is not None and (tokenizer.bos_id,) * 2 in pairwise(ids)


@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_transformers_and_ends_the_family_s(name: str, folder_of: Callable[[Chat], Path]) -> None:
    chat = CHATS[name]
    folder = folder_of(chat)
    tokenizer, template, ends = opened(chat, folder)
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=chat.bos, eos_token=chat.eos
    )
    expected = oracle.apply_chat_template(
        TALK, chat_template=template_text(chat), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    ids = tokenizer.encode(template.render(TALK), add_special=False, parse_special=True)
    assert ids == expected
    assert not has_bos_twice(tokenizer, ids)
    assert {tokenizer.token_to_id(text) for text in chat.ends} <= ends
    assert not ends & {tokenizer.token_to_id(text) for text in ("<|im_start|>", "<start_of_turn>", "<|user|>")}


@pytest.mark.parametrize("name", CHATS)
def test_a_gguf_gives_the_same(
    name: str, metadata_of: Callable[[Chat], dict[str, Any]], folder_of: Callable[[Chat], Path]
) -> None:
    chat = CHATS[name]
    metadata = metadata_of(chat)
    tokenizer = open_tokenizer(metadata)
    eos = "" if tokenizer.eos_id is None else tokenizer.token_text(tokenizer.eos_id)
    bos = "" if tokenizer.bos_id is None or chat.bos is None else tokenizer.token_text(tokenizer.bos_id)
    template = ChatTemplate(metadata["tokenizer.chat_template"], bos=bos, eos=eos)
    theirs, their_template, _ = opened(chat, folder_of(chat))
    ids = tokenizer.encode(template.render(TALK), add_special=False, parse_special=True)
    assert ids == theirs.encode(their_template.render(TALK), add_special=False, parse_special=True)
    assert not has_bos_twice(tokenizer, ids)
    ends = {*tokenizer.eos_ids, *template_end_ids(template, tokenizer)}
    assert {tokenizer.token_to_id(text) for text in chat.ends} <= ends


def test_templates_that_want_another_conversation_name_no_end() -> None:
    tokenizer = open_tokenizer(DATA / "models/stories260K/hf")
    for source in ("{{ raise_exception('no') }}", "{{ messages[0].content }}", "{{ messages[1].content }} and <no>"):
        assert template_end_ids(ChatTemplate(source), tokenizer) == frozenset()
    assert template_end_ids(ChatTemplate("{{ messages[1].content }} </s>"), tokenizer) == {2}
