"""Files are written where the caller pointed: whole, with the modes they had, through links and into devices."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import foveate
from foveate import recipe
from foveate.files import check_writable, write_whole
from foveate.view import save

CHANGED = "new\n"
ALONE = {**os.environ, "PYTHONPATH": str(Path(foveate.__file__).parent)}
"""`files` stands on nothing: processes of their own need not import the package."""
WRITERS = {
    "text": lambda path: write_whole(path, CHANGED),
    "bytes": lambda path: write_whole(str(path), CHANGED.encode()),
    "recipe": lambda path: recipe.save(path, foveate.FastV(keep=0.5)),
    "picture": lambda path: save(Figure(), path),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def fails(number: int):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@every_writer
def test_a_new_file_minds_the_umask_and_leaves_nothing_else(write, tmp_path, umask):
    for mask in (0o077, 0o002):
        umask(mask)
        path = tmp_path / oct(mask) / "deep" / "out.png"
        write(path)
        assert mode(path) == 0o666 & ~mask
        assert list(path.parent.iterdir()) == [path]


@every_writer
@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664])
def test_an_existing_file_keeps_its_mode(write, kept, tmp_path):
    path = tmp_path / "out.png"
    path.write_text("old")
    path.chmod(kept)
    write(path)
    assert mode(path) == kept
    assert path.read_bytes() != b"old"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_existing_file_keeps_its_owner(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    write_whole(path, CHANGED)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


@every_writer
def test_links_stay_links(write, tmp_path):
    target, link, chain, dangling = (tmp_path / name for name in ("real.png", "link.png", "chain.png", "new.png"))
    target.write_text("old")
    link.symlink_to(target.name)
    chain.symlink_to(link)
    write(chain)
    assert chain.is_symlink()
    assert link.is_symlink()
    assert target.read_bytes() != b"old"
    dangling.symlink_to(tmp_path / "not" / "yet.png")
    write(dangling)
    assert dangling.is_symlink()
    assert (tmp_path / "not" / "yet.png").is_file()


@every_writer
def test_a_pipe_stays_a_pipe(write, tmp_path):
    pipe, got = tmp_path / "pipe.png", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    check_writable(pipe)  # does not open it: the reader would see its end
    write(pipe)
    reader.join(10)
    assert pipe.is_fifo()
    assert got[0]


@every_writer
def test_devices_stay_devices(write, tmp_path):
    before = os.stat("/dev/null")
    link = tmp_path / "null.png"
    link.symlink_to("/dev/null")
    write(link)
    after = os.stat("/dev/null")
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_whole("/dev/full", CHANGED)


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "/dev/stderr"])
def test_standard_output_is_written_to_where_it_stands(path, tmp_path):
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = (
        "import sys; from files import *\n"
        f"print('before'); check_writable({path!r}); write_whole({path!r}, 'json'); print('after')"
    )
    wanted = {"/dev/stderr": ("before\nafter\n", "json")}.get(path, ("before\njsonafter\n", ""))
    run = {"cwd": tmp_path, "env": ALONE, "timeout": 120}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **run)
    assert (done.stdout, done.stderr) == wanted
    with open(tmp_path / "file", "w") as file:  # redirected into a file, which must not begin anew
        subprocess.run([sys.executable, "-c", code], stdout=file, stderr=file, check=True, **run)
    assert (tmp_path / "file").read_text() in ("before\njsonafter\n", "jsonbefore\nafter\n")
    ours, theirs = socket.socketpair()  # cannot be opened by its name
    with ours, theirs:
        subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True, **run)
        assert b"json" in ours.recv(100)


def test_a_socket_by_name_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match=r"socket|No such device"):
            write_whole(tmp_path / "socket", CHANGED)
        assert (tmp_path / "socket").is_socket()


@pytest.mark.parametrize("check", [check_writable, lambda path: write_whole(path, CHANGED)], ids=["check", "write"])
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("folder", errno.EISDIR),
        ("n" * 300, errno.ENAMETOOLONG),
        ("file/out", errno.ENOTDIR),
        ("loop", errno.ELOOP),
        ("a\0b", errno.EINVAL),
        ("", errno.EISDIR),
    ],
)
def test_impossible_places_are_refused_before_and_after(check, name, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=r".") as error:
        check(Path(name) if name else name or ".")
    assert error.value.errno == number
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_of_the_greatest_length_is_written(tmp_path):
    path = tmp_path / ("n" * 255)
    check_writable(path)
    write_whole(path, CHANGED)
    write_whole(path, CHANGED)
    assert path.read_text() == CHANGED


def test_a_file_or_folder_one_may_not_write_to_is_refused(tmp_path):
    """In a process without root's rights, which has its own."""
    code = f"""
import os, sys
from files import *
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
for act in (check_writable, lambda path: write_whole(path, 'new')):
    for path in ({str(tmp_path / "closed")!r}, {str(tmp_path / "folder" / "out")!r}):
        try:
            act(path)
        except PermissionError:
            continue
        sys.exit(f'{{path}} was written')
write_whole({str(tmp_path / "folder" / "mine")!r}, 'new')
"""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "closed").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("a longer old text")
    (tmp_path / "folder" / "mine").chmod(0o666)  # may be written, though nothing can be put beside it
    (tmp_path / "closed").chmod(0o444)
    (tmp_path / "folder").chmod(0o555)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ALONE, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "closed").read_text() == "old"
    assert (tmp_path / "folder" / "mine").read_text() == "new"
    assert mode(tmp_path / "folder" / "mine") == 0o666


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", fails(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, CHANGED)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_mount_of_its_own_is_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "out"
    path.write_text("an old text that is longer")
    number = path.stat().st_ino
    monkeypatch.setattr(Path, "replace", fails(errno.EBUSY))
    write_whole(path, CHANGED)
    assert path.read_text() == CHANGED
    assert path.stat().st_ino == number
    assert list(tmp_path.iterdir()) == [path]
