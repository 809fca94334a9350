"""One generation over as many calls as it takes: what has come, and whether to go on. Pure."""

from dataclasses import dataclass

from expertmesh.client.retries import Patience
from expertmesh.runtime.errors import ExpertMeshError, Unavailable
from expertmesh.v1 import generate_pb2

RESUMES = 8
"""How often a broken answer is taken up again without a new token in between: for about 9 s."""


@dataclass(frozen=True)
class Chunk:
    """What is new since the last chunk."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    """"length", "eos" or "stop" in the last chunk, else ""."""
    prompt_tokens: int
    """In the last chunk."""
    generated_tokens: int
    """In the last chunk."""
    degraded_mass: float = 0.0
    """What missing experts have cost so far: the largest share of a token's weights in a layer that
    was for experts without a live replica; 0 if everything is exact."""
    mean_degraded_mass: float = 0.0
    """The mean over all tokens and layers so far, the prompt's included; after a gateway was lost,
    over what the next one computed."""


class Course:
    """The calls of one generation.

    An answer whose connection breaks is taken up by the next call where it broke: the gateway
    computes what came so far once more, as part of the prompt. Not with a seed, whose draws cannot
    be taken up.

    Args:
        request: of the first call.
        retries: how often what has not begun is tried again, when the gateway says.
        timeout_s: for everything, pauses included.
    """

    def __init__(
        self, request: generate_pb2.GenerateRequest, retries: int, timeout_s: float | None
    ) -> None:
        self.request = generate_pb2.GenerateRequest()
        """Of the next call."""
        self.request.CopyFrom(request)
        self.is_over = False
        """Whether the last chunk has come."""
        self._retries = retries
        self._patience = Patience(retries, timeout_s)
        self._has_begun = False
        """Whether the present call has brought anything."""
        self._broken: ExpertMeshError | None = None
        self._largest = 0.0

    def left_s(self) -> float | None:
        """Time that the next call may take."""
        return self._patience.left_s()

    def take(self, response: generate_pb2.GenerateResponse) -> Chunk:
        """What a message of the present call brings.

        Raises:
            ExpertMeshError: the error that broke the call before, if this gateway does not go on
                where that stopped: one from before `generated` was a field.
        """
        had = self.request.generated.ids
        if self._broken is not None and response.position != len(had):
            raise self._broken
        self._has_begun = True
        had.extend(response.tokens)
        self._largest = max(self._largest, response.degraded_mass.largest)
        reason = generate_pb2.FinishReason.Name(response.finish_reason)
        name = reason.removeprefix("FINISH_REASON_").lower()
        self.is_over = name != "unspecified"
        return Chunk(
            response.text,
            tuple(response.tokens),
            name if self.is_over else "",
            response.prompt_tokens,
            response.generated_tokens,
            self._largest,
            response.degraded_mass.mean,
        )

    def pause_s(self, error: ExpertMeshError) -> float:
        """How long to wait before the next call, after one that failed.

        Raises:
            ExpertMeshError: the error itself, if there should be no other.
        """
        if self.is_over:
            return 0.0
        if self._has_begun:
            # a gateway that says why it stops has its reasons; a lost one says nothing
            if type(error) is not Unavailable or self.request.sampling.HasField("seed"):
                raise error
            self._has_begun, self._broken = False, error
            self._patience = Patience(max(self._retries, RESUMES), self.left_s())
        return self._patience.pause_s(error)
