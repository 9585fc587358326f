"""Repositories of the Hugging Face Hub: what a name stands for lies in the local cache, or is downloaded into it.

Nothing else of the package goes to the network. The cache, its place and its settings are huggingface_hub's own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpc_hess.errors import ConfigError, DataError, ModelError, UnreachableError
from hpc_hess.intake.directory import PICKLES
from hpc_hess.model.sources.paths import find_path

Kind = Literal["model", "dataset"]
Reach = Literal["all", "small", "none"]
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", re.ASCII)
_FILES = (".gguf", ".json", ".jsonl", ".toml", ".safetensors", *PICKLES)  # a path that is missing, not a name
_TRIES, _LONGEST_WAIT_S = 5, 300.0  # where the Hub asks to wait

_reach: ContextVar[Reach] = ContextVar("reach", default="all")


class Name(NamedTuple):
    """A repository of the Hub at a branch, a tag or a commit; "" is its main branch."""

    name: str
    revision: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def error(self) -> type[ConfigError]:
        """What is raised about it."""
        return ModelError if self.kind == "model" else DataError

    @property
    def fetching(self) -> str:
        """The command that brings it into the cache."""
        return f"hpc-hess fetch {self}" if self.kind == "model" else "hpc-hess fetch CONFIG.toml"


def named(text: str, revision: str, kind: Kind) -> Name | None:
    """Return what "ORG/NAME" or "ORG/NAME@REV" names, None for anything else, such as an existing path.

    Raises
    ------
    ModelError, DataError : two revisions.

    """
    match = _NAME.fullmatch(text)
    if match is None or match[1].endswith(_FILES) or find_path(text) is not None:
        return None
    found = Name(match[1], match[2] or revision, kind)
    if match[2] and revision not in ("", match[2]):
        key = "model" if kind == "model" else "data"
        raise found.error(f"'{text}' and {key}.revision = '{revision}' name two revisions: leave one out")
    return found


@contextlib.contextmanager
def reaching(how_far: Reach) -> Iterator[None]:
    """Say what this thread may download within the block: "all", "small" (no weights of models), "none"."""
    token = _reach.set(how_far)
    try:
        yield
    finally:
        _reach.reset(token)


def reach() -> Reach:
    """Return what this thread may download."""
    return _reach.get()


def offline() -> bool:
    """Return whether the user keeps the Hub's libraries offline (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    from huggingface_hub import is_offline_mode

    asked = os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return asked or (is_offline_mode() and not os.environ.get("HPC_HESS_NAMES_ONLINE"))


def may_ask() -> bool:
    """Return whether the Hub may be asked."""
    return reach() != "none" and not offline()


def cached(name: Name) -> Path | None:
    """Return where the cache holds a revision, perhaps in part, else None. Asks no one. Raises ModelError, DataError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # of no file at all: it would insist on those that it is asked for
        where: dict[str, Any] = {"repo_type": name.kind, "revision": name.revision or None, "allow_patterns": ["-"]}
        return Path(snapshot_download(name.name, local_files_only=True, **where))
    except HFValidationError as error:
        raise _explained(error, name) from None
    except (LocalEntryNotFoundError, OSError):
        return None


def repository(name: Name, first: str) -> tuple[Path, dict[str, int]]:
    """Ask the Hub what a revision stands for; return its directory in the cache, and the sizes of its files by name.

    ``first`` : a file that is brought with it, where there is one. Raises ModelError, DataError.
    """
    path = _download(name, name.revision, [first])
    path.mkdir(parents=True, exist_ok=True)
    return path, files_of(name, path.name) or {}


def files_of(name: Name, commit: str) -> dict[str, int] | None:
    """Return the sizes of a commit's files by name, as the cache has the list, else None. Asks no one."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path: file.size for file in get_cached_repo_tree(name.name, repo_type=name.kind, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def bring(name: Name, commit: str, files: list[str]) -> Path:
    """Download those files of a commit that the cache lacks; return its directory.

    Raises
    ------
    ModelError, DataError : no network, no disk space, a file whose checksum is not the Hub's (it is removed).

    """
    from huggingface_hub import constants

    there = cached(name._replace(revision=commit))
    missing = [file for file in files if there is None or not (there / file).is_file()]
    if there is not None and not missing:
        return there
    sizes = files_of(name, commit) or {}
    total, free = sum(sizes.get(file, 0) for file in missing), _free(Path(constants.HF_HUB_CACHE))
    if total > free and may_ask():
        raise name.error(
            f"{name} needs {_size(total)} more in {constants.HF_HUB_CACHE}, where {_size(free)} are free: free some, or set "
            "HF_HOME to another disk"
        )
    if may_ask():
        files_text = ", ".join(missing[:2]) + ", ..." * (len(missing) > 2)
        _say(f"downloading {files_text} of {name}, commit {commit[:12]} ({_size(total)})")
    path = _download(name, commit, [re.sub(r"([\[?*])", r"[\1]", file) for file in missing])
    for file in missing:
        _verify(name, path / file)
    return path


