"""How to log in to Redis, without the password standing where configuration is shown or logged."""

import os
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

from pydantic import model_validator

from expertmesh.runtime.config import Settings
from expertmesh.runtime.errors import ConfigError
from expertmesh.runtime.security.watched import read_file


class RedisSecrets(Settings):
    """Where the password is, and certificates for rediss://. Read whenever a connection is made."""

    password_file: str | None = None
    """File with the password, and nothing else; it must be there on every node."""
    password_env: str | None = None
    """Variable with the password, in the environment of every process."""
    ca_file: str | None = None
    """CA that has signed the server's certificate (PEM), for rediss://; none is the system's."""
    cert_file: str | None = None
    """Own certificate, if the server asks for one (PEM)."""
    key_file: str | None = None
    """Its private key (PEM)."""

    def sources(self) -> list[str]:
        """Fields that say where the password is."""
        return [name for name in ("password_file", "password_env") if getattr(self, name)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.sources()) > 1:
            raise ValueError(f"only one of them can have the password: {self.sources()}")
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        return self

    def read_password(self) -> str | None:
        """The password now; None if there is none.

        Raises:
            ConfigError: it is not where it should be.
        """
        if self.password_file is not None:
            content = read_file(self.password_file, "redis.password_file")
            return content.decode("utf-8", "replace").strip("\r\n")
        if self.password_env is not None:
            if self.password_env not in os.environ:
                message = f"redis.password_env: there is no variable {self.password_env}"
                raise ConfigError(message, field="redis.password_env")
            return os.environ[self.password_env]
        return None

    def tls_options(self, url: str) -> dict[str, Any]:
        """redis-py's, for this URL.

        Raises:
            ConfigError: a file cannot be read, or the URL does not ask for TLS.
        """
        files = {"ca_certs": self.ca_file, "certfile": self.cert_file, "keyfile": self.key_file}
        given = {f"ssl_{name}": file for name, file in files.items() if file is not None}
        if not url.startswith("rediss://"):
            if given:
                message = "redis.ca_file: certificates are for rediss:// URLs"
                raise ConfigError(message, field="redis.ca_file")
            return {}
        for file in given.values():
            read_file(file, "redis.ca_file, cert_file or key_file")
        return {"ssl_cert_reqs": "required", "ssl_check_hostname": True, **given}


def split_password(url: str) -> tuple[str, str | None]:
    """(the URL without its password, the password or None).

    Raises:
        ConfigError: not an URL, or the password is in its query. The text does not repeat it.
    """
    try:
        parts = urlsplit(url)
        password, _ = parts.password, parts.port
    except ValueError:
        raise _no_url() from None
    if "password" in parse_qs(parts.query):
        raise _no_url()
    if password is None:
        return url, None
    user, host = parts.username or "", parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{user}@{host}" if user else host)), unquote(password)


def split_user(url: str) -> tuple[str, str | None]:
    """(the URL without its user, the user or None); for a URL without a password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host)), unquote(parts.username or "") or None


def without_password(url: str) -> str:
    """The URL, for settings that are shown and logged.

    Raises:
        ValueError: it has a password.
    """
    if split_password(url)[1] is not None:
        raise ValueError(
            "a password in a URL is logged by Ray Serve; use redis_secrets.password_file"
        )
    return url


def _no_url() -> ConfigError:
    message = "redis.url: expected redis://host:port/db, rediss:// or unix://, and no password in ?"
    return ConfigError(message, field="redis.url")
