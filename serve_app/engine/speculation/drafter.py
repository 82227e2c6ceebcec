"""A draft model over its own KV cache: continuations of many sequences at a time, greedy or sampled."""

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from itertools import islice

import numpy as np
import torch

from kernels import dispatch
from serve_app.batch import ForwardBatch
from serve_app.engine.device_choice import on_device
from serve_app.engine.forward import Forward, choose_forward
from serve_app.engine.graph_forward import GraphForward, GraphLimits
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.logits_ops import HostLogits, Logits, LogitsOps, TorchLogits
from serve_app.engine.speculation.draft_border import MakeSwitch
from serve_app.engine.speculation.draft_call import DraftCall, Drafted
from serve_app.engine.speculation.draft_sampler import CANDIDATES, DraftSampler
from serve_app.engine.speculation.draft_sequence import DraftSequence
from serve_app.engine.speculation.outcomes import Outcomes
from serve_app.engine.stats import DraftStats
from serve_app.kv_cache.block_ledger import BlockLedger
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.layers.angle_sets import AngleSets
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig

LEAST_CHANCE = 0.3
"""A token that the draft itself finds less likely ends its proposal; not where tokens are sampled."""
MOST_SEQUENCES = 4096
"""Sequences whose text is kept. Those beyond, the longest unused, have to be told again."""
IDLE_S = 0.02
"""A part of a prompt that is computed in idle time takes about so long: a call may have to wait for it."""
_MOST_PENDING = 64
"""A call with a limit does not compute more of a sequence: prompts are for idle time, and do not make others wait."""
# A forward of so many rows takes hardly longer than of one, on CPU and GPU.
_MOST_CHEAP_ROWS = 8


