"""Health and metrics of an agent, for those who run it.

No exact figure of training is among them: no loss, no batch size, no count of persons. But when something happens and how
long it takes depends on rows too, and on the same machine runs a postman that reports to the server. So the page is
served on the loopback address only, and only to who shows a token that the agent's user alone can read.
"""

import hmac
import http.server
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from confide.common.errors import RULES, UsageError

CHILD_STATES: Final = ("absent", "loading", "ready", "training")
OK, DEGRADED, FAILING = "ok", "degraded", "failing"
LEAST_TOKEN_CHARACTERS = 32
_ADDRESS = "127.0.0.1"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


class Gauges:
    """What an agent tells of itself. Every method may be called from any thread.

    Args:
        site: The site's name, a label of every metric.
        clock: Gives the seconds since 1970.
        silent_s: How long no exchange may come before health is degraded; 0 for ever, as between runs.
    """

    def __init__(self, site: str, *, clock: Callable[[], float] = time.time, silent_s: float = 0.0) -> None:
        self._clock = clock
        self._silent_s = silent_s
        self._lock = threading.Lock()
        self._troubles: dict[str, tuple[bool, str]] = {}
        self._left: dict[str, float] = {}
        self._child = CHILD_STATES[0]
        self._last_exchange = clock()
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"confide_site_{name}", text, ("site", *labels), registry=self._registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"confide_site_{name}", text, ("site", *labels), registry=self._registry)

        self._site = site
        self._answered = counter("answers", "Messages answered, by kind.", "kind")
        self._refused = counter("refusals", "Messages refused, by the rule that refused them.", "rule")
        self._spends = counter("spends", "Rounds whose cost was written down.")
        self._training = counter("training_seconds", "How long the child trained.")
        self._witness = counter("witness_refusals", "How often somebody had seen a later ledger than ours, or another.")
        self._budget = gauge("budget_epsilon", "Epsilon of an account, by what became of it.", "account", "part")
        self._state = gauge("child", "1 for the state the child is in, 0 for the others.", "state")
        self._exchange = gauge("last_exchange_timestamp_seconds", "When a message was answered last.")
        self._ledger = gauge("ledger_records", "Records in the ledger.")
        for metric in (self._spends, self._training, self._witness, self._exchange, self._ledger):
            metric.labels(site)  # so that it is there, with 0, from the beginning
        self.child(self._child)

    def answered(self, kind: str) -> None:
        """Count a message of this kind, one of `common/messages`, that was answered."""
        self._answered.labels(self._site, kind).inc()
        with self._lock:
            self._last_exchange = self._clock()
        self._exchange.labels(self._site).set(self._last_exchange)

    def refused(self, rule: str) -> None:
        """Count a message that was refused by a rule of `RULES`, or by none of them ("")."""
        self._refused.labels(self._site, rule if rule in RULES else "other").inc()

    def spent(self) -> None:
        """Count a round whose cost was written down."""
        self._spends.labels(self._site).inc()

    def budget(self, account: str, used: float, left: float) -> None:
        """Tell how much epsilon of an account is used and left."""
        for part, value in (("used", used), ("left", left)):
            self._budget.labels(self._site, account, part).set(value)
        with self._lock:
            self._left[account] = left

    def child(self, state: str) -> None:
        """Tell what the child does, one of CHILD_STATES.

        Raises:
            UsageError: There is no such state.
        """
        if state not in CHILD_STATES:
            raise UsageError(f"A child is never {state!r}, but one of {', '.join(CHILD_STATES)}.")
        for each in CHILD_STATES:
            self._state.labels(self._site, each).set(each == state)
        with self._lock:
            self._child = state

    def trained(self, seconds: float) -> None:
        """Add the seconds that a round's training took, whether it ended well or not."""
        self._training.labels(self._site).inc(seconds)

    def ledger(self, records: int) -> None:
        """Tell how many records the ledger has."""
        self._ledger.labels(self._site).set(records)

    def witness_refused(self) -> None:
        """Count that a witness refused our ledger: it was rolled back or forked, which only people can mend."""
        self._witness.labels(self._site).inc()
        self.trouble("witness", "A witness has seen a later ledger than this, or another.", failing=True)

    def trouble(self, name: str, text: str, *, failing: bool = False) -> None:
        """Tell of something that is wrong until `mended`; `failing` is whether the site can take no part because of it.

        Args:
            name: What it is called; a second trouble of this name takes the place of the first.
            text: One sentence, without rows, secrets or exact figures.
            failing: As above.
        """
        with self._lock:
            self._troubles[name] = (failing, text)

    def mended(self, name: str) -> None:
        """Tell that a trouble is over, if there was one of this name."""
        with self._lock:
            self._troubles.pop(name, None)

    def health(self) -> dict[str, object]:
        """Return `status`, which is ok, degraded or failing, and `reasons`, a sentence for each."""
        with self._lock:
            found = [*self._troubles.values()]
            exhausted = [account for account, left in self._left.items() if left <= 0]
            silent, child = self._clock() - self._last_exchange, self._child
        found += [(False, f"Account {account} has no budget left.") for account in exhausted]
        if child == "absent":
            found.append((False, "There is no child that could train; the next round starts one."))
        if self._silent_s and silent > self._silent_s:
            found.append((False, f"No message was answered for {silent:.0f} s."))
        failing = any(bad for bad, _ in found)
        return {
            "status": FAILING if failing else DEGRADED if found else OK,
            "reasons": [reason for _, reason in sorted(found, key=lambda entry: not entry[0])],
        }

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def serve(self, port: int, token: str) -> "Page":
        """Return the page of metrics and health, served on the loopback address while its `with` block lasts.

        `/metrics` gives `text()`, `/health` gives `health()` as JSON, with the status 503 if it is failing. Who asks sends
        `Authorization: Bearer TOKEN`; Prometheus does, with `authorization: {credentials_file: …}`.

        Args:
            port: Where; 0 takes a free one.
            token: At least LEAST_TOKEN_CHARACTERS printable ASCII characters, such as `Keys.secret(…).hex()`.

        Raises:
            UsageError: The token is too short or has other characters, or the port is taken.

        Guarantee: nothing is served to other machines, nor to who does not know the token.
        """
        if len(token) < LEAST_TOKEN_CHARACTERS or not (token.isascii() and token.isprintable()) or " " in token:
            raise UsageError(
                f"The token for the page of metrics needs at least {LEAST_TOKEN_CHARACTERS} printable ASCII characters, "
                "no spaces."
            )
        return Page(self, port, token)


