"""Contents of files by hash, remembered while size and timestamp stay."""

import os

from mindspeed_mm.data.content import ContentIndex, digest_of, digest_of_values, signature_of


def remember(index, path):
    index.add({path: (signature_of(path), digest_of(path))})


def test_hash_is_of_bytes_not_of_names(tmp_path):
    for name, data in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(data)
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "c")


def test_folder_is_its_files_names_and_bytes(tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "0.png").write_bytes(b"0")
    seen = [digest_of(masks)]
    (masks / "1.png").write_bytes(b"1")
    seen.append(digest_of(masks))
    (masks / "1.png").rename(masks / "2.png")
    seen.append(digest_of(masks))
    (masks / "2.png").write_bytes(b"2")
    seen.append(digest_of(masks))
    assert len(set(seen)) == 4


def test_known_file_is_not_known_any_more_once_it_changed(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")
    index = ContentIndex(tmp_path / "state")
    assert index.get(path) is None
    remember(index, path)
    assert index.get(path) == digest_of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert index.get(path) is None
    path.unlink()
    assert index.get(path) is None


def test_every_rank_writes_its_own_file_and_reads_all(tmp_path):
    for rank in range(3):
        path = tmp_path / f"{rank}.mp4"
        path.write_bytes(b"%d" % rank)
        remember(ContentIndex(tmp_path / "state", rank), path)
    everyone = ContentIndex(tmp_path / "state", 0)
    assert all(everyone.get(tmp_path / f"{rank}.mp4") for rank in range(3))


def test_line_that_was_cut_by_a_kill_is_ignored(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"one")
    remember(ContentIndex(tmp_path / "state"), path)
    with open(tmp_path / "state/contents2.0.jsonl", "a") as file:
        file.write('["/some/clip.mp4", "12')
    index = ContentIndex(tmp_path / "state")
    assert index.get(path) == digest_of(path)
    other = tmp_path / "other.mp4"
    other.write_bytes(b"two")
    remember(index, other)
    assert ContentIndex(tmp_path / "state").get(other) == digest_of(other)


def test_values_are_hashed_whatever_their_order():
    assert digest_of_values({"a": 1, "b": [1, 2]}) == digest_of_values({"b": [1, 2], "a": 1})
    assert digest_of_values({"a": 1}) != digest_of_values({"a": "1"})
