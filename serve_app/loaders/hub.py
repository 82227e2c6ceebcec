"""Hub ids → local files, through huggingface_hub: progress bar, revision, token, offline. No torch."""

import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import LaunchError, ModelFileError
from serve_app.options import ModelSource

_TIMEOUT_S = 20.0

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form NAME or OWNER/NAME; says nothing about existence."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and len(name) <= 200


def read_token(token_source: str) -> str | bool | None:
    """The hub token that --token-source names, as huggingface_hub takes it: None lets it use its own cache, False none.

    Raises LaunchError where a named variable or file holds no token; the message never shows one.
    """
    kind, _, value = token_source.partition(":")
    if kind == "cache":
        return None
    if kind == "none":
        return False
    if kind == "literal":
        token = value
    elif kind == "env":
        token = os.environ.get(value, "")
    elif kind == "path":
        try:
            token = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"--token-source: the file {value} cannot be read ({_reason(error)})") from error
    else:
        raise LaunchError("--token-source takes literal:TOKEN, env:NAME, path:FILE, cache or none")
    if not token.strip():
        raise LaunchError(f"--token-source: there is no token in {kind + ':' + value if kind != 'literal' else kind}")
    return token.strip()


def fetch(repo_id: str, source: ModelSource, choose: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """Downloads the files of a repository that `choose` picks from its list; returns the folder that holds them.

    Files already in the cache are not loaded again; with source.offline, or where the hub cannot be reached, the
    folder in the cache is returned as it is. Raises ModelFileError for a repository or revision that does not exist or
    may not be read, LaunchError where the hub is needed and cannot be reached; choose's errors pass.
    """
    # Imported here: it takes a while, and a local model needs none of it.
    from huggingface_hub import snapshot_download

    where: dict[str, Any] = {"repo_id": repo_id, "revision": source.revision, "token": read_token(source.token_source)}
    names, problem = _list_files(where, source)
    try:
        if names is None:
            cached = snapshot_download(**where, cache_dir=source.hf_cache, local_files_only=True, allow_patterns=[])
            if problem is not None:
                logger.warning("%s: the hub cannot be reached (%s); its cached files are used", repo_id, problem)
            return Path(cached)
        patterns = [glob.escape(name) for name in choose(names)]
        return Path(snapshot_download(**where, cache_dir=source.hf_cache, allow_patterns=patterns))
    except ModelFileError:
        raise
    except Exception as error:  # their classes come from an HTTP library that differs between versions
        if names is None and problem is None:
            raise ModelFileError(f"{repo_id}: is not in the local cache, and offline the hub is not asked") from error
        raise _refusal(repo_id, source, error) or _unreachable(repo_id, problem or _reason(error)) from error


def _list_files(where: dict[str, Any], source: ModelSource) -> tuple[list[str] | None, str | None]:
    """The repository's file names; None and the reason where the hub does not answer (no reason: it is not asked)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    if source.offline:
        return None, None
    try:
        # Not list_repo_files: that one tries again for half a minute before it says that the hub is away.
        info = HfApi().model_info(**where, timeout=_TIMEOUT_S)
        return [file.rfilename for file in info.siblings or []], None
    except OfflineModeIsEnabled:
        return None, None
    except Exception as error:  # as above
        refusal = _refusal(where["repo_id"], source, error)
        if refusal is not None:
            raise refusal from error
        return None, _reason(error)


def _refusal(repo_id: str, source: ModelSource, error: Exception) -> ModelFileError | None:
    """What the hub's answer means in one sentence; None where it gave no answer."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return ModelFileError(f"{repo_id}: the hub gives it only to those it has admitted; see --token-source")
    if isinstance(error, RevisionNotFoundError):
        return ModelFileError(f"{repo_id}: the hub has no revision {source.revision!r} of it")
    if isinstance(error, RepositoryNotFoundError):
        return ModelFileError(
            f"{repo_id}: is no local file or folder, and the hub has no such repository"
            " or gives it only with a token (--token-source)"
        )
    if isinstance(error, HFValidationError):
        return ModelFileError(f"{repo_id}: is no local file or folder and no valid hub id")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ModelFileError(f"{repo_id}: the hub refused access (HTTP {status}); see --token-source")
    return None


def _unreachable(repo_id: str, reason: str) -> LaunchError:
    endpoint = os.environ.get("HF_ENDPOINT", "huggingface.co")
    return LaunchError(
        f"{repo_id}: is no local file or folder, and the hub ({endpoint}) cannot be reached to download it ({reason})"
    )


def _reason(error: BaseException) -> str:
    """The first line of an error, shortened."""
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return text if len(text) <= 160 else text[:160] + "…"
