import importlib.util
import sys
from pathlib import Path

# Test modules of several folders share these, which are no packages of ours to import by name.
_SHARED = (
    "tiny_llama",
    "block_data",
    "torch_operators",
    "family_cases",
    "mixtures",
    "ggml_writer",
    "family_gguf",
    "family_folders",
    "asked_source",
)
for _name in _SHARED:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(f"{_name}.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_name] = _module
    _spec.loader.exec_module(_module)
