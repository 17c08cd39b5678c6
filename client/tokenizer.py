"""The tokenizer of a base model: texts, words and turns of a conversation to tokens, each row by itself.

It is the one file beside the data that may use transformers.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from confide.common.errors import MissingPackage, ModelError
from confide.common.examples import IGNORED, Ints

# Chat templates may ask for today's date. Two readings of a table, and two sites', must not differ by it.
FIXED_DATE = "26 Jul 2024"


def load_tokenizer(base_directory: Path) -> "Tokenizer":
    """Return the tokenizer in the directory of a base model; nothing is downloaded and no code of it is run.

    A tokenizer without a pad token, as GPT-2 and Llama have, pads with its end-of-text token.

    Raises:
        ModelError: There is none that can be read, it has no `tokenizer.json`, or no token that could pad.
        MissingPackage: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingPackage("transformers", "site") from None
    if not base_directory.is_dir():
        raise ModelError(f"There is no model directory {base_directory}. Give a local path; nothing is downloaded.")
    try:
        backend = AutoTokenizer.from_pretrained(
            str(base_directory),
            local_files_only=True,
            trust_remote_code=False,
            use_fast=True,
            truncation_side="right",  # some models' own setting would cut off the beginning
        )
    except Exception as error:  # its readers raise bare Exception, among many others
        raise ModelError(
            f"The tokenizer in {base_directory} cannot be read ({type(error).__name__}). It needs tokenizer.json and "
            "tokenizer_config.json; tokenizers that bring their own code are refused."
        ) from None
    if not backend.is_fast:
        raise ModelError(
            f"The tokenizer in {base_directory} has no tokenizer.json. Load it once with transformers and save it "
            "with save_pretrained, which writes one."
        )
    pad_token = backend.eos_token_id if backend.pad_token_id is None else backend.pad_token_id
    if pad_token is None:
        raise ModelError(
            f"The tokenizer in {base_directory} has neither a pad nor an end-of-text token, so rows of different "
            "length cannot share a batch. Name one in its tokenizer_config.json as pad_token."
        )
    return Tokenizer(backend, int(pad_token))


