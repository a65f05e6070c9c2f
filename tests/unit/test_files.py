import pytest

from labkit.files import DATA, read_sums, sha256, whole_file, write_text


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "first\n")
    with pytest.raises(RuntimeError), whole_file(path) as part:
        part.write_text("half of the sec")
        raise RuntimeError("power cut")
    assert path.read_text() == "first\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: make it first"):
        write_text(tmp_path / "nowhere" / "a.txt", "x")


def test_published_data_has_its_published_hashes():
    sums = read_sums(DATA / "SHA256SUMS")
    files = {p.relative_to(DATA).as_posix() for ending in ("jsonl", "safetensors") for p in DATA.rglob(f"*.{ending}")}
    assert set(sums) == files, "make it anew: cd data && sha256sum models/*/*.safetensors */*.jsonl > SHA256SUMS"
    assert {name: sha256(DATA / name) for name in sums} == sums
