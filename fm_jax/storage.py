"""Where a run's files are: a folder of a file system, or one of a bucket (gs://, s3://). Layer 0.

    storage.place("runs/x")                   # pathlib.Path
    storage.place("s3://bucket/runs/x")       # Url: as much of a path as runs and Orbax make use of
    with storage.local("s3://bucket/runs/x", "metrics.jsonl") as files:
        files.path                            # a folder of this machine, with that file
        files.push()                          # what was changed in it is in the bucket now

There is one client for all: TensorStore's, through which Orbax writes the arrays too. So what the start of a run tries
is what its saves need. It finds credentials as the store's own tools do:

    s3://   AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws (AWS_PROFILE), a container's or the machine's role;
            AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) and AWS_REGION for a store that is not Amazon's
    gs://   GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, the machine's service account;
            TENSORSTORE_GCS_HTTP_URL for a store that is not Google's

A bucket maps names to bytes: an object is written whole or not at all and seen by all at once, but it cannot grow, and
no two change together. There are no folders, so none is made, renamed or empty.
"""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import fnmatch
import functools
import os
import pathlib
import re
import tempfile

from etils.epath import gpath

from fm_jax.errors import UserError

DRIVERS = {"gs": "gcs", "s3": "s3"}   # of TensorStore
CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login` or the machine's service account",
    "s3": "AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the machine's role; a store that is not "
          "Amazon's is named by AWS_ENDPOINT_URL"}
# TensorStore's own are 32 attempts, a quarter of an hour. A store that is gone for two minutes ends the run.
RETRIES = {"max_retries": 8, "initial_delay": "1s", "max_delay": "30s"}
FIRST_RETRIES = {"max_retries": 3, "initial_delay": "500ms", "max_delay": "2s"}   # of the first contact
FIRST_TIMEOUT_S = 30
TIMEOUT_S = 900   # of one object, the largest 400 MiB (Orbax)


def place(path) -> "pathlib.Path | Url":
    """Returns a path of the file system or, for gs:// and s3://, of a bucket.

    Raises:
      UserError: another scheme, or a bucket that cannot be reached: what the store said.
    """
    if isinstance(path, Url):
        return path
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", str(path))
    if not scheme:
        return pathlib.Path(path)
    if scheme[1] not in DRIVERS:
        raise UserError(f"{path}: {scheme[1]}:// is not supported; name a folder, or one of a bucket as gs://BUCKET/"
                        "FOLDER or s3://BUCKET/FOLDER")
    url = Url(str(path))
    if len(url.parts) < 4:
        raise UserError(f"{path}: name a folder of the bucket, as in {scheme[1]}://BUCKET/FOLDER")
    _meet(url)
    return url


class Url(gpath.PosixGPath):
    """A path in a bucket, which etils and Orbax take for one of theirs.

    All that reads or writes raises UserError, with what the store said, where it refuses or does not answer.
    """

    @property
    def key(self) -> str:
        return "/".join(self.parts[3:])

    def keys(self) -> list[str]:
        """Returns the names of all objects in this folder, below it, sorted."""
        begin = len(self.key) + 1
        return sorted(k[begin:] for k in self._range("/") if len(k) > begin)

    def _range(self, after=""):
        """Returns the keys of this object (without `after`) and of those in this folder."""
        import tensorstore as ts

        until = self.key + "0"   # which comes after /
        keys = self._ask(lambda store: store.list(ts.KvStore.KeyRange(self.key + after, until)))
        if not keys and self.parts[1] == "gs":   # TensorStore 0.1.86 takes a refusal to list there for an empty list
            self.is_file()
        return [k for k in map(bytes.decode, keys) if k == self.key or k.startswith(self.key + "/")]

    def _ask(self, what):
        return _answer(what(_store(*self.parts[1:3])), self)

    def exists(self):
        return bool(self._range())

    def is_dir(self):
        return bool(self._range("/"))

    def is_file(self):
        return self._ask(lambda store: store.read(self.key)).state == "value"

    def iterdir(self) -> Iterator["Url"]:
        return self.glob("*")

    def glob(self, pattern) -> Iterator["Url"]:
        depth = pattern.count("/") + 1
        found = {"/".join(parts[:depth]) for parts in (k.split("/") for k in self.keys()) if len(parts) >= depth}
        return (self / name for name in sorted(found) if fnmatch.fnmatchcase(name, pattern))

    def mkdir(self, mode=None, parents=False, exist_ok=False):
        pass

    def absolute(self):
        return self

    def resolve(self, strict=False):
        return self

    def read_bytes(self):
        found = self._ask(lambda store: store.read(self.key))
        if found.state == "missing":
            raise FileNotFoundError(f"{self}: no such object")
        return found.value

    def write_bytes(self, data):
        self._ask(lambda store: store.write(self.key, data))
        return len(data)

    def read_text(self, encoding="utf-8"):
        return self.read_bytes().decode(encoding)

    def write_text(self, data, encoding="utf-8", errors=None):
        return self.write_bytes(data.encode(encoding))

    def rename(self, target):
        """Returns the target: of an object, not of a folder."""
        target.write_bytes(self.read_bytes())
        self.unlink()
        return target

    def unlink(self, missing_ok=True):
        self._ask(lambda store: store.write(self.key, None))

    def rmtree(self, missing_ok=True):
        import tensorstore as ts

        self._ask(lambda store: store.delete_range(ts.KvStore.KeyRange(self.key + "/", self.key + "0")))


@functools.cache
def _store(scheme, bucket):
    import tensorstore as ts

    return ts.KvStore.open(spec(scheme, bucket)).result()


@functools.cache
def _meet(url):
    """Returns nothing where the bucket can be listed, and raises UserError soon where it cannot be reached."""
    import tensorstore as ts

    try:
        store = ts.KvStore.open(spec(*url.parts[1:3], FIRST_RETRIES)).result()
    except ValueError as error:   # of the bucket's name
        raise UserError(f"{url}: {said(error)}") from None
    _answer(store.list(ts.KvStore.KeyRange(".fm_jax_", ".fm_jax_0")), url, FIRST_TIMEOUT_S)


def spec(scheme: str, bucket: str, retries: dict | None = None) -> dict:
    """Returns what TensorStore is to be told of a bucket."""
    driver = DRIVERS[scheme]
    out = {"driver": driver, "bucket": bucket, f"{driver}_request_retries": retries or RETRIES}
    if scheme == "s3":   # TensorStore does not look for the endpoint and the region in the environment
        read = lambda *names: next(filter(None, map(os.environ.get, names)), None)
        if read("AWS_ACCESS_KEY_ID"):   # first in its chain too, which complains on stderr where there is no ~/.aws
            out["aws_credentials"] = {"type": "environment"}
        if endpoint := read("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            out["endpoint"] = endpoint.rstrip("/")
            out["aws_region"] = read("AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
    return out


def _answer(future, url, timeout_s=TIMEOUT_S):
    try:
        return future.result(timeout=timeout_s)
    except TimeoutError:
        what = f"no answer for {timeout_s} s"
    except Exception as error:   # TensorStore has no type of its own for them
        what = said(error)
    scheme = str(url)[:2]
    raise UserError(f"{url}: the store did not do what was asked ({what}); see that the bucket is there, can be "
                    f"reached, and may be listed, read and written by {CREDENTIALS[scheme]}")


def said(error: BaseException) -> str:
    """Returns the gist of what TensorStore says of an error, in one line: it adds the whole answer of the store."""
    text = " ".join(str(error).split())
    gist, message = re.split(r" \[[\w-]+='", text)[0], re.search(r'\\?"message\\?": ?\\?"(.*?)\\?"', text)
    return (gist if message is None or message[1] in gist else f"{gist}: {message[1]}")[:400]


def teach_orbax() -> None:
    """Returns nothing; from now on Orbax has TensorStore write to s3:// too, and no bucket is asked without an end.

    Orbax 0.12 makes specs for TensorStore of folders and of gs:// alone (its pull request 2739 would add S3), and
    leaves out the endpoint of a store and the number of attempts. All go through one function of it.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build = tensorstore_utils.build_kvstore_tspec
    if getattr(build, "knows_buckets", False):
        return

    @functools.wraps(build)
    def build_kvstore_tspec(directory, *args, **kwargs):
        found = re.match(r"(gs|s3)://([^/]+)", directory)
        if not found:
            return build(directory, *args, **kwargs)
        made = build("gs" + directory[2:], *args, **kwargs)
        made.get("base", made).update(spec(*found.groups()))
        return made

    build_kvstore_tspec.knows_buckets = True
    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


# --- Files that are worked on


class Local:
    """A folder of this machine that stands for one elsewhere.

    Attributes:
      path: pathlib.Path.
    """

    def __init__(self, path: pathlib.Path, url: Url | None = None):
        self.path, self._url = path, url
        self._there = {}   # name: (size, time of change) of what is the same in both

    def pull(self, names) -> None:
        """Returns nothing; fetches the files of these names, and all below the folders of these names."""
        found = {k[len(self._url.key) + 1:] for name in names for k in (self._url / name)._range()}
        with futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(self._fetch, found - {""}))

    def _fetch(self, name):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((self._url / name).read_bytes())
        self._there[name] = _mark(path)

    def push(self) -> None:
        """Returns when all that was written, changed or removed here is so in the bucket, in the order it was done.

        Raises:
          UserError: the store did not do it.
        """
        if self._url is None:
            return
        here = {str(p.relative_to(self.path)): _mark(p) for p in self.path.rglob("*") if p.is_file()}
        for name in sorted(here, key=lambda name: here[name][1]):
            if self._there.get(name) != here[name]:
                (self._url / name).write_bytes((self.path / name).read_bytes())
                self._there[name] = here[name]
        for name in set(self._there) - set(here):
            (self._url / name).unlink()
            del self._there[name]


def _mark(path):
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def local(path, *names: str) -> Iterator[Local]:
    """Yields a `Local`: of a folder on this machine, that folder; of one in a bucket, a new one, pushed at the end.

    names: files and folders that are wanted in it.

    Raises:
      UserError: the store did not give or take them.
    """
    url = place(path)
    if not isinstance(url, Url):
        yield Local(url)
        return
    with tempfile.TemporaryDirectory(prefix=f"fm_jax_{url.name}_") as folder:
        files = Local(pathlib.Path(folder), url)
        files.pull(names)
        try:
            yield files
        except BaseException:
            with contextlib.suppress(UserError):   # of two troubles the first one, and without waiting for the second
                _meet.__wrapped__(url)
                files.push()
            raise
        files.push()
