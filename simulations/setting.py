"""What a simulated run needs beside its plan, kept in the run's directory so that the run can be resumed."""

import dataclasses
import json
from pathlib import Path

from confide.client.noise import CRYPTOGRAPHIC
from confide.common.base import files_digest
from confide.common.disk import READABLE, whole
from confide.common.entries import SEEDED
from confide.common.errors import RunError, UsageError
from confide.common.plan import load_plan
from confide.simulations.insecure import PLAIN_SUM

FORMAT = "confide-setting/2"
# Types of the plain fields, checked when a setting is read back.
_PLAIN = {
    "test_share": "float",
    "sites": "int",
    "seed": "int",
    "threads": "int",
    "alone": "bool",
    "head_only": "bool",
    "compare": "bool",
    "score_every": "int",
}
SPLITS = ("column", "iid", "dirichlet", "quantity")
ENGINES = ("in-process", "flower")
REAL = "real"
SUMMATIONS = (REAL, PLAIN_SUM)
NOISES = (SEEDED, CRYPTOGRAPHIC)
_CHOICES = {"split": SPLITS, "engine": ENGINES, "summation": SUMMATIONS, "noise": NOISES}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a plan is simulated.

    Attributes:
        model: The base model's directory.
        data: The table of all sites' rows.
        test: A table of held-out rows; if None, `test_share` of the persons is held out.
        test_share: Between 0 and 1.
        split: How the rows are shared out to sites, one of `SPLITS`.
        column: The column that names each row's site, for the split `column`.
        sites: How many sites, for the other splits.
        concentration: The Dirichlet parameter, for the splits `dirichlet` and `quantity`.
        seed: Fixes the split, and every draw that is seeded.
        engine: How messages travel, one of `ENGINES`.
        summation: How vectors are summed, one of `SUMMATIONS`.
        noise: Where the federation's draws come from, one of `NOISES`.
        threads: Processor threads of torch, 0 for the plan's; equal bytes need equal numbers.
        alone: Whether each site is also trained alone.
        head_only: Whether the federation is also run with its head only.
        compare: Whether all rows are also trained pooled, with privacy and without.
        score_every: After how many rounds an adapter is scored; 0 for the last only.
    """

    model: Path
    data: Path
    test: Path | None
    test_share: float
    split: str
    column: str | None
    sites: int
    concentration: float
    seed: int
    engine: str
    summation: str
    noise: str
    threads: int
    alone: bool
    head_only: bool
    compare: bool
    score_every: int


def check_choices(**chosen: str) -> None:
    """Return if each of split, engine, summation and noise that is given is one of those there are.

    Raises:
        UsageError: One is not.
    """
    for name, value in chosen.items():
        if value not in _CHOICES[name]:
            raise UsageError(f"There is no {name} {value!r}. Known are {', '.join(_CHOICES[name])}.")


def check_fresh(directory: Path) -> None:
    """Return if no run is under way in `directory`; one that failed before its first score may be begun anew.

    Raises:
        RunError: One was.
    """
    if (directory / "setting.json").exists() and (directory / "scores").exists():
        raise RunError(
            f"{directory} holds a run already. Go on with it: confide simulate run --resume {directory} "
            "Or give another --out."
        )


def begin(directory: Path, plan_file: Path, setting: Setting) -> None:
    """Make a run's directory, with the plan, the setting and the digests of the tables in it.

    Raises:
        RunError: It holds a run already.
        UsageError: It cannot be written to.
    """
    check_fresh(directory)
    plan = load_plan(plan_file)
    fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(setting).items()}
    tree = {"format": FORMAT, **fields, "plan": plan.digest, "tables": _tables(setting)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "plan.toml").write_bytes(plan_file.read_bytes())
        with whole(directory / "setting.json", READABLE) as draft:
            draft.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write to {directory}: {error.strerror or error}. Give another --out.") from None


def read_setting(directory: Path) -> Setting:
    """Return the setting that `begin` wrote.

    Raises:
        RunError: There is none, it is damaged, or the plan or a table has changed since.
    """
    try:
        fields = json.loads((directory / "setting.json").read_bytes())
        written = fields.pop("format")
        if written == "confide-setting/1":
            raise RunError(
                f"The run in {directory} was begun by an earlier version, whose settings do not say where its noise comes "
                "from, so it cannot go on. Begin anew with another --out."
            )
        if written != FORMAT:
            raise ValueError
        plan, tables = fields.pop("plan"), fields.pop("tables")
        for name in ("model", "data", "test"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        setting = Setting(**fields)
        if any(type(getattr(setting, name)).__name__ != kind for name, kind in _PLAIN.items()):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunError(
            f"{directory} holds no readable setting.json, so there is no run to resume. Give the directory of a run "
            "that `confide simulate run` began."
        ) from None
    if load_plan(directory / "plan.toml").digest != plan:
        raise RunError(
            f"The plan of the run in {directory} has changed since it began. Restore it, or begin anew with another --out."
        )
    if _tables(setting) != tables:
        raise RunError(
            f"A table of the run in {directory} has changed since it began, so it cannot go on as it began. Restore the "
            "table, or begin anew with another --out."
        )
    return setting


def _tables(setting: Setting) -> dict[str, str]:
    """Return the digests of the tables, each a file or a directory of files."""
    digests = {}
    for name, path in (("data", setting.data), ("test", setting.test)):
        if path is not None:
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
            digests[name] = files_digest(files)
    return digests
