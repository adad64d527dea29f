"""A run's folder in an object store: a new machine goes on from there, whatever was cut short."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import runs

from vision_jax import store, train
from vision_jax.checkpoints import complete_steps
from vision_jax.errors import UserError

obstore = pytest.importorskip("obstore")


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(workdir, step, content=b"x"):
    folder = workdir / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    for name in ("_CHECKPOINT_METADATA", "checksums.json", "state/array"):
        (folder / name).write_bytes(content + name.encode())


def all_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").iterdir()]


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path / 'bucket'}"


def copy(url, workdir, said=None):
    """One process's life: takes the folder, copies all, gives it up."""
    one = store.Store(url, (said if said is not None else []).append)
    one.begin(workdir, all_steps)
    one.close()


def fetch(url, workdir, last, check=lambda folder, step: None):
    workdir.mkdir(exist_ok=True)
    one = store.Store(url, print)
    try:
        return one.fetch(workdir, last, check)
    finally:
        one.close()


def test_what_is_copied_and_comes_back(tmp_path, url):
    work = tmp_path / "work"
    write(work, 2)
    write(work, 4)
    (work / "frozen").mkdir()
    for name in ("config.json", "frozen/array", "lock", "a.draft", ".hidden"):
        (work / name).write_bytes(name.encode())
    said = []
    copy(url, work, said)
    assert said == []
    there = files(tmp_path / "bucket")
    kept = {"lock", "a.draft", ".hidden"}
    assert there == {name: b for name, b in files(work).items() if name not in kept}
    (note,) = fetch(url, tmp_path / "new", None)
    assert note == f"the checkpoints of step 2, 4 were fetched from {url}"
    assert files(tmp_path / "new") == there
    assert fetch(url, tmp_path / "new", 4) == []  # it has the newest already


def test_a_checkpoint_is_taken_from_the_store_when_it_is_gone_here(tmp_path, url):
    work = tmp_path / "work"
    write(work, 2)
    copy(url, work)
    shutil.rmtree(work / "checkpoints/2")
    write(work, 4)
    copy(url, work)
    assert store._steps(files(tmp_path / "bucket")) == [4]
    assert not list((tmp_path / "bucket/checkpoints/2").rglob("*.json"))


def test_what_was_cut_short_is_nothing(tmp_path, url, monkeypatch):
    """At each file: until the last one of a checkpoint is there, the older one is the newest."""
    work = tmp_path / "work"
    write(work, 2)
    copy(url, work)
    write(work, 4, b"y")
    put = obstore.put
    monkeypatch.setattr(store, "LAST", 0.0)
    for allowed in range(6):
        calls = []

        def broken(where, name, *arguments, calls=calls, allowed=allowed, **keywords):
            calls.append(name)
            if name != store.OWNER and len([n for n in calls if n != store.OWNER]) > allowed:
                raise OSError("the network is down")
            return put(where, name, *arguments, **keywords)

        monkeypatch.setattr(obstore, "put", broken)
        said = []
        copy(url, work, said)
        assert "the network is down" in said[0]
        assert "lacks what was written last" in said[-1]
        monkeypatch.setattr(obstore, "put", put)
        new = tmp_path / f"new{allowed}"
        fetch(url, new, None)
        for step in all_steps(new):
            expected = files(work / "checkpoints" / str(step))
            assert files(new / "checkpoints" / str(step)) == expected
        assert 2 in all_steps(new)
    copy(url, work)
    assert store._steps(files(tmp_path / "bucket")) == [2, 4]


def test_another_run_is_neither_fetched_nor_written_over(tmp_path, url):
    work, mine = tmp_path / "work", tmp_path / "mine"
    write(work, 100)
    (work / "config.json").write_bytes(b"B")
    copy(url, work)
    write(mine, 10)
    (mine / "config.json").write_bytes(b"A")
    before = files(mine), files(tmp_path / "bucket")

    def check(folder, step):
        assert step == 100
        if (folder / "config.json").read_bytes() != b"A":
            raise UserError(f"{folder} holds a run of another config")

    for last in (10, 200):  # behind the store, and ahead of it
        with pytest.raises(UserError, match=f"^{url} holds a run of another config$"):
            fetch(url, mine, last, check)
    assert (files(mine), files(tmp_path / "bucket")) == before


