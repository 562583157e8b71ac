"""A home that cannot be written can be read, and refuses every write before it starts."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapterctl.migrations import migrate
from adapterctl.registry.domain.errors import Corrupt, Misconfigured, NotAllowed, NotFound, Unavailable
from adapterctl.registry.domain.job import NewJob
from adapterctl.registry.domain.version import AdapterVersion
from adapterctl.registry.ports import Ledger
from adapterctl.registry.services.doctor import check_in_place
from adapterctl.registry.services.garbage import _locks
from adapterctl.registry.settings import load_settings
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.ledger import SqlLedger

NOBODY = 65534


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="adapterctl-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("ledger", ["sql_ledger"], indirect=True)
@pytest.mark.parametrize("open_elsewhere", [False, True], ids=["closed", "in use"])
def test_a_read_only_home_is_read_and_not_written(
    ledger: Ledger, add_version: Callable[..., AdapterVersion], home: Path, shared: Path, open_elsewhere: bool
):
    version = add_version()
    if not open_elsewhere:
        ledger.close()
    for file in home.glob("registry.db*"):
        (shared / file.name).write_bytes(file.read_bytes())
        (shared / file.name).chmod(0o444)
    shared.chmod(0o555)
    before = {file.name: file.stat().st_mtime_ns for file in shared.iterdir()}

    assert as_somebody_else(lambda: _reads_but_cannot_write(shared, version)) == ""

    assert {file.name: file.stat().st_mtime_ns for file in shared.iterdir()} == before


def _reads_but_cannot_write(home: Path, version: AdapterVersion) -> None:
    other = SqlLedger(Database(sqlite_url(home)))
    assert other.versions() == [version]
    with pytest.raises(NotAllowed, match="cannot be written"):
        other.submit(NewJob("merge", "k", "t", {}, "ada"))
    with pytest.raises(NotAllowed, match="cannot be written"), other.exclusive("key"):
        pass
    other.close()
    with pytest.raises(NotAllowed, match="cannot be written"):  # what every command that writes begins with
        migrate(sqlite_url(home))
    with pytest.raises(NotAllowed, match="cannot be written"):
        migrate(sqlite_url(home / "new"))


def as_somebody_else(check: Callable[[], None]) -> str:
    """Run `check` in a process without the rights of root; returns what it raised, if anything.

    A fork, because somebody else may not be able to read the files of this Python, which may be in root's home.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # 3.12: threads; the copy uses none
        pid = os.fork()
    if pid == 0:
        said = ""
        try:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            check()
        except BaseException as error:  # noqa: BLE001  told to the parent
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


def test_a_home_that_is_closed_to_us_is_said_to_be(home: Path):
    (home / "closed").mkdir(mode=0o700)

    def reads() -> None:
        with pytest.raises(NotAllowed, match=f"{home / 'closed'} cannot be read: Permission denied"):
            SqlLedger(Database(sqlite_url(home / "closed"))).versions()

    assert as_somebody_else(reads) == ""


def test_the_lock_files_of_another_user_are_left_to_him(shared: Path):
    shared.chmod(0o777)
    his, own = (shared / f"{digit * 32}.lock" for digit in "ab")
    for file, mode in ((his, 0o644), (own, 0o666)):
        file.touch()
        file.chmod(mode)

    def frees() -> None:
        assert [each.name for each in _locks(shared, dry_run=False)] == [str(own)]

    assert as_somebody_else(frees) == ""
    assert list(shared.iterdir()) == [his]


def test_a_copy_whose_first_home_is_closed_to_us_is_refused_in_words(shared: Path):
    shared.chmod(0o755)
    (shared / "closed").mkdir(mode=0o700)
    for folder in (shared, shared / "closed"):
        (folder / "mlflow.db").touch()

    def looks() -> None:
        with pytest.raises(Misconfigured, match=f"was made in {shared / 'closed'}"):
            check_in_place(shared, f"sqlite:///{shared}/closed/mlflow.db")

    assert as_somebody_else(looks) == ""


def test_a_settings_file_of_somebody_else_is_not_passed_over(tmp_path: Path):
    tmp_path.chmod(0o700)

    def reads() -> None:
        with pytest.raises(Misconfigured, match=r"config\.toml cannot be read: Permission denied"):
            load_settings(env={"XDG_CONFIG_HOME": str(tmp_path)}, cwd=Path("/"))

    assert as_somebody_else(reads) == ""


def test_a_home_without_a_registry_is_said_to_be_empty(home: Path):
    with pytest.raises(NotFound, match="no registry"):
        SqlLedger(Database(sqlite_url(home))).versions()

    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "hint"), [(4096, "its disk is full: free some space there"), (1 << 30, "see `adapterctl doctor`")]
)
def test_a_database_that_a_full_disk_keeps_from_being_read_says_so(
    home: Path, free: int, hint: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    (home / "registry.db").mkdir()  # cannot be opened, whoever asks

    with pytest.raises(Unavailable) as met:
        SqlLedger(Database(sqlite_url(home))).versions()

    assert met.value.hint == hint


def test_a_file_that_is_no_database_is_said_to_be_damaged(home: Path):
    (home / "registry.db").write_bytes(b"not a database, but long enough to look like one" * 100)

    with pytest.raises(Corrupt, match=r"registry\.db is damaged"):
        SqlLedger(Database(sqlite_url(home))).versions()