def lacking(name: Name) -> UnreachableError:
    """Return what to say where the cache lacks a repository and the Hub may not be asked."""
    from huggingface_hub import constants

    why = " and HF_HUB_OFFLINE forbids to ask the Hub" if offline() else ""
    return UnreachableError(
        f"{name} is not in the cache of the Hub ({constants.HF_HUB_CACHE}){why}: run `{name.fetching}` where there is a "
        "network, such as on a login node, with the same HF_HOME"
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def _say(line: str) -> None:
    print(f"hpc-hess: {line}", file=sys.stderr, flush=True)


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _verify(name: Name, file: Path) -> None:
    """Compare a new file with its sha256, by which the cache names large files; a wrong one is removed."""
    blob = file.resolve()
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != blob.name:
        file.unlink()
        blob.unlink(missing_ok=True)
        raise name.error(f"{file.name} of {name} came with a wrong checksum and was removed: run the same command again")


def _download(name: Name, revision: str, patterns: list[str]) -> Path:
    """Download files; wait where the Hub asks to. Raises ModelError or DataError, one sentence."""
    from huggingface_hub import constants, snapshot_download

    if not may_ask():
        raise lacking(name)
    for tries in range(1, _TRIES + 1):
        before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False  # see hpc_hess.model
        try:
            options: dict[str, Any] = {"repo_type": name.kind, "revision": revision or None, "allow_patterns": patterns}
            return Path(snapshot_download(name.name, tqdm_class=_bars(), **options))
        except Exception as error:  # of the network, the Hub, the disk: many kinds, and each becomes one sentence
            wait_s = _asks_to_wait(error)
            if wait_s is None or tries == _TRIES:
                raise _explained(error, name) from None
            _say(f"the Hub asks to wait {wait_s:.0f} s (429, try {tries} of {_TRIES})")
            time.sleep(wait_s)
        finally:
            constants.HF_HUB_OFFLINE = before
    raise AssertionError


def _bars() -> Any:
    """Return the class of progress bars: live on a terminal, elsewhere a line every half minute."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            if not sys.stderr.isatty():
                options |= {"mininterval": 30.0, "maxinterval": 60.0, "delay": 30.0}
            super().__init__(*args, **options)

    return Bar


def _response(error: BaseException | None) -> Any:
    """Return the answer of the Hub that an error comes from, or None."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None


def _asks_to_wait(error: Exception) -> float | None:
    response = _response(error)
    if response is None or response.status_code != 429:
        return None
    told = response.headers.get("Retry-After", "")
    policy = re.search(r";\s*t=(\d+)", response.headers.get("ratelimit", ""))
    return min(float(told) if told.isdigit() else float(policy[1]) if policy else 10.0, _LONGEST_WAIT_S)


def _explained(error: Exception, name: Name) -> ConfigError:
    """Return what an error of a download means, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    key, what, path = ("model", "a model", "") if name.kind == "model" else ("data", "a data set", "datasets/")
    cache, page, login = constants.HF_HUB_CACHE, f"{constants.ENDPOINT}/{path}{name.name}", "`hf auth login` or HF_TOKEN"
    response = _response(error)
    status = None if response is None else response.status_code
    reason = error.errno if isinstance(error, OSError) else None
    if isinstance(error, HFValidationError):
        text = f"'{name.name}' cannot be a name on the Hub: write ORG/NAME as its page shows it"
    elif isinstance(error, RevisionNotFoundError):
        text = f"{name.name} has no revision '{name.revision}': set {key}.revision to a branch, a tag or a commit of {page}"
    elif isinstance(error, GatedRepoError):
        text = f"{name.name} is gated: ask for access at {page}, and log in with {login}"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        text = f"'{name.name}' is no path here and not {what} of {constants.ENDPOINT}; if it is private, log in with {login}"
    elif status in (401, 403):
        text = f"the Hub refuses access to {name.name} ({status}): log in with {login}, of an account that may read it"
    elif status == 429:
        text = f"the Hub takes no more requests for {name.name} (429): try again later, or log in with {login}"
    elif reason in (errno.ENOSPC, errno.EDQUOT):
        text = f"the disk of {cache} is full: free some, or set HF_HOME to another disk"
    elif reason in (errno.EACCES, errno.EPERM, errno.EROFS):
        text = f"the cache of the Hub cannot be written ({cache}): set HF_HOME to a directory of yours"
    else:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        why = f"it answers {status}" if status else f"{type(root).__name__}: {[*str(root).strip().splitlines(), ''][0]}"
        return UnreachableError(
            f"{name} could not be downloaded from {constants.ENDPOINT} ({why}): run `{name.fetching}` where there is a "
            "network; files that came whole are kept"
        )
    return name.error(text)