class Tokenizer:
    """The tokenizer of a base model. Make one with `load_tokenizer`.

    Attributes:
        pad_token: The token that fills shorter rows of a batch.
    """

    def __init__(self, backend: Any, pad_token: int) -> None:  # noqa: ANN401  any of transformers' tokenizers
        self._backend = backend
        self.pad_token = pad_token

    def added_tokens(self, *, pair: bool) -> int:
        """Return how many tokens of its own it adds to a text, or to a pair of texts."""
        return int(self._backend.num_special_tokens_to_add(pair=pair))

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, max_tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each row, and at which of them its second text begins (their number if none does).

        Args:
            texts: The text of each row.
            pairs: The second text of each row, or None.
            max_tokens: How many tokens of a row are kept; of a pair, the longer text is cut first.
        """
        encoded = self._called(list(texts), None if pairs is None else list(pairs), max_tokens=max_tokens)
        tokens: list[list[int]] = encoded["input_ids"]
        if pairs is None:
            return tokens, [len(row) for row in tokens]
        sequences = (row.sequence_ids for row in encoded.encodings)
        return tokens, [row.index(1) if 1 in row else len(row) for row in sequences]

    def encode_words(
        self, rows: Sequence[Sequence[str]], max_tokens: int
    ) -> tuple[list[list[int]], list[dict[int, int]]]:
        """Return the tokens of each row's words, and the first token of each word as {place of the token: word}.

        Words are read as one text with a space between two, as the model met them when it was pretrained, and are found
        again by their letters. A word that is cut off, or of which the tokenizer keeps nothing, has no first token.

        Args:
            rows: The words of each row.
            max_tokens: How many tokens of a row are kept.
        """
        encoded = self._called([" ".join(row) for row in rows], max_tokens=max_tokens, return_offsets_mapping=True)
        return encoded["input_ids"], [_firsts(*row) for row in zip(rows, encoded["offset_mapping"], strict=True)]

    def encode_turns(
        self, prompts: Sequence[str], answers: Sequence[str] | None, system: str | None, max_tokens: int
    ) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each prompt and its answer, and at which of them what is to be answered begins.

        With a chat template the answer ends with what the template closes it with. Without one the form is: system text,
        blank line, prompt, blank line, answer, end-of-text token; a tokenizer's own start token comes first.

        Args:
            prompts: What each row asks.
            answers: What is answered; None stops each row where the answer would begin.
            system: What the model is told before each prompt.
            max_tokens: How many tokens of a row are kept. Where the answer begins may lie beyond.

        Raises:
            ModelError: The chat template fails, or does not begin prompt and answer with the prompt.
        """
        opened = [self._rendered(prompt, None, system) for prompt in prompts]
        whole = opened
        if answers is not None:
            whole = [self._rendered(prompt, answer, system) for prompt, answer in zip(prompts, answers, strict=True)]
        if not all(text.startswith(beginning) for beginning, text in zip(opened, whole, strict=True)):
            raise _template_error("changes the prompt when an answer follows it")
        opening: list[int] = []
        ending: list[int] = []
        if not self._backend.chat_template:
            opening = [token for token in self._backend("")["input_ids"][:1] if token == self._backend.bos_token_id]
            ending = [] if answers is None else self._end
        encoded = self._backend(
            whole,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens, begins = [], []
        for text, row, offsets in zip(opened, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token that holds the end of the prompt and the beginning of the answer is none of the answer's.
            answer = next((place for place, (start, _) in enumerate(offsets) if start >= len(text)), len(row))
            tokens.append([*opening, *row, *ending][:max_tokens])
            begins.append(len(opening) + answer)
        return tokens, begins

    def check_turns(self, system: str | None) -> None:
        """Return if prompts and answers can be told apart in what the chat template makes of them.

        Raises:
            ModelError: The template fails, leaves out the system text, or does not begin with the prompt's tokens where
                an answer follows: then the model would be trained after other tokens than it is asked after.
        """
        if not self._backend.chat_template:
            return
        opened, whole = self._rendered("Yes", None, system), self._rendered("Yes", "No", system)
        if system is not None and system.strip() not in opened:
            raise _template_error("leaves out [data] system")
        (before,), (after,) = (
            self._backend([text], add_special_tokens=False, verbose=False)["input_ids"] for text in (opened, whole)
        )
        if not whole.startswith(opened) or after[: len(before)] != before:
            raise _template_error("changes the prompt when an answer follows it")

    def closed(self, row: list[int], max_tokens: int) -> list[int]:
        """Return the row with the end-of-text token after it, if there is one, it is not there yet and there is room."""
        return [*row, *self._end][:max_tokens] if row[-1:] != self._end else row

    def opened(self, row: list[int]) -> list[int]:
        """Return the row without an end-of-text token after it, so that a model may go on."""
        return row[:-1] if row[-1:] == self._end else row

    def decode(self, row: Sequence[int]) -> str:
        """Return the text that tokens stand for, special ones left out."""
        return str(self._backend.decode(list(row), skip_special_tokens=True))

    def hide(self, row: Sequence[int], rate: float, seed: int) -> tuple[list[int], list[int]]:
        """Return the row with some of its tokens hidden, and as targets what these were, IGNORED elsewhere.

        Of the tokens that are not special a share `rate`, at least one, is chosen; of those, with probability 0.8 a token
        becomes the mask token, 0.1 any ordinary one, 0.1 it stays. All draws follow from the row's own tokens and the
        seed. A row of special tokens only has no target.

        Args:
            row: Tokens.
            rate: The share, above 0, at most 1.
            seed: From 0 to 2^64 - 1.

        Source: Devlin et al. 2019 (arXiv 1810.04805), Sec. 3.1; chosen once for each row, as in their Appendix A.1.

        Guarantee: what is hidden in a row does not depend on any other row.
        """
        tokens = np.array(row, dtype=np.int32)
        targets = np.full(len(tokens), IGNORED, dtype=np.int32)
        ordinary = np.flatnonzero(~np.isin(tokens, self._backend.all_special_ids))
        if len(ordinary):
            key = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=16, key=seed.to_bytes(8, "big")).digest()
            random = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
            count = max(1, round(rate * len(ordinary)))
            chosen = ordinary[np.argsort(random.random(len(ordinary)), kind="stable")[:count]]
            fate, other = random.random(count), random.random(count)
            targets[chosen] = tokens[chosen]
            others = self._vocabulary[(other * len(self._vocabulary)).astype(np.int64)]
            hidden = np.where(fate < 0.9, others, tokens[chosen])
            tokens[chosen] = np.where(fate < 0.8, self._backend.mask_token_id, hidden)
        return tokens.tolist(), targets.tolist()

    def check_mask(self) -> None:
        """Return if there is a mask token.

        Raises:
            ModelError: There is none.
        """
        if self._backend.mask_token_id is None:
            raise ModelError(
                "The base model's tokenizer has no mask token, so nothing can be hidden for masked-lm. Use a model that was "
                "pretrained with one, such as BERT, or the task causal-lm."
            )

    @functools.cached_property
    def _vocabulary(self) -> Ints:
        """All tokens that are not special, in order."""
        return np.setdiff1d(list(self._backend.get_vocab().values()), self._backend.all_special_ids)

    @property
    def _end(self) -> list[int]:
        return [] if self._backend.eos_token_id is None else [self._backend.eos_token_id]

    def _called(
        self, texts: list[str], pairs: list[str] | None = None, *, max_tokens: int, return_offsets_mapping: bool = False
    ) -> Any:  # noqa: ANN401  transformers' own
        return self._backend(
            texts,
            pairs,
            truncation="longest_first",
            max_length=max_tokens,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=return_offsets_mapping,
        )

    def _rendered(self, prompt: str, answer: str | None, system: str | None) -> str:
        if not self._backend.chat_template:
            return "\n\n".join([*([] if system is None else [system]), prompt, answer or ""])
        turns = [("system", system), ("user", prompt), ("assistant", answer)]
        try:
            # transformers renders in a sandbox; the plan's digest of the base model covers the template.
            rendered = self._backend.apply_chat_template(
                [{"role": role, "content": said} for role, said in turns if said is not None],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=answer is None,
            )
            return str(rendered)
        except Exception as error:  # a template may raise what it likes
            raise _template_error(f"fails on {'these turns' if system is None else 'a system turn'}", error) from None

    @functools.cached_property
    def _template(self) -> str:
        fixed = f"{{%- macro strftime_now(form) -%}}{FIXED_DATE}{{%- endmacro -%}}"
        return fixed + str(self._backend.get_chat_template())


def _template_error(what: str, error: Exception | None = None) -> ModelError:
    name = "" if error is None else f" ({type(error).__name__})"
    return ModelError(
        f"The chat template of the base model's tokenizer {what}{name}, so it cannot be used. Use a base model with another "
        "template or with none, and remove [data] system if the template knows no system turn."
    )


def _firsts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Return {place of a word's first token: the word}, where `offsets` are each token's letters in the joined words."""
    ends = np.cumsum([len(word) + 1 for word in words])  # the space after a word included
    firsts: dict[int, int] = {}
    last = -1
    for place, (start, end) in enumerate(offsets):
        # A token may begin with the space before its word, so its last letter says whose it is.
        word = int(np.searchsorted(ends, end - 1, side="right"))
        if end > start and word > last and end < ends[word]:
            firsts[place] = last = word
    return firsts