def test_one_run_at_a_time(tmp_path, url, monkeypatch):
    monkeypatch.setattr(store, "SECONDS_BETWEEN_BEATS", 0.1)
    monkeypatch.setattr(store, "SECONDS_BETWEEN_LOOKS", 0.1)
    one = store.Store(url, print)
    try:
        monkeypatch.setattr(store, "GONE", 20.0)
        with pytest.raises(UserError, match=f"config.store {url} is in use: a run on "):
            store.Store(url, print)
    finally:
        one.close()
    assert files(tmp_path / "bucket") == {}
    # Of a machine that is gone, and of a process of this one that was killed.
    monkeypatch.setattr(store, "GONE", 0.4)
    monkeypatch.setattr(store, "SETTLE", 0.0)
    for owner in (
        {"host": "elsewhere", "pid": 1},
        {"host": socket.gethostname(), "pid": 2**22 + 1},
    ):
        (tmp_path / "bucket" / store.OWNER).write_text(json.dumps(owner))
        said = []
        store.Store(url, said.append).close()
        assert [text.startswith(url) for text in said] == [True] * (owner["host"] == "elsewhere")


def test_a_run_whose_folder_was_taken_over_copies_nothing_more(tmp_path, url, monkeypatch):
    monkeypatch.setattr(store, "SECONDS_BETWEEN_BEATS", 0.1)
    said = []
    one = store.Store(url, said.append)
    (tmp_path / "bucket" / store.OWNER).write_text('{"host": "other", "id": "x"}')
    write(tmp_path / "work", 2)
    one.begin(tmp_path / "work", all_steps)
    one.close()
    assert said[0] == f"warning: {url} is another run's now, on other"
    assert list(files(tmp_path / "bucket")) == [store.OWNER]


def test_an_owner_beats_while_a_copy_takes_long(tmp_path, url, monkeypatch):
    monkeypatch.setattr(store, "SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(store, "SECONDS_BETWEEN_LOOKS", 0.05)
    put, copying, done = obstore.put, threading.Event(), threading.Event()

    def slow(where, name, *arguments, **keywords):
        if name.startswith("checkpoints"):
            copying.set()
            assert done.wait(60)
        return put(where, name, *arguments, **keywords)

    monkeypatch.setattr(obstore, "put", slow)
    write(tmp_path / "work", 2)
    one = store.Store(url, print)
    one.begin(tmp_path / "work", all_steps)
    try:
        assert copying.wait(60)
        monkeypatch.setattr(store, "GONE", 30.0)  # it ends when the owner is seen to live
        with pytest.raises(UserError, match="is in use"):
            store.Store(url, print)
    finally:
        done.set()
        one.close()
    assert store._steps(files(tmp_path / "bucket")) == [2]
    assert store.OWNER not in files(tmp_path / "bucket")


def test_two_that_wait_for_the_same_dead_owner(tmp_path, url, monkeypatch):
    """Both see that it is gone before either has taken the folder."""
    (tmp_path / "bucket").mkdir()
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1}
    (tmp_path / "bucket" / store.OWNER).write_text(json.dumps(dead))
    monkeypatch.setattr(store, "SETTLE", 0.0)
    both, lives, put, puts = threading.Barrier(2, timeout=60), store._lives, obstore.put, []

    def put_both(where, name, *arguments, **keywords):  # before either looks again
        put(where, name, *arguments, **keywords)
        puts.append(name)
        if len(puts) <= 2:
            both.wait()

    monkeypatch.setattr(obstore, "put", put_both)
    monkeypatch.setattr(store, "_lives", lambda pid: lives(pid) or both.wait() < 0)
    found = []

    def take():
        try:
            found.append(store.Store(url, print))
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (refused,) = [one for one in found if isinstance(one, str)]
    (owner,) = [one for one in found if not isinstance(one, str)]
    assert "is in use" in refused
    owner.close()


def test_files_that_go_while_the_last_copy_is_made_are_tried_again(tmp_path, url, monkeypatch):
    work, put, missed = tmp_path / "work", obstore.put, []
    write(work, 2)

    def put_once_later(where, name, *arguments, **keywords):
        if name.endswith("state/array") and not missed:
            missed.append(name)
            (work / "checkpoints/2").rename(tmp_path / "aside")
            try:
                return put(where, name, *arguments, **keywords)
            finally:
                write(work, 4)
        return put(where, name, *arguments, **keywords)

    monkeypatch.setattr(obstore, "put", put_once_later)
    said = []
    copy(url, work, said)
    assert missed
    assert said == []
    assert store._steps(files(tmp_path / "bucket")) == [4]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, url, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(obstore, "put", refuse)
    with pytest.raises(UserError, match="can't be written: no"):
        store.Store(url, print)


