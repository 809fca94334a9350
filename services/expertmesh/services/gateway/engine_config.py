"""Sizes of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. The first three matter for continuous batching only."""

    max_batch_tokens: int = 1024
    """Tokens in one forward, prompts and answers of all requests together."""
    kv_cache_tokens: int = 16384
    """Tokens of all running requests together whose keys and values are kept; also the most a
    single request may have. Allocated at start."""
    page_size: int = 64
    """Tokens per page of that cache, at least 4."""
    max_running: int = 32
    """Requests in one batch."""
    max_waiting: int = 256
    """Requests accepted while `max_running` are running; one more is QueueFull."""
    max_prompt_tokens: int = 1 << 20
    """Tokens of the prompts of all of them; more are QueueFull."""
    share_prefixes: bool = True
    """Let continuous batching reuse keys and values of prompts that begin alike."""
    flash_attention: bool = False
    """Let continuous batching switch to an installed flash attention: faster on a GPU, but other
    bits than transformers' default attention."""
