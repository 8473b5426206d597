"""Folders that one process has to itself."""

import errno
import fcntl
import logging

import pytest

from nvembed.eval.files import claimed, locked, without_empty_folders


def test_a_claimed_folder_is_refused_until_it_is_let_go(tmp_path):
    with claimed(tmp_path, "build_data.py"):
        with pytest.raises(ValueError, match="another build_data.py runs in .*: wait for it, or name another"):
            claimed(tmp_path, "build_data.py").__enter__()
        with locked(tmp_path, lambda: pytest.fail("a lock of another name"), ".other.lock"):
            pass
    with claimed(tmp_path, "build_data.py"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, number):
    """Nothing stays behind that would keep the next run out, which may be on another machine."""

    def refuse(file, operation):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING), claimed(tmp_path, "stage1.py"):
            assert "cannot be locked" in caplog.text and "no locks here" in caplog.text


def test_empty_folders_that_were_made_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with without_empty_folders(tmp_path / "mine" / "a" / "b"):
        (tmp_path / "mine" / "a" / "b").mkdir(parents=True)
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "mine" / "a").exists()
    with without_empty_folders(tmp_path / "mine" / "a" / "b"):
        (tmp_path / "mine" / "a" / "b").mkdir(parents=True)
        (tmp_path / "mine" / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "mine" / "a").iterdir()] == ["kept"]
