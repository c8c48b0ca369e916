"""Shards at https:// and hf:// addresses, on a server on loopback. The Hub is imitated."""

import logging
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from fixtures.range_server import Hub, RangeServer, range_server
from iwm_fast.cli import main
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage import http_file, remote_file
from iwm_fast.pipelines.storage.index_cache import file_version
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.remote_file import RemoteFile
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards
from iwm_fast.runtime.error_reporting import user_facing_errors


@pytest.fixture
def server(tiny_shards, monkeypatch, tmp_path) -> Iterator[RangeServer]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("IWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_file, "FIRST_WAIT_S", 0.01)
    with range_server() as started:
        started.files = {f"/data/{path.name}": path.read_bytes() for path in tiny_shards.folder.glob("*.tar")}
        yield started
    http_file._pool.cache_clear()


@pytest.fixture
def hub(server, monkeypatch) -> Hub:
    files = {name.replace("/data/", "shards/train/"): content for name, content in server.files.items()}
    server.hub = Hub("user/name", {"README.md": b"about", "shards/train/notes.txt": b"", **files})
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    return server.hub


def images_of(spec: str) -> list[bytes]:
    shards = open_shards(spec)
    with Reader(shards, 8) as reader:
        return [image.tobytes() for image in reader.read(np.arange(shards.num_samples))]


def message_of(action, capsys) -> str:
    with pytest.raises(SystemExit) as end, user_facing_errors():
        action()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and "Traceback" not in error
    return error


def test_shards_at_an_address_hold_the_same_samples(server, tiny_shards, tmp_path):
    spec = f"{server.address}/data/tiny-{{000000..000002}}.tar"
    local, remote = open_shards(tiny_shards.pattern), open_shards(spec)
    assert remote.content_digest == local.content_digest
    assert images_of(spec) == images_of(tiny_shards.pattern)
    # Nothing but ranges is requested, and an index is stored.
    assert all(span for _, span, _ in server.requests)
    server.requests.clear()
    open_shards(spec)
    assert [span for _, span, _ in server.requests] == ["bytes=0-0"] * 6
    assert len(list((tmp_path / "cache" / "index").glob("*.index"))) == 3


def test_a_read_takes_one_request(server):
    file = RemoteFile(f"{server.address}/data/tiny-000000.tar")
    content = server.files["/data/tiny-000000.tar"]
    server.requests.clear()
    assert file.read_at(1000, 77) == content[1000:1077] and file.read_at(len(content) - 5, 50) == content[-5:]
    assert file.read_at(len(content), 5) == b""
    assert [span for _, span, _ in server.requests] == [
        "bytes=1000-1076",
        f"bytes={len(content) - 5}-{len(content) - 1}",
    ]


def test_a_server_without_ranges_is_refused_before_training(server, capsys, tmp_path):
    server.faults = ["whole"] * 100
    spec = f"{server.address}/data/tiny-000000.tar"
    arguments = ["demo", "runtime.loader=torch", "runtime.engine=plain", "runtime.zero_stage=null"]
    arguments += [f"data.train={spec}", f"output.folder={tmp_path / 'run'}"]
    error = message_of(lambda: main(["train", *arguments]), capsys)
    assert f"{spec}: the server sends the complete file instead of a range of bytes" in error
    assert "download the shards, or serve them from a server with range requests" in error
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "text", "num_requests"),
    [("404", "no shards match 'http", 1),
     ("403", "the store refuses access (HTTP status 403 Forbidden); use an address that needs no login", 1),
     ("401", "the store refuses access (HTTP status 401 Unauthorized)", 1),
     ("400", "HTTP status 400 Bad Request", 1),
     ("503", "looking it up failed: HTTP status 503 Service Unavailable", 5),
     ("429", "HTTP status 429 Too Many Requests", 5),
     ("cut", "IncompleteRead", 5)],
)  # fmt: skip
def test_a_failing_server_is_reported_in_one_message(server, capsys, fault, text, num_requests):
    server.faults = [fault] * 100
    error = message_of(lambda: find_shards(f"{server.address}/data/tiny-000000.tar"), capsys)
    assert text in error and f"{server.address}/data/tiny-000000.tar" in error
    assert len(server.requests) == num_requests


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut"])
def test_a_read_that_fails_three_times_returns_the_right_bytes(server, caplog, fault):
    file = RemoteFile(f"{server.address}/data/tiny-000000.tar")
    server.faults = [fault] * 3
    assert file.read_at(100, 5000) == server.files["/data/tiny-000000.tar"][100:5100]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_a_server_that_sends_nothing_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote_file, "REQUEST_TIMEOUT_S", 0.1)
    monkeypatch.setattr(remote_file, "NUM_ATTEMPTS", 2)
    server.faults, begin_s = ["stall"] * 100, time.monotonic()
    with pytest.raises(OSError, match="ReadTimeoutError") as caught:
        RemoteFile(f"{server.address}/data/tiny-000000.tar")
    assert time.monotonic() - begin_s < 10 and "failed 2 times" in caught.value.__notes__[0]