class Drafter:
    """See DraftModel. Not for several threads.

    Between two calls it goes on behind what it answered, as if all of it were accepted, and behind other outcomes that
    are likely (Outcomes): a call whose new tokens agree finds them drafted. Blocks of sequences that were not asked for
    longest are taken where others need them; they are computed again when their turn comes.
    """

    def __init__(
        self,
        model: CausalLM,
        kv: KvPool,
        pool: BlockLedger,
        plan: KvPlan,
        config: EngineConfig,
        *,
        least_chance: float = LEAST_CHANCE,
        works_ahead: bool = True,
        seed: int | None = None,
        num_ids: int | None = None,
    ) -> None:
        """Owns all it is given. plan: of one group of layers without a window; config.device: a device of torch's.
        least_chance: see LEAST_CHANCE. works_ahead: advance() does more than prompts; not where the target needs the
        same cores. seed: of what is sampled, None: a new one; num_ids: nothing is sampled beyond, where a model has
        more rows than its tokenizer has tokens. Raises LaunchError for an attention backend that cannot run here."""
        assert [group.window for group in plan.groups] == [0]
        # A native program has the addresses of the weights only.
        self._model: CausalLM | None = model
        self._kv = kv
        self.pool = pool
        self._device = config.device
        self._place = on_device(config.device)
        self._angles = plan.angles
        self._longest = plan.longest(pool.num_total)
        self._choose = partial(
            choose_forward,
            kv=kv,
            device=config.device,
            attention=config.attention_backend,
            is_exact=config.cpu_exact,
            graphs=GraphLimits(config.max_seqs, self._longest) if config.cuda_graphs else None,
        )
        self._forward: Forward | None = self.forward_of(model)
        is_native = config.device == "cpu" and dispatch.native().ops is not None
        self._ops: LogitsOps = HostLogits() if is_native else TorchLogits(torch.device(config.device))
        self._chunk_tokens = min(config.prefill_chunk_tokens, config.max_batched_tokens)
        self._batch_tokens = config.max_batched_tokens
        self._idle_tokens = min(64, self._chunk_tokens)
        self._sampler = DraftSampler(seed, num_ids)
        self._outcomes = Outcomes(pool, kv)
        self._least_chance = least_chance
        self._works_ahead = works_ahead
        # The longest unused first.
        self._sequences: OrderedDict[Hashable, DraftSequence] = OrderedDict()
        self._num_calls = 0
        self.num_forwards = 0
        self.num_evictions = 0
        # Of a drafter that was built from a model's files.
        self.make_switch: MakeSwitch | None = None

    def propose(self, calls: Sequence[DraftCall], until_s: float | None = None) -> list[Drafted]:
        """See DraftModel. With a limit a sequence of which much is not computed yet gets no tokens."""
        self._num_calls += 1
        asked = [self._asked(call) for call in calls]
        at_work = [sequence for sequence in asked if sequence is not None]
        if until_s is not None:
            at_work = [s for s in at_work if len(s.ids) - s.num_computed <= _MOST_PENDING]
        while True:
            at_work = [s for s in at_work if not s.is_drafted(0, s.max_tokens, self._least_chance)]
            if until_s is not None and time.monotonic() >= until_s:
                break
            if not self._compute(at_work, self._batch_tokens, evicts=True):
                break
        return [None if s is None else s.drafted(s.max_tokens, self._least_chance) for s in asked]

    def feed(self, sequence: Hashable, token_ids: Sequence[int], offset: int) -> None:
        """See DraftModel."""
        known = self._sequences.get(sequence)
        if known is None:
            if offset:
                return
            known = self._new(sequence)
        self._outcomes.drop(known, self._angles)
        known.tell(offset, list(token_ids))

    def advance(self) -> bool:
        """See DraftModel. Takes no blocks from others."""
        if self._works_ahead and self._compute(self._ahead(), self._batch_tokens, evicts=False):
            return True
        behind = [s for s in self._sequences.values() if s.num_computed < s.num_text]
        began_s = time.monotonic()
        count = self._compute(behind, self._idle_tokens, evicts=False)
        if count == self._idle_tokens:
            affordable = int(count * IDLE_S / max(1e-9, time.monotonic() - began_s))
            most = min(2 * count, self._chunk_tokens)
            self._idle_tokens = max(min(affordable, most), count // 2, min(16, self._chunk_tokens))
        return count > 0

    def forget(self, sequence: Hashable) -> None:
        """See DraftModel."""
        known = self._sequences.pop(sequence, None)
        if known is not None:
            self._free(known)

    def close(self) -> None:
        """See DraftModel."""
        for sequence in list(self._sequences):
            self.forget(sequence)
        self.pool.close()
        self._kv.close()

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._kv.dtype

    @property
    def num_graphs(self) -> int:
        """CUDA graphs that forwards are replayed from."""
        return self._forward.num_graphs if isinstance(self._forward, GraphForward) else 0

    @property
    def num_foreseen(self) -> int:
        """Answers that were drafted as an unlikely outcome of the one before."""
        return self._outcomes.num_adopted

    @property
    def num_sequences(self) -> int:
        """Whose text is known."""
        return len(self._sequences)

    def stats(self) -> DraftStats:
        """What it has done, from any thread; every number by itself is exact."""
        return DraftStats(self.num_forwards, self.num_evictions, self.pool.num_total, self.pool.num_free)

    def forward_of(self, model: CausalLM) -> Forward:
        """How a model of the same shape is run over the same cache: recorded now, in whichever thread."""
        with on_device(self._device):
            return self._choose(model)

    def exchange(
        self, model: CausalLM | None, forward: Forward | None, angles: AngleSets | None
    ) -> tuple[CausalLM | None, Forward | None, AngleSets]:
        """Puts another model in the place of this one, which it returns; all texts are to be computed by it. None:
        nothing is proposed until there is one again."""
        for sequence in self._sequences.values():
            self._free(sequence)
        old = self._model, self._forward, self._angles
        self._model, self._forward, self._angles = model, forward, angles or self._angles
        return old

    def _asked(self, call: DraftCall) -> DraftSequence | None:
        sequence = self._sequences.get(call.sequence)
        if sequence is None:
            if call.base:
                return None
            sequence = self._new(call.sequence)
        token_ids = list(call.token_ids)
        self._outcomes.settle(sequence, call.base, token_ids, self._angles)
        if not sequence.tell(call.base, token_ids):
            return None
        sequence.sample_by(call.chain)
        sequence.max_tokens = call.max_tokens
        sequence.last_call = self._num_calls
        self._sequences.move_to_end(call.sequence)
        return sequence

    def _new(self, name: Hashable) -> DraftSequence:
        while len(self._sequences) >= MOST_SEQUENCES:
            self.forget(next(iter(self._sequences)))
        sequence = self._sequences[name] = DraftSequence()
        return sequence

    def _ahead(self) -> list[DraftSequence]:
        """What the next call will ask for, the likeliest first, as far as it is not drafted yet."""
        asked = [s for s in self._sequences.values() if s.last_call == self._num_calls]
        ahead = [s for s in asked if self._goes_on(s)]
        room = _MOST_CHEAP_ROWS - len(ahead)
        if room > 0 and len(asked) <= _MOST_CHEAP_ROWS:
            answered = [(s, s.num_drafted(s.max_tokens, self._least_chance)) for s in asked if s.num_computed]
            outcomes = self._outcomes.expect(answered, self._angles, self._longest, _MOST_CHEAP_ROWS)
            ahead += [s for s in outcomes if not s.is_drafted(0, s.max_tokens, self._least_chance)][:room]
        return ahead

    def _goes_on(self, sequence: DraftSequence) -> bool:
        """Whether the next call is not drafted yet, if the target accepts all of this one's answer and then draws what
        the draft would."""
        if len(sequence.ids) - sequence.num_computed > _MOST_PENDING:
            return False
        answered = sequence.num_drafted(sequence.max_tokens, self._least_chance)
        return not sequence.is_drafted(answered + 1, sequence.max_tokens, self._least_chance)

    # -- one forward ----------------------------------------------------------------------------------------------

    def _compute(self, sequences: Iterable[DraftSequence], budget: int, *, evicts: bool) -> int:
        """Computes what is pending of sequences, and drafts one more token for those of which all is; the shortest
        first, where budget tokens do not suffice. Returns the number of tokens computed, 0: nothing could be done."""
        if self._forward is None:
            return 0
        work: list[tuple[DraftSequence, int]] = []
        for sequence in sorted(sequences, key=lambda s: len(s.ids) - s.num_computed):
            if not self._may_grow(sequence):
                continue
            count = min(len(sequence.ids) - sequence.num_computed, self._chunk_tokens, budget)
            if count and self._grow(sequence, count, evicts=evicts):
                work.append((sequence, count))
                budget -= count
        if not work:
            return 0
        ended = [sequence for sequence, n in work if sequence.num_computed + n == len(sequence.ids)]
        with self._place:
            logits = self._forward(self._batch(work))
            if ended:
                self._draw(ended, logits)
        for sequence, n in work:
            sequence.num_computed += n
        self.num_forwards += 1
        return sum(n for _, n in work)

    def _draw(self, sequences: Sequence[DraftSequence], logits: Logits) -> None:
        """One more token for each. Where some are sampled a few candidates of each row come to the host, which waits
        for the tokens in any case."""
        own = self._ops.own(logits)
        token_ids = self._ops.likeliest(own)
        sampled = [i for i, sequence in enumerate(sequences) if sequence.chain is not None]
        # The second likeliest are for outcomes, which are foreseen only where there is time to work ahead.
        k = min(CANDIDATES, own.shape[1]) if sampled else 2 if self._works_ahead else 1
        logprobs, *top = self._ops.logprobs(own, token_ids, k)
        found, chances, *top = self._ops.fetch([token_ids, logprobs, *top]).wait()
        others: list[tuple[int, float] | None] = [None] * len(sequences)
        if self._works_ahead:
            others = list(zip(top[0][:, 1].tolist(), np.exp(top[1][:, 1]).tolist(), strict=True))
        rows = zip(sequences, found.tolist(), np.exp(chances).tolist(), others, strict=True)
        for sequence, token_id, chance, other in rows:
            if sequence.chain is None:
                sequence.draw(token_id, chance, other)
        if sampled:
            chains = [chain for sequence in sequences if (chain := sequence.chain) is not None]
            drawn = self._sampler.draw(top[0][sampled], top[1][sampled], chains)
            for i, token_id, candidates, chances in zip(sampled, *drawn, strict=True):
                sequences[i].draw_sampled(int(token_id), (candidates, chances))

    def _may_grow(self, sequence: DraftSequence) -> bool:
        """Whether all of a sequence may be computed under its rotary set, which it gets where it has none that fits."""
        if not sequence.num_text or len(sequence.ids) > self._longest:
            return False
        angles = sequence.angles
        if angles is not None and self._angles.is_outgrown(angles, sequence.num_text):
            self._angles.give_back(angles)
            sequence.angles = None
            sequence.reset()
        elif angles is not None and self._angles.is_outgrown(angles, len(sequence.ids)):
            # The text itself has not: for once a few tokens fewer.
            return False
        if sequence.angles is None:
            sequence.num_prompt = sequence.num_prompt or sequence.num_text
            sequence.angles = self._angles.take(sequence.num_prompt, sequence.num_text, self._longest)
        return sequence.angles is not None

    def _grow(self, sequence: DraftSequence, count: int, *, evicts: bool) -> bool:
        """Sees to blocks for the next tokens."""
        missing = -(-(sequence.num_computed + count) // self.pool.block_size) - len(sequence.blocks)
        if missing <= 0:
            return True
        blocks = self.pool.allocate(missing)
        while blocks is None and evicts and self._evict():
            blocks = self.pool.allocate(missing)
        sequence.blocks += blocks or []
        return blocks is not None

    def _evict(self) -> bool:
        """Takes the blocks of the sequence that was not asked for longest; False: all with blocks are in this call."""
        for sequence in self._sequences.values():
            if sequence.blocks and sequence.last_call != self._num_calls:
                self._free(sequence)
                self.num_evictions += 1
                return True
        return False

    def _free(self, sequence: DraftSequence) -> None:
        self._outcomes.drop(sequence, self._angles)
        sequence.reset()
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        if sequence.angles is not None:
            self._angles.give_back(sequence.angles)
            sequence.angles = None

    def _batch(self, work: Sequence[tuple[DraftSequence, int]]) -> ForwardBatch:
        size = self.pool.block_size
        counts = np.array([n for _, n in work], np.int64)
        computed = np.array([s.num_computed for s, _ in work], np.int64)
        starts = np.zeros(len(work) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        context = computed + counts
        width = -(-int(context.max()) // size)
        tables = np.zeros((len(work), width), np.int32)
        for row, (sequence, _) in zip(tables, work, strict=True):
            row[: len(sequence.blocks)] = sequence.blocks[:width]
        owner = np.repeat(np.arange(len(work)), counts)
        positions = np.arange(starts[-1]) - starts[owner] + computed[owner]
        block, offset = np.divmod(positions, size)
        slots = tables[owner, block].astype(np.int64) * size + offset
        positions += np.array([s.angles.first_row if s.angles else 0 for s, _ in work], np.int64)[owner]
        token_ids = [i for s, n in work for i in islice(s.ids, s.num_computed, s.num_computed + n)]
        is_last = np.array([s.num_computed + n == len(s.ids) for s, n in work], np.bool_)
        return ForwardBatch(
            token_ids=np.array(token_ids, np.int64),
            positions=positions,
            slot_mapping=slots,
            block_tables=tables,
            query_start=starts.astype(np.int32),
            context_lens=context.astype(np.int32),
            logit_index=starts[1:][is_last] - 1,
            sample_rows=np.zeros(0, np.int64),
            sample_positions=np.zeros(0, np.int64),
            max_query_len=int(counts.max()),
            max_context_len=int(context.max()),
        )
