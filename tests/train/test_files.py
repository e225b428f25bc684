import pytest

from nanofuse.train.errors import UserError
from nanofuse.train.files import atomic_folder, make_folder, write_text_atomically


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_what_is_in_the_way_of_a_folder_is_named(tmp_path, below):
    make_folder(tmp_path / "made" / below)
    make_folder(tmp_path / "made" / below)
    assert (tmp_path / "made" / below).is_dir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to("absent")
    for name in ("file", "link"):
        with pytest.raises(UserError, match=f"{name} is not a folder; move it away$"):
            make_folder(tmp_path / name / below)
    assert (tmp_path / "file").read_text() == "kept" and (tmp_path / "link").is_symlink()


def test_text_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(path, "\ud800")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_folder_appears_only_when_complete(tmp_path):
    target = tmp_path / "step"
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / "file").write_text(content)
            assert content == "first" or (target / "file").read_text() == "first"
    assert (target / "file").read_text() == "second" and list(tmp_path.iterdir()) == [target]
