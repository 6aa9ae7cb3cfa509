"""Signs encoded images as C2PA content credentials, with a certificate of the user's.

It needs the extra `discl[c2pa]`. Nothing is requested from the network.
"""

from __future__ import annotations

import datetime
import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import c2pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from PIL import Image

from ..errors import RecipeError, StoreError
from .marks import SYNTHETIC
from .signatures import MIME_TYPES, suffix_of

CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
LARGEST_FILE = 1 << 20
"""Bytes of a certificate chain or key; larger files are something else."""
SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_trust": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}
"""No thumbnail, and no requests. Whether the certificate is trusted is up to who reads an image."""


class ContentSigner:
    """Signs images with a certificate and its key.

    The manifest has the action `c2pa.created` with IPTC's source type trainedAlgorithmicMedia, this
    package with its version, and the id of the image. There is no time stamp, so a signature is
    valid as long as the certificate.

    - `certificate`: PEM file with the certificate, followed by those that issued it.
    - `key`: PEM file with its private key, without a password. It is only held in memory.

    Raises RecipeError for files that cannot be read, are of another kind or do not belong together,
    for a certificate that is not valid now, and for one that C2PA does not allow.

    ```python
    from pathlib import Path

    from discl.export.signing import ContentSigner

    signer = ContentSigner(Path("chain.pem"), Path("key.pem"))
    signed = signer.sign(Path("bag.png").read_bytes(), "bag-1")
    ```
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        chain, secret = _read(certificate, "certificate"), _read(key, "key")
        own, private = _load_certificate(certificate, chain), _load_key(key, secret)
        if _public_bytes(own.public_key()) != _public_bytes(private.public_key()):
            raise RecipeError(
                f"{key} is not the key of the certificate in {certificate}. The certificate to "
                "sign with comes first in its file.",
                argument="key",
            )
        _check_dates(certificate, own)
        self.name = _common_name(own)
        self.digest = own.fingerprint(hashes.SHA256()).hex()
        plain = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            info = c2pa.C2paSignerInfo(_algorithm(key, private), chain, plain, None)
            self._signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context(c2pa.Settings.from_dict(SETTINGS))
            self._sign(_smallest_png(), "trial")
        except c2pa.C2paError as error:
            raise RecipeError(
                f"C2PA cannot sign with {certificate}: {error}. It needs the key usage "
                "digitalSignature and an extended key usage such as emailProtection.",
                argument="certificate",
            ) from error

    def sign(self, data: bytes, identifier: str) -> bytes:
        """The image with a signed manifest; the image data keeps its bytes.

        - `data`: a PNG, JPEG or WebP file.
        - `identifier`: id of the image.

        Raises StoreError for another format, for a damaged file, and once the certificate expires.
        """
        try:
            return self._sign(data, identifier)
        except c2pa.C2paError as error:
            raise StoreError(f"the image '{identifier}' cannot be signed: {error}") from error

    def _sign(self, data: bytes, identifier: str) -> bytes:
        mime_type = MIME_TYPES[suffix_of(data)]
        manifest = _make_manifest(identifier, mime_type)
        signed = io.BytesIO()
        with c2pa.Builder(manifest, self._context) as builder:
            builder.sign(self._signer, mime_type, io.BytesIO(data), signed)
        return signed.getvalue()


def _make_manifest(identifier: str, mime_type: str) -> dict[str, Any]:
    software = {"name": "discl", "version": version("discl")}
    action = {
        "action": "c2pa.created",
        "digitalSourceType": SYNTHETIC,
        "softwareAgent": software,
        "parameters": {"discl.request_id": identifier},
    }
    return {
        "title": identifier,
        "format": mime_type,
        "claim_generator_info": [software],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [action]}}],
    }


def _read(file: Path, argument: str) -> bytes:
    try:
        if not file.is_file():
            raise RecipeError(f"{file} is not a file.", argument=argument)
        with file.open("rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
    except OSError as error:
        raise RecipeError(
            f"cannot read {file}: {error.strerror or error}.", argument=argument
        ) from error
    if len(content) > LARGEST_FILE:
        raise RecipeError(f"{file} is larger than 1 MiB, so it is no PEM file.", argument=argument)
    return content


def _load_certificate(file: Path, chain: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise RecipeError(
            f"{file} holds no certificate in PEM format (-----BEGIN CERTIFICATE-----).",
            argument="certificate",
        ) from error


def _load_key(file: Path, content: bytes) -> Any:
    """The private key. Errors say nothing of what the file holds."""
    try:
        return load_pem_private_key(content, password=None)
    except TypeError:
        problem = "has a password; write it without one (openssl pkey -in KEY -out PLAIN)"
    except Exception:
        problem = "holds no private key in PEM format (-----BEGIN PRIVATE KEY-----)"
    raise RecipeError(f"{file} {problem}.", argument="key")


def _algorithm(file: Path, key: Any) -> str:
    """The name that C2PA has for signatures with this kind of key."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise RecipeError(
        f"{file} is of a kind that C2PA does not sign with; use an elliptic curve (P-256, P-384 or "
        "P-521), Ed25519, or RSA of at least 2048 bits.",
        argument="key",
    )


def _check_dates(file: Path, certificate: x509.Certificate) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= datetime.datetime.now(datetime.UTC) <= last:
        raise RecipeError(
            f"the certificate in {file} is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d}, not "
            "today. Sign with one that is valid.",
            argument="certificate",
        )


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def _public_bytes(key: Any) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _smallest_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()
