"""Which processes do without torch, and what the engine does without."""

import subprocess
import sys
import textwrap

from source_tree import modules


def run(code: str) -> None:
    """Runs code in a fresh interpreter; its last words are the failure."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_driver_ingress_and_preprocessor_never_import_torch() -> None:
    """Every module of deployments/, and the composition root: the engine is imported in the target's constructor."""
    names = [name for name in modules() if name.startswith("deployments") or name == "serve_app.app"]
    run(f"""
        import importlib, sys
        for name in {names!r}:
            importlib.import_module(name)
            assert "torch" not in sys.modules, name
    """)


def test_api_and_text_never_import_torch_or_ray() -> None:
    names = [name for name in modules() if name.startswith(("serve_app.api", "serve_app.text"))]
    run(f"""
        import importlib, sys
        for name in {names!r}:
            importlib.import_module(name)
            assert not {{"torch", "ray"}} & set(sys.modules), name
    """)


def test_memory_for_weights_is_made_ready_before_torch_comes() -> None:
    run("""
        import sys
        import kernels.cpu._native
        import serve_app.engine.start
        assert "torch" not in sys.modules
    """)


def test_the_engine_runs_without_the_servers_packages() -> None:
    run("""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("ray", "pydantic", "gguf", "fastapi", "starlette", "uvicorn", "typer"):
                    raise ModuleNotFoundError(f"{name} is not installed", name=name)
                return None

        sys.meta_path.insert(0, Absent())
        from serve_app.engine.llm import LLM
        from serve_app.options import SamplingParams

        llm = LLM(None, dtype="f32")
        try:
            [output] = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=4))
            assert len(output.token_ids) == 4, output
        finally:
            llm.close()
    """)
