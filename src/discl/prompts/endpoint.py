"""The base URL and the API key of a chat server, checked before anything is sent."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, urlsplit

from ..errors import EndpointError, RecipeError, shorten

_KEY_NAME = re.compile(r"KEY|TOKEN")
_OTHER_SECRET = re.compile(r"^AWS_|SECRET|PASS|PRIVATE|SSH|CREDENTIAL|SESSION")


def check_url(url: str) -> str:
    """The base URL without a slash at its end.

    Raises RecipeError for a text that is no base URL, or that holds a password.
    """
    if set("@?#") & set(url):
        raise RecipeError(
            "a base URL holds neither a password nor a query (no '@', '?' or '#'); put a key into "
            "an environment variable, and name the variable."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise RecipeError(f"{shorten(url)} is no base URL: {error}.") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        raise RecipeError(
            f"{shorten(url)} is no base URL; it begins with http:// or https:// and often ends "
            "in /v1."
        )
    if not _is_host(parts.hostname):
        raise RecipeError(
            f"{shorten(url)} is no base URL: {shorten(parts.hostname)} can be no host; a host is "
            "an address, or labels of 1 to 63 letters, digits and hyphens with dots between them."
        )
    if not (url.isprintable() and " " not in url and parts.path.isascii()):
        raise RecipeError(
            f"{shorten(url)} is no base URL: its path may hold ASCII characters only and no space; "
            f"write it as {shorten(quote(parts.path, safe='/%', errors='replace'), quoted=False)}."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _is_host(name: str) -> bool:
    """Whether it can be looked up: an address, or labels of letters, digits, '-' and '_'."""
    try:
        plain = name.encode("idna").decode()
    except UnicodeError:
        return False
    return ":" in plain or all(
        re.fullmatch(r"[A-Za-z0-9_-]{1,63}", label) for label in plain.removesuffix(".").split(".")
    )


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable; None without a variable.

    A recipe names both the variable and the server that gets its value. So only variables with KEY
    or TOKEN in their name are read, and none with AWS or a word for a password.

    Raises EndpointError for another variable, for one that is not set, and for a value with a
    space, a line break or a character that is not ASCII.
    """
    if variable is None:
        return None
    if not _KEY_NAME.search(variable.upper()) or _OTHER_SECRET.search(variable.upper()):
        raise EndpointError(
            f"{variable} is not named like an API key, so it is not sent; put the key into a "
            "variable with KEY or TOKEN in its name, such as OPENAI_API_KEY.",
            argument="key_variable",
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EndpointError(
            f"the environment variable {variable}, which should hold the API key, is not set; "
            "export it and run the command again.",
            argument="key_variable",
        )
    check_key(key, f"the API key in the environment variable {variable}")
    return key


def check_key(key: str, what: str) -> None:
    """Raises EndpointError for a character that no header can hold, without showing it."""
    strange = re.search(r"[^!-~]", key)
    if strange:
        raise EndpointError(
            f"{what} cannot be sent: its character {strange.start() + 1} is a space, a line break "
            "or no ASCII character (the key itself is not shown); copy it once more.",
            argument="key_variable",
        )
