"""JWTs of an OpenID Connect provider, which here is an HTTP server on loopback with real keys."""

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from expertmesh.runtime.errors import ConfigError, Unauthenticated, Unavailable
from expertmesh.runtime.security import oidc
from expertmesh.runtime.security.guard import Caller
from expertmesh.runtime.security.oidc import OidcTokens, ProviderKeys
from expertmesh.runtime.security.settings import OidcSettings

AUDIENCE = "expertmesh"


@dataclass
class Provider:
    """Signs tokens and publishes its keys."""

    issuer: str = ""
    keys: dict[str, rsa.RSAPrivateKey] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    is_down: bool = False
    claimed_issuer: str = ""

    def add_key(self, kid: str) -> None:
        """One more."""
        self.keys[kid] = rsa.generate_private_key(65537, 2048)

    def settings(self, **more: str) -> OidcSettings:
        return OidcSettings.model_validate({"issuer": self.issuer, "audience": AUDIENCE} | more)

    def token(self, kid: str = "k1", key: Any = None, alg: str = "RS256", **claims: Any) -> str:
        """A good one, but for `claims`; None leaves one out."""
        good = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "alice",
            "exp": time.time() + 60,
            "scope": "openid generate control",
        }
        payload = {k: v for k, v in (good | claims).items() if v is not None}
        return jwt.encode(payload, key or self.keys[kid], algorithm=alg, headers={"kid": kid})

    def document(self, path: str) -> Any:
        """What is at a path."""
        if path == "/.well-known/openid-configuration":
            issuer = self.claimed_issuer or self.issuer
            return {"issuer": issuer, "jwks_uri": f"{self.issuer}/keys"}
        jwks = []
        for kid, key in self.keys.items():
            own = json.loads(RSAAlgorithm.to_jwk(key.public_key()))
            jwks.append(own | {"kid": kid, "use": "sig", "alg": "RS256"})
        return {"keys": jwks}


@pytest.fixture
def provider() -> Iterator[Provider]:
    own = Provider()
    own.add_key("k1")

    class Handler(BaseHTTPRequestHandler):
        """Answers with the provider's documents."""

        def do_GET(self) -> None:
            own.asked.append(self.path)
            body = json.dumps(own.document(self.path)).encode()
            self.send_response(503 if own.is_down else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not to stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    own.issuer = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield own
    server.shutdown()
    thread.join()
    server.server_close()


async def test_a_good_token_is_a_caller_with_our_scopes(provider: Provider) -> None:
    tokens = OidcTokens(provider.settings())
    scopes = frozenset({"generate", "control"})
    for _ in range(3):
        assert await tokens.caller_of(provider.token()) == Caller("oidc:alice", scopes)
    assert provider.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_scopes_may_be_a_list_under_another_name(provider: Provider) -> None:
    tokens = OidcTokens(provider.settings(scopes_claim="roles"))
    caller = await tokens.caller_of(provider.token(roles=["route", "else", 7]))
    assert caller
    assert caller.scopes == {"route"}
    caller = await tokens.caller_of(provider.token(roles={"route": True}))
    assert caller
    assert caller.scopes == frozenset()


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": 1}, "ExpiredSignature"),
        ({"exp": None}, "MissingRequiredClaim"),
        ({"aud": "another"}, "InvalidAudience"),
        ({"aud": None}, "MissingRequiredClaim"),
        ({"iss": "https://evil.example.com"}, "InvalidIssuer"),
        ({"sub": None}, "MissingRequiredClaim"),
        ({"nbf": 1e11}, "ImmatureSignature"),
    ],
)
async def test_a_wrong_claim_says_which(provider: Provider, claims: Any, why: str) -> None:
    token = provider.token(**claims)
    with pytest.raises(Unauthenticated, match=why) as refused:
        await OidcTokens(provider.settings()).caller_of(token)
    assert token not in refused.value.message


async def test_forged_signatures(provider: Provider) -> None:
    tokens = OidcTokens(provider.settings())
    own = rsa.generate_private_key(65537, 2048)
    with pytest.raises(Unauthenticated, match="InvalidSignature"):
        await tokens.caller_of(provider.token(key=own))
    with pytest.raises(Unauthenticated, match="key of nobody"):
        await tokens.caller_of(provider.token("unknown", key=own))
    with pytest.raises(Unauthenticated, match="Algorithm"):  # the public key as a shared secret
        await tokens.caller_of(provider.token(key="x" * 64, alg="HS256"))
    unsigned = jwt.encode({"sub": "a"}, "", algorithm="none", headers={"kid": "k1"})
    with pytest.raises(Unauthenticated, match="Algorithm"):
        await tokens.caller_of(unsigned)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "..", "expertmesh-abc", "\u00e9.\u00e9"])
async def test_what_is_no_jwt_is_left_to_others(provider: Provider, token: str) -> None:
    assert await OidcTokens(provider.settings()).caller_of(token) is None


class Clock:
    """Seconds that pass when told to."""

    now_s = 1e6

    def __call__(self) -> float:
        return self.now_s


async def test_a_new_key_is_fetched_and_made_up_ids_are_not_asked_for(provider: Provider) -> None:
    clock = Clock()
    keys = ProviderKeys(provider.settings(jwks_url=provider.issuer), oidc.fetch_json, clock)
    assert await keys.key("k1")
    provider.add_key("k2")
    for number in range(50):
        assert await keys.key(f"made-up {number}") is None
    assert len(provider.asked) == 1
    clock.now_s += oidc.RETRY_S
    found = await asyncio.gather(*(keys.key("k2") for _ in range(20)))
    assert all(found)
    assert len(provider.asked) == 2


async def test_a_provider_that_is_down_is_not_our_outage(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = ProviderKeys(provider.settings(), oidc.fetch_json, clock)
    provider.is_down = True
    with pytest.raises(Unavailable):
        await keys.key("k1")
    provider.is_down = False
    clock.now_s += oidc.RETRY_S
    assert await keys.key("k1")
    provider.is_down = True
    clock.now_s += 3600
    assert await keys.key("k1")
    assert "could not be read: HTTPError" in caplog.text


async def test_a_discovery_document_of_somebody_else(
    provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    provider.claimed_issuer = "https://elsewhere.example.com"
    with pytest.raises(Unavailable):
        await OidcTokens(provider.settings()).caller_of(provider.token())
    assert "ConfigError" in caplog.text


@pytest.mark.parametrize("url", ["http://login.example.com", "file:///etc/passwd", "ftp://h", "x"])
def test_keys_come_over_https_only(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        OidcTokens(OidcSettings(issuer=url, audience="a"))
    with pytest.raises(ConfigError, match="https"):
        OidcTokens(OidcSettings(issuer="https://x", audience="a", jwks_url=url))
