"""Composes what protects router and gateway, and checks before the start that it can be used."""

from expertmesh.runtime.security.guard import Authenticator, PublicGuard
from expertmesh.runtime.security.server import ServerSecurity, check_plaintext, server_credentials
from expertmesh.runtime.security.settings import SecuritySettings
from expertmesh.runtime.security.tokens import FileTokens
from expertmesh.services.settings import MeshSettings

SCOPES = {
    "expertmesh.v1.RouterService": "route",
    "expertmesh.v1.GenerateService": "generate",
    "expertmesh.v1.ControlService": "control",
    "expertmesh.v1.ControllerService": "control",
}
"""Service -> the scope that a token needs for it."""


def public_security(security: SecuritySettings, mesh: str) -> ServerSecurity:
    """Of router and gateway.

    Raises:
        ConfigError: the file of tokens cannot be used.
    """
    guard = PublicGuard(SCOPES, authenticators(security), security.limits, mesh)
    limits = security.limits
    is_limited = limits.calls_per_s is not None or limits.running_calls is not None
    return ServerSecurity(
        security.tls,
        mesh,
        requires_certificate=security.tls.client_auth == "required",
        guard=guard if security.asks_for_tokens or is_limited else None,
        insecure=security.insecure,
    )


def authenticators(security: SecuritySettings) -> list[Authenticator]:
    """One for each kind of token.

    Raises:
        ConfigError: the file of tokens, or the provider's address, cannot be used.
    """
    found: list[Authenticator] = []
    if security.tokens_file is not None:
        found.append(FileTokens(security.tokens_file))
    if security.oidc.issuer is not None:
        from expertmesh.runtime.security.oidc import OidcTokens  # jwt: for those who need it

        found.append(OidcTokens(security.oidc))
    return found


def check_security(settings: MeshSettings) -> None:
    """What would keep a process of this mesh from listening.

    Raises:
        ConfigError: names the setting.
    """
    security = settings.security
    authenticators(security)
    if security.tls.enabled:
        server_credentials(security.tls, settings.mesh, requires_certificate=True)
        return
    for section in ("experts", "router", "gateway", "controller"):
        host = getattr(settings, section).host
        check_plaintext(f"{section}.host", host, insecure=security.insecure)