class Page:
    """The page of metrics and health; made by `Gauges.serve`.

    Attributes:
        port: Where it is.
    """

    def __init__(self, gauges: Gauges, port: int, token: str) -> None:
        self._gauges = gauges
        self._expected = f"Bearer {token}".encode()
        page = self

        class Handler(_Handler):
            def do_GET(self) -> None:
                self.reply(*page.answer(self.path, self.headers.get("Authorization", "")))

        try:
            # One request at a time: whoever asks too much delays the page, and nothing else.
            self._server = _Server((_ADDRESS, port), Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"Cannot serve at {_ADDRESS}:{port}: {error}. Choose another port, or 0.") from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="gauges", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, authorization: str) -> tuple[HTTPStatus, str, bytes]:
        """Return (status, type, content) for a request."""
        if not hmac.compare_digest(authorization.encode("utf-8", "replace"), self._expected):
            return HTTPStatus.UNAUTHORIZED, "text/plain", b""
        if path == "/metrics":
            return HTTPStatus.OK, _CONTENT_TYPE, self._gauges.text()
        if path == "/health":
            health = self._gauges.health()
            status = HTTPStatus.SERVICE_UNAVAILABLE if health["status"] == FAILING else HTTPStatus.OK
            return status, "application/json", json.dumps(health).encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b""


class _Server(socketserver.TCPServer):
    """Asks no name service for its own name, and says nothing of callers that hang up."""

    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):
            _log.error("the page of metrics failed", exc_info=True)


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request within a few seconds in all, however slowly its bytes come."""

    def setup(self) -> None:
        super().setup()
        self._deadline = threading.Timer(_PATIENCE_S, self._hang_up)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def reply(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "confide"

    def log_message(self, *_: object) -> None:
        """Say nothing: strangers must not fill a log."""

    def _hang_up(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended
