"""The images of a run on local disk: fetched from GridFS once, linked, forgotten when the cache is full."""

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from bson import ObjectId
from gridfs import GridFSBucket
from pymongo.database import Database

from handlers.errors import TemporaryError
from handlers.images import ImageCache
from handlers.store import Store
from handlers.store.files import FileMissing

Db = Database[dict[str, Any]]


def write_refs(folder: Path, file_ids: list[Any]) -> Path:
    path = folder / "refs.jsonl"
    rows = [{"id": n, "mongodb_id": f"{n:024x}", "file_id": i and str(i)} for n, i in enumerate(file_ids, 1)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


async def fetch(cache: ImageCache, store: Store, folder: Path, file_ids: list[Any]) -> list[dict[str, Any]]:
    await anyio.Path(folder).mkdir()
    listing = await cache.fetch(store, write_refs(folder, file_ids), folder)
    return [json.loads(line) for line in listing.read_text().splitlines()]


def content(row: dict[str, Any]) -> bytes:
    return Path(row["path"]).read_bytes()


async def test_images_are_fetched_once_and_linked(
    store: Store, db: Db, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the message; a second run downloads nothing, not even one image twice in one run."""
    contents = [os.urandom(1000 + n) for n in range(20)] + [b""]
    ids = [GridFSBucket(db, "images").upload_from_stream("x", content) for content in contents]
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    rows = await fetch(cache, store, tmp_path / "one", ids)
    assert [row["id"] for row in rows] == list(range(1, 22))
    assert [content(row) for row in rows] == contents

    async def no_download(*args: Any) -> str:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(store.files.images, "fetch", no_download)
    rows = await fetch(cache, store, tmp_path / "two", [ids[3], ids[3], ids[5]])
    assert [content(row) for row in rows] == [contents[3], contents[3], contents[5]]


async def test_an_image_that_gridfs_does_not_have_is_listed_with_the_reason(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """Missing, cut off, or never named: a reason each, and nothing is kept of it; the good one arrives."""
    bucket = GridFSBucket(db, "images", chunk_size_bytes=1000)
    good, cut, gone = (bucket.upload_from_stream("x", b"x" * 2500) for _ in range(3))
    db["images.chunks"].delete_one({"files_id": cut, "n": 2})
    db["images.files"].delete_one({"_id": gone})
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    rows = await fetch(cache, store, tmp_path / "run", [good, cut, gone, None, ObjectId()])
    assert content(rows[0]) == b"x" * 2500
    assert [set(row) for row in rows[1:]] == [{"id", "reason"}] * 4
    assert all(str(i) in row["reason"] for i, row in zip((cut, gone), rows[1:3], strict=True))
    assert "IMG_INFO" in rows[3]["reason"]
    assert [path.name for path in (tmp_path / "run" / "images").iterdir()] == ["1"]
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == [str(good)]


async def test_the_images_longest_unused_are_forgotten_and_a_running_child_keeps_its_own(
    store: Store, db: Db, tmp_path: Path
) -> None:
    """Down to the bound, oldest use first; a use is a fetch from the cache too; links stay readable."""
    ids = [GridFSBucket(db, "images").upload_from_stream("x", bytes([n]) * 1000) for n in range(5)]
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    rows = await fetch(cache, store, tmp_path / "one", ids)
    kept = {path.name: path for path in (tmp_path / "cache").glob("*/*")}
    for age, file_id in enumerate(ids):
        os.utime(kept[str(file_id)], (1e9 + age, 1e9 + age))
    await fetch(cache, store, tmp_path / "two", [ids[0]])
    smaller = ImageCache(tmp_path / "cache", max_bytes=2000)
    assert await smaller.forget() == 3
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {str(ids[0]), str(ids[4])}
    assert [content(row)[0] for row in rows] == [0, 1, 2, 3, 4]
    assert await smaller.forget() == 0


async def test_the_cache_keeps_its_bound_at_every_fetch(store: Store, db: Db, tmp_path: Path) -> None:
    """Not only when the janitor comes: a pod is evicted that takes more of its volume than it may."""
    ids = [GridFSBucket(db, "images").upload_from_stream("x", bytes([n]) * 1000) for n in range(5)]
    cache = ImageCache(tmp_path / "cache", max_bytes=2500)
    for number, file_id in enumerate(ids):
        assert content((await fetch(cache, store, tmp_path / str(number), [file_id]))[0]) == bytes([number]) * 1000
        kept = list((tmp_path / "cache").glob("*/*"))
        assert len(kept) == min(number + 1, 2)
        assert str(file_id) in [path.name for path in kept]


async def test_a_full_disk_is_a_fault_of_the_surroundings(
    store: Store, db: Db, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC: the task goes back to the queue with a reason; another error of the disk is raised as it is."""
    ids = [GridFSBucket(db, "images").upload_from_stream("x", b"x") for _ in range(3)]
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    for number, expected in ((errno.ENOSPC, TemporaryError), (errno.EIO, OSError)):
        with monkeypatch.context() as patch:
            patch.setattr("handlers.store.files.anyio.open_file", full)
            with pytest.raises(expected) as raised:
                await fetch(cache, store, tmp_path / str(number), ids)
        if isinstance(raised.value, TemporaryError):
            assert raised.value.kind == "disk_full"
            assert "DLTASK_CACHE_DIR" in str(raised.value)
    assert await fetch(cache, store, tmp_path / "run", ids)


async def test_a_full_disk_makes_the_cache_smaller(
    store: Store, db: Db, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it goes, the longest unused first, so that the next attempt finds room."""
    ids = [GridFSBucket(db, "images").upload_from_stream("x", bytes([n]) * 1000) for n in range(5)]
    cache = ImageCache(tmp_path / "cache", max_bytes=10**9)
    await fetch(cache, store, tmp_path / "one", ids[:4])
    for age, file_id in enumerate(ids[:4]):
        (path,) = (tmp_path / "cache").glob(f"*/{file_id}")
        os.utime(path, (1e9 + age, 1e9 + age))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("handlers.store.files.anyio.open_file", full)
    with pytest.raises(TemporaryError):
        await fetch(cache, store, tmp_path / "two", ids[4:])
    assert {path.name for path in (tmp_path / "cache").glob("*/*")} == {str(file_id) for file_id in ids[2:4]}


async def test_a_file_in_gridfs_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    """Several chunks; the digest is that of what was written; a fetch that fails leaves no file."""
    content = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(content)
    file_id = await store.files.models.put(tmp_path / "in", "x", {"task_id": 1})
    assert await store.files.models.fetch(file_id, tmp_path / "out") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "out").read_bytes() == content
    (tmp_path / "out").unlink()
    await store.files.models.delete(file_id)
    with pytest.raises(FileMissing):
        await store.files.models.fetch(file_id, tmp_path / "out")
    assert [path.name async for path in anyio.Path(tmp_path).iterdir()] == ["in"]