@pytest.mark.parametrize("address", ["s4://bucket/x", "bucket", "http://host/x"])
def test_addresses_that_are_none(address):
    with pytest.raises(UserError, match="it must begin with gs://"):
        store.open_store(address)


def test_names_that_lead_out_of_the_folder_are_left_alone(tmp_path, url, monkeypatch):
    work = tmp_path / "work"
    write(work, 2)
    copy(url, work)
    listed = [{"path": n, "size": 1} for n in (*files(tmp_path / "bucket"), "../evil", "/etc/evil")]
    monkeypatch.setattr(obstore, "list", lambda _: [listed])
    fetch(url, tmp_path / "new", None)
    assert "evil" not in "".join(files(tmp_path))


@pytest.mark.long
def test_a_run_goes_on_from_the_store_alone(tmp_path, url):
    """Stopped at step 3 of 6, its workdir lost: the same command ends with the same bits."""
    from test_train import tensors

    class Interrupted(Exception):
        pass

    config = runs.full_config(store=url)
    report = train._Reporter.__call__

    def interrupt(self, step, metrics):
        report(self, step, metrics)
        if step == 5:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._Reporter, "__call__", interrupt)
        with pytest.raises(Interrupted):
            train.run(config, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    assert train.run(config, tmp_path / "found") == 0
    assert tensors(tmp_path / "found") == tensors(runs.finished())
    copied = files(tmp_path / "bucket")
    own = {name: content for name, content in files(tmp_path / "found").items() if name != "lock"}
    assert copied == own
    assert complete_steps(tmp_path / "bucket") == complete_steps(tmp_path / "found")


# A loopback server of S3's protocol, which Google's XML interface shares.


def signing_for(port):
    """Hands Google's requests on, signed as S3's are: moto tells services apart by that."""

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = dict(self.headers.items())
            scope = "Credential=a/20260101/us-east-1/s3/aws4_request, Signature=b"
            headers["authorization"] = f"AWS4-HMAC-SHA256 {scope}"
            headers = {k: v for k, v in headers.items() if k != "Authorization"}
            connection = HTTPConnection("127.0.0.1", port)
            connection.request(self.command, self.path, content, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def log_message(self, *_):
            pass

    return Handler


@pytest.fixture
def server(tmp_path, monkeypatch):
    if importlib.util.find_spec("moto") is None and "MOTO_SERVER" not in os.environ:
        pytest.skip("needs moto[server]")
    program = os.environ.get("MOTO_SERVER", f"{sys.executable} -m moto.server").split()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen(
        [*program, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        threading.Thread(target=child.stderr.read, daemon=True).start()
        end = time.monotonic() + 60
        while True:  # until it serves
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < end
            assert child.poll() is None
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        google = ThreadingHTTPServer(("127.0.0.1", 0), signing_for(port))
        threading.Thread(target=google.serve_forever, daemon=True).start()
        account = tmp_path / "account.json"
        unsigned = {"disable_oauth": True, "client_email": "", "private_key": ""}
        base = f"http://127.0.0.1:{google.server_port}"
        account.write_text(json.dumps({"gcs_base_url": base, "private_key_id": "", **unsigned}))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(account))
        yield address
        google.shutdown()
        google.server_close()
    finally:
        child.terminate()
        child.wait()
        with contextlib.suppress(ValueError):
            child.stderr.close()


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_over_the_network(scheme, server, tmp_path):
    url, work = f"{scheme}://bucket/{scheme}/run", tmp_path / "work"
    write(work, 2)
    (work / "config.json").write_bytes(b"{}")
    (work / "large").write_bytes(os.urandom(12_000_000))  # in parts
    copy(url, work)
    shutil.rmtree(work / "checkpoints/2")
    write(work, 4)
    copy(url, work)
    new = tmp_path / "new"
    assert fetch(url, new, None) == [f"the checkpoints of step 4 were fetched from {url}"]
    assert files(new) == files(work)


@pytest.mark.long
def test_a_store_that_does_not_answer_is_said(server):
    with pytest.raises(UserError, match=r"config.store s3://nobody/run can't be "):
        store.Store("s3://nobody/run", print)
