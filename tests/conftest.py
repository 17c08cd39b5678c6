"""A tiny transformer, its tokenizer, a plan for it and rows to learn from: real code on small numbers."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from confide.common import cli
from confide.common.base import base_digest
from confide.common.examples import Examples
from confide.common.plan import Plan, read_plan, starter

# How long an example takes says nothing of what it shows.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

os.environ.update(HF_HUB_OFFLINE="1", FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

WORDS = (
    "bad",
    "awful",
    "late",
    "fine",
    "plain",
    "usual",
    "good",
    "great",
    "kind",
    "the",
    "a",
    "service",
    "was",
    "very",
)
LABELS = ("negative", "neutral", "positive")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def save_tokenizer(directory: Path) -> None:
    """Write a word-level tokenizer of a few words."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of four layers, 16 wide, with random weights, as a local directory."""
    directory = tmp_path_factory.mktemp("base") / "tiny-bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
    )
    transformers.BertModel(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def plan(base_directory: Path) -> Plan:
    """A plan for the tiny model: three labels, adapters in the top two layers, three rounds of two steps."""
    return read_plan(plan_text(base_directory).encode())


@pytest.fixture
def plan_file(base_directory: Path, tmp_path: Path) -> Path:
    """The same plan as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(plan_text(base_directory), encoding="utf-8")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ninety rows whose words tell their label, from three clinics with unlike label mixes."""
    random = np.random.default_rng(4)
    lines = ["text,label,clinic"]
    for row in range(90):
        clinic = row % 3
        label = int(random.choice(3, p=np.roll([0.6, 0.2, 0.2], clinic)))
        mood, filler = WORDS[3 * label : 3 * label + 3], WORDS[9:]
        words = [*random.choice(filler, random.integers(1, 6)), *random.choice(mood, 2)]
        lines.append(f"{' '.join(words)},{LABELS[label]},clinic-{clinic}")
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def plan_text(base_directory: Path) -> str:
    """Return the tiny plan as TOML."""
    text = starter("tiny", "tiny-bert", base_digest(base_directory), ["query", "value"])
    for key, value in {
        "max_tokens": "16",
        "rank": "2",
        "top_layers": "2",
        "labels": str(list(LABELS)).replace("'", '"'),
        "rounds": "3",
        "steps_per_round": "2",
        "sampling_rate": "0.5",
        "min_persons": "10",
        "delta": "1e-3",
        "micro_batch": "8",
    }.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    return text


MakeExamples = Callable[..., Examples]


@pytest.fixture(scope="session")
def make_examples() -> MakeExamples:
    """Return a maker of random rows, some persons having several."""

    def make(rows: int, seed: int, *, persons: int | None = None, labels: int = 3, longest: int = 12) -> Examples:
        random = np.random.default_rng(seed)
        lengths = random.integers(3, longest + 1, rows)
        tokens = random.integers(len(SPECIAL), len(SPECIAL) + len(WORDS), int(lengths.sum())).astype(np.int32)
        starts = np.cumsum(lengths) - lengths
        owners = (
            np.arange(rows)
            if persons is None
            else np.concatenate([np.arange(persons), random.integers(0, persons, rows - persons)])
        )
        return Examples(
            tokens=[tokens],
            store=np.zeros(rows, np.int64),
            starts=starts,
            lengths=lengths,
            second=lengths.copy(),
            labels=random.integers(0, labels, rows),
            persons=owners.astype(np.int64),
            pad_token=0,
        )

    return make


def run(*arguments: object) -> int:
    """Return the exit code of `confide` with these arguments."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def simulate(out: Path, plan_file: Path, base: Path, table: Path, *more: object) -> int:
    return run(
        "simulate", "run", plan_file, "--model", base, "--data", table, "--out", out, "--threads", 1, "--json", *more
    )


BY_CLINIC = ("--split", "column", "--column", "clinic")
