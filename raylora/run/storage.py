"""Reads and writes the objects of one run directory in object storage: S3, Google Cloud Storage or Azure, by fsspec.

Each provider's library raises errors of its own. Here they become one sentence that names the cure.
"""

import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from raylora.errors import RunDirectoryError, first_line
from raylora.run.outage import FIRST_PAUSE, LONGEST_PAUSE, PATIENCE_SECONDS

Result = TypeVar("Result")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
"""Scheme of a URL -> extra of raylora that brings its package."""

THREADS = 8
"""Objects of one folder that are under way at once."""

DEFINITE = (PermissionError, ImportError, ValueError, NotImplementedError)
"""Errors that another try does not mend, beside those that `_is_refusal` knows."""

REFUSED = re.compile("credential|forbidden|unauthorized|access denied", re.IGNORECASE)
"""Texts by which botocore, gcsfs and adlfs refuse access in errors of other types."""

UNKNOWN_CALLER, FORBIDDEN, MISSING = 401, 403, 404
"""HTTP statuses of errors that have one."""


@dataclass(frozen=True)
class Stored:
    """One object as a listing shows it."""

    size: int
    """Bytes."""

    modified: int
    """Time of its last change, in whole seconds since 1970."""


@dataclass(frozen=True)
class Storage:
    """Objects below one URL; their names are relative to it. It pickles small."""

    url: str
    patience: float = 0.0
    """Seconds for which an outage is waited out."""

    note: Callable[[str], None] | None = field(default=None, compare=False)
    """Shows the user a line, once for each outage."""

    def patient(self, seconds: float = PATIENCE_SECONDS, note: Callable[[str], None] | None = None) -> "Storage":
        """Return the same storage, which waits outages out."""
        return replace(self, patience=seconds, note=note or self.note)

    @cached_property
    def _fs(self) -> tuple[Any, str]:
        """File system, and the path of the URL in it."""
        scheme = _scheme(self.url)
        if scheme not in (*EXTRAS, "memory"):  # fsspec's memory:// is for tests
            raise ValueError(f"a run directory is a folder or a URL of {', '.join(EXTRAS)}, found {scheme}://")
        fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        return fs, root.rstrip("/")

    def read(self, name: str) -> bytes:
        """Return the content of an object.

        Raises:
            FileNotFoundError: there is none.
            RunDirectoryError: storage cannot be reached, or refuses.
        """
        return self._try(lambda fs, root: fs.cat_file(f"{root}/{name}"))

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return name -> content of several objects, read at once."""
        return self._at_once(self.read, names)

    def write(self, name: str, content: bytes) -> None:
        """Write an object; one that is there is replaced."""
        self._put(lambda fs, root: fs.pipe_file(f"{root}/{name}", content))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless there is one.

        Returns:
            True if it is there with this content. That of another writer counts as ours only if it is the same to the
            last byte: a try whose answer was lost finds its own object.
        """
        try:
            self._put(lambda fs, root: fs.pipe_file(f"{root}/{name}", content, mode="create"))
        except FileExistsError:
            return self.read(name) == content
        return True

    def list(self, folder: str = "", *, below: bool = True) -> dict[str, Stored]:
        """Return name -> object, of a folder and all folders in it.

        Args:
            folder: relative to the URL.
            below: False leaves out what lies in further folders.
        """
        where = f"/{folder}".rstrip("/")
        try:
            # with `maxdepth`, s3fs lists nothing where it is refused or the bucket is missing, and adlfs lists all
            found = self._try(lambda fs, root: fs.find(root + where, detail=True))
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        if isinstance(found, list):  # adlfs, where the URL is that of an object
            raise RunDirectoryError(f"{self.url}{where} is an object, and no folder; name another URL")
        if not found and EXTRAS.get(_scheme(self.url)) == "azure" and not self._try(_has_bucket):
            raise self._no_bucket()  # adlfs lists a missing container as an empty one
        start = len(self._fs[1]) + 1
        # a folder whose first object is written meanwhile is listed as itself; one that a console made ends in a slash
        files = {path[start:]: i for path, i in found.items() if i["type"] == "file" and not path.endswith("/")}
        wanted = (name for name in files if below or name.count("/") == where.count("/"))
        return {name: Stored(files[name]["size"], _modified(files[name])) for name in wanted}

    def upload(self, file: Path, name: str) -> None:
        """Write an object from a local file."""
        self._put(lambda fs, root: fs.put_file(str(file), f"{root}/{name}"))

    def upload_all(self, files: dict[str, Path]) -> None:
        """Write several objects at once: name -> local file."""
        self._at_once(lambda name: self.upload(files[name], name), files)

    def download(self, name: str, file: Path) -> None:
        """Write an object to a local file, whose folder is made."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda fs, root: fs.get_file(f"{root}/{name}", str(file)))

    def download_all(self, files: dict[str, Path]) -> None:
        """Write several objects to local files at once: name -> file."""
        self._at_once(lambda name: self.download(name, files[name]), files)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; one that is gone already is passed over."""

        def remove_one(name: str) -> None:
            try:
                self._try(lambda fs, root: fs.rm_file(f"{root}/{name}"))
            except FileNotFoundError:
                return

        self._at_once(remove_one, names)

    @staticmethod
    def _at_once(function: Callable[[str], Result], names: Iterable[str]) -> dict[str, Result]:
        names = list(names)
        with ThreadPoolExecutor(THREADS) as threads:
            return dict(zip(names, threads.map(function, names), strict=True))

    def _put(self, function: Callable[[Any, str], object]) -> None:
        try:
            self._try(function)
        except FileNotFoundError as error:
            raise self._no_bucket() from error

    def _try(self, function: Callable[[Any, str], Result]) -> Result:
        """Call a function with file system and root, again and again during an outage.

        Raises:
            FileNotFoundError: object or bucket is missing.
            FileExistsError: the object is there already.
            RunDirectoryError: it failed otherwise.
        """
        deadline, pause = time.monotonic() + self.patience, FIRST_PAUSE
        while True:
            try:
                return function(*self._fs)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # botocore, aiohttp, gcsfs and azure each raise their own
                if _status(error) == MISSING:
                    raise FileNotFoundError(first_line(error)) from error
                is_definite = isinstance(error, DEFINITE) or _is_refusal(error)
                if is_definite or time.monotonic() + pause > deadline:
                    raise RunDirectoryError(explain(self.url, error)) from error
                if self.note is not None and pause == FIRST_PAUSE:
                    self.note(f"{explain(self.url, error)}; trying again for {self.patience:.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _no_bucket(self) -> RunDirectoryError:
        return RunDirectoryError(f"{self.url}: its bucket does not exist; make it first, or name another one")


def explain(url: str, error: Exception, needed: str = "list, read, write and delete") -> str:
    """Return what went wrong at a URL of object storage, and its cure, as one sentence.

    Args:
        url: bucket with a path.
        error: what fsspec or a provider's library raised.
        needed: what the credentials must allow.
    """
    text = first_line(error)
    if isinstance(error, ImportError):
        return f"{url} needs a package: pip install 'raylora[{EXTRAS[_scheme(url)]}]'"
    if _status(error) == UNKNOWN_CALLER or "credentials" in f"{type(error).__name__} {text}".lower():
        return f"{url}: no credentials for it ({text}); set those that its provider's tools read"
    if isinstance(error, PermissionError) or _is_refusal(error):
        return f"{url}: access is refused ({text}); the credentials must allow to {needed}"
    if isinstance(error, DEFINITE):
        return f"{url}: {text}"
    return f"{url} cannot be reached ({type(error).__name__}: {text}); check network, endpoint and region"


def _is_refusal(error: Exception) -> bool:
    """Return True if a provider refuses access."""
    is_said = REFUSED.search(f"{type(error).__name__} {first_line(error)}") is not None
    return is_said or _status(error) in (UNKNOWN_CALLER, FORBIDDEN)


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error; azure-core, aiohttp and gcsfs each name it otherwise."""
    found = (str(getattr(error, name, "")) for name in ("status_code", "status", "code"))
    return next((int(status) for status in found if status.isdigit()), None)


def _has_bucket(fs: Any, root: str) -> bool:
    """Return False if a bucket is missing. adlfs says True too where the credentials may not look."""
    return bool(fs.exists(root.partition("/")[0]))


def _scheme(url: str) -> str:
    """Return what stands before `://`."""
    return url.partition("://")[0]


def _modified(info: dict[str, Any]) -> int:
    """Return the time of the last change from a listing; s3fs, gcsfs, adlfs and memory each name it otherwise."""
    for key in ("LastModified", "mtime", "last_modified", "created"):
        if key in info:
            value = info[key]
            return int(value if isinstance(value, float) else value.timestamp())
    raise ValueError(f"no time of the last change among {', '.join(info)}")
