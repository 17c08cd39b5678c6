"""What a simulated run needs beside its plan, kept in the run's directory so that the run can be resumed."""

import dataclasses
import json
from pathlib import Path

from confide.common.errors import RunError
from confide.common.plan import load_plan

FORMAT = "confide-setting/1"
SPLITS = ("column", "iid", "dirichlet", "quantity")
ENGINES = ("in-process", "flower")


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
        seed: Fixes the split and every draw.
        engine: How messages travel, one of `ENGINES`.
        threads: Processor threads of torch, 0 for the plan's; equal bytes need equal numbers.
        alone: Whether each site is also trained alone.
        compare: Whether the head-only and the pooled comparisons are made.
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
    threads: int
    alone: bool
    compare: bool


def begin(directory: Path, plan_file: Path, setting: Setting) -> None:
    """Make a run's directory.

    Raises:
        RunError: It holds a run already.
    """
    if (directory / "setting.json").exists():
        raise RunError(
            f"{directory} holds a run already. Go on with it: confide simulate run --resume {directory} "
            "Or give another --out."
        )
    load_plan(plan_file)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "plan.toml").write_bytes(plan_file.read_bytes())
    fields = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(setting).items()}
    text = json.dumps({"format": FORMAT, **fields}, indent=2) + "\n"
    (directory / "setting.json").write_text(text, encoding="utf-8")


def read_setting(directory: Path) -> Setting:
    """Return the setting that `begin` wrote.

    Raises:
        RunError: There is none, or it is damaged.
    """
    try:
        fields = json.loads((directory / "setting.json").read_bytes())
        if fields.pop("format") != FORMAT:
            raise ValueError
        for name in ("model", "data", "test"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        return Setting(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunError(
            f"{directory} holds no readable setting.json, so there is no run to resume. Give the directory of a run "
            "that `confide simulate run` began."
        ) from None
