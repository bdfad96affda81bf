"""Files of resumable runs: private, whole, checked when read, and swept when left behind."""

import logging
import os
import platform
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from optimum_cap.runtime import files as files_module
from optimum_cap.runtime.digests import digest_of
from optimum_cap.runtime.files import JsonFiles, TensorFiles, write_atomically

STORED = torch.tensor([[1.5, 0.0], [0.0, 2.0]])


@pytest.fixture(autouse=True)
def said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that are logged once are logged in each test."""
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX systems")
def test_nobody_else_can_read_what_is_stored(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path / "parent" / "resume")
    files.write("model/layers/settings/key", STORED)
    files.write("key", STORED)
    assert mode_of(tmp_path / "parent") == 0o777 & ~current_umask()
    for path in (files.folder, *files.folder.rglob("*")):
        assert mode_of(path) == (0o700 if path.is_dir() else 0o600), path


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_of_the_user_has_the_usual_mode(tmp_path: Path) -> None:
    write_atomically(tmp_path / "scores", b"scores")
    (tmp_path / "other").touch()
    assert mode_of(tmp_path / "scores") == mode_of(tmp_path / "other")


def forged(key: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """Return a file whose checksum is right for this key."""
    checksum = digest_of(key, tensors.get("tensor", STORED))
    return safetensors.torch.save(tensors, {"sha256": checksum})


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


DEEP = b'{"tensor":' + b'{"a":' * 3000 + b"1" + b"}" * 3001
UNEXPECTED = {
    "shape": forged("key", {"tensor": torch.ones(1, 1)}),
    "no dimension": forged("key", {"tensor": torch.tensor(1.0)}),
    "dtype": forged("key", {"tensor": STORED.double()}),
    "other name": forged("key", {"weight": STORED}),
    "other key": forged("another key", {"tensor": STORED}),
    "no checksum": safetensors.torch.save({"tensor": STORED}),
    "truncated": forged("key", {"tensor": STORED})[:-3],
    "empty": b"",
    "header of another encoding": with_header('{"tensör":{}}'.encode("latin-1")),
    "header that is no object": with_header(b"[1, 2]"),
    "deep header": with_header(DEEP),
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "unknown dtype": with_header(b'{"tensor":{"dtype":"F1","shape":[1],"data_offsets":[0,4]}}1234'),
    "text": b"not a safetensors file at all",
}


@pytest.mark.parametrize("name", UNEXPECTED)
def test_what_is_not_expected_is_named_and_deleted(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, file = TensorFiles(tmp_path), tmp_path / "key.safetensors"
    file.write_bytes(UNEXPECTED[name])
    assert files.read("key", (2, 2), torch.float32) is None
    (said,) = caplog.messages
    assert said.startswith(f"{file} is damaged (")
    assert said.endswith("): its content is computed again")
    assert not file.exists()
    if name == "shape":
        assert "it holds [1, 1] torch.float32, not [2, 2] torch.float32" in said


def test_values_are_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = TensorFiles(tmp_path)
    files.write("key", STORED)
    assert torch.equal(files.read("key", (2, 2), torch.float32, lambda tensor: None), STORED)
    assert not caplog.messages
    assert files.read("key", (2, 2), torch.float32, lambda tensor: "it is odd") is None
    assert "key.safetensors is damaged (it is odd): its content is computed again" in caplog.text


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)])
def test_something_else_than_a_file_is_not_read(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "key.safetensors")
    assert TensorFiles(tmp_path).read("key", (2, 2), torch.float32) is None


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    files = TensorFiles(tmp_path)
    files.write("key", STORED)
    found = files.read("key", (2, 2), torch.float32)
    (tmp_path / "key.safetensors").unlink()
    assert torch.equal(found, STORED)


def test_a_folder_that_another_run_deletes_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, folder = TensorFiles(tmp_path / "resume"), tmp_path / "resume" / "layers"
    own, calls = files_module.write_atomically, []

    def deleted_at_first(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 1:
            folder.rmdir()
        own(*args, **kwargs)

    monkeypatch.setattr(files_module, "write_atomically", deleted_at_first)
    files.write("layers/key", STORED)
    assert torch.equal(files.read("layers/key", (2, 2), torch.float32), STORED)
    assert not files.failed
    assert not caplog.messages


@pytest.mark.parametrize(
    "make",
    [
        Path.touch,
        lambda path: path.symlink_to(path.with_name("gone")),
        lambda path: path.symlink_to(path),
    ],
)
def test_what_is_no_folder_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "resume")
    with pytest.raises(NotADirectoryError, match=r"the resume_dir .*resume is a file or a broken"):
        TensorFiles(tmp_path / "resume")


def test_a_name_that_is_too_long_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = TensorFiles(tmp_path / ("n" * 300))
    for _ in range(2):
        assert files.read("key", (2, 2), torch.float32) is None
        files.write("key", STORED)
    (said,) = caplog.messages
    assert "cannot be written (File name too long): the run continues" in said


def test_a_linked_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "resume").symlink_to(tmp_path / "disk")
    files = TensorFiles(tmp_path / "resume")
    files.write("model/key", STORED)
    assert torch.equal(files.read("model/key", (2, 2), torch.float32), STORED)
    assert (tmp_path / "disk" / "model" / "key.safetensors").exists()
    assert not caplog.messages


# Whom a folder trusts

SHARED_MODES = {0o777: "all users", 0o1777: "all users", 0o775: "its group", 0o755: None}


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX systems")
@pytest.mark.parametrize("mode", SHARED_MODES)
@pytest.mark.parametrize("inner", ["", "model"])
def test_folders_that_others_may_write_to_are_named(
    mode: int,
    inner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(files_module, "_is_private_group", lambda group: False)
    TensorFiles(tmp_path).write("model/key", STORED)
    (tmp_path / inner).chmod(mode)
    TensorFiles(tmp_path).read("model/key", (2, 2), torch.float32)
    writers = SHARED_MODES[mode]
    assert set(caplog.messages) == (
        set()
        if writers is None
        else {
            f"{tmp_path / inner} may be written to by {writers}: whoever can write to it can "
            "change what a resumed run computes; remove their permission, or choose another "
            "resume_dir"
        }
    )


@pytest.mark.skipif(os.name != "posix", reason="owners are those of POSIX systems")
def test_a_folder_of_another_user_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() == 0:  # root alone can give a folder away, and is trusted where it is not
        os.chown(tmp_path, 987_654_321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 987_654_321)
    owner = files_module._name_of_user(tmp_path.stat().st_uid)
    files = TensorFiles(tmp_path)
    files.read("key", (2, 2), torch.float32)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path} belongs to another user ({owner}): whoever can write")


@pytest.mark.skipif(os.name != "posix", reason="groups are those of POSIX systems")
@pytest.mark.parametrize(
    ("name", "members", "private"),
    [("ada", [], True), ("ada", ["ada"], True), ("ada", ["eve"], False), ("users", [], False)],
)
def test_the_group_of_one_user_is_private(
    name: str, members: list[str], private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grp
    import pwd

    user = pwd.struct_passwd(("ada", "x", 1000, 1000, "", "/home/ada", "/bin/sh"))
    group = grp.struct_group((name, "x", 1000, members))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: group)
    assert files_module._is_private_group(1000) == private


# Files that killed processes left

TOKEN = "0123abcd.tmp"


def test_unfinished_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    host, old = platform.node(), time.time() - 2 * 86_400
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    started = psutil.Process().create_time()
    ages = {
        f"key.{host}-{ended.pid}-{TOKEN}": (None, False),
        f"key.{host}-{os.getpid()}-{TOKEN}": (started - 60, False),  # its process had the same id
        f"other.{host}-{os.getpid()}-{TOKEN}": (None, True),
        f"key.elsewhere-1-{TOKEN}": (None, True),
        f"other.elsewhere-1-{TOKEN}": (old, False),
        "a.tmp": (old, True),
        "notes.from-2025-01234567.txt": (old, True),
    }
    for name, (modified, _) in ages.items():
        (tmp_path / name).touch()
        if modified is not None:
            os.utime(tmp_path / name, (modified, modified))
    write_atomically(tmp_path / "key", b"content")
    left = {name for name, (_, stays) in ages.items() if stays}
    assert {file.name for file in tmp_path.iterdir()} == left | {"key"}


@pytest.mark.slow
def test_a_process_killed_while_it_writes_leaves_nothing_for_good(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from optimum_cap.runtime import files
files.sync = lambda stream: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path({str(tmp_path / "key")!r}), b"content")
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.suffix == ".tmp"
    write_atomically(tmp_path / "key", b"content")
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "ä" * 127
    write_atomically(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_json_values_are_kept_until_they_are_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = JsonFiles(tmp_path / "resume")
    value = {"seconds": 0.1 + 0.2, "texts": ["ü", None], "count": 3}
    assert files.read("model/key") is None
    files.write("model/key", value)
    file = tmp_path / "resume" / "model" / "key.json"
    assert files.read("model/key") == value
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    other = file.read_text().replace('"count": 3', '"count": 4')
    for text in (other, file.read_text()[:-2], "[]", '{"value": 1}'):
        file.write_text(text)
        caplog.clear()
        assert files.read("model/key") is None
        assert f"{file} is damaged" in caplog.text
        assert not file.exists()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write("model/key", float("nan"))
