"""Engines around tiny random models of any family, with a KV pool of a given size."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from serve_app.batch import ForwardBatch
from serve_app.engine.assembly import assemble, ledger
from serve_app.engine.engine import Engine
from serve_app.engine.kv_plan import KvPlan
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampler import Sampler
from serve_app.engine.scheduler import Schedule
from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.block_ledger import NO_BLOCK
from serve_app.kv_cache.block_pool import BlockPool
from serve_app.kv_cache.kv_pool import KvPool
from serve_app.kv_cache.layer_groups import LayerGroup
from serve_app.messages import Finish, GenerateRequest
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig, SamplingParams
from serve_app.text.tokenizer import open_tokenizer

TOKENIZER = Path(__file__).parents[1] / "data" / "models" / "stories260K" / "hf"


class TinyEngine:
    """An engine that is stepped to the end, with the ledger's invariants checked after every step.

    K and V of blocks that nobody holds, and that are not cached, become NaN at once: whatever reads them is seen.
    """

    def __init__(
        self,
        model: CausalLM,
        config: EngineConfig,
        num_blocks: int,
        max_tokens: int = 512,
        *,
        gives_up: bool = True,
        overlaps: bool = False,
    ) -> None:
        """gives_up False: all layers in one group that keeps everything; windows only mask. overlaps: on the devices of
        model_runner.OVERLAPPING."""
        device = "cpu" if config.device == "auto" else config.device
        plan = KvPlan.of(model, config, max_tokens)
        if not gives_up:
            plan = replace(plan, groups=(LayerGroup(0, tuple(range(model.args.n_layers))),))
        args = model.args
        shape = (config.block_size, plan.layers_per_block, args.n_kv_heads, args.head_dim, torch.float32, plan.layers)
        if device == "cpu":
            self.kv = KvPool.create(PosixShmArena.create, num_blocks, *shape)
        else:
            self.kv = KvPool.on_device(device, num_blocks, *shape)
        self.pool = ledger(config, num_blocks, b"tiny")
        tokenizer = open_tokenizer(TOKENIZER)
        runner = ModelRunner(
            model, Sampler(args.vocab_size, config.max_seqs, device, []), self.kv, device, config.attention_backend,
            is_exact=True, overlaps=overlaps,
        )  # fmt: skip
        self.windows = plan.windows(num_blocks)
        parts = assemble(
            runner, self.pool, self.kv, tokenizer, config, max_tokens, frozenset(), SamplingParams(), self.windows,
            plan.angles,
        )  # fmt: skip
        self.engine = Engine(parts, config, lambda deltas: None)
        self._build, parts.builder.build = parts.builder.build, self._checked  # type: ignore[method-assign]
        self.finishes: dict[tuple[str, int], Finish] = {}
        self.least_free = num_blocks
        # Tokens that a request may have blocks for beyond those that are drawn.
        self.most_drafted = 0

    def add(self, name: str, prompt: Iterable[int], **sampling: Any) -> None:
        params = SamplingParams().with_overrides({"temperature": 0.0, "ignore_eos": True, "seed": 3, **sampling})
        self.engine.add(GenerateRequest(name, list(prompt), params))

    def step(self, outputs: dict[tuple[str, int], list[int]]) -> None:
        for delta in self.engine.step():
            assert delta.finish is None or delta.finish.error is None
            outputs.setdefault((delta.request_id, delta.choice), []).extend(delta.token_ids)
            if delta.finish is not None:
                self.finishes[delta.request_id, delta.choice] = delta.finish
        self._check()

    def run(self, max_steps: int = 5000) -> dict[tuple[str, int], list[int]]:
        """Output tokens by request and choice."""
        outputs: dict[tuple[str, int], list[int]] = {}
        while self.engine.has_requests:
            max_steps -= 1
            assert max_steps > 0, "the engine makes no progress"
            self.step(outputs)
        return outputs

    def _checked(self, schedule: Schedule, wanted: Any) -> ForwardBatch:
        """A batch, whose tables must be the requests'."""
        rows: Any = self.engine.parts.builder
        for request in [*schedule.decode, *(request for request, _ in schedule.prefill)]:
            for table, known in zip(request.tables, rows._tables, strict=True):
                taken = known[request.row, : len(table)].tolist()
                assert [a for a, b in zip(taken, table, strict=True) if b != NO_BLOCK] == [
                    b for b in table if b != NO_BLOCK
                ]
        return self._build(schedule, wanted)

    def _check(self) -> None:
        pool, running = self.pool, self.engine.parts.scheduler.running
        assert isinstance(pool, BlockPool)
        pool.check()
        owner: Any = pool._owner
        owner.check()
        self.least_free = min(self.least_free, pool.num_free)
        held = {block for request in running for table in request.tables for block in table if block >= 0}
        assert pool.num_free == pool.num_total - len(held)
        lengths = [request.num_tokens + self.most_drafted for request in running]
        most = sum(window.most_blocks(length) for length in lengths for window in self.windows)
        assert len(held) <= most
        dead = [block for block in range(pool.num_total) if block not in held and owner._hash[block] is None]
        for tensor in (*self.kv.k, *self.kv.v):
            tensor[dead] = torch.nan

    def close(self) -> None:
        self.engine.abort_all()
        assert self.pool.num_free == self.pool.num_total
        self.engine.stop()