def test_a_file_that_changed_after_it_was_indexed_is_refused(server):
    shards = open_shards(f"{server.address}/data/tiny-000000.tar")
    server.files["/data/tiny-000000.tar"] += bytes(512)
    with Reader(shards, 1) as reader, pytest.raises(ShardError, match="has changed since it was indexed"):
        reader.read(np.arange(2))
    file = RemoteFile(f"{server.address}/data/tiny-000000.tar")
    server.files["/data/tiny-000000.tar"] = server.files["/data/tiny-000000.tar"][:2000]
    with pytest.raises(OSError, match=r"had .* bytes when it was opened and now has 2000"):
        file.read_at(0, 100)


def test_a_redirection_is_followed_once_for_all_reads(server):
    server.redirects["/old.tar"] = "/data/tiny-000000.tar"
    file = RemoteFile(f"{server.address}/old.tar")
    server.requests.clear()
    assert file.read_at(0, 100) + file.read_at(100, 100) == server.files["/data/tiny-000000.tar"][:200]
    assert [path for path, _, _ in server.requests] == ["/data/tiny-000000.tar"] * 2


@pytest.mark.parametrize(
    ("path", "text"),
    [("/data/", "cannot be listed; name them, for example with braces as in {000..099}"),
     ("/data/*.tar", "cannot be listed; name them"),
     ("/data/a.tar?token=hush", "without user, password or options after '?'")],
)  # fmt: skip
def test_addresses_that_cannot_be_read_name_the_remedy(server, path, text):
    with pytest.raises(ValueError, match=r".") as caught:
        find_shards(server.address + path)
    assert text in str(caught.value) and "hush" not in str(caught.value) and not server.requests


def test_an_address_is_written_as_for_a_browser(server):
    server.files["/a b/ü.tar"] = server.files["/data/tiny-000000.tar"]
    assert len(images_of(f"{server.address}/a%20b/ü.tar")) == len(images_of(f"{server.address}/a b/%C3%BC.tar")) == 20


def test_a_missing_package_is_named_with_its_extra(server, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "urllib3", None)
    error = message_of(lambda: find_shards(f"{server.address}/data/tiny-000000.tar"), capsys)
    assert "urllib3 is not installed: pip install 'iwm-fast[eval]'" in error


HUB = "hf://datasets/user/name"


@pytest.mark.parametrize(
    "spec",
    [f"{HUB}/shards/train/*.tar", f"{HUB}/shards/train", f"{HUB}@v1/shards/train/tiny-{{000000..000002}}.tar"],
)
def test_shards_on_the_hub_hold_the_same_samples(hub, tiny_shards, spec):
    remote = open_shards(spec)
    assert remote.content_digest == open_shards(tiny_shards.pattern).content_digest
    folder = spec.rpartition("/")[0] if spec.endswith(".tar") else spec
    assert [shard.path for shard in remote.shards] == [f"{folder}/tiny-{n:06}.tar" for n in range(3)]
    assert images_of(spec) == images_of(tiny_shards.pattern)


def test_the_hub_is_asked_once_for_the_place_of_a_file_until_that_expires(hub, server):
    path = f"{HUB}/shards/train/tiny-000000.tar"
    file, content = RemoteFile(path), hub.files["shards/train/tiny-000000.tar"]
    server.requests.clear()
    assert file.read_at(0, 100) + file.read_at(100, 100) == content[:200]
    assert len(server.requests) == 2 and all("/blobs/" in path for path, _, _ in server.requests)
    hub.signature += 1
    server.requests.clear()
    assert file.read_at(200, 100) == content[200:300]
    assert ["/resolve/" in path for path, _, _ in server.requests] == [False, True, False]


def test_the_token_goes_to_the_hub_alone(hub, server, monkeypatch):
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(images_of(f"{HUB}/shards/train/tiny-000000.tar")) == 20
    tokens = {"/blobs/" in path: token for path, _, token in server.requests}
    assert tokens == {False: "Bearer secret", True: ""}


def test_the_version_of_a_file_on_the_hub_is_that_of_its_content(hub):
    versions = {file_version(f"{HUB}{revision}/shards/train/tiny-000000.tar") for revision in ("", "@v1")}
    assert len(versions) == 1 and versions != {file_version(f"{HUB}/shards/train/tiny-000001.tar")}


@pytest.mark.parametrize(
    ("spec", "text"),
    [(f"{HUB}/shards/train/none.tar", "no shards match"),
     (f"{HUB}/shards/train/none-*.tar", "no shards match"),
     (f"{HUB}@v9/shards/train/*.tar", "revision not found"),
     ("hf://datasets/other/name/a.tar", "repository not found"),
     ("hf://datasets", "an address is hf://datasets/USER/NAME/PATH"),
     (f"{HUB}/README.md", "is cut off")],
)  # fmt: skip
def test_what_is_not_on_the_hub_is_named(hub, capsys, spec, text):
    error = message_of(lambda: open_shards(spec), capsys)
    assert text in error
    if "repository" in text:
        assert "log in with `hf auth login` or set HF_TOKEN" in error


def test_a_failing_hub_is_retried_and_then_named(hub, server, capsys):
    server.faults = ["500"] * 1000
    error = message_of(lambda: find_shards(f"{HUB}/shards/train/*.tar"), capsys)
    assert "HTTP status 500" in error and "failed 5 times" in error
    server.faults = []
    assert len(find_shards(f"{HUB}/shards/train/*.tar")) == 3
