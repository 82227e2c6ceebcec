"""The program: argv → AppConfig → what was asked for. `sirocco` and `python -m serve_app` both come here."""

import sys
from collections.abc import Sequence
from pathlib import Path

import kernels
from serve_app.errors import LaunchError, ModelFileError

# The interface of kernels that this serve_app was written against.
EXPECTED_ABI = 5

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns the exit code."""
    try:
        check_kernels()
        return _run(sys.argv[1:] if argv is None else argv)
    except (LaunchError, ModelFileError) as error:
        print(f"sirocco: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of `sirocco config | head` left: nothing went wrong, and Python must not try to flush again.
        sys.stdout = None
        return EXIT_OK


def check_kernels() -> None:
    """Raises LaunchError if another distribution's `kernels` stands where ours should, or an old one of ours."""
    found = Path(kernels.__file__ or "").resolve().parent
    wanted = Path(__file__).resolve().parent.parent / "kernels"
    if found != wanted or not hasattr(kernels, "ABI"):
        raise LaunchError(
            f"The package kernels at {found} is another distribution's, not Sirocco's at {wanted}: install Sirocco in "
            "an environment of its own."
        )
    if kernels.ABI != EXPECTED_ABI:
        raise LaunchError(
            f"The package kernels at {found} has interface {kernels.ABI} where this version needs {EXPECTED_ABI}: "
            "install Sirocco again."
        )


def _run(argv: Sequence[str]) -> int:
    from serve_app import cli
    from serve_app.config import apply_log_level

    invocation = cli.parse(argv)
    if invocation is None:
        return EXIT_OK
    apply_log_level(invocation.config.log)
    if invocation.command == "doctor":
        from serve_app.commands import doctor

        return doctor.run(as_json=invocation.as_json, lists_models=invocation.lists_models)
    if invocation.command == "config":
        from serve_app.commands import config

        return config.run(invocation.config)
    if invocation.command == "chat":
        from serve_app.commands import chat

        return chat.run(invocation.config, invocation.chat)
    if invocation.command == "quantize":
        from serve_app.commands import quantize

        return quantize.run(invocation.config, invocation.quantize)
    if invocation.command == "quality":
        from serve_app.commands import quality

        return quality.run(invocation.config, invocation.quality)
    from serve_app import app

    return app.run(invocation.config)


if __name__ == "__main__":
    sys.exit(main())
