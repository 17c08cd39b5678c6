"""The second engine: the same rounds, with Flower between server and sites.

The agents stay in this process, behind one socket, and share one model. Flower's simulation runs the server's loop
(`app`) and, on Ray, one postman per site (`confide.client.app`). Flower gets a home, a port and a directory of its own,
fetches nothing, and is stopped with everything it started.

    this process:  agents ── socket ──────────────────┐
    SuperLink ─ simulation:  server's loop ── Ray ── postmen
"""

import contextlib
import dataclasses
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from confide.client import postbox
from confide.client.app import AGENT_SOCKET
from confide.common.adapter import Layout, load_vector, save_vector
from confide.common.canonical import canonical_bytes
from confide.common.crypto import Identity
from confide.common.errors import RunError
from confide.common.messages import Envelope
from confide.common.plan import load_plan
from confide.common.ring import RingLayout
from confide.common.roster import parse_roster
from confide.common.witness import Witness
from confide.server.aggregate import ServerState
from confide.server.app import GridChannel
from confide.server.rounds import Run, run_rounds, status_of
from confide.server.store import RoundRecord, Store
from confide.server.summation import SecureSummation, Summation
from confide.simulations.insecure import InsecurePlainSum

if TYPE_CHECKING:
    from confide.simulations.federation import Site

ERRAND = "CONFIDE_ERRAND"
FORMAT = "confide-errand/1"

_ERRAND_FOLDER, _FAILURE = "errand", "failure"
_GLANCE_S = 0.2
_START_S = 60.0
_GRACE_S = 2.0  # nothing is lost when Flower is killed: what counts is in the store
_STUBBORN_S = 30.0

app = ServerApp()  # a plain assignment: Flower looks for it in the source before it imports


def run_through_flower(
    run: Run,
    agents: Mapping[str, "Site"],
    store: Store,
    start: ServerState,
    told: Callable[[RoundRecord], None],
) -> str:
    """Run the rounds that the store does not hold yet through Flower, and return how the run ended.

    Nothing that was started for it is left afterwards, however it ends.

    Args:
        run: What is run; its plan must lie in the store as `plan.toml`.
        agents: The sites, by name; they are asked in this thread, one at a time.
        store: Where each round is recorded before the next begins.
        start: The state before the first round.
        told: Called with each new record.

    Raises:
        RunError: Flower did not start, or stopped before the last round; its words are in the store's `flower.log`.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(postbox.private_folder())
        agents_socket = folder / "agents"
        box = stack.enter_context(postbox.Postbox(agents_socket, {site: agents[site].answer for site in run.sites}))
        _write_errand(errand_in(folder), run, store, start)
        log = store.root / "flower.log"
        job = FlowerJob(
            server_app="confide.simulations.flower:app",
            client_app="confide.client.app:app",
            sites=len(run.sites),
            environment={AGENT_SOCKET: str(agents_socket)},
        )
        flower = stack.enter_context(under_flower(job, folder, log))
        while len(store.records) < run.plan.privacy.rounds:
            running = flower.running()
            box.serve(_GLANCE_S)
            for record in store.refresh():
                told(record)
            if not running and len(store.records) < run.plan.privacy.rounds:
                raise RunError(f"Flower ended the run too early: {flower.reason()}. All it said is in {log}.")
    return status_of(store.records)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the server's loop: what Flower starts as the simulation's server."""
    with errand() as folder:
        run, store, start = _read_errand(folder)
        run_rounds(run, _Attended(GridChannel(grid, patience_s=run.training_s)), store, start, lambda _: None)


class _Attended:
    """The channel, where silence is a failure of the engine: nobody drops out or is late in one process.

    Without this a broken Flower, or the end of the agents' process, would pass for sites that dropped out, and the rest
    of the run would be written down as void.
    """

    def __init__(self, channel: GridChannel) -> None:
        self._channel = channel

    def ask(self, messages: Mapping[str, Envelope], timeout_s: float) -> Iterator[tuple[str, Envelope]]:
        lost = set(messages)
        for site, answer in self._channel.ask(messages, timeout_s):
            lost.discard(site)
            yield site, answer
        if lost:
            raise RunError(f"Messages to or from {', '.join(sorted(lost))} were lost.")
        postbox.sites(Path(os.environ[AGENT_SOCKET]))  # raises if the agents' process has ended


def _write_errand(folder: Path, run: Run, store: Store, start: ServerState) -> None:
    """Write what the server's process needs to know; the folder is private and goes when the run ends."""
    save_vector(folder / "adapter.safetensors", start.adapter, run.layout)
    for name, moment in start.moments.items():
        save_vector(folder / f"moment-{name}.safetensors", moment, run.layout)
    fields = {
        "format": FORMAT,
        "name": run.name,
        "plan": run.plan.digest,
        "layout": list(run.layout.tensors),
        "ring": dataclasses.asdict(run.ring),
        "sites": list(run.sites),
        "training_s": run.training_s,
        "answer_s": run.answer_s,
        "summation": _spelled(run.summation),
        "moments": sorted(start.moments),
        "store": str(store.root.resolve()),
    }
    (folder / "errand.json").write_bytes(canonical_bytes(fields))


