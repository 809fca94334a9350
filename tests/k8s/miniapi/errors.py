"""What the server answers when it does not do something."""


class ApiError(Exception):
    """A status with code and reason, as kubectl expects it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message

    def status(self) -> dict[str, object]:
        """The body."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }


def invalid(obj: dict[str, object], what: str) -> ApiError:
    """422, naming the object."""
    metadata = obj["metadata"]
    assert isinstance(metadata, dict)
    name = metadata.get("name")
    return ApiError(422, "Invalid", f'{obj["kind"]} "{name}" is invalid: {what}')
