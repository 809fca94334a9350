"""The prompt of a request, as tokens, at no cost for other callers."""

import asyncio
from collections.abc import Callable

from expertmesh.runtime.errors import InvalidInput
from expertmesh.services.gateway.sampling import Limits
from expertmesh.v1 import generate_pb2 as pb

MAX_CHARS_PER_TOKEN = 64
"""Of a whole prompt, on average; ordinary text has about four."""
_SHORT_CHARS = 16 << 10


async def prompt_of(
    request: pb.GenerateRequest,
    tokenize: Callable[[pb.GenerateRequest], list[int]],
    limits: Limits,
) -> list[int]:
    """The tokens. A long text is tokenised beside the event loop, which has others to serve; one
    that no tokenizer can bring below the limit is not tokenised at all.

    Raises:
        InvalidInput: the text is too long.
    """
    num_chars = len(request.text)
    if num_chars > MAX_CHARS_PER_TOKEN * limits.max_positions:
        expected = f"a text of fewer than {limits.max_positions} tokens"
        raise InvalidInput.of("prompt", expected=expected, got=f"{num_chars} characters")
    if num_chars <= _SHORT_CHARS:
        return tokenize(request)
    return await asyncio.to_thread(tokenize, request)