def _read_errand(folder: Path) -> tuple[Run, Store, ServerState]:
    fields = json.loads((folder / "errand.json").read_bytes())
    if fields["format"] != FORMAT:
        raise RunError(f"The errand in {folder} has another format than {FORMAT}. Use equal versions.")
    store = Store(Path(fields["store"]))
    plan = load_plan(store.root / "plan.toml")
    if plan.digest != fields["plan"]:
        raise RunError(f"The plan in {store.root} is another one than the run's.")
    layout = Layout(tensors=tuple((name, tuple(shape)) for name, shape in fields["layout"]))
    run = Run(
        name=fields["name"],
        plan=plan,
        layout=layout,
        ring=RingLayout(**{**fields["ring"], "segments": tuple(map(tuple, fields["ring"]["segments"]))}),
        sites=tuple(fields["sites"]),
        summation=_summation(fields["summation"]),
        training_s=fields["training_s"],
        answer_s=fields["answer_s"],
    )
    start = ServerState(
        adapter=load_vector(folder / "adapter.safetensors", layout),
        moments={name: load_vector(folder / f"moment-{name}.safetensors", layout) for name in fields["moments"]},
    )
    return run, store, start


def _spelled(summation: Summation) -> dict[str, str] | None:
    """Return what the server's process needs to sum securely: the roster and the coordinator's key, both of this run."""
    if isinstance(summation, SecureSummation):
        return {"roster": summation.roster.canonical().decode(), "key": summation.coordinator.seed().hex()}
    if isinstance(summation, InsecurePlainSum):
        return None
    raise RunError(f"A sum by {type(summation).__name__} cannot be taken through Flower.")


def _summation(fields: dict[str, str] | None) -> Summation:
    if fields is None:
        return InsecurePlainSum()
    coordinator = Identity(bytes.fromhex(fields["key"]))
    return SecureSummation(parse_roster(fields["roster"].encode()), coordinator, witness=Witness())


# Flower's SuperLink, which ends with all below it when its input does: when we close it, or however we end.
_SUPERLINK = """
import contextlib, os, sys, threading, psutil

def end_with_parent():
    sys.stdin.read()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(0)

threading.Thread(target=end_with_parent, daemon=True).start()
from flwr.superlink.cli import flower_superlink
flower_superlink()
"""

_BUNDLE = """
[project]
name = "confide-simulation"
version = "1.0.0"
description = "Settings only; the code is the installed package."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "confide"

[tool.flwr.app.components]
serverapp = "{server_app}"
clientapp = "{client_app}"
"""

_CONNECTION = """
[superlink]
default = "confide"

[superlink.confide]
address = "127.0.0.1:{port}"
insecure = true
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlowerJob:
    """What a Flower simulation runs.

    Attributes:
        server_app: The ServerApp, as `module:name` of an installed package.
        client_app: The ClientApp, likewise.
        sites: How many nodes it has.
        environment: What both find in their environment.
    """

    server_app: str
    client_app: str
    sites: int
    environment: Mapping[str, str]


@contextlib.contextmanager
def under_flower(job: FlowerJob, folder: Path, log_path: Path) -> Iterator["FlowerRun"]:
    """Give the job's run, which is under way; afterwards nothing of it is left.

    Args:
        job: What is run.
        folder: A private directory of a short path, for this run alone; its errand is in it.
        log_path: Where to write all that Flower says.
    """
    port = _free_port()
    (folder / "home").mkdir(mode=0o700)
    (folder / "home" / "config.toml").write_text(_CONNECTION.format(port=port))
    (folder / "bundle").mkdir()
    bundle = _BUNDLE.format(server_app=job.server_app, client_app=job.client_app)
    (folder / "bundle" / "pyproject.toml").write_text(bundle)
    environment = {**_environment(folder), **job.environment, ERRAND: str(folder / _ERRAND_FOLDER)}
    with log_path.open("ab") as log:
        flower = FlowerRun(folder, environment, log, port)
        try:
            flower.submit(job.sites)
            yield flower
        finally:
            flower.stop()


def errand_in(folder: Path) -> Path:
    """Make the directory in `folder` for what a ServerApp needs to know, and return it."""
    path = folder / _ERRAND_FOLDER
    path.mkdir(mode=0o700)
    return path


@contextlib.contextmanager
def errand() -> Iterator[Path]:
    """Give a ServerApp its errand's directory; if it fails, `FlowerRun.reason` says why."""
    folder = Path(os.environ[ERRAND])
    try:
        yield folder
    except Exception as error:
        (folder / _FAILURE).write_text(f"{type(error).__name__}: {error}")
        raise


