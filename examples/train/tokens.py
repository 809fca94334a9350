"""From documents to batches: the tokenizer, the validation split and the sampling of sequences.

Shapes: N tokens of one domain in a row, W windows, B sequences in a batch, S tokens in a sequence.
"""

import itertools
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"


def train_tokenizer(
    documents: list[str], vocab_size: int, max_tokens: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is in the vocabulary, so no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def split_documents(documents: list[str], held_out_frac: float) -> tuple[list[str], list[str]]:
    """Return (train, validation), cut between documents so that no document is in both."""
    num_held_out = max(1, round(held_out_frac * len(documents)))
    return documents[num_held_out:], documents[:num_held_out]


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents in a row, each closed by the end-of-text token."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    closed = ([*encoding.ids, tokenizer.eos_token_id] for encoding in encodings)
    return torch.tensor(list(itertools.chain.from_iterable(closed)))


def sample_batches(
    ids_N_by_domain: dict[str, Tensor], batch_size: int, sequence_tokens: int, seed: int
) -> Iterator[Tensor]:
    """Endless batches [B, S]; each sequence starts anywhere in a domain drawn with equal chance."""
    generator = torch.Generator().manual_seed(seed)
    domains = list(ids_N_by_domain.values())
    while True:
        drawn = torch.randint(len(domains), (batch_size,), generator=generator)
        starts = torch.rand(batch_size, generator=generator)
        yield torch.stack(
            [
                _slice(domains[domain], start, sequence_tokens)
                for domain, start in zip(drawn.tolist(), starts.tolist(), strict=True)
            ]
        )


def windows(ids_N: Tensor, max_windows: int, sequence_tokens: int) -> Tensor:
    """Return the same sequences in every run, disjoint and spread over the domain."""
    ids_WS = ids_N[: len(ids_N) // sequence_tokens * sequence_tokens].view(-1, sequence_tokens)
    stride = max(1, len(ids_WS) // max_windows)
    return ids_WS[::stride][:max_windows]


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Bytes of text behind each id [V]; the byte-level alphabet has one character per byte."""
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if i in special else len(token) for i, token in enumerate(tokens)])


def _slice(ids_N: Tensor, start_frac: float, num_tokens: int) -> Tensor:
    start = int(start_frac * (len(ids_N) - num_tokens))
    return ids_N[start : start + num_tokens]
