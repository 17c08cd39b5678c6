"""Health and metrics: what they tell, to whom, and what they never tell."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from confide.client import gauges as module
from confide.client.gauges import CHILD_STATES, Gauges, Page
from confide.common.errors import RULES, UsageError

TOKEN = "0123456789abcdef" * 2


@pytest.fixture
def gauges() -> Gauges:
    made = Gauges("north", clock=lambda: 1000.0)
    made.child("ready")
    return made


@pytest.fixture
def page(gauges: Gauges) -> Iterator[Page]:
    with gauges.serve(0, TOKEN) as served:
        yield served


def values(gauges: Gauges) -> dict[tuple[str, ...], float]:
    """Return each value by the metric's name and its labels but for the site."""
    found = {}
    for family in text_string_to_metric_families(gauges.text().decode()):
        for sample in family.samples:
            assert sample.labels.pop("site") == "north"
            name = sample.name.removeprefix("confide_site_")
            found[(name, *(value for _, value in sorted(sample.labels.items())))] = sample.value
    return found


def test_what_happened_is_in_prometheus_text(gauges: Gauges) -> None:
    gauges.answered("contribution")
    gauges.answered("contribution")
    gauges.refused("budget")
    gauges.refused("")
    gauges.spent()
    gauges.trained(2.5)
    gauges.trained(1.5)
    gauges.budget("1", used=0.75, left=2.25)
    gauges.ledger(42)
    gauges.child("training")

    found = values(gauges)

    assert found["answers_total", "contribution"] == 2
    assert found["refusals_total", "budget"] == 1
    assert found["refusals_total", "other"] == 1
    assert found["spends_total",] == 1
    assert found["training_seconds_total",] == 4
    assert (found["budget_epsilon", "1", "used"], found["budget_epsilon", "1", "left"]) == (0.75, 2.25)
    assert found["ledger_records",] == 42
    assert found["last_exchange_timestamp_seconds",] == 1000
    assert [found["child", state] for state in CHILD_STATES] == [0, 0, 0, 1]


def test_what_has_not_happened_yet_is_there_with_zero(gauges: Gauges) -> None:
    found = values(gauges)

    assert [found[name,] for name in ("spends_total", "training_seconds_total", "witness_refusals_total")] == [0, 0, 0]


def test_refusals_are_counted_by_the_names_of_rules_only(gauges: Gauges) -> None:
    for rule in (*RULES, "made up by somebody", "\n"):
        gauges.refused(rule)

    counted = {labels[0]: value for (name, *labels), value in values(gauges).items() if name == "refusals_total"}
    assert counted == {**dict.fromkeys(RULES, 1), "other": 2}


def test_no_exact_figure_of_training_has_a_place_here(gauges: Gauges) -> None:
    told = gauges.text().decode().lower()

    assert not any(word in told for word in ("loss", "batch", "persons", "rows", "clipped", "gradient", "norm"))
    assert "python_info" not in told
    assert "process_" not in told


def test_a_child_is_in_one_of_the_known_states(gauges: Gauges) -> None:
    with pytest.raises(UsageError, match="never 'idle'"):
        gauges.child("idle")


def test_health_is_ok_degraded_or_failing_with_reasons(gauges: Gauges) -> None:
    well = gauges.health()
    gauges.budget("2", used=3.0, left=0.0)
    gauges.child("absent")
    degraded = gauges.health()
    gauges.trouble("disk", "The trail cannot be written.", failing=True)
    failing = gauges.health()
    gauges.mended("disk")
    gauges.mended("disk")
    gauges.child("ready")
    gauges.budget("2", used=0.0, left=3.0)

    assert well == {"status": "ok", "reasons": []}
    assert degraded["status"] == "degraded"
    assert "Account 2 has no budget left." in str(degraded["reasons"])
    assert "no child" in str(degraded["reasons"])
    assert failing["status"] == "failing"
    assert str(failing["reasons"]).startswith("['The trail cannot be written.'")
    assert gauges.health() == well


