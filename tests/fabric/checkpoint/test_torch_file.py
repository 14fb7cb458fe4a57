"""Checkpoint files: whole or not at all, and nothing in them runs. The damage is done for real.

Tests of ``treadle_fabric.checkpoint.torch_file``, ``treadle_fabric.checkpoint.torch_io``,
``treadle_fabric.checkpoint.archive``, ``treadle_fabric.checkpoint.seal``, ``treadle_fabric.checkpoint.reading``.
"""

from __future__ import annotations

import fcntl
import io as io_module
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from treadle_fabric.checkpoint import CheckpointIO, DistributedCheckpointIO, TorchCheckpointIO
from treadle_fabric.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointUnsafeError,
    MisconfigurationException,
)

STATE: dict[str, Any] = {"weights": torch.arange(5000.0).reshape(50, 100), "step": 3, "names": ["a", ("b", None)]}
LARGE: dict[str, Any] = {"weights": torch.zeros(1_000_000)}  # 4 MB


@pytest.fixture
def io() -> TorchCheckpointIO:
    return TorchCheckpointIO()


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return (
        left.keys() == right.keys()
        and torch.equal(left["weights"], right["weights"])
        and all(left[k] == right[k] for k in left if k != "weights")
    )


# --- the ordinary way ---


def test_a_checkpoint_comes_back_and_the_folder_holds_nothing_else(io: TorchCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.ckpt"
    io.save_checkpoint(STATE, path)
    assert same(io.load_checkpoint(path), STATE)
    assert os.listdir(path.parent) == ["a.ckpt"]
    io.save_checkpoint({**STATE, "step": 4}, str(path))
    assert io.load_checkpoint(str(path))["step"] == 4
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_plain_torch_reads_what_we_write_and_we_read_what_it_writes(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "ours")
    assert same(torch.load(tmp_path / "ours", weights_only=True), STATE)
    torch.save(STATE, tmp_path / "theirs")
    assert same(io.load_checkpoint(tmp_path / "theirs"), STATE)
    torch.save(STATE, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert same(io.load_checkpoint(tmp_path / "old"), STATE)


def test_a_file_written_without_checksums_is_read(io: TorchCheckpointIO, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "fast")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(io.load_checkpoint(tmp_path / "fast"), STATE)


def test_the_permissions_are_those_of_any_new_file(io: TorchCheckpointIO, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


def test_a_save_through_a_link_leaves_the_linked_file_alone(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    io.save_checkpoint({**STATE, "step": 9}, tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "epoch=1.ckpt")["step"] == 3
    assert io.load_checkpoint(tmp_path / "last.ckpt")["step"] == 9


def test_map_location_decides_where_tensors_land(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "a")
    assert io.load_checkpoint(tmp_path / "a")["weights"].device.type == "cpu"
    assert io.load_checkpoint(tmp_path / "a", map_location="meta")["weights"].device.type == "meta"
    moved = io.load_checkpoint(tmp_path / "a", map_location=lambda storage, location: storage)
    assert same(moved, STATE)


@pytest.mark.gpu
def test_tensors_go_to_the_gpu_and_by_default_come_back_to_the_cpu(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint({"weights": STATE["weights"].cuda()}, tmp_path / "a")
    assert torch.equal(io.load_checkpoint(tmp_path / "a")["weights"], STATE["weights"])
    on_gpu = io.load_checkpoint(tmp_path / "a", map_location=torch.device("cuda", 0))["weights"]
    assert on_gpu.device == torch.device("cuda", 0)
    assert torch.equal(on_gpu.cpu(), STATE["weights"])


def test_loaded_tensors_do_not_hang_on_the_file(io: TorchCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "a"
    io.save_checkpoint(STATE, path)
    loaded = io.load_checkpoint(path)
    path.write_bytes(b"\0" * 100)  # rewritten in place, as cp and rsync --inplace do
    assert same(loaded, STATE)


def test_remove_takes_files_folders_and_what_is_not_there(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "a")
    DistributedCheckpointIO().save_checkpoint(STATE, tmp_path / "sharded")
    (tmp_path / "link").symlink_to("sharded")
    for name in ("a", "link", "sharded", "never"):
        io.remove_checkpoint(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_store_of_ones_own_needs_three_methods() -> None:
    class Half(CheckpointIO):
        def remove_checkpoint(self, path: Any) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


# --- a save that fails ---


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=1m")


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(io: TorchCheckpointIO, small_disk: Path) -> None:
    path = small_disk / "a.ckpt"
    io.save_checkpoint(STATE, path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*No space left on device \[ENOSPC\].*Free some space"):
        io.save_checkpoint(LARGE, path)
    assert same(io.load_checkpoint(path), STATE)
    assert os.listdir(small_disk) == ["a.ckpt"]
    io.save_checkpoint({**STATE, "step": 4}, path)
    assert io.load_checkpoint(path)["step"] == 4


def test_a_read_only_disk_is_named(io: TorchCheckpointIO, small_disk: Path) -> None:
    io.save_checkpoint(STATE, small_disk / "a.ckpt")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"\[EROFS\].*writable"):
        io.save_checkpoint(STATE, small_disk / "a.ckpt")
    assert same(io.load_checkpoint(small_disk / "a.ckpt"), STATE)
    with pytest.raises(CheckpointError, match=r"could not be removed: .*\[EROFS\]"):
        io.remove_checkpoint(small_disk / "a.ckpt")


def test_a_write_that_breaks_off_leaves_the_earlier_checkpoint(io: TorchCheckpointIO, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    io.save_checkpoint(STATE, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(CheckpointError, match=r"a\.ckpt.*\[EFBIG\].*untouched.*ulimit"):
            io.save_checkpoint(LARGE, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(io.load_checkpoint(path), STATE)
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_file_where_a_folder_should_be_is_named(io: TorchCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.ckpt", tmp_path / "file" / "b" / "a.ckpt"):
        with pytest.raises(CheckpointError, match="part of the path is a file"):
            io.save_checkpoint(STATE, path)


def test_a_folder_where_the_file_should_be_is_named(io: TorchCheckpointIO, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"\[EISDIR\].*in the way"):
        io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"is a folder.*sharded"):
        io.load_checkpoint(tmp_path / "a.ckpt")


class Vandal:
    """Removes a folder while it is being pickled, as an impatient colleague would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        shutil.rmtree(self.folder)
        return str, ("gone",)


def test_a_folder_that_vanishes_during_the_save_is_named(io: TorchCheckpointIO, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"\[ENOENT\].*Keep the folder"):
        io.save_checkpoint({"x": Vandal(folder)}, folder / "a.ckpt")
    assert os.listdir(tmp_path) == []
    io.save_checkpoint(STATE, folder / "a.ckpt")  # one that vanished before is made again
    assert os.listdir(folder) == ["a.ckpt"]


def test_what_cannot_be_pickled_is_named_by_its_place(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "a")
    with pytest.raises(
        CheckpointError, match=r"state\['hyper_parameters'\]\['fns'\]\[1\] \(a function\) cannot be pickled"
    ):
        io.save_checkpoint({"w": torch.ones(2), "hyper_parameters": {"lr": 1, "fns": [len, lambda: 0]}}, tmp_path / "a")
    assert same(io.load_checkpoint(tmp_path / "a"), STATE)
    assert os.listdir(tmp_path) == ["a"]


def test_ctrl_c_in_the_middle_of_a_save_is_not_swallowed(io: TorchCheckpointIO, tmp_path: Path) -> None:
    class Interrupting:
        def __reduce__(self) -> Any:
            signal.raise_signal(signal.SIGINT)
            return str, ("",)

    io.save_checkpoint(STATE, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        io.save_checkpoint({"x": Interrupting()}, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def bytes_written(pid: int) -> int:
    return int(Path(f"/proc/{pid}/io").read_text().split("wchar:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux")
@pytest.mark.parametrize("megabytes", [1, 20, 50])
def test_kill_9_in_the_middle_of_a_save_leaves_the_earlier_file(
    io: TorchCheckpointIO, tmp_path: Path, megabytes: int
) -> None:
    path = tmp_path / "a.ckpt"
    io.save_checkpoint({"n": 1}, path)
    child = os.fork()
    if child == 0:
        try:
            io.save_checkpoint({"n": 2, "weights": torch.zeros(64 << 18)}, path)
        finally:
            os._exit(0)
    before = bytes_written(child)
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while bytes_written(child) < before + (megabytes << 20) and not os.waitid(os.P_PID, child, look):
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL  # it was in the middle
    assert io.load_checkpoint(path) == {"n": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_file_system_without_nameless_files_is_served_too(
    io: TorchCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)  # as on macOS
    io.save_checkpoint(STATE, tmp_path / "a")
    with pytest.raises(CheckpointError, match="ENOENT"):
        io.save_checkpoint({"x": Vandal(tmp_path / "b")}, tmp_path / "b" / "a")
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        io.save_checkpoint({"x": lambda: 0}, tmp_path / "a")
    assert same(io.load_checkpoint(tmp_path / "a"), STATE)
    assert os.listdir(tmp_path) == ["a"]


def test_there_what_a_killed_process_left_is_removed(
    io: TorchCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    program = """
import os, sys
from treadle_fabric import TorchCheckpointIO
delattr(os, "O_TMPFILE")

class Kills:
    def __reduce__(self):
        os.kill(os.getpid(), 9)

TorchCheckpointIO().save_checkpoint({"x": Kills()}, sys.argv[1])
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], timeout=60).returncode == -9
    (left,) = tmp_path.iterdir()
    io.save_checkpoint(STATE, tmp_path / "a")
    assert left.exists()  # the other process could be about to lock it
    os.utime(left, (time.time() - 100,) * 2)
    with open(left, "rb+") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        io.save_checkpoint(STATE, tmp_path / "a")
        assert left.exists()
    io.save_checkpoint(STATE, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


# --- a file that is not what it should be ---


def saved(**options: Any) -> bytes:
    buffer = io_module.BytesIO()
    torch.save(STATE, buffer, **options)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io_module.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "hello")
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io_module.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/version"):
            archive.writestr(name, "x")
    return buffer.getvalue()


def flipped(position: float) -> bytes:
    content = bytearray(saved())
    content[int(len(content) * position)] ^= 1
    return bytes(content)


DAMAGED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "cut in half": (lambda: saved()[: len(saved()) // 2], "truncated"),
    "cut by a byte": (lambda: saved()[:-30], "truncated"),
    "cut to its first bytes": (lambda: saved()[:10], "truncated"),
    "one bit in a tensor": (lambda: flipped(0.5), "damaged: the checksum of its record '.*data/0'"),
    "one bit in the pickle": (
        lambda: saved().replace(b"weights", b"weighst", 1),
        r"damaged: the checksum of its record '.*data\.pkl'",
    ),
    "zeros, as after a power cut": (lambda: bytes(5000), "begins with zeros"),
    "random bytes": (lambda: b"\xee" + torch.Generator().manual_seed(0).get_state().numpy().tobytes(), "no checkpoint"),
    "text": (lambda: b"hello world\nsecond line", "no checkpoint"),
    "another zip": (lambda: zipped("report.txt"), r"zip archive, no checkpoint \(it holds report\.txt\)"),
    "TorchScript": (scripted, "TorchScript"),
    "safetensors": (lambda: (9).to_bytes(8, "little") + b'{"a": []}' + bytes(8), "safetensors"),
    "Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "gzip": (lambda: b"\x1f\x8b\x08" + bytes(50), "gzip"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "bare pickle"),
    "old format, cut": (lambda: saved(_use_new_zipfile_serialization=False)[:300], "before 1.6.*truncated"),
}


@pytest.mark.parametrize("weights_only", [None, False], ids=["safe", "trusted"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_or_foreign_file_is_told_by_what_it_is(
    io: TorchCheckpointIO, tmp_path: Path, kind: str, weights_only: bool | None
) -> None:
    content, words = DAMAGED[kind]
    (tmp_path / "a.ckpt").write_bytes(content())
    with pytest.raises(CheckpointCorruptError, match=rf"a\.ckpt.*{words}"):
        io.load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)


def test_every_cut_and_many_flips_are_noticed(io: TorchCheckpointIO, tmp_path: Path) -> None:
    good = saved()
    path = tmp_path / "a"
    for length in range(0, len(good), 701):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            io.load_checkpoint(path)
    unnoticed = 0
    for position in range(0, len(good), 211):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        try:
            assert same(io.load_checkpoint(path), STATE)  # a bit that means nothing, such as in the padding
            unnoticed += 1
        except CheckpointError:
            continue
    assert unnoticed < 20


def test_a_missing_file_is_told_with_its_neighbours(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint(STATE, tmp_path / "epoch=1.ckpt")
    with pytest.raises(CheckpointNotFoundError, match=r"epoch=2\.ckpt.*there is: epoch=1\.ckpt") as error:
        io.load_checkpoint(tmp_path / "epoch=2.ckpt")
    assert isinstance(error.value, FileNotFoundError)
    with pytest.raises(CheckpointNotFoundError, match="not there either"):
        io.load_checkpoint(tmp_path / "nowhere" / "a.ckpt")


# --- a file that would run code ---


class Hostile:
    """Runs a shell command when it is unpickled."""

    command: ClassVar[str] = "touch owned"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Unused:
    """A class of the user's own."""


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_bare_pickle_never_runs(
    io: TorchCheckpointIO, tmp_path: Path, protocol: int, weights_only: bool | None
) -> None:
    (tmp_path / "a").write_bytes(pickle.dumps({"x": [1, "posix", Hostile()]}, protocol=protocol))
    with pytest.raises(CheckpointUnsafeError, match=r"posix\.system"):
        io.load_checkpoint(tmp_path / "a", weights_only=weights_only)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_hostile_checkpoint_does_not_run_unless_it_is_trusted_by_name(
    io: TorchCheckpointIO, tmp_path: Path, zip_format: bool
) -> None:
    torch.save({"x": Hostile()}, tmp_path / "a", _use_new_zipfile_serialization=zip_format)
    for weights_only in (None, True):
        with pytest.raises(CheckpointUnsafeError, match=r"posix\.system.*add_safe_globals.*weights_only=False"):
            io.load_checkpoint(tmp_path / "a", weights_only=weights_only)
    assert not (tmp_path / "owned").exists()
    assert io.load_checkpoint(tmp_path / "a", weights_only=False) == {"x": 0}
    assert (tmp_path / "owned").exists()  # so the test above means something


def test_the_environment_cannot_turn_the_check_off(
    io: TorchCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"x": Hostile()}, tmp_path / "a")
    with pytest.raises(CheckpointUnsafeError):
        io.load_checkpoint(tmp_path / "a")


def test_numpy_numbers_and_arrays_are_plain_data(io: TorchCheckpointIO, tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    state = {"lr": numpy.float64(0.1), "n": numpy.int32(3), "a": numpy.arange(4.0, dtype=numpy.float16).reshape(2, 2)}
    io.save_checkpoint(state, tmp_path / "a")
    loaded = io.load_checkpoint(tmp_path / "a")
    assert (loaded["lr"], loaded["n"]) == (0.1, 3)
    numpy.testing.assert_array_equal(loaded["a"], state["a"])
    io.save_checkpoint({"a": numpy.array([Hostile()], dtype=object)}, tmp_path / "b")
    with pytest.raises(CheckpointUnsafeError, match=r"holds (?!numpy)"):
        io.load_checkpoint(tmp_path / "b")
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_a_class_is_loaded_once_it_is_allowed_by_name(io: TorchCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint({"x": Unused()}, tmp_path / "a")
    with pytest.raises(CheckpointUnsafeError, match=r"test_torch_file\.Unused.*add_safe_globals\(\[Unused\]\)"):
        io.load_checkpoint(tmp_path / "a")
    with torch.serialization.safe_globals([Unused]):
        assert isinstance(io.load_checkpoint(tmp_path / "a")["x"], Unused)
    assert isinstance(io.load_checkpoint(tmp_path / "a", weights_only=False)["x"], Unused)


def test_a_class_that_is_gone_is_named(io: TorchCheckpointIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unused, "__module__", "project_before_the_rename")
    module = type(sys)("project_before_the_rename")
    module.Unused = Unused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "project_before_the_rename", module)
    io.save_checkpoint({"x": Unused()}, tmp_path / "a")
    monkeypatch.delitem(sys.modules, "project_before_the_rename")
    with pytest.raises(CheckpointError, match=r"project_before_the_rename.*importable"):
        io.load_checkpoint(tmp_path / "a", weights_only=False)


# --- elsewhere than on the local disk ---


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_a_url_works_like_a_path(io: TorchCheckpointIO, tmp_path: Path, memory: MemoryFileSystem) -> None:
    for base in ("memory://bucket", f"file://{tmp_path}"):
        io.save_checkpoint(STATE, f"{base}/run/a.ckpt")
        assert same(io.load_checkpoint(f"{base}/run/a.ckpt"), STATE)
        io.remove_checkpoint(f"{base}/run/a.ckpt")
        io.remove_checkpoint(f"{base}/run/a.ckpt")
        with pytest.raises(CheckpointNotFoundError, match=r"a\.ckpt"):
            io.load_checkpoint(f"{base}/run/a.ckpt")
    io.save_checkpoint(STATE, "memory://bucket/run/a.ckpt")
    with pytest.raises(CheckpointError, match=r"'memory://bucket/run' is a folder"):
        io.remove_checkpoint("memory://bucket/run")
    assert memory.exists("/bucket/run/a.ckpt")
    memory.pipe_file("/bucket/b", saved()[:5000])
    with pytest.raises(CheckpointCorruptError, match="truncated"):
        io.load_checkpoint("memory://bucket/b")


def test_storage_options_reach_the_file_system_and_are_refused_for_a_path(
    io: TorchCheckpointIO, tmp_path: Path, memory: MemoryFileSystem
) -> None:
    with pytest.raises(MisconfigurationException, match=r"storage_options.*local"):
        io.save_checkpoint(STATE, tmp_path / "a", storage_options={"key": "x"})
    Moody.seen.clear()
    io.save_checkpoint(STATE, "moody://a", storage_options={"token": "secret"})
    assert Moody.seen == ["secret"]


class Moody(MemoryFileSystem):  # type: ignore[misc]
    """A store that publishes what was written before the connection broke."""

    protocol = "moody"
    store: ClassVar[dict[str, Any]] = {}
    seen: ClassVar[list[Any]] = []
    broken: ClassVar[bool] = False

    def __init__(self, token: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        Moody.seen.append(token)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("moody://", "memory://")))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        super().pipe_file(path, value[: len(value) // 2] if Moody.broken else value, **options)
        if Moody.broken:
            raise ConnectionResetError(104, "Connection reset by peer")


fsspec.register_implementation("moody", Moody, clobber=True)


def test_a_broken_upload_leaves_the_earlier_checkpoint(io: TorchCheckpointIO, monkeypatch: pytest.MonkeyPatch) -> None:
    Moody.store.clear()
    io.save_checkpoint(STATE, "moody://run/a.ckpt")
    monkeypatch.setattr(Moody, "broken", True)
    with pytest.raises(CheckpointError, match=r"moody://run/a\.ckpt.*Connection reset by peer"):
        io.save_checkpoint(LARGE, "moody://run/a.ckpt")
    assert list(Moody.store) == ["/run/a.ckpt"]
    assert same(io.load_checkpoint("moody://run/a.ckpt"), STATE)


# --- the cost ---


@pytest.mark.alone
def test_a_save_costs_little_more_than_torch_save_and_fsync(io: TorchCheckpointIO, tmp_path: Path) -> None:
    state = {str(i): torch.rand(1 << 18) for i in range(32)}  # 32 MB

    def plain() -> None:
        with open(tmp_path / "plain", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def best(f: Callable[[], None]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)

    reference, ours = best(plain), best(lambda: io.save_checkpoint(state, tmp_path / "ours"))
    assert ours < 1.5 * reference + 0.02, f"{ours:.3f} s against {reference:.3f} s"
