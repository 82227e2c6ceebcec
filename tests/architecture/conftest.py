import importlib.util
import sys
from pathlib import Path

# The test modules of this folder share source_tree, which is no package of ours to import by name.
_spec = importlib.util.spec_from_file_location("source_tree", Path(__file__).with_name("source_tree.py"))
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules["source_tree"] = _module
_spec.loader.exec_module(_module)