class FlowerRun:
    """A SuperLink of our own and the one run in it."""

    def __init__(self, folder: Path, environment: Mapping[str, str], log: IO[bytes], port: int) -> None:
        self._folder = folder
        self._failure = folder / _ERRAND_FOLDER / _FAILURE
        self._environment = environment
        self._log = log
        self._port = port
        self._met = 0.0
        self._own: list[subprocess.Popen[bytes]] = []
        self._family: set[psutil.Process] = set()  # every process there is because of us
        self._superlink = self._start(
            *("-c", _SUPERLINK, "--insecure", "--simulation", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
            stdin=subprocess.PIPE,
        )
        self._watch: subprocess.Popen[bytes] | None = None

    def submit(self, sites: int) -> None:
        """Return once the SuperLink is up and the run on its way to it."""
        self._await_health()
        resources = f"num-supernodes={sites} client-resources-num-cpus=1 init-args-num-cpus=2"
        self._watch = self._client("run", "bundle", "confide", "--federation-config", resources, "--stream")

    def running(self) -> bool:
        """Return whether the run may still go on."""
        assert self._watch is not None
        if self._failure.exists() or self._superlink.poll() is not None:
            return False
        if time.monotonic() > self._met + 1:
            self._meet_family(psutil.Process(self._superlink.pid))
        if self._watch.poll() is None:
            return True
        state = self._state()
        if state.get("status", "finished").startswith("finished"):
            return False
        self._watch = self._client("log", state["run-id"], "confide", "--stream")  # the stream broke, the run did not
        return True

    def reason(self) -> str:
        """Return why the run stopped before its end."""
        if self._failure.exists():
            return self._failure.read_text().rstrip(".")
        if self._superlink.poll() is not None:
            return "its SuperLink ended"
        return self._state().get("status-details", "").rstrip(".") or "it gave no reason"

    def stop(self) -> None:
        """Return once nothing that was started is left; what does not end when asked is killed."""
        assert self._superlink.stdin is not None
        self._meet_family(*self._family)
        self._superlink.stdin.close()
        began = time.monotonic()
        while alive := [relative for relative in self._family if _alive(relative)]:
            self._meet_family(*alive)
            waited_s = time.monotonic() - began
            if waited_s > _STUBBORN_S:
                raise RunError(
                    f"These processes cannot be ended: {', '.join(str(relative.pid) for relative in alive)}."
                )
            for relative in alive if waited_s > _GRACE_S else ():
                with contextlib.suppress(psutil.NoSuchProcess):
                    relative.kill()
            time.sleep(0.05)
        for process in self._own:
            process.wait()

    def _meet_family(self, *elders: psutil.Process) -> None:
        """Remember all processes below `elders`: one whose parent ends is nobody's child and not to be found later."""
        self._met = time.monotonic()
        for elder in elders:
            with contextlib.suppress(psutil.NoSuchProcess):  # raised too if the number is another process's by now
                self._family.update(elder.children(recursive=True))

    def _await_health(self) -> None:
        deadline = time.monotonic() + _START_S
        while self._superlink.poll() is None and time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError, http.client.HTTPException),
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=_START_S)) as connection,
            ):
                connection.request("GET", "/health")
                if connection.getresponse().status == http.client.OK:
                    return
            time.sleep(_GLANCE_S)
        raise RunError(f"Flower's SuperLink did not start within {_START_S:g} s. All it said is in {self._log.name}.")

    def _state(self) -> dict[str, str]:
        """Return what Flower says of the run."""
        client = self._client("list", "confide", "--format", "json", stdout=subprocess.PIPE)
        try:
            state: dict[str, str] = json.loads(client.communicate()[0])["runs"][0]
        except (ValueError, KeyError, IndexError):
            return {}
        return state

    def _client(self, *arguments: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
        return self._start("-c", "from flwr.cli.app import app; app()", *arguments, stdout=stdout)

    def _start(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603  these are our own words
            [sys.executable, "-P", *arguments],
            cwd=self._folder,
            env=self._environment,
            stdin=stdin,
            stdout=stdout or self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C is for us alone to handle
        )
        self._own.append(process)
        self._family.add(psutil.Process(process.pid))
        return process


def _alive(process: psutil.Process) -> bool:
    """Return whether a process still runs; neither one that waits to be buried nor another of the same number does."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _environment(folder: Path) -> dict[str, str]:
    """Return our environment with settings for this Flower and this Ray only, and no way out to other machines."""
    foreign = re.compile(r"FLWR_.*|RAY_.*|(?i:(https?|all)_proxy)")
    inherited = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    programs = os.path.dirname(sys.executable)
    return inherited | {
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: bind to the loopback address only
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",  # the log is whole even if its writers are killed
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
