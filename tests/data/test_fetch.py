from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import threading
import zipfile

import pytest

from cambia.data import FetchSource
from cambia.data import fetch as fetching
from cambia.data.fetch import FETCHABLE, PublicFile, fetch
from cambia.errors import ConfigError, DataError

STORY = b"Once upon a time there was a test.\n" * 40


def zipped(content):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("enwik8", content)
    return held.getvalue()


FILES = {
    "story.txt": STORY,
    "wiki.zip": zipped("Straße\n".encode() * 999),
    "rows.jsonl": b'{"q": "2+2?", "a": "4"}\n',
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = FILES.get(self.path.removeprefix("/mirror/"))
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def mirror(monkeypatch):
    def public(name, files, **more):
        return PublicFile(
            f"https://example.org/a/{name}", hashlib.sha256(FILES[name]).hexdigest(), "MIT", files, **more
        )

    sets = {
        "story": public("story.txt", ("story/input.txt",)),
        "wiki": public("wiki.zip", ("w/train.txt", "w/valid.txt", "w/test.txt"), recipe="unzip_90_5_5"),
        "rows": public(
            "rows.jsonl", ("r/rows.jsonl",), reads={"instruction_field": "q", "output_field": "a"}
        ),
    }
    monkeypatch.setattr(fetching, "FETCHABLE", sets)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/mirror"
    server.shutdown()
    thread.join()
    server.server_close()


def everything_below(folder):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def test_a_file_is_fetched_once_and_then_read(mirror, tmp_path, monkeypatch):
    [path] = fetch("story", into=tmp_path, base_url=mirror)
    assert path == tmp_path / "story" / "input.txt" and path.read_bytes() == STORY
    monkeypatch.setitem(FILES, "story.txt", b"changed")
    assert fetch("story", into=tmp_path, base_url=mirror)[0].read_bytes() == STORY
    monkeypatch.setenv("CAMBIA_DATA", str(tmp_path))
    source = FetchSource("story", limit_bytes=100)
    assert "".join(document.text for document in source.documents()).startswith("Once upon")
    assert source.own_splits() == {}
    assert source.describe()["reads"]["files"]["train"][0]["sha256"] == hashlib.sha256(STORY).hexdigest()


def test_a_packed_file_that_is_there_is_not_fetched_again(mirror, tmp_path):
    (tmp_path / "story").mkdir()
    packed = tmp_path / "story" / "input.txt.gz"
    packed.write_bytes(gzip.compress(STORY))
    assert fetch("story", into=tmp_path, base_url="http://127.0.0.1:1") == [packed]


def test_rows_are_read_as_the_set_says(mirror, tmp_path, monkeypatch):
    fetch("rows", into=tmp_path, base_url=mirror)
    monkeypatch.setenv("CAMBIA_DATA", str(tmp_path))
    [document] = FetchSource("rows").documents()
    assert document.text[document.loss_from :] == "4"


def test_a_derived_set_follows_its_recipe(mirror, tmp_path, monkeypatch):
    paths = fetch("wiki", into=tmp_path, base_url=mirror)
    parts = [path.read_bytes() for path in paths]
    assert b"".join(parts) == "Straße\n".encode() * 999
    assert [len(part) / 7992 for part in parts] == pytest.approx([0.9, 0.05, 0.05], abs=0.001)
    assert all(part.decode() for part in parts)
    monkeypatch.setenv("CAMBIA_DATA", str(tmp_path))
    assert sorted(FetchSource("wiki").own_splits()) == ["test", "valid"]


@pytest.mark.parametrize("content", [STORY[:-1], b"<html>moved</html>"])
def test_another_file_than_expected_is_refused_and_not_kept(mirror, tmp_path, monkeypatch, content):
    monkeypatch.setitem(FILES, "story.txt", content)
    with pytest.raises(DataError, match=r"has SHA-256 .*, expected"):
        fetch("story", into=tmp_path, base_url=mirror)
    assert everything_below(tmp_path) == [] and os.listdir(tmp_path) == []


def test_a_failed_download_is_one_line(mirror, tmp_path):
    with pytest.raises(DataError, match="404") as caught:
        fetch("story", into=tmp_path, base_url=mirror.replace("mirror", "nothing"))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match="could not be downloaded"):
        fetch("story", into=tmp_path, base_url="http://127.0.0.1:1")


def test_missing_sets_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CAMBIA_DATA", str(tmp_path))
    with pytest.raises(DataError, match="`cambia data fetch text8` brings it"):
        next(FetchSource("text8").documents())
    monkeypatch.delenv("CAMBIA_DATA")
    with pytest.raises(DataError, match="CAMBIA_DATA is not set"):
        next(FetchSource("text8").documents())
    with pytest.raises(ConfigError, match="did you mean 'text8'"):
        FetchSource("txt8")


def test_every_known_set_is_complete():
    for name, public in FETCHABLE.items():
        assert len(public.sha256) == 64 and public.license and public.files, name
        assert public.recipe in fetching.RECIPES
        assert public.url.startswith("https://")


@pytest.mark.parametrize("name", ["tiny-shakespeare", "humaneval", "gsm8k", "gsm8k-test"])
def test_sets_on_this_machine_are_the_ones_expected(corpora, name):
    public = FETCHABLE[name]
    path = corpora / public.files[0]
    raw = (
        path.read_bytes()
        if path.exists()
        else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    )
    assert hashlib.sha256(raw).hexdigest() == public.sha256
    first = next(FetchSource(name).documents())
    assert first.text and (first.loss_from > 0) == bool(public.reads)
