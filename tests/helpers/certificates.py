"""Certificates to sign with, made on the spot."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import (
    AuthorityInformationAccessOID,
    ExtendedKeyUsageOID,
    NameOID,
)

SIGNS = x509.KeyUsage(True, *(False,) * 8)
ISSUES = x509.KeyUsage(*(False,) * 5, True, True, False, False)


def make_certificate(
    folder: Path,
    *,
    days: tuple[int, int] = (-1, 30),
    curve: ec.EllipticCurve | None = None,
    purpose: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    password: bytes | None = None,
    responder: str | None = None,
) -> tuple[Path, Path]:
    """`chain.pem` and `key.pem` in `folder`, which is made; valid for these days from now.

    - `responder`: address that tells whether the certificate is revoked (OCSP).
    """
    issuer, key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(curve or ec.SECP256R1()),
    )
    root = _sign(
        "Test root",
        issuer,
        issuer,
        (-400, 400),
        [(x509.BasicConstraints(True, None), True), (ISSUES, True)],
    )
    own = _sign(
        "A | studio",
        key,
        issuer,
        days,
        [
            (x509.BasicConstraints(False, None), True),
            (SIGNS, True),
            (x509.ExtendedKeyUsage([purpose]), False),
            *([] if responder is None else [(_responder(responder), False)]),
        ],
    )
    folder.mkdir()
    chain, secret = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in (own, root)))
    lock = BestAvailableEncryption(password) if password else NoEncryption()
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return chain, secret


def _sign(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: ec.EllipticCurvePrivateKey,
    days: tuple[int, int],
    extensions: list[tuple[Any, bool]],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    first, last = (now + datetime.timedelta(days=count) for count in days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named("Test root"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(first)
        .not_valid_after(last)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False
        )
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer, hashes.SHA256())


def _responder(address: str) -> x509.AuthorityInformationAccess:
    place = x509.UniformResourceIdentifier(address)
    return x509.AuthorityInformationAccess(
        [x509.AccessDescription(AuthorityInformationAccessOID.OCSP, place)]
    )


def _named(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
