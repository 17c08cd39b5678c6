"""Everything that can go wrong, as one tree.

    ConfideError                 exit 1   anything below
    ├── UsageError               exit 2   a flag, a path or a combination of them is wrong
    ├── PlanError                exit 3   the plan is malformed or contradicts itself
    ├── DataError                exit 4   a table cannot be read as the plan says
    ├── ModelError               exit 5   a base model is missing, altered or unsupported
    ├── AdapterError             exit 6   an adapter file is missing, altered or of another layout
    ├── PrivacyError             exit 7   a guarantee cannot be given or computed
    ├── MessageError             exit 8   bytes from the other side are not the message they should be
    ├── Refused                  exit 9   a site said no
    ├── RunError                 exit 10  a run failed, or its directory cannot be resumed
    ├── MissingPackage           exit 11  an optional package is not installed
    ├── SealError                exit 12  a sealed file is damaged, or the key is another
    └── LedgerError              exit 13  a ledger is damaged, forged, rolled back or cannot be written

Each message says what was wrong, the value, the limit and the remedy. It is for the person at this machine. What may
leave a site is `outside`: one fixed sentence per class, never rows, paths or values. A refusal may add the name of the
rule it follows from, one of `RULES`, and never the value or the limit.
"""

from typing import ClassVar, Final

# What a site's owner may limit, by the names under which a refusal leaves the site.
RULES: Final = (
    "approval",
    "base-model",
    "budget",
    "cohort",
    "compute",
    "data",
    "federation",
    "graph",
    "hours",
    "ledger",
    "noise",
    "plan-privacy",
    "rounds",
    "targets",
    "task",
)


class ConfideError(Exception):
    """Root of every error Confide raises on purpose."""

    exit_code: ClassVar[int] = 1
    outside: ClassVar[str] = "The site could not go on."


class UsageError(ConfideError):
    """A flag, a path or a combination of them is wrong."""

    exit_code = 2


class PlanError(ConfideError):
    """The plan is malformed or contradicts itself; `problems` lists every fault found, one sentence each."""

    exit_code = 3
    outside = "The site does not accept this plan."

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(ConfideError):
    """A table cannot be read as the plan says."""

    exit_code = 4
    outside = "The site's data do not fit the plan."


class ModelError(ConfideError):
    """A base model is missing, altered or unsupported."""

    exit_code = 5
    outside = "The site's base model does not fit the plan."


class AdapterError(ConfideError):
    """An adapter file is missing, altered or of another layout."""

    exit_code = 6
    outside = "The adapter offered does not fit the plan."


class PrivacyError(ConfideError):
    """A guarantee cannot be given or computed."""

    exit_code = 7
    outside = "The site cannot give the guarantee asked for."


class MessageError(ConfideError):
    """Bytes from the other side are not the message they should be."""

    exit_code = 8
    outside = "The site received a malformed message."


class Refused(ConfideError):  # noqa: N818  a refusal is a decision, not an error of the program
    """A site said no; `rule` is one of `RULES`, or nothing if it follows from none of them."""

    exit_code = 9
    outside = "The site refused."

    def __init__(self, message: str, rule: str = "") -> None:
        if rule and rule not in RULES:
            raise ValueError(f"{rule!r} is no rule's name; see RULES.")
        self.rule = rule
        super().__init__(message)


class RunError(ConfideError):
    """A run failed, or its directory cannot be resumed."""

    exit_code = 10


class MissingPackage(ConfideError):  # noqa: N818  names the thing that is missing
    """An optional package is not installed; the message holds the line that installs it."""

    exit_code = 11

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'confide[{extra}]'"
        )


class SealError(ConfideError):
    """A sealed file is damaged, or the key is another."""

    exit_code = 12
    outside = "The site cannot read what it had put aside."


class LedgerError(ConfideError):
    """A ledger is damaged, forged, rolled back or cannot be written; nothing may be trained on its word."""

    exit_code = 13
    outside = "The site cannot vouch for its record of spends."
