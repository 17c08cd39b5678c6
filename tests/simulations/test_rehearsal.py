"""A rehearsal: the made-up part of a federation around one site's agent."""

import contextlib
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from confide.client.persons import declared
from confide.client.postbox import Postbox, private_folder
from confide.common.crypto import Identity
from confide.common.errors import MessageError, RunError, UsageError
from confide.common.messages import Envelope
from confide.common.plan import read_plan
from confide.common.roster import read_roster
from confide.common.signed_plan import read_signed_plan
from confide.server.store import RoundRecord
from confide.simulations.rehearsal import ROSTER, Rehearsal, _persons
from tests.conftest import plan_text, run
from tests.policies import changed

NORTH = Identity(bytes([7]) * 32)


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal.begin(tmp_path / "r", "north", NORTH.public)


@contextlib.contextmanager
def answering(site: str) -> Iterator[Path]:
    """The socket of an agent that breaks off whatever it is asked."""

    def broken(_: Envelope) -> Envelope:
        raise RuntimeError

    ended = threading.Event()
    with private_folder() as folder, Postbox(folder / "agent.sock", {site: broken}) as box:

        def serve() -> None:
            while not ended.is_set():
                box.serve(0.05)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield folder / "agent.sock"
        finally:
            ended.set()
            thread.join()


def test_it_is_the_same_federation_when_it_is_opened_again(rehearsal: Rehearsal) -> None:
    again = Rehearsal(rehearsal.directory)

    roster = read_roster((rehearsal.directory / ROSTER).read_bytes(), [again.admin.public])
    assert roster == again.roster == rehearsal.roster
    assert roster.sites == {"north": NORTH.public, **{name: peer.public for name, peer in again.peers.items()}}
    assert len(again.peers) == 2
    assert stat.S_IMODE((rehearsal.directory / "keys.json").stat().st_mode) == 0o600


