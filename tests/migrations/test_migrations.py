"""The migrations and the tables say the same, a registry is brought up to date once, and never by an older program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from adapterctl import migrations
from adapterctl.bootstrap import migrate_tables
from adapterctl.migrations import HEAD_REVISION, VERSION_TABLE, check_newest, check_schema, migrate, schema_state
from adapterctl.registry.domain.errors import InvalidInput, Misconfigured
from adapterctl.registry.settings import Settings
from adapterctl.registry.stores.sql.engine import Database, sqlite_url
from adapterctl.registry.stores.sql.tables import metadata

OLD_REVISION = "0007"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, home: Path) -> str:
    """An address where no table is."""
    if request.param == "sqlite":
        return sqlite_url(home / "a home with spaces & 100% ?")
    return str(request.getfixturevalue("new_database")("template0"))


def test_the_known_head_is_the_head_of_the_scripts():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))

    assert ScriptDirectory.from_config(config).get_heads() == [HEAD_REVISION]


def test_an_empty_home_gets_all_tables_and_looks_like_tables_py(url: str):
    assert schema_state(url) == "empty"

    migrate(url)

    assert schema_state(url) == "current"
    with closing(Database(url)) as database, database.read() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []


def test_looking_makes_nothing(url: str, home: Path):
    schema_state(url)
    with pytest.raises(Misconfigured, match="no tables yet"):
        check_schema(url)

    assert schema_state(url) == "empty"
    assert list(home.iterdir()) == []


def test_a_current_registry_costs_no_import_of_alembic(url: str):
    migrate(url)
    code = (
        "import sys; from adapterctl.migrations import migrate; migrate(sys.argv[1]); print('alembic' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code, url], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "False"


def test_two_first_commands_at_once_both_find_their_tables(url: str):
    code = "import sys; from adapterctl.migrations import migrate; migrate(sys.argv[1])"
    both = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(2)]

    errors = [process.communicate()[1] for process in both]

    assert [process.returncode for process in both] == [0, 0], errors
    assert schema_state(url) == "current"


@pytest.fixture
def old_url(url: str, home: Path) -> str:
    """An address whose tables an earlier adapterctl made."""
    url = sqlite_url(home) if url.startswith("sqlite") else url
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with closing(Database(url, create=True)) as database:
        database.prepare()
        with database.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, OLD_REVISION)
    assert schema_state(url) == "older"
    return url


def adapterctl(url: str, *words: str) -> subprocess.Popen[str]:
    """The command line on the registry at that address."""
    at_home = ["--home", str(Path(url.removeprefix("sqlite:///")).parent)] if url.startswith("sqlite") else []
    return subprocess.Popen(
        [sys.executable, "-m", "adapterctl", *at_home, *words],
        env=os.environ | ({} if at_home else {"ADAPTERCTL_DATABASE_URL": url}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_after_an_upgrade_reads_name_the_one_command_that_brings_the_tables_up_to_date(old_url: str):
    ran = []
    for words in (["ls"], ["migrate", "--check"], ["migrate", "-o", "json"], ["migrate", "--check", "-q"], ["ls"]):
        process = adapterctl(old_url, *words)
        ran.append((*process.communicate(), process.returncode))
    (_, refused, code), (_, behind, checked), (done, _, _), (newest, _, current), (_, afterwards, _) = ran

    assert (code, checked, current) == (2, 5, 0)
    for told in (refused, behind):
        assert f"tables of revision {OLD_REVISION}, this adapterctl needs revision {HEAD_REVISION}" in told
        assert "adapterctl migrate" in told
    assert {**json.loads(done), "ledger": ""} == {"ledger": "", "before": OLD_REVISION, "after": HEAD_REVISION}
    assert newest == f"{HEAD_REVISION}\n"
    assert "revision" not in afterwards


def test_of_several_that_migrate_at_once_one_does_it(old_url: str):
    each = [adapterctl(old_url, "migrate", "-o", "json") for _ in range(3)]

    told = [json.loads(process.communicate()[0])["before"] for process in each]

    assert sorted(told) == [OLD_REVISION, HEAD_REVISION, HEAD_REVISION]


def test_the_tables_of_a_server_are_not_ours_to_change(tmp_path: Path):
    settings = Settings(home=tmp_path / "home", server="http://registry")

    with pytest.raises(InvalidInput, match="commands go to the server at http://registry"):
        migrate_tables(settings)

    assert not (tmp_path / "home").exists()


def test_a_registry_of_a_newer_program_is_refused_with_both_revisions(url: str):
    migrate(url)
    with closing(Database(url)) as database, database.write() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))

    assert schema_state(url) == "newer"
    for refuse in (migrate, check_newest, check_schema):
        with pytest.raises(Misconfigured, match=f"revision 9999, .* up to {HEAD_REVISION}") as caught:
            refuse(url)
        assert "pip install --upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "table", ["base_assignment", "decision", "edge", "event", "gate_file", "signature", "stage_history"]
)
@pytest.mark.parametrize("statement", ["UPDATE {table} SET {column} = {column}", "DELETE FROM {table}"])
def test_facts_of_record_can_neither_be_changed_nor_deleted(url: str, table: str, statement: str):
    migrate(url)
    database = Database(url)
    values = {
        column.name: 1 if column.type.python_type in (int, float) else "x" for column in metadata.tables[table].columns
    }
    names = ", ".join(values)
    off = "PRAGMA defer_foreign_keys = ON" if url.startswith("sqlite") else "SET session_replication_role = replica"
    with database.write() as connection:
        connection.execute(text(off))
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES (:{', :'.join(values)})"), values)
        if not url.startswith("sqlite"):  # it switches off every trigger, ours too
            connection.execute(text("SET session_replication_role = origin"))
        with pytest.raises(IntegrityError, match=f"{table} is append-only"), connection.begin_nested():
            connection.execute(text(statement.format(table=table, column=next(iter(values)))))
        assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 1
        connection.rollback()
    database.close()


def test_names_are_in_the_order_of_code_points_whatever_the_language_of_a_database(new_database: Callable[[str], str]):
    url = new_database("template0")
    migrate(url)

    with closing(Database(url)) as database, database.read() as connection:
        columns = inspect(connection).get_columns("adapter")

    assert {each["name"]: each["type"].collation for each in columns if each["name"] == "name"} == {"name": "C"}
