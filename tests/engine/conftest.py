from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.null_engine import null_engine
from serve_app.engine.engine import Engine
from serve_app.options import EngineConfig

TOKENIZER = Path(__file__).parents[1] / "data" / "models" / "stories260K" / "hf"


@pytest.fixture(params=[False, True], ids=["step by step", "overlapped"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """Engines without a model, which look at a step before the next one begins, or one later.

    When the test ends, each must have given back every block.
    """
    engines: list[Engine] = []

    def make(
        config: EngineConfig, max_seq_len: int = 512, num_blocks: int = 64, windows: Sequence[int] = (0,)
    ) -> Engine:
        overlaps = request.param
        engines.append(null_engine(TOKENIZER, config, max_seq_len, num_blocks, windows=windows, overlaps=overlaps))
        return engines[-1]

    yield make
    for engine in engines:
        pool = engine.parts.scheduler.pool
        if engine.is_stopped:
            continue
        engine.abort_all()
        assert pool.num_free == pool.num_total
        pool.check()
        engine.stop()
