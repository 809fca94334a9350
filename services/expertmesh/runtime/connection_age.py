"""How long a server keeps a connection, so that callers get to servers that came later."""

from pydantic import PositiveFloat

from expertmesh.runtime.channels import Options
from expertmesh.runtime.config import Settings


class ConnectionAge(Settings):
    """A client asks DNS, and a plain Service chooses a Pod, for new connections only. Source:
    https://github.com/grpc/proposal/blob/master/A9-server-side-conn-mgt.md
    """

    max_connection_age_s: PositiveFloat | None = None
    """Age at which a connection takes no new calls and the client makes another, give or take 10 %
    by chance; none keeps it for as long as the client does."""
    connection_grace_s: PositiveFloat | None = None
    """Time running calls have to end after that, before they are cut; none lets them end."""

    def options(self) -> Options:
        """Of a gRPC server."""
        times_s = {
            "grpc.max_connection_age_ms": self.max_connection_age_s,
            "grpc.max_connection_age_grace_ms": self.connection_grace_s,
        }
        return [(name, round(1e3 * own)) for name, own in times_s.items() if own is not None]
