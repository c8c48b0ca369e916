"""Remote shards on a real S3 server, reached through a proxy that fails in the ways of networks and stores."""

import http.client
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from fixtures.paths import PROJECT
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage import remote_file
from iwm_fast.pipelines.storage.index_cache import MIN_AGE_NS, file_version
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.remote_file import ChangedError, RemoteFile, file_info, list_files
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards

SHARD = "s3://bucket/tiny/tiny-000000.tar"
INTERNAL_ERROR = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    span: str
    """The Range header."""
    credential: str
    """Credential scope of the signature: access key, date, region and service."""


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the store, records them, and injects a fault into the first responses on request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, store: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.store = store
        self.lock = Lock()
        self.is_stopping = Event()
        self.reset()

    def reset(self) -> None:
        self.requests: list[Request] = []
        self.fault = ""
        self.num_faults = 0
        self.latency_s = 0.0
        self.num_in_flight = self.max_in_flight = 0

    def inject(self, fault: str, times: int = 10**6) -> None:
        """Forget the requests so far and spoil the next responses."""
        self.requests.clear()
        self.fault, self.num_faults = fault, times

    @property
    def spans(self) -> list[str]:
        return [request.span for request in self.requests if request.span]


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        proxy, signed = self.server, self.headers.get("Authorization", "")
        credential = signed.partition("Credential=")[2].partition(",")[0]
        with proxy.lock:
            proxy.requests.append(Request(self.command, self.path, self.headers.get("Range", ""), credential))
            fault = proxy.fault if proxy.num_faults > 0 else ""
            proxy.num_faults -= 1
            proxy.num_in_flight += 1
            proxy.max_in_flight = max(proxy.max_in_flight, proxy.num_in_flight)
        if proxy.latency_s:
            time.sleep(proxy.latency_s)
        try:
            self._respond(fault)
        finally:
            with proxy.lock:
                proxy.num_in_flight -= 1

    def do_HEAD(self) -> None:
        self.do_GET()

    def _respond(self, fault: str) -> None:
        if fault == "stall":
            self.server.is_stopping.wait(60)
            self.close_connection = True
            return
        status, headers, body = (500, {}, INTERNAL_ERROR) if fault == "500" else self._forward()
        if fault.endswith("short"):
            body = body[: -1 if fault == "one byte short" else len(body) // 2]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length") or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = self.close_connection or fault == "cut"

    def _forward(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.server.store)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        # The length of a body is set from the forwarded bytes. A response to HEAD has no body, but states a length.
        dropped = {"connection", "transfer-encoding", "date", "server"} | ({"content-length"} if body else set())
        headers = {name: value for name, value in response.getheaders() if name.lower() not in dropped}
        return response.status, headers, body


@dataclass(frozen=True)
class Store:
    """The server, the proxy in front of it, and a client that writes without the proxy."""

    proxy: Proxy
    system: fs.S3FileSystem
    address: tuple[str, int]

    def put(self, uri: str, content: bytes) -> None:
        with self.system.open_output_stream(uri.removeprefix("s3://")) as stream:
            stream.write(content)

    def check_credentials(self, is_on: bool) -> None:
        connection = http.client.HTTPConnection(*self.address)
        connection.request("POST", "/moto-api/reset-auth", body=b"0" if is_on else b"1000000")
        assert connection.getresponse().status == 200
        connection.close()


@pytest.fixture(scope="module")
def server(tiny_shards) -> Iterator[Store]:
    # The server logs each request at INFO, which would appear among the messages that the tests check.
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    address = moto.get_host_and_port()
    proxy = Proxy(address)
    thread = Thread(target=proxy.serve_forever)
    thread.start()
    system = fs.S3FileSystem(
        endpoint_override="http://{}:{}".format(*address), access_key="writer", secret_key="w", region="us-east-1",
        allow_bucket_creation=True, background_writes=False,
    )  # fmt: skip
    system.create_dir("bucket")
    store = Store(proxy, system, address)
    for path in tiny_shards.folder.glob("*.tar"):
        store.put(f"s3://bucket/tiny/{path.name}", path.read_bytes())
    store.put("s3://bucket/tiny/notes.txt", b"no shard")
    yield store
    proxy.is_stopping.set()
    proxy.shutdown()
    proxy.server_close()
    thread.join()
    moto.stop()


@pytest.fixture
def store(server, monkeypatch, tmp_path) -> Iterator[Store]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    host, port = server.proxy.server_address
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "IWM_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 0.01)
    server.proxy.reset()
    forget_clients()
    yield server
    forget_clients()


def forget_clients() -> None:
    remote_file._client.cache_clear()
    remote_file._require_bucket.cache_clear()


def content_of(tiny_shards, number: int = 0) -> bytes:
    return (tiny_shards.folder / f"tiny-{number:06}.tar").read_bytes()


def run_script(script: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", script, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=PROJECT)


def images_of(spec: str) -> list[bytes]:
    shards = open_shards(spec)
    with Reader(shards, 8) as reader:
        return [image.tobytes() for image in reader.read(np.arange(shards.num_samples))]


@pytest.mark.parametrize(
    "spec", ["s3://bucket/tiny", "s3://bucket/tiny/", "s3://bucket/tiny/tiny-{000000..000002}.tar"]
)
def test_folders_and_braces_give_the_same_samples_as_local_shards(store, tiny_shards, spec):
    local, remote = open_shards(tiny_shards.pattern), open_shards(spec)
    assert [shard.path for shard in remote.shards] == [f"s3://bucket/tiny/tiny-{n:06}.tar" for n in range(3)]
    assert remote.content_digest == local.content_digest
    assert images_of(spec) == images_of(tiny_shards.pattern)


def test_an_index_is_stored_and_no_header_is_read_again(store, tmp_path):
    while time.time_ns() - file_version(SHARD).changed_ns < MIN_AGE_NS:
        time.sleep(0.1)
    first = open_shards("s3://bucket/tiny")
    assert store.proxy.spans and len(list((tmp_path / "cache/index").glob("*.index"))) == 3
    store.proxy.reset()
    assert open_shards("s3://bucket/tiny").content_digest == first.content_digest
    assert store.proxy.requests and not store.proxy.spans


def test_an_address_is_taken_literally(store, tiny_shards):
    names = ["a%20b.tar", "a#1.tar", "a+b c.tar"]
    for name in names:
        store.put(f"s3://bucket/special/{name}", content_of(tiny_shards, 2))
    assert find_shards("s3://bucket/special") == [f"s3://bucket/special/{name}" for name in sorted(names)]
    assert len(images_of("s3://bucket/special")) == 33


@pytest.mark.parametrize(
    "address",
    [
        "s3://user:hush@bucket/a.tar", "s3://user:hu/sh@bucket/a.tar", "s3://user@bucket/a.tar", "s3://user:hush",
        "s3://bucket/a.tar?access_key=user&secret_key=hush", "gs://bucket/a.tar?endpoint_override=hush", "s3:///a.tar",
        "file://host/a.tar",
    ],
)  # fmt: skip
def test_an_address_with_credentials_is_refused_without_repeating_them(store, address):
    with pytest.raises(ValueError, match=r"PATH without user, password.*AWS_ENDPOINT_URL") as caught:
        find_shards(address)
    assert "hush" not in str(caught.value) and "user:" not in str(caught.value)
    assert not store.proxy.requests


def test_an_unknown_scheme_is_refused():
    for spec, hint in {
        "ftp://user:hush@example.org/a.tar": "got ftp:$",
        "pipe:curl -u user:hush https://example.org/a.tar": "got pipe:; a command's output cannot be read by offsets",
        "gcs://bucket/a.tar": "got gcs:; write gs://",
        "az://container/a.tar": "got az:; serve the container at an https:// address, or mount it",
    }.items():
        accepted = "one of s3://, gs://, https://, http://, hf://, file://"
        with pytest.raises(ValueError, match=f"{accepted}, {hint}") as caught:
            find_shards(spec)
        assert "hush" not in str(caught.value)


def test_missing_files_and_buckets_are_named_after_a_single_request(store):
    with pytest.raises(FileNotFoundError, match=r"1 of 2 names do not exist, the first is s3://bucket/tiny/none\.tar"):
        find_shards("s3://bucket/tiny/{none,tiny-000000}.tar")
    with pytest.raises(FileNotFoundError, match=r"bucket s3://absent does not exist; .*AWS_ENDPOINT_URL"):
        find_shards("s3://absent/tiny-000000.tar")
    store.proxy.reset()
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/tiny/none\.tar does not exist"):
        RemoteFile("s3://bucket/tiny/none.tar")
    assert len(store.proxy.requests) == 1


def test_wrong_credentials_are_reported_without_a_retry(store, caplog):
    store.check_credentials(True)
    try:
        for request in (file_info, RemoteFile, list_files):
            with pytest.raises(PermissionError, match=r"s3://bucket/tiny.*refuses access.*AWS_ACCESS_KEY_ID"):
                request(SHARD if request is RemoteFile else "s3://bucket/tiny")
    finally:
        store.check_credentials(False)
    assert caplog.records == []


def test_credentials_and_region_come_from_the_profile(store, monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[profile lab]\nregion = eu-north-1\n")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = s\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    # In a new process, because the AWS SDK reads the profile's region only when it starts.
    run_script(
        "import sys; from iwm_fast.pipelines.storage.remote_file import file_info; file_info(sys.argv[1])", SHARD
    )
    (request,) = store.proxy.requests
    key, _, region, service, _ = request.credential.split("/")
    assert (key, region, service) == ("LABKEY", "eu-north-1", "s3")


REQUESTS = {
    "look up": lambda: file_info(SHARD).size,
    "open": lambda: RemoteFile(SHARD).size_bytes,
    "list": lambda: list_files("s3://bucket/tiny"),
}


@pytest.mark.parametrize("request_store", REQUESTS.values(), ids=REQUESTS)
def test_failures_of_the_store_are_retried_and_logged(store, caplog, request_store):
    expected = request_store()
    store.proxy.inject("500", times=3)
    assert request_store() == expected
    assert len(store.proxy.requests) == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3
    assert all("s3://bucket/tiny" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_read_that_fails_three_times_returns_the_right_bytes(store, tiny_shards, caplog, fault):
    content, file = content_of(tiny_shards), RemoteFile(SHARD)
    for offset, size in ((0, len(content)), (1000, 77), (5, 1), (len(content) - 10, 50)):
        caplog.clear()
        # A short response takes two reads to detect, followed by a look-up whether the object has changed.
        store.proxy.inject(fault, times=8 if fault == "short" else 3)
        assert file.read_at(offset, size) == content[offset : offset + size]
        assert len(store.proxy.spans) == (7 if fault == "short" else 4) and len(caplog.records) == 3
    assert file.read_at(len(content), 5) == b""
    file.close()


@pytest.mark.parametrize("fault", ["short", "one byte short"])
def test_a_short_response_is_detected_for_any_last_byte(store, fault):
    content = bytes([0x5A, 0xA5, 0]) * 20
    store.put("s3://bucket/marks.bin", content)
    file = RemoteFile("s3://bucket/marks.bin")
    for size in (1, 2, 16, 33):
        for offset in (0, 1, 2):
            store.proxy.reset()
            assert file.read_at(offset, size) == content[offset : offset + size]
            store.proxy.inject(fault, times=2)
            assert file.read_at(offset, size) == content[offset : offset + size]
            assert len(store.proxy.spans) >= 3
    file.close()


@pytest.mark.parametrize("fault", ["500", "cut", "short"])
def test_a_permanent_failure_is_reported_with_address_count_and_remedy(store, fault):
    file = RemoteFile(SHARD)
    store.proxy.inject(fault)
    with pytest.raises(OSError, match=r"s3://bucket/tiny/tiny-000000\.tar: reading 2000 bytes at byte 512") as caught:
        file.read_at(512, 2000)
    (note,) = caught.value.__notes__
    assert SHARD in note and "failed 5 times" in note and "AWS_ENDPOINT_URL" in note
    assert len(store.proxy.spans) == remote_file.NUM_ATTEMPTS * (2 if fault == "short" else 1)
    file.close()


def test_a_stalled_request_is_noticed_and_retried(store, tiny_shards, monkeypatch, caplog):
    monkeypatch.setattr(remote_file, "REQUEST_TIMEOUT_S", 1)
    file = RemoteFile(SHARD)
    store.proxy.inject("stall", times=1)
    assert file.read_at(512, 2000) == content_of(tiny_shards)[512:2512]
    assert len(store.proxy.spans) == 2 and "the last 1 seconds" in caplog.text
    file.close()


def test_a_store_that_does_not_listen_is_an_error(store, monkeypatch):
    # No server listens on port 1.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"s3://bucket.*looking it up failed"):
        file_info(SHARD)


def test_a_shard_replaced_after_indexing_is_reported(store, tiny_shards):
    uri = "s3://bucket/changing/a.tar"
    store.put(uri, content_of(tiny_shards, 0))
    shards = open_shards(uri)
    for size in (-512, 512):
        store.put(uri, content_of(tiny_shards, 0)[:size] if size < 0 else content_of(tiny_shards, 0) + bytes(size))
        with (
            Reader(shards, 2) as reader,
            pytest.raises(ShardError, match=r"changed since it was indexed.*restart") as caught,
        ):
            reader.read(np.arange(4))
        assert caught.value.shard == uri


def test_a_shard_truncated_while_open_never_returns_wrong_bytes(store, tiny_shards, caplog):
    uri, content = "s3://bucket/changing/b.tar", content_of(tiny_shards, 0)
    store.put(uri, content)
    file = RemoteFile(uri)
    store.put(uri, content[:3000])
    assert file.read_at(2000, 1000) == content[2000:3000]
    for offset in (2000, 2999, 3000, 9000):
        with pytest.raises(ChangedError, match=r"b\.tar"):
            file.read_at(offset, 2000)
    assert caplog.records == []
    file.close()


def test_a_shard_truncated_or_removed_during_the_run_is_named(store, tiny_shards):
    uri = "s3://bucket/changing/c.tar"
    store.put(uri, content_of(tiny_shards, 0))
    shards = open_shards(uri)
    last = np.array([shards.num_samples - 1])
    with Reader(shards, 2) as reader:
        reader.read(last)
        store.put(uri, content_of(tiny_shards, 0)[:2048])
        with pytest.raises(ShardError, match=r"c\.tar: has changed since it was opened.*restart to index it again"):
            reader.read(last)
        store.system.delete_file(uri.removeprefix("s3://"))
        with pytest.raises(FileNotFoundError, match=r"c\.tar does not exist") as caught:
            reader.read(last)
    assert any(uri in note and "sample" in note for note in caught.value.__notes__)


def test_tens_of_reads_are_in_flight_and_earlier_batches_come_first(store, tiny_shards):
    shards = open_shards(SHARD)
    samples = np.arange(shards.num_samples)
    store.proxy.latency_s = 0.3
    with Reader(shards, 40) as reader:
        batches = [reader.submit(samples) for _ in range(4)]
        for batch in batches:
            batch.result()
    assert 30 <= store.proxy.max_in_flight <= 40
    store.proxy.latency_s = 0.01
    with Reader(shards, 3) as reader:
        reader.read(samples[:1])
        store.proxy.reset()
        for first in (10, 0, 5):
            batch = reader.submit(samples[first : first + 5])
        batch.result()
    number = {f"bytes={begin}-": index for index, begin in enumerate(shards.shards[0].image_offset.tolist())}
    order = [number[span.partition("-")[0] + "-"] // 5 for span in store.proxy.spans]
    # With three threads, requests of two consecutive batches may overtake each other.
    assert all(abs(position // 5 - [2, 0, 1].index(batch)) <= 1 for position, batch in enumerate(order))
    assert set(order[:3]) == {2} and set(order[-3:]) == {1}


def test_an_awaited_read_overtakes_reading_ahead(store):
    shards = open_shards(SHARD)
    store.proxy.latency_s = 0.02
    with Reader(shards, 1) as reader:
        ahead = [reader.submit(np.arange(20)) for _ in range(5)]
        assert len(reader.read(np.array([7]))) == 1
        assert not ahead[1].done()


def test_a_closed_reader_ends_after_the_reads_in_progress(store):
    shards = open_shards(SHARD)
    store.proxy.reset()
    store.proxy.latency_s = 0.1
    reader = Reader(shards, 2)
    ahead = [reader.submit(np.arange(20)) for _ in range(3)]
    while store.proxy.num_in_flight < 2:
        time.sleep(0.01)
    reader.close()
    assert len(store.proxy.requests) <= 6
    assert all(isinstance(batch.exception(), CancelledError) for batch in ahead)


def test_a_process_with_an_open_reader_exits_without_hanging_or_warnings(store):
    script = (
        "import sys, numpy as np; from iwm_fast.pipelines.storage.shard_set import open_shards; "
        "from iwm_fast.pipelines.storage.reader import Reader; "
        "shards = open_shards(sys.argv[1]); reader = Reader(shards, 16); print(len(reader.read(np.arange(48)))); "
        "ahead = reader.submit(np.arange(48))"
    )
    process = run_script(script, "s3://bucket/tiny")
    assert (process.returncode, process.stdout, process.stderr) == (0, "48\n", "")
