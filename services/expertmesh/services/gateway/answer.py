"""An answer on its way: from tokens to the messages of GenerateService."""

import asyncio
from dataclasses import dataclass, field

from expertmesh.runtime.errors import InvalidInput
from expertmesh.runtime.missing_experts import DegradedMass
from expertmesh.services.gateway.sampling import GenerationRequest
from expertmesh.services.gateway.text_stream import TextStream
from expertmesh.v1 import generate_pb2 as pb

_FEW_TOKENS = 64


@dataclass
class Answer:
    """One answer on its way: text, counts and how it ends."""

    request: GenerationRequest
    text: TextStream
    degraded: DegradedMass = field(default_factory=DegradedMass)
    num_tokens: int = 0
    finish: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED
    _pieces: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Takes up what the caller already has, text included.

        Raises:
            InvalidInput: nothing comes after it.
        """
        for token in self.request.generated:
            self._take(token)
            if self.finish:
                expected = "tokens that an answer goes on after"
                got = f"an answer that ends with its token {self.num_tokens}"
                raise InvalidInput.of("generated", expected=expected, got=got)
        self._pieces.clear()

    def step(self, tokens: list[int]) -> pb.GenerateResponse:
        """The message for these tokens; those after the end, if any, are dropped."""
        used, position = [], self.num_tokens
        for token in tokens:
            used.append(token)
            self._take(token)
            if self.finish:
                break
        message = pb.GenerateResponse(
            tokens=used,
            text="".join(self._pieces),
            finish_reason=self.finish,
            position=position,
            degraded_mass=self.degraded.to_proto(),
        )
        self._pieces.clear()
        if self.finish:
            message.prompt_tokens = len(self.request.prompt) - self.request.num_generated
            message.generated_tokens = self.num_tokens
        return message

    def _take(self, token: int) -> None:
        self.num_tokens += 1
        piece = self.text.push([token])
        if not piece.stopped:
            self.finish = self._ended_by(token)
            if self.finish:
                self._pieces.append(piece.text)
                piece = self.text.flush()
        self._pieces.append(piece.text)
        if piece.stopped:
            self.finish = pb.FINISH_REASON_STOP

    def _ended_by(self, token: int) -> pb.FinishReason.ValueType:
        if token in self.request.eos_ids:
            return pb.FINISH_REASON_EOS
        if self.num_tokens == self.request.num_generated + self.request.max_new_tokens:
            return pb.FINISH_REASON_LENGTH
        return pb.FINISH_REASON_UNSPECIFIED


async def answer_to(request: GenerationRequest, text: TextStream) -> Answer:
    """An answer to begin or to take up; a long one beside the event loop, which has others to
    serve.

    Raises:
        InvalidInput: nothing comes after what the caller already has.
    """
    if request.num_generated <= _FEW_TOKENS:
        return Answer(request, text)
    return await asyncio.to_thread(Answer, request, text)