def test_a_ledger_that_a_witness_refuses_is_failing(gauges: Gauges) -> None:
    gauges.witness_refused()

    assert gauges.health()["status"] == "failing"
    assert values(gauges)["witness_refusals_total",] == 1


def test_silence_is_degraded_where_there_should_be_messages() -> None:
    now = 0.0
    gauges = Gauges("north", clock=lambda: now, silent_s=60)
    gauges.child("ready")

    now = 61.0
    silent = gauges.health()
    gauges.answered("advertisement")

    assert silent == {"status": "degraded", "reasons": ["No message was answered for 61 s."]}
    assert gauges.health()["status"] == "ok"


def test_two_agents_in_one_process_do_not_share_metrics() -> None:
    first, second = Gauges("north"), Gauges("north")

    first.spent()

    assert values(first)["spends_total",] == 1
    assert values(second)["spends_total",] == 0


def asked(page: Page, path: str, authorization: str | None = f"Bearer {TOKEN}") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Authorization": authorization} if authorization else {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_the_page_gives_metrics_and_health_to_who_knows_the_token(gauges: Gauges, page: Page) -> None:
    gauges.spent()

    assert asked(page, "/metrics") == (200, gauges.text())
    assert asked(page, "/health") == (200, json.dumps(gauges.health()).encode())
    assert asked(page, "/")[0] == 404
    gauges.witness_refused()
    assert asked(page, "/health")[0] == 503


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer " + TOKEN[:-1], f"Bearer {TOKEN} ", f"Basic {TOKEN}", "Bearer \xff"]
)
def test_nothing_is_served_to_who_does_not_know_the_token(page: Page, authorization: str | None) -> None:
    assert asked(page, "/metrics", authorization) == (401, b"")
    assert asked(page, "/health", authorization) == (401, b"")


def test_nothing_is_served_to_other_machines(page: Page) -> None:
    host, _ = page._server.server_address[:2]

    assert host == "127.0.0.1"
    with socket.socket() as elsewhere:
        elsewhere.settimeout(2)
        with pytest.raises(OSError, match=r"refused|timed out"):
            elsewhere.connect(("127.0.0.2", page.port))


@pytest.mark.parametrize("token", ["", "short", "x" * 31, "x" * 32 + " ", "é" * 32, "x" * 32 + "\n"])
def test_a_token_that_can_be_guessed_or_not_be_sent_is_refused(gauges: Gauges, token: str) -> None:
    with pytest.raises(UsageError, match="32 printable"):
        gauges.serve(0, token)


def test_a_port_that_is_taken_is_told(gauges: Gauges, page: Page) -> None:
    with pytest.raises(UsageError, match="Choose another port"):
        gauges.serve(page.port, TOKEN)
    with pytest.raises(UsageError, match="Choose another port"):
        gauges.serve(1 << 20, TOKEN)


def test_a_caller_that_says_nothing_or_little_is_let_go(
    gauges: Gauges, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.3)

    with gauges.serve(0, TOKEN) as page, socket.create_connection(("127.0.0.1", page.port), timeout=10) as slow:
        began = time.monotonic()
        dripping = threading.Thread(target=drip, args=(slow,))
        dripping.start()
        status, _ = asked(page, "/metrics")
        waited = time.monotonic() - began
        dripping.join()

    assert status == 200
    assert waited < 5
    assert capsys.readouterr().err == ""


def drip(connection: socket.socket) -> None:
    """Send a request byte by byte, until the other side hangs up."""
    with contextlib.suppress(OSError):
        for byte in b"GET /metrics HTTP/1.1\r\n" * 100:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)


def test_the_page_ends_with_its_block(gauges: Gauges) -> None:
    with gauges.serve(0, TOKEN) as page:
        pass

    with pytest.raises(OSError, match="refused"):
        asked(page, "/metrics")
