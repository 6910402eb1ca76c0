"""Files of a saved edit, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers.utils.hub import cached_file, extract_commit_hash

from .adapter_schema import AdapterError

NETWORK_ERRORS: tuple[type[Exception], ...] = tuple(  # of the HTTP library that the Hub's client uses
    kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError"
)


class MissingFileError(AdapterError):
    """A file of a saved edit that is not there."""


def find_file(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> Path:
    """Return where a file of a saved edit lies, downloaded if need be.

    Raises:
        MissingFileError: If there is none.
        AdapterError: If it cannot be downloaded.
    """
    try:
        file = cached_file(str(name_or_path), name, **hub_arguments)
    except OSError as error:
        if isinstance(error.__cause__, (HfHubHTTPError, LocalEntryNotFoundError)) and not _is_known_missing(
            name_or_path, name, hub_arguments
        ):
            raise AdapterError(f"{name_or_path}: {name} cannot be downloaded ({error})") from error
        raise MissingFileError(
            f"{name_or_path}: no {name}; a saved edit has its weights and a description beside ({error})"
        ) from error
    except NETWORK_ERRORS as error:
        raise AdapterError(f"{name_or_path}: {name} cannot be downloaded ({error}); try again") from error
    return Path(str(file))


def pinned(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the commit that a revision is now: a push in between must not mix old weights with a new config."""
    commit = extract_commit_hash(str(find_file(name_or_path, name, hub_arguments)), None)
    return {} if commit is None or Path(name_or_path).is_dir() else {"revision": commit}


def _is_known_missing(name_or_path: str | Path, name: str, hub_arguments: Mapping[str, Any]) -> bool:
    """Tell whether the cache knows that the repository has no such file, as of an adapter that is read offline."""
    where = {key: hub_arguments[key] for key in ("cache_dir", "revision") if key in hub_arguments}
    cached = try_to_load_from_cache(str(name_or_path), name, **where)
    return cached is not None and not isinstance(cached, str)  # the client's own mark of an absent file
