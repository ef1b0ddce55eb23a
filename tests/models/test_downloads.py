"""Files reach a user verified or not at all."""

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator

import pytest

from ssm_nn.models.downloads import DataError, DataFile, cache_folder, read_file

CONTENT = bytes(range(256)) * 40
PACKED = gzip.compress(CONTENT)
OTHER = gzip.compress(CONTENT[::-1])


def a_file(*mirrors: str) -> DataFile:
    return DataFile("set/values.gz", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), mirrors)


class Server:
    """Serves ``answers`` at the loopback address and counts requests."""

    def __init__(self):
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                answer = server.answers.get(self.path)
                if answer is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(PACKED)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the test's own, no data folder, and no proxy between the test and its server."""
    monkeypatch.setenv("SSM_NN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SSM_NN_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def put(folder, packed):
    (folder / "set").mkdir(parents=True)
    (folder / "set" / "values.gz").write_bytes(packed)
    return folder


def test_a_download_is_verified_and_kept(server, cache):
    server.answers["/values.gz"] = PACKED
    file = a_file(f"{server.base}/values.gz")
    assert read_file(file) == CONTENT
    assert read_file(file) == CONTENT
    assert server.asked == ["/values.gz"]
    assert [path.name for path in (cache / "set").iterdir()] == ["values.gz"]


def test_bytes_that_a_mirror_packed_anew_are_accepted(server):
    server.answers["/values.gz"] = gzip.compress(CONTENT, compresslevel=6, mtime=7)
    assert len(server.answers["/values.gz"]) == len(PACKED)
    assert server.answers["/values.gz"] != PACKED
    assert read_file(a_file(f"{server.base}/values.gz")) == CONTENT


def test_mirrors_are_tried_in_order(server):
    server.answers["/good"] = PACKED
    assert read_file(a_file(f"{server.base}/missing", f"{server.base}/good", f"{server.base}/never")) == CONTENT
    assert server.asked == ["/missing", "/good"]


def test_a_wrong_checksum_leaves_nothing_behind(server, cache):
    server.answers["/values.gz"] = OTHER[: len(PACKED)].ljust(len(PACKED), b"\0")
    with pytest.raises(
        DataError, match=r"values.gz could not be downloaded .*(not the expected|not a valid|cut short)"
    ):
        read_file(a_file(f"{server.base}/values.gz"))
    assert list((cache / "set").iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing_behind(server, cache):
    server.answers["/values.gz"] = PACKED[:-50]
    with pytest.raises(DataError, match=r"values.gz could not be downloaded"):
        read_file(a_file(f"{server.base}/values.gz"))
    assert list((cache / "set").iterdir()) == []


def test_without_a_network_every_mirror_and_the_way_out_are_named(server):
    dead = server.base
    server.http.server_close()
    with pytest.raises(DataError, match=rf"{dead}/a: .*{dead}/b: .*set/values.gz in a folder .* SSM_NN_DATA"):
        read_file(a_file(f"{dead}/a", f"{dead}/b"))


def test_a_damaged_cache_is_fetched_again(server, cache):
    put(cache, OTHER)
    server.answers["/values.gz"] = PACKED
    assert read_file(a_file(f"{server.base}/values.gz")) == CONTENT
    assert (cache / "set" / "values.gz").read_bytes() == PACKED


def test_the_folder_comes_before_the_variable_and_the_variable_before_the_cache(tmp_path, monkeypatch):
    folder, named = put(tmp_path / "folder", PACKED), put(tmp_path / "named", OTHER)
    monkeypatch.setenv("SSM_NN_DATA", str(named))
    assert read_file(a_file(), folder) == CONTENT
    with pytest.raises(DataError, match=r"named.*is not the expected file"):
        read_file(a_file())
    put(cache_folder(), PACKED)
    monkeypatch.delenv("SSM_NN_DATA")
    assert read_file(a_file()) == CONTENT


def test_a_file_that_the_named_folder_lacks_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSM_NN_DATA", str(tmp_path))
    put(cache_folder(), PACKED)
    assert read_file(a_file()) == CONTENT


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (PACKED[:-100], "is cut short"),
        (b"", "is cut short"),
        (b"no gzip at all", "is not a valid gzip file"),
        (PACKED[:-8] + bytes(8), "is not a valid gzip file"),
        (OTHER, "is not the expected file: sha256"),
        (gzip.compress(CONTENT + b"more"), "is not the expected file: sha256"),
    ],
    ids=["truncated", "empty", "not gzip", "wrong crc", "other bytes", "too long"],
)
def test_a_damaged_file_in_the_folder_is_refused(tmp_path, packed, message):
    put(tmp_path / "data", packed)
    with pytest.raises(DataError, match=message):
        read_file(a_file("http://127.0.0.1:1/never-asked"), tmp_path / "data")


def test_a_missing_folder_or_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"folder is '.*nowhere', which is not a folder"):
        read_file(a_file(), tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"values.gz is missing; put values.gz there"):
        read_file(a_file(), tmp_path)
    with pytest.raises(DataError, match=r"no mirror is known .* set/values.gz in a folder"):
        read_file(a_file())
    monkeypatch.setenv("SSM_NN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"SSM_NN_DATA is '.*nowhere'"):
        read_file(a_file())


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("SSM_NN_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(DataError, match=r"cannot be written .* SSM_NN_CACHE"):
        read_file(a_file("http://127.0.0.1:1/never-asked"))


def test_the_cache_is_the_platforms_unless_named(monkeypatch):
    monkeypatch.delenv("SSM_NN_CACHE")
    assert cache_folder().name == "ssm_nn"
