"""What a model asks of the KV cache: which layers share block tables, what those must cover, which angles K have."""

from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.kv_cache.layer_groups import KvWindow, LayerGroup, fit_windows, group_layers, longest_request
from serve_app.layers.angle_sets import AngleSets, OneSet
from serve_app.layers.shape_probe import ShapeProbe
from serve_app.models.base import CausalLM
from serve_app.options import EngineConfig


@dataclass(frozen=True, slots=True)
class KvPlan:
    """groups: of layers. angles: the rotary sets of requests. max_tokens: of the longest request that is allowed.
    table_bytes: of the rotary tables on the model's device for requests of any allowed length."""

    groups: tuple[LayerGroup, ...]
    angles: AngleSets
    block_size: int
    chunk_tokens: int
    max_tokens: int
    table_bytes: int

    @classmethod
    def of(cls, model: CausalLM, config: EngineConfig, max_tokens: int) -> "KvPlan":
        """Read off a model by running its forward over a step that computes nothing."""
        probe = ShapeProbe()
        model.forward(probe)
        by_layer = sorted(probe.shapes, key=lambda shape: shape.layer)
        # A contiguous range of blocks is given back as a whole.
        windows = [shape.window if config.paged_attention else 0 for shape in by_layer]
        several = [rotary.sets for rotary in probe.rotaries if rotary.sets.are_several]
        assert len(several) <= 1, "positions are rows of one rotary table: two cannot both have several sets"
        return cls(
            group_layers(windows, max_tokens),
            several[0] if several else OneSet(),
            config.block_size,
            min(config.prefill_chunk_tokens, config.max_batched_tokens),
            max_tokens,
            sum(rotary.num_bytes(max_tokens) for rotary in probe.rotaries),
        )

    @property
    def layers(self) -> Sequence[Sequence[int]]:
        """Of each group."""
        return [group.layers for group in self.groups]

    @property
    def layers_per_block(self) -> int:
        """Layers that a block has room for."""
        return max(map(len, self.layers))

    @property
    def most_blocks(self) -> int:
        """Blocks that the longest request holds at a time."""
        windows = [KvWindow(group.window, self.block_size, self.chunk_tokens) for group in self.groups]
        return sum(window.most_blocks(self.max_tokens) for window in windows)

    def windows(self, num_blocks: int) -> tuple[KvWindow, ...]:
        """What each group's tables cover over a pool of so many blocks."""
        return fit_windows(self.groups, self.block_size, self.chunk_tokens, num_blocks, self.max_tokens)

    def longest(self, num_blocks: int) -> int:
        """Tokens of the longest request over such a pool; 0: it cannot hold any."""
        return min(self.max_tokens, longest_request(self.windows(num_blocks), num_blocks, self.max_tokens))
