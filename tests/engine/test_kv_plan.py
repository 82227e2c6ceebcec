"""What a model asks of the memory beside its weights."""

import pytest
from family_cases import hf_model, our_model

from serve_app.engine.kv_plan import KvPlan
from serve_app.layers.shape_probe import ShapeProbe
from serve_app.options import EngineConfig


@pytest.mark.parametrize("name", ["llama", "llama dynamic", "phi3, long", "gemma3, scaled"])
def test_rotary_tables_are_as_large_as_planned(name: str) -> None:
    model = our_model(hf_model(name))
    probe = ShapeProbe()
    model.forward(probe)
    assert KvPlan.of(model, EngineConfig(), 300).table_bytes == sum(
        table.on_device(300).nbytes for table in probe.rotaries
    )
