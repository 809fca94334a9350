"""What the configuration says about security. Paths and names only: no field holds a secret."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from expertmesh.runtime.config import Settings


class TlsSettings(Settings):
    """Certificates of the mesh's own processes, in PEM; read again when they change."""

    cert_file: str | None = None
    """This process's certificate, and what leads from it to the CA; none is plaintext."""
    key_file: str | None = None
    """The private key of the certificate, not encrypted."""
    ca_file: str | None = None
    """The CA that has signed the certificates of the mesh, and of callers with `client_auth`."""
    client_auth: Literal["none", "required"] = "none"
    """"required": router and gateway take only callers with a certificate of the CA. Replicas
    always do, and it must have the mesh's identity."""

    @property
    def enabled(self) -> bool:
        """Whether gRPC is encrypted."""
        return self.cert_file is not None

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        files = {name: getattr(self, name) for name in ("cert_file", "key_file", "ca_file")}
        missing = [name for name, file in files.items() if not file]
        if missing and len(missing) < len(files):
            raise ValueError(f"TLS needs cert_file, key_file and ca_file; missing: {missing}")
        if missing and self.client_auth == "required":
            raise ValueError("client_auth: callers have certificates only with TLS: set cert_file")
        return self


class OidcSettings(Settings):
    """Tokens of an OpenID Connect provider, as JWTs."""

    issuer: str | None = None
    """The provider, as `iss` in its tokens; none takes no such tokens."""
    audience: str | None = None
    """What tokens must have in `aud`."""
    jwks_url: str | None = None
    """Where the provider's public keys are; none asks the issuer's discovery document."""
    scopes_claim: str = "scope"
    """Claim with the scopes: words in a string, or a list."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if bool(self.issuer) != bool(self.audience):
            raise ValueError("OIDC needs issuer and audience, both")
        return self


class CallLimits(Settings):
    """Of each caller, in each router and gateway process."""

    calls_per_s: PositiveFloat | None = None
    """Calls begun per second, over time; none is no limit."""
    burst_calls: PositiveInt = 10
    """Calls that may begin at once, before `calls_per_s` counts."""
    running_calls: PositiveInt | None = None
    """Calls running at the same time; none is no limit."""


class SecuritySettings(Settings):
    """Encryption, who may call, and how much."""

    insecure: bool = False
    """Listen without TLS on addresses that are not loopback: only in a network where everybody may
    use, and stop, your model."""
    tokens_file: str | None = None
    """Names, hashes and scopes of the tokens that router and gateway take (`expertmesh token`)."""
    tls: TlsSettings = TlsSettings()
    oidc: OidcSettings = OidcSettings()
    limits: CallLimits = CallLimits()

    @property
    def asks_for_tokens(self) -> bool:
        """Whether callers of router and gateway need a token."""
        return self.tokens_file is not None or self.oidc.issuer is not None
