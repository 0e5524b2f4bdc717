"""Captions of concepts, and the tokenizer that is trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from emoji_styles import COARSE_LABELS, TEMPLATES, coarse_label
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import CLIPTokenizer

MAX_TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Captions:
    """What can be said about each of C concepts, with W distinct words in all.

    Attributes:
        concepts: Concept slugs; their order is the concept index.
        words: Distinct names and keywords.
        names: Index of each concept's name in `words` [C].
        keywords: For each concept the indices of its keywords in `words`; never empty.
        says: Whether a word is true of a concept [C, W], bool.
        label_sets: Sets of broader labels, each with the label index of every concept [C]
            (-1: none).
    """

    concepts: tuple[str, ...]
    words: tuple[str, ...]
    names: Tensor
    keywords: tuple[tuple[int, ...], ...]
    says: Tensor
    label_sets: tuple[tuple[tuple[str, ...], Tensor], ...]


def collect_captions(dataset: Dataset) -> Captions:
    """Read the captions of the concepts in a split.

    Args:
        dataset: The training split, so that nothing of a held-out concept is used.

    Returns:
        Captions of its concepts.
    """
    columns = ["concept", "text", "keywords", "category", "subgroup"]
    rows = {row["concept"]: row for row in dataset.select_columns(columns).to_list()}
    concepts = tuple(sorted(rows))
    table = [rows[concept] for concept in concepts]
    phrases = [[row["text"].lower(), *_usable(row["keywords"])] for row in table]
    words = tuple(sorted({word for phrase in phrases for word in phrase}))
    index = {word: position for position, word in enumerate(words)}
    numbers = [[index[word] for word in phrase] for phrase in phrases]
    says = torch.zeros(len(concepts), len(words), dtype=torch.bool)
    for concept, known in enumerate(numbers):
        says[concept, known] = True
    return Captions(
        concepts=concepts,
        words=words,
        names=torch.tensor([known[0] for known in numbers]),
        keywords=tuple(tuple(known[1:] or known) for known in numbers),
        says=says,
        label_sets=_label_sets(table),
    )


def _usable(keywords: Iterable[str]) -> list[str]:
    return [word for word in keywords if len(word) > 1 and any(char.isalpha() for char in word)]


def _label_sets(table: Sequence[dict]) -> tuple[tuple[tuple[str, ...], Tensor], ...]:
    """Return the coarse words (twice as often as the others), sub-groups and groups."""
    coarse = _label_set([coarse_label(row["subgroup"]) for row in table], list(COARSE_LABELS))
    subgroup = _label_set([row["subgroup"].replace("-", " ") for row in table])
    category = _label_set([row["category"].lower() for row in table])
    return (coarse, coarse, subgroup, category)


def _label_set(
    labels: Sequence[str | None], order: Sequence[str] | None = None
) -> tuple[tuple[str, ...], Tensor]:
    order = tuple(order or sorted({label for label in labels if label is not None}))
    index = {label: position for position, label in enumerate(order)}
    return order, torch.tensor([-1 if label is None else index[label] for label in labels])


def draw_words(
    captions: Captions, concepts: Tensor, keyword_share: float, generator: torch.Generator
) -> Tensor:
    """Draw one true word per concept.

    Args:
        captions: Of all concepts.
        concepts: Concept indices [B].
        keyword_share: How often a keyword replaces the name.
        generator: Fixes the draw.

    Returns:
        Indices [B] in `captions.words`.
    """
    chosen = captions.names[concepts].clone()
    luck = torch.rand(2, len(concepts), generator=generator)
    for row in (luck[0] < keyword_share).nonzero().squeeze(1).tolist():
        options = captions.keywords[int(concepts[row])]
        chosen[row] = options[int(luck[1, row] * len(options))]
    return chosen


def fill_templates(words: Sequence[str], generator: torch.Generator) -> list[str]:
    """Put every word in a random caption template."""
    picks = torch.randint(len(TEMPLATES), (len(words),), generator=generator).tolist()
    return [TEMPLATES[pick].format(word) for pick, word in zip(picks, words, strict=True)]


def train_tokenizer(captions: Captions, vocabulary: int) -> CLIPTokenizer:
    """Train CLIP's lower-casing byte-level BPE on the training captions.

    Args:
        captions: Of the training concepts.
        vocabulary: Number of tokens: 2 special ones, 256 bytes within and 256 at the end of words
            (so that any text can be encoded), and merges.

    Returns:
        Tokenizer whose end token is 1. (CLIP pools differently if it is 2.)
    """
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [START, END, *alphabet, *(char + "</w>" for char in alphabet)]
    backend = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).backend_tokenizer
    backend.model = models.BPE(end_of_word_suffix="</w>")
    labels = [label for names, _ in captions.label_sets for label in names]
    corpus = [*captions.words, *labels, *(template.format("") for template in TEMPLATES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary + len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    merges = _merges(backend)[: max(0, vocabulary - len(base))]
    vocab = {token: number for number, token in enumerate(base)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    pairs: Any = merges  # annotated as strings, used as pairs
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=MAX_TOKENS)


def _merges(backend: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(backend.to_str())["model"]["merges"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
    return [(left, right) for left, right in pairs]
