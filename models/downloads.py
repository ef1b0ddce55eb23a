"""Files with a known checksum: found in a folder, or downloaded into the cache and verified before anything sees them.

A file is looked for in the folder given by the caller; else in the folder that the environment variable SSM_NN_DATA
names, then in the cache (SSM_NN_CACHE, or the platform's cache folder), then at its mirrors. The checksum is the sha256
of the uncompressed bytes, because mirrors may pack the same bytes anew; or the md5 of the file as it lies, where that is
what its publisher gives.
"""

import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs

__all__ = ["DataError", "DataFile", "cache_folder", "read_file"]

TIMEOUT_SECONDS = 30.0  # of silence, not of the whole download
CHUNK_BYTES = 1 << 16


class DataError(ValueError):
    """A data set that is unknown, missing, unreachable or not what its checksum says."""


@dataclass(frozen=True)
class DataFile:
    """One file of a data set.

    Args:
        path: where it lies in a data folder, with forward slashes: ``"mnist/t10k-labels-idx1-ubyte.gz"``.
        sha256: hexadecimal, of the uncompressed bytes; ignored where there is an md5.
        size: number of the uncompressed bytes, or of the file as it lies where there is an md5.
        mirrors: addresses of the (compressed) file, tried in this order.
        md5: hexadecimal, of the file as it lies, which is then handed out as it lies, an archive still packed.
    """

    path: str
    sha256: str = ""
    size: int = 0
    mirrors: tuple[str, ...] = ()
    md5: str = ""

    def under(self, folder: Path) -> Path:
        """The file's place in a data folder."""
        return folder.joinpath(*PurePosixPath(self.path).parts)


def cache_folder() -> Path:
    """SSM_NN_CACHE if it is set, else the platform's cache folder for ssm_nn; it need not exist yet."""
    named = os.environ.get("SSM_NN_CACHE")
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("ssm_nn", appauthor=False))


def read_file(file: DataFile, folder: str | Path | None = None) -> bytes:
    """The uncompressed bytes of a file (the packed ones where it has an md5), verified.

    Args:
        file: what to read.
        folder: the only folder to look in. None looks in SSM_NN_DATA, then in the cache, then downloads into the
            cache.

    Raises:
        DataError: the folder or the file is missing, the bytes do not fit the checksum, or no mirror delivered them.
    """
    if folder is not None:
        place = file.under(_existing(Path(folder).expanduser(), "folder"))
        if not place.is_file():
            raise DataError(f"{place} is missing; put {_name(file)} there, or leave out the folder to have it fetched")
        return _verified(file, place)
    named = os.environ.get("SSM_NN_DATA")
    if named:
        place = file.under(_existing(Path(named).expanduser(), "SSM_NN_DATA"))
        if place.is_file():
            return _verified(file, place)
    cached = file.under(cache_folder())
    if cached.is_file():
        try:
            return _verified(file, cached)
        except DataError:
            # The cache is ours: a damaged file is fetched again. Without a mirror the error is all there is.
            if not file.mirrors:
                raise
    return _download(file, cached)


def _existing(folder: Path, argument: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{argument} is {str(folder)!r}, which is not a folder; name the folder with the data files")
    return folder


def _name(file: DataFile) -> str:
    return PurePosixPath(file.path).name


def _verified(file: DataFile, place: Path) -> bytes:
    """What ``read_file`` hands out of ``place``; DataError unless it fits."""
    try:
        packed = place.read_bytes()
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror}); check its permissions") from error
    if file.md5:
        _check(place, "md5", hashlib.md5(packed, usedforsecurity=False).hexdigest(), file.md5, "of the file as it lies")
        return packed
    content = _unpacked(file, packed, str(place))
    _check(place, "sha256", hashlib.sha256(content).hexdigest(), file.sha256, "of the uncompressed bytes")
    return content


def _check(place: Path, kind: str, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise DataError(
            f"{place} is not the expected file: {kind} {found[:12]}... instead of {expected[:12]}... ({what}); "
            "delete it and fetch it again"
        )


def _unpacked(file: DataFile, packed: bytes, place: str) -> bytes:
    if not file.path.endswith(".gz"):
        return packed
    unpack = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)  # 16: a gzip header is expected
    try:
        # One byte more than expected, so that a file that is too long is seen, and never unpacked in full.
        content = unpack.decompress(packed, file.size + 1)
    except zlib.error as error:
        raise DataError(f"{place} is not a valid gzip file; delete it and fetch it again") from error
    if not unpack.eof and len(content) <= file.size:
        raise DataError(f"{place} is cut short ({len(packed)} bytes); delete it and fetch it again")
    return content


def _download(file: DataFile, target: Path) -> bytes:
    """Fetch into a temporary file beside ``target``, verify, and only then rename: nothing is ever half written."""
    if not file.mirrors:
        raise DataError(
            f"{_name(file)} was not found, and no mirror is known that holds these very bytes; "
            f"put it at {file.path} in a folder and name the folder in SSM_NN_DATA, or put it at {target}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise DataError(
            f"{target.parent} cannot be written ({error.strerror}); name a folder for the cache in SSM_NN_CACHE"
        ) from error
    part = Path(name)
    reasons: list[str] = []
    try:
        for mirror in file.mirrors:
            try:
                _fetch(mirror, part, _name(file))
                content = _verified(file, part)
            except DataError as error:
                reasons.append(f"{mirror}: {str(error).replace(str(part), 'what it sent').split(';')[0]}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                reasons.append(f"{mirror}: {_reason(error)}")
            else:
                part.replace(target)
                return content
    finally:
        part.unlink(missing_ok=True)
    raise DataError(
        f"{_name(file)} could not be downloaded ({'; '.join(reasons)}); check the network, or put the file at "
        f"{file.path} in a folder and name the folder in SSM_NN_DATA"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def _fetch(address: str, part: Path, name: str) -> None:
    from rich.console import Console  # only needed when something is fetched
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response,
        part.open("wb") as out,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        length = response.headers.get("Content-Length")
        bar = progress.add_task(name, total=int(length) if length else None)
        received = 0
        while chunk := response.read(CHUNK_BYTES):
            out.write(chunk)
            received += len(chunk)
            progress.update(bar, advance=len(chunk))
        if length and received < int(length):
            raise OSError(f"the connection closed after {received} of {length} bytes")