def test_a_plan_is_signed_as_a_coordinator_does(rehearsal: Rehearsal, base_directory: Path) -> None:
    text = plan_text(base_directory).encode()

    signed = read_signed_plan(rehearsal.sign(text, "try 1"), rehearsal.roster.coordinator, federation="rehearsal")

    assert (signed.run, signed.digest) == ("try 1", read_plan(text).digest)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peers": 1}, "--peers 1"),
        ({"peers": 6}, "--peers 6"),
        ({"key": b"short"}, "5 bytes"),
        ({"site": "a/b"}, "is no name"),
        ({"federation": ""}, "is no name"),
        ({"site": "made-up-1"}, "is the name of a made-up site"),
    ],
    ids=str,
)
def test_what_cannot_be_rehearsed_leaves_no_directory(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    given = {"site": "north", "key": NORTH.public} | changes

    with pytest.raises(UsageError, match=says):
        Rehearsal.begin(tmp_path / "r", **given)  # type: ignore[arg-type]

    assert not (tmp_path / "r").exists()


def test_a_directory_that_is_there_stays_as_it_is(rehearsal: Rehearsal) -> None:
    before = (rehearsal.directory / "keys.json").read_bytes()

    with pytest.raises(UsageError, match="exists and is left as it is"):
        Rehearsal.begin(rehearsal.directory, "north", NORTH.public)

    assert (rehearsal.directory / "keys.json").read_bytes() == before


def test_another_directory_holds_no_rehearsal(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text('{"format": "confide-rehearsal/2"}')

    with pytest.raises(UsageError, match="holds no rehearsal"):
        Rehearsal(tmp_path)


def test_a_run_needs_the_site_s_agent_and_no_other(rehearsal: Rehearsal, base_directory: Path) -> None:
    signed = rehearsal.sign(plan_text(base_directory).encode(), "try")

    with pytest.raises(RunError, match="No agent answers"):
        rehearsal.run(signed, model=base_directory, agent=rehearsal.directory / "none.sock")
    with answering("south") as agent, pytest.raises(RunError, match="does not serve the site north"):
        rehearsal.run(signed, model=base_directory, agent=agent)


def test_a_plan_that_another_coordinator_signed_is_not_run(
    rehearsal: Rehearsal, tmp_path: Path, base_directory: Path
) -> None:
    other = Rehearsal.begin(tmp_path / "other", "north", NORTH.public)
    signed = other.sign(plan_text(base_directory).encode(), "try")

    with pytest.raises(MessageError):
        rehearsal.run(signed, model=base_directory, agent=tmp_path / "none.sock")


def test_an_agent_that_breaks_off_is_a_site_that_is_missing(rehearsal: Rehearsal, base_directory: Path) -> None:
    signed = rehearsal.sign(plan_text(base_directory).replace("rounds = 3", "rounds = 1").encode(), "try")
    records: list[RoundRecord] = []

    with answering("north") as agent:
        status = rehearsal.run(signed, model=base_directory, agent=agent, told=records.append)

    (record,) = records
    assert (status, record.present) == ("failed", ())
    assert "north" in record.missing
    assert rehearsal.rounds_of("try") == 1
    assert (rehearsal.adapter_of("try") / "plan.toml").exists()


def test_a_run_s_name_stands_for_one_plan(rehearsal: Rehearsal, base_directory: Path) -> None:
    text = plan_text(base_directory).replace("rounds = 3", "rounds = 1")
    with answering("north") as agent:
        rehearsal.run(rehearsal.sign(text.encode(), "try"), model=base_directory, agent=agent)
        other = rehearsal.sign(text.replace("rounds = 1", "rounds = 2").encode(), "try")

        with pytest.raises(RunError, match="of another plan was begun"):
            rehearsal.run(other, model=base_directory, agent=agent)


@pytest.mark.parametrize("least", [2, 10, 99, 100, 101, 1005, 1200, 12345])
def test_made_up_sites_have_as_many_persons_as_the_plan_asks_for_once_they_are_declared(
    least: int, base_directory: Path
) -> None:
    plan = changed(read_plan(plan_text(base_directory).encode()), privacy__min_persons=least)

    count = _persons(plan)

    assert least <= declared(count) == count < least * 1.1 + 1


def test_the_commands_make_a_federation_and_a_signed_plan(
    tmp_path: Path, base_directory: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, out = tmp_path / "r", tmp_path / "try.plan"

    assert run("simulate", "rehearsal", "begin", where, "--site", "north", "--key", NORTH.public.hex()) == 0
    text = capsys.readouterr().out
    assert run("simulate", "rehearsal", "plan", where, plan_file, "--run", "try", "--out", out, "--json") == 0
    tree = json.loads(capsys.readouterr().out)

    made = Rehearsal(where)
    assert f"confide site join {where / ROSTER} --admin {made.admin.public.hex()}" in text
    assert read_signed_plan(out.read_bytes(), made.coordinator.public).digest == tree["plan"]
    assert run("simulate", "rehearsal", "plan", where, plan_file, "--run", "try", "--out", out) == 2
    assert run("simulate", "rehearsal", "run", where, out, "--model", base_directory, "--agent", tmp_path / "a") == 10
    assert run("simulate", "rehearsal", "begin", where, "--site", "north", "--key", "zz") == 2


def test_a_plan_for_more_sites_than_there_are_is_not_signed(
    rehearsal: Rehearsal, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_file.write_text(plan_file.read_text().replace("min_sites = 3", "min_sites = 5"))
    out = tmp_path / "try.plan"

    assert run("simulate", "rehearsal", "plan", rehearsal.directory, plan_file, "--run", "try", "--out", out) == 2

    assert "asks for 5 to" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_that_gave_no_sum_says_so_in_json_too(
    rehearsal: Rehearsal, base_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "try.plan"
    out.write_bytes(rehearsal.sign(plan_text(base_directory).replace("rounds = 3", "rounds = 1").encode(), "try"))
    words = ("run", rehearsal.directory, out, "--model", base_directory, "--agent")

    with answering("north") as agent:
        assert run("simulate", "rehearsal", *words, agent, "--json") == 10

    tree = json.loads(capsys.readouterr().out)
    assert (tree["status"], tree["error"]) == ("failed", "RunError")
    assert "No round gave a sum" in tree["message"]


def test_a_socket_that_a_killed_agent_left_behind_is_as_if_there_were_none(
    rehearsal: Rehearsal, base_directory: Path, tmp_path: Path
) -> None:
    signed, path = rehearsal.sign(plan_text(base_directory).encode(), "try"), tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    with pytest.raises(RunError, match=r"No agent answers at .* Start one with: confide site agent"):
        rehearsal.run(signed, model=base_directory, agent=path)
