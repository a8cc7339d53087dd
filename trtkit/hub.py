"""Sources on the Hugging Face hub: downloaded into huggingface_hub's own cache, by its own client."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

from trtkit.errors import InputError, LacksError
from trtkit.untrusted import printable

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is downloaded from the hub: no pickle files, no code."""

NOT_FILES = ["*/*", "consolidated*"]
"""Never downloaded: folders within the repository (copies in other formats; huggingface_hub's `*` matches `/` too), and
the second copy of the weights in their maker's own layout that Mistral's repositories carry."""

_LOCAL_TROUBLE = {
    errno.ENOSPC: "free disk space, or set HF_HOME to a folder on a larger disk",
    errno.EDQUOT: "free some of your disk quota, or set HF_HOME to a folder on another disk",
    errno.EACCES: "set HF_HOME to a folder that you can write to",
    errno.EPERM: "set HF_HOME to a folder that you can write to",
    errno.EROFS: "set HF_HOME to a folder that you can write to",
    errno.ENOTDIR: "set HF_HOME to a folder that you can write to",
}


def download(repo: str, revision: str | None) -> Path:
    """The folder of a model of the hub, in huggingface_hub's cache: `.../snapshots/COMMIT`.

    Shows huggingface_hub's progress bars on stderr, if that is a terminal. When the connection breaks within a file,
    huggingface_hub asks for the rest of it (a Range request) up to five times. A run that was killed keeps the files
    that were complete; huggingface_hub from version 2 begins the others again.

    Raises:
        InputError: no such model or revision.
        LacksError: no access, no connection, or no place to write to.
    """
    import huggingface_hub
    import huggingface_hub.errors as hub

    try:
        with _progress():
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=FILES, ignore_patterns=NOT_FILES
            )
    except hub.HFValidationError as error:
        fix = "give a folder or a hub id such as owner/name"
        raise InputError(f"'{repo}' is neither a local folder nor a possible hub id", fix) from error
    except hub.GatedRepoError as error:
        fix = f"accept its licence at the hub's page of {repo}, then set HF_TOKEN"
        raise LacksError(f"'{repo}' is gated and this machine has no access to it", fix) from error
    except hub.RevisionNotFoundError as error:
        raise InputError(f"'{repo}' has no revision '{revision}'", "give an existing commit, tag or branch") from error
    except hub.RepositoryNotFoundError as error:
        raise InputError(
            f"'{repo}' is neither a local folder nor a model on the hub", "check the name; private ones need HF_TOKEN"
        ) from error
    # HTTPError is the base of what its HTTP client raises: httpx since version 1, before that requests (an OSError).
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _failure(repo, revision, error) from error
    return Path(folder)


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """huggingface_hub's bars only on a terminal: some of them fill log files too. Its own setting, if any, wins."""
    from huggingface_hub import constants, utils

    mute = not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    mute = mute and not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    if mute:
        utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if mute:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _failure(repo: str, revision: str | None, error: Exception) -> LacksError:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    at = f" at revision '{revision}'" if revision else ""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        # The hub's own "not in the cache" is a FileNotFoundError, but no trouble of this machine.
        if isinstance(link, OSError) and link.errno in _LOCAL_TROUBLE:
            where = f" to {link.filename}" if link.filename else ""
            said = f"cannot write '{repo}'{where}: {link.strerror}"
            return LacksError(printable(said, 500), _LOCAL_TROUBLE[link.errno])
    if isinstance(error, (LocalEntryNotFoundError, HfHubHTTPError)):
        return LacksError(
            f"cannot reach the hub, and '{repo}'{at} is neither a folder here nor in the hub's local cache",
            "run once with a connection, or copy the checkpoint here and give its folder",
        )
    reason = printable((str(error) or type(error).__name__).splitlines()[0], 200)
    return LacksError(
        f"the download of '{repo}'{at} broke off ({reason})", "run again: files that are complete are kept"
    )
