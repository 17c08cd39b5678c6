"""A run on disk: what is written counts once its record is there, and damage is found."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from confide.common.adapter import Layout
from confide.common.errors import RunError
from confide.common.messages import vector_digest
from confide.common.plan import Federation
from confide.common.ring import Update
from confide.server.aggregate import ServerState, step
from confide.server.store import RoundRecord, Store

LAYOUT = Layout.of({"B": (2, 2), "head": (1,)})
FEDADAM = Federation(server_optimizer="fedadam", server_learning_rate=0.1)
FEDAVG = Federation()


def beginning(federation: Federation) -> ServerState:
    return ServerState.begin(np.zeros(LAYOUT.length, np.float32), federation)


def record_of(before: ServerState, after: ServerState, number: int) -> RoundRecord:
    return RoundRecord(
        round=number,
        attempts=1,
        parent=vector_digest(before.adapter),
        adapter=vector_digest(after.adapter),
        moments={name: vector_digest(moment) for name, moment in after.moments.items()},
        present=("a", "b", "c"),
        missing={"d": "contribute: no answer"},
        void="",
        summation="secure_aggregation",
        bounded=1 / 3,
        saturated=0.0,
        bytes_up=120,
        bytes_down=240,
        seconds=0.25,
    )


def go_on(store: Store, rounds: int, federation: Federation) -> ServerState:
    """Do `rounds` more rounds from where the store is."""
    state = store.latest(LAYOUT) or beginning(federation)
    for number in range(len(store.records) + 1, len(store.records) + 1 + rounds):
        mean = np.sin(np.arange(LAYOUT.length) + number).astype(np.float32)
        after = step(state, Update(mean=mean, count=3), federation)
        store.commit(after, record_of(state, after, number), LAYOUT)
        state = after
    return state


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def same(one: ServerState | None, other: ServerState) -> bool:
    assert one is not None
    return (
        one.adapter.tobytes() == other.adapter.tobytes()
        and set(one.moments) == set(other.moments)
        and all(one.moments[name].tobytes() == other.moments[name].tobytes() for name in other.moments)
    )


def test_a_new_store_is_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")

    assert store.records == []
    assert store.latest(LAYOUT) is None


@pytest.mark.parametrize("federation", [FEDAVG, FEDADAM], ids=["fedavg", "fedadam"])
def test_what_is_committed_is_read_back_by_another_process(tmp_path: Path, federation: Federation) -> None:
    store = Store(tmp_path)
    state = go_on(store, 3, federation)

    again = Store(tmp_path)

    assert again.records == store.records
    assert [record.round for record in again.records] == [1, 2, 3]
    assert same(again.latest(LAYOUT), state)


@pytest.mark.parametrize("federation", [FEDAVG, FEDADAM], ids=["fedavg", "fedadam"])
def test_a_run_resumed_after_every_round_ends_as_one_that_was_not_stopped(
    tmp_path: Path, federation: Federation
) -> None:
    whole = go_on(Store(tmp_path / "whole"), 4, federation)

    for _ in range(4):
        resumed = go_on(Store(tmp_path / "resumed"), 1, federation)

    assert same(resumed, whole)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_adapters_are_named_by_their_digest_and_equal_ones_are_kept_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    state = go_on(store, 2, FEDAVG)
    for number in (3, 4):  # void rounds
        store.commit(state, record_of(state, state, number), LAYOUT)

    names = {path.stem for path in (tmp_path / "adapters").iterdir()}

    assert names == {record.adapter.removeprefix("sha256:") for record in store.records}
    assert len(names) == 2
    for record in store.records:
        assert vector_digest(store.adapter(record.adapter, LAYOUT)) == record.adapter


def test_only_the_last_moments_are_kept(tmp_path: Path) -> None:
    go_on(Store(tmp_path), 3, FEDADAM)

    assert sorted(path.name for path in (tmp_path / "moments").iterdir()) == [
        "0003-first.safetensors",
        "0003-second.safetensors",
    ]


class Killed(BaseException):
    """Stands for a process that ends."""


def test_a_kill_between_any_two_files_neither_loses_nor_invents_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = go_on(Store(tmp_path / "whole"), 3, FEDADAM)
    after_two = go_on(Store(tmp_path / "two"), 2, FEDADAM)
    replace, unlink = Path.replace, Path.unlink
    outcomes = []

    for steps in range(12):
        root = tmp_path / f"killed-{steps}"
        shutil.copytree(tmp_path / "two", root)
        store, left = Store(root), [steps]

        def counted(path: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1 if ".part" in path.name or "moments" in path.parts else 0

        def killing_replace(path: Path, target: Path, check: Callable[[Path], None] = counted) -> Path:
            check(path)
            return replace(path, target)

        def killing_unlink(path: Path, missing_ok: bool = False, check: Callable[[Path], None] = counted) -> None:
            if not missing_ok:  # the draft of a killed process stays
                check(path)
                unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killing_replace)
            patch.setattr(Path, "unlink", killing_unlink)
            try:
                go_on(store, 1, FEDADAM)
                outcomes.append("ended")
            except Killed:
                outcomes.append("killed")

        again = Store(root)
        assert len(again.records) in {2, 3}
        assert same(again.latest(LAYOUT), after_two if len(again.records) == 2 else uninterrupted)
        assert same(go_on(again, 3 - len(again.records), FEDADAM), uninterrupted)
        assert Store(root).records == Store(tmp_path / "whole").records

    # Four files are put in place (adapter, two moments, record) and two stale ones removed.
    assert outcomes == ["killed"] * 6 + ["ended"] * 6


def test_drafts_of_a_killed_process_are_no_rounds(tmp_path: Path) -> None:
    state = go_on(Store(tmp_path), 2, FEDADAM)
    (tmp_path / "rounds" / ".0003.json.77.part").write_bytes(b"{")
    (tmp_path / "rounds" / "._0003.json").write_bytes(b"")
    (tmp_path / "rounds" / "notes.json").write_bytes(b"{}")
    (tmp_path / "adapters" / ".aa.safetensors.77.part").write_bytes(b"")
    (tmp_path / "moments" / "0003-first.safetensors").write_bytes(b"")

    again = Store(tmp_path)

    assert len(again.records) == 2
    assert same(again.latest(LAYOUT), state)
    assert len(go_on(again, 1, FEDADAM).moments) == 2


def test_another_process_sees_new_records_by_refreshing(tmp_path: Path) -> None:
    writer, reader = Store(tmp_path), Store(tmp_path)
    go_on(writer, 2, FEDAVG)

    assert reader.refresh() == writer.records
    assert reader.refresh() == []
    go_on(writer, 1, FEDAVG)
    assert [record.round for record in reader.refresh()] == [3]
    assert reader.records == writer.records


def altered(**changes: object) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        whole = {**json.loads(raw), **changes}
        kept = {name: value for name, value in whole.items() if value != "left out"}
        return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut short": lambda raw: raw[:-9],
    "without its line break": lambda raw: raw[:-1],
    "no JSON": lambda raw: b"\xff" + raw,
    "a list": lambda raw: b"[1]\n",
    "null": lambda raw: b"null\n",
    "nested deeply": lambda raw: b"[" * 100_000,
    "spelled otherwise": lambda raw: raw.replace(b",", b", "),
    "another format": altered(format="confide-round/2"),
    "another round": altered(round=1),
    "a field missing": altered(adapter="left out"),
    "a field too many": altered(extra=1),
    "a text for a list": altered(present="abc"),
    "a list for a mapping": altered(missing=[]),
    "a number for a digest": altered(adapter=7),
    "a text for a number": altered(bytes_up="120"),
    "a bool for a number": altered(attempts=True),
    "a whole number for a share": altered(bounded=1),
    "null for a text": altered(void=None),
    "a share missing": altered(saturated="left out"),
    "not finite": altered(seconds=float("nan")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_refused(tmp_path: Path, case: str) -> None:
    go_on(Store(tmp_path), 2, FEDAVG)
    path = tmp_path / "rounds" / "0002.json"
    path.write_bytes(DAMAGE[case](path.read_bytes()))

    with pytest.raises(RunError, match=r"The record .*0002.json is damaged. Restore it"):
        Store(tmp_path)


def test_a_missing_record_is_refused(tmp_path: Path) -> None:
    go_on(Store(tmp_path), 3, FEDAVG)
    (tmp_path / "rounds" / "0002.json").unlink()

    with pytest.raises(RunError, match="holds round 0003 but not the record before it"):
        Store(tmp_path)


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    go_on(Store(tmp_path / "one"), 2, FEDAVG)
    go_on(Store(tmp_path / "other"), 2, FEDADAM)
    shutil.copy(tmp_path / "other" / "rounds" / "0002.json", tmp_path / "one" / "rounds" / "0002.json")

    with pytest.raises(RunError, match="does not follow the one before it"):
        Store(tmp_path / "one")


def test_removing_the_last_record_repeats_its_round(tmp_path: Path) -> None:
    state = go_on(Store(tmp_path), 3, FEDAVG)
    (tmp_path / "rounds" / "0003.json").unlink()

    store = Store(tmp_path)

    assert len(store.records) == 2
    assert same(go_on(store, 1, FEDAVG), state)


def last(root: Path, folder: str) -> Path:
    if folder == "moments":
        return root / "moments" / "0002-second.safetensors"
    return root / "adapters" / f"{Store(root).records[-1].adapter.removeprefix('sha256:')}.safetensors"


@pytest.mark.parametrize("folder", ["adapters", "moments"])
def test_a_missing_adapter_or_memory_is_refused(tmp_path: Path, folder: str) -> None:
    go_on(Store(tmp_path), 2, FEDADAM)
    last(tmp_path, folder).unlink()

    with pytest.raises(RunError, match="cannot go on: Cannot read the adapter"):
        Store(tmp_path).latest(LAYOUT)


@pytest.mark.parametrize("folder", ["adapters", "moments"])
def test_an_altered_adapter_or_memory_is_refused(tmp_path: Path, folder: str) -> None:
    go_on(Store(tmp_path), 2, FEDADAM)
    path = last(tmp_path, folder)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))

    with pytest.raises(RunError, match="is not what the run's records say"):
        Store(tmp_path).latest(LAYOUT)


def test_a_damaged_adapter_or_one_of_another_layout_is_refused(tmp_path: Path) -> None:
    go_on(Store(tmp_path), 2, FEDADAM)

    with pytest.raises(RunError, match="a name or a shape differs"):
        Store(tmp_path).latest(Layout.of({"B": (5,)}))
    last(tmp_path, "adapters").write_bytes(b"")
    with pytest.raises(RunError, match="is damaged or not safetensors"):
        Store(tmp_path).latest(LAYOUT)


def test_a_record_says_who_was_missing_where_and_what_the_sum_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    go_on(store, 1, FEDAVG)

    raw = json.loads((tmp_path / "rounds" / "0001.json").read_bytes())

    assert raw == {"format": "confide-round/1", **dataclasses.asdict(store.records[0]), "present": ["a", "b", "c"]}
    assert raw["missing"] == {"d": "contribute: no answer"}
    assert (raw["summation"], raw["attempts"], raw["void"]) == ("secure_aggregation", 1, "")
    assert (raw["bounded"], raw["saturated"]) == (1 / 3, 0.0)


def test_the_number_of_an_attempt_is_never_given_twice_even_by_another_process(tmp_path: Path) -> None:
    numbers = [Store(tmp_path).begin_attempt(number) for number in (1, 1, 2, 2, 2, 3)]

    assert numbers == [1, 2, 1, 2, 3, 1]


def test_the_number_of_an_attempt_is_on_disk_before_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.begin_attempt(4)

    def killed(path: Path, target: Path) -> Path:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            store.begin_attempt(4)

    assert json.loads((tmp_path / "attempts.json").read_bytes()) == {"attempt": 1, "round": 4}
    assert Store(tmp_path).begin_attempt(4) == 2


@pytest.mark.parametrize("raw", [b"", b"{}", b"[1, 2]", b"7", b"null", b"\xff", b'{"round":1,"attempt":"2"}'])
def test_a_damaged_number_of_an_attempt_is_refused(tmp_path: Path, raw: bytes) -> None:
    store = Store(tmp_path)
    (tmp_path / "attempts.json").write_bytes(raw)

    with pytest.raises(RunError, match=r"attempts\.json is damaged\. Remove it; sites may then refuse one round"):
        store.begin_attempt(1)
