"""Bearer tokens of an OpenID Connect provider: JWTs, signed with the keys it publishes."""

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jwt

from expertmesh.runtime.errors import ConfigError, Unauthenticated, Unavailable
from expertmesh.runtime.security.access import host_of, is_loopback
from expertmesh.runtime.security.guard import Caller
from expertmesh.runtime.security.settings import OidcSettings
from expertmesh.runtime.security.tokens import SCOPES

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
"""Signatures only: with a shared secret, whoever checks tokens could make them."""
_CLOCK_SKEW_S = 30.0
_KEYS_LAST_S = 300.0
RETRY_S = 10.0
"""Keys are fetched no more often: a caller with made-up key ids must not drive us to ask."""
_FETCH_TIMEOUT_S = 5.0
_MAX_DOCUMENT_BYTES = 1 << 20

Fetch = Callable[[str], Any]


class OidcTokens:
    """An `Authenticator` for one provider.

    Args:
        fetch: gets a JSON document by URL; blocks.

    Raises:
        ConfigError: an URL that is not safe to ask.
    """

    def __init__(self, settings: OidcSettings, fetch: Fetch | None = None) -> None:
        self._settings = settings
        self._keys = ProviderKeys(settings, fetch or fetch_json)

    async def caller_of(self, token: str) -> Caller | None:
        """See `Authenticator.caller_of`.

        Raises:
            Unavailable: the provider's keys cannot be had.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            return None
        key = await self._keys.key(str(header.get("kid", "")))
        if key is None:
            raise Unauthenticated("authorization: the token is signed with a key of nobody we know")
        try:
            claims = self._verified(token, key)
        except jwt.PyJWTError as error:
            # the class says why; the text may repeat what is in the token
            why = type(error).__name__
            raise Unauthenticated(f"authorization: the token is not valid: {why}") from None
        return Caller(_name(claims), _scopes(claims.get(self._settings.scopes_claim)))

    def _verified(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=ALGORITHMS,
            audience=self._settings.audience,
            issuer=self._settings.issuer,
            leeway=_CLOCK_SKEW_S,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        return claims


class ProviderKeys:
    """The provider's public keys by id; fetched when first needed, and again now and then."""

    def __init__(
        self, settings: OidcSettings, fetch: Fetch, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._fetch = fetch
        self._clock = clock
        self._lock = asyncio.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._tried_s = -RETRY_S
        self._fetched_s = -_KEYS_LAST_S
        for url in (settings.issuer, settings.jwks_url):
            if url is not None:
                check_url(url)

    async def key(self, kid: str) -> jwt.PyJWK | None:
        """The key of this id; None if the provider has none.

        Raises:
            Unavailable: no keys have come yet.
        """
        if kid not in self._keys or self._is_due(kid):
            async with self._lock:  # whose turn it is not finds the keys that have just come
                if self._is_due(kid):
                    await self._refresh()
        if not self._keys:
            raise Unavailable("the identity provider's keys are not there; try again later")
        return self._keys.get(kid)

    def _is_due(self, kid: str) -> bool:
        now_s = self._clock()
        is_stale = kid not in self._keys or now_s - self._fetched_s >= _KEYS_LAST_S
        return is_stale and now_s - self._tried_s >= RETRY_S

    async def _refresh(self) -> None:
        self._tried_s = self._clock()
        try:
            self._keys = await asyncio.to_thread(self._read)
            self._fetched_s = self._clock()
        except Exception as error:  # whatever the provider sends, calls go on with the keys we have
            logger.error("the identity provider's keys could not be read: %s", type(error).__name__)

    def _read(self) -> dict[str, jwt.PyJWK]:
        url = self._settings.jwks_url or self._discovered()
        keys = jwt.PyJWKSet.from_dict(self._fetch(url)).keys
        return {key.key_id or "": key for key in keys if key.public_key_use in (None, "sig")}

    def _discovered(self) -> str:
        issuer = str(self._settings.issuer)
        document = self._fetch(issuer.rstrip("/") + "/.well-known/openid-configuration")
        if document["issuer"] != issuer:
            raise ConfigError("the discovery document is of another issuer", field="security.oidc")
        url = str(document["jwks_uri"])
        check_url(url)
        return url


def _name(claims: Mapping[str, Any]) -> str:
    """Never that of an entry in the file of tokens."""
    return f"oidc:{claims['sub']}"[:100]


def _scopes(claim: Any) -> frozenset[str]:
    words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(SCOPES).intersection(word for word in words if isinstance(word, str))


def check_url(url: str) -> None:
    """Raise ConfigError unless nobody on the way can change what is fetched there."""
    scheme, _, rest = url.partition("://")
    if scheme != "https" and not (scheme == "http" and is_loopback(host_of(rest.split("/")[0]))):
        raise ConfigError(
            "security.oidc: expected an https:// URL, as who changes the keys on the way can make "
            f"tokens; got {scheme}://",
            field="security.oidc",
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Nowhere else."""


def fetch_json(url: str) -> Any:
    """The document at a checked URL, without following it elsewhere."""
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(url, timeout=_FETCH_TIMEOUT_S) as response:
        data = response.read(_MAX_DOCUMENT_BYTES + 1)
    if len(data) > _MAX_DOCUMENT_BYTES:
        raise ValueError("the document is too large")
    return json.loads(data)
