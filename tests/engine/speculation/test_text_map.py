"""A draft with another vocabulary: the text of what it says is what the target could say."""

import itertools
import json
import random
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest

from serve_app.engine.speculation.build_drafter import build_drafter
from serve_app.engine.speculation.draft_call import DraftCall, Drafted
from serve_app.engine.speculation.local_proposer import LocalProposer
from serve_app.engine.speculation.proposer import DraftWish
from serve_app.engine.speculation.text_map import TextMappedDraft
from serve_app.options import EngineConfig, ModelSource
from serve_app.text.tokenizer import Tokenizer, open_tokenizer

DATA = Path(__file__).parents[2] / "data"
TOKENIZERS = {
    "stories": DATA / "models" / "stories260K" / "hf",
    "llama 2": DATA / "tokenizers" / "llama2",
    "gpt-2": DATA / "vocab" / "ggml-vocab-gpt-2.gguf",
    "phi-3": DATA / "tokenizers" / "phi-3-mini",
}
STORY = (DATA / "models" / "stories3M" / "sampled_text.txt").read_text()[:1500].replace("\n", " ").strip()


class Reader:
    """A DraftModel that knows a story: it goes on where what it was told ends, in its own tokens."""

    def __init__(self, tokenizer: Tokenizer, story: str) -> None:
        self._tokenizer = tokenizer
        self._story = story
        self.texts: dict[Hashable, list[int]] = {}
        self.num_told = 0

    def propose(self, calls: Sequence[DraftCall], until_s: float | None = None) -> list[Drafted]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: DraftCall) -> Drafted:
        if call.base > len(self.texts.get(call.sequence, [])):
            return None
        self.feed(call.sequence, call.token_ids, call.base)
        text = self._tokenizer.decode(self.texts[call.sequence])
        assert self._story.startswith(text), (text, self._story[: len(text)])
        rest = self._story[len(text) :]
        ids = self._tokenizer.encode(rest, add_special=False)
        if self._tokenizer.strips_space and not rest.startswith(" "):
            # Encoding puts a space before it, which is a token of its own or the first one's.
            ids = self._inside(rest)
        elif self._tokenizer.strips_space:
            ids = self._tokenizer.encode(rest[1:], add_special=False)
        return ids[: call.max_tokens]

    def _inside(self, rest: str) -> list[int]:
        marked = self._tokenizer.encode(f"x{rest}", add_special=False)
        return marked[1:] if self._tokenizer.token_bytes(marked[0]) == b" x" else []

    def feed(self, sequence: Hashable, token_ids: Sequence[int], offset: int) -> None:
        self.texts.setdefault(sequence, [])[offset:] = token_ids
        self.num_told += len(token_ids)

    def advance(self) -> bool:
        return False

    def forget(self, sequence: Hashable) -> None:
        self.texts.pop(sequence, None)

    def close(self) -> None:
        self.texts.clear()


@pytest.mark.parametrize(("own", "target"), list(itertools.permutations(TOKENIZERS, 2)))
def test_a_draft_that_knows_the_text_is_understood(own: str, target: str) -> None:
    mine, theirs = open_tokenizer(TOKENIZERS[own]), open_tokenizer(TOKENIZERS[target])
    reader = Reader(mine, STORY)
    draft = TextMappedDraft(reader, mine, theirs)
    ids = theirs.encode(STORY)
    rng, known, told, accepted, rounds = random.Random(1), 4, 0, 0, 0
    while known < len(ids) - 8:
        [drafted] = draft.propose([DraftCall(0, told, ids[told:known], 4)])
        assert drafted is not None
        told = known
        agreeing = [a == b for a, b in zip(drafted, ids[known:], strict=False)]
        count = agreeing.index(False) if False in agreeing else len(agreeing)
        accepted, rounds = accepted + count, rounds + 1
        # Sometimes fewer are taken than were right.
        known += rng.randint(0, count) + 1 if rng.random() < 0.3 else count + 1
    assert accepted / rounds > 3.0, accepted / rounds
    # A text that grows is told in pieces, not from its beginning.
    assert reader.num_told < 8 * len(mine.encode(STORY))


def test_rejections_and_what_is_not_known() -> None:
    mine, theirs = open_tokenizer(TOKENIZERS["gpt-2"]), open_tokenizer(TOKENIZERS["llama 2"])
    reader = Reader(mine, STORY)
    draft = TextMappedDraft(reader, mine, theirs)
    ids = theirs.encode(STORY)
    assert draft.propose([DraftCall(0, 5, ids[5:9], 4)]) == [None]
    draft.feed(0, ids[:300], 0)
    assert draft.propose([DraftCall(0, 300, [], 4)]) == [ids[300:304]]
    # Back to before what was settled.
    assert draft.propose([DraftCall(0, 20, ids[20:25], 4)]) == [ids[25:29]]
    reader.forget(0)
    assert draft.propose([DraftCall(0, 25, ids[25:26], 4)]) == [None]
    assert draft.propose([DraftCall(0, 0, ids[:26], 4)]) == [ids[26:30]]
    draft.forget(0)
    assert not reader.texts


def test_nothing_is_proposed_inside_of_a_character() -> None:
    mine, theirs = open_tokenizer(TOKENIZERS["gpt-2"]), open_tokenizer(TOKENIZERS["stories"])
    story = "A cat 🐱 sat."
    draft = TextMappedDraft(Reader(mine, story), mine, theirs)
    ids = theirs.encode(story)
    answers = [draft.propose([DraftCall(i, 0, ids[:i], 3)])[0] for i in range(3, len(ids))]
    inside = [theirs.decode(ids[:i]).endswith("�") for i in range(3, len(ids))]
    assert any(inside)
    assert all(answer == [] for answer, is_inside in zip(answers, inside, strict=True) if is_inside)
    assert any(answers)


def test_a_real_draft_through_text_accepts_nearly_what_it_does_by_ids() -> None:
    [case] = [
        case
        for case in json.loads((DATA / "models" / "stories260K" / "golden_greedy.json").read_text())["cases"]
        if not case["prompt"]
    ]
    goal = case["prompt_ids"] + case["generated_ids"]
    tokenizer = open_tokenizer(TOKENIZERS["stories"])
    accepted = []
    for maps in (False, True):
        drafter = build_drafter(
            ModelSource(model=str(DATA / "models" / "stories40K-draft" / "hf"), dtype="f32"),
            EngineConfig(max_seqs=8, block_size=16, device="cpu"),
            least_chance=0.0,
        )
        proposer = LocalProposer(TextMappedDraft(drafter, tokenizer, tokenizer) if maps else drafter)
        known, total = 5, 0
        while known < len(goal) - 5:
            [drafted] = proposer.propose([DraftWish(0, goal[:known], 1, 4)])
            agreeing = [a == b for a, b in zip(drafted, goal[known:], strict=False)]
            count = agreeing.index(False) if False in agreeing else len(agreeing)
            total += count
            known += count + 1
        accepted.append(total)
        proposer.close()
    assert accepted[1] > 0.8 * accepted[0]
