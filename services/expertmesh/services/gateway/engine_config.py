"""Sizes of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. The first three matter for continuous batching only."""

    max_batch_tokens: int = 1024
    """Tokens in one forward, prompts and answers of all requests together."""
    kv_cache_tokens: int = 16384
    """Tokens of all running requests together whose keys and values are kept; also the most a
    single request may have. Checked at start, taken as needed."""
    page_size: int = 64
    """A request's part of it grows by multiples of so many tokens."""
    max_running: int = 32
    """Requests in one batch."""
    max_waiting: int = 256
    """Requests accepted while `max_running` are running; one more is QueueFull."""
    max_prompt_tokens: int = 1 << 20
    """Tokens of the prompts of all of them; more are QueueFull."""
    stream_interval_s: float = 0.02
    """Tokens between a request's first and last wait so long at most for those of further steps,
    to travel with them in one message."""
