"""C2PA content credentials: read back by the C2PA library, and refused where they cannot hold."""

from __future__ import annotations

import io
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from discl import encode_image, mark_synthetic
from discl.errors import RecipeError, RunError, StoreError
from discl.export.signing import ContentSigner
from discl.spectrum.encoding import ENCODINGS
from discl.stages.export import open_signer
from helpers.certificates import make_certificate

PIXELS = np.random.default_rng(0).integers(0, 256, (31, 45, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> ContentSigner:
    return ContentSigner(*make_certificate(tmp_path_factory.mktemp("signer") / "good"))


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_signed_image_says_what_it_is_and_keeps_its_pixels(
    signer: ContentSigner, encoding: str
) -> None:
    marked = mark_synthetic(encode_image(PIXELS, encoding), "bag-1")
    signed = signer.sign(marked, "bag-1")
    assert (pixels_of(signed) == pixels_of(marked)).all()
    assert b"Iptc4xmpExt:DigitalSourceType" in signed
    kind = Image.open(io.BytesIO(signed)).get_format_mimetype()
    reader = c2pa.Reader(kind, io.BytesIO(signed))
    assert reader.get_validation_state() == "Valid"
    failures = reader.get_validation_results()["activeManifest"]["failure"]
    assert [each["code"] for each in failures] == ["signingCredential.untrusted"]
    manifest = reader.get_active_manifest()
    assert manifest["title"] == "bag-1" and manifest["signature_info"]["common_name"] == signer.name
    (assertion,) = manifest["assertions"]
    assert assertion["label"].startswith("c2pa.actions")
    (action,) = assertion["data"]["actions"]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    assert action["softwareAgent"] == {"name": "discl", "version": version("discl")}
    assert action["parameters"] == {"discl.request_id": "bag-1"}


def test_nobody_is_asked_about_the_certificate(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        responder = f"http://127.0.0.1:{server.getsockname()[1]}/"
        signer = ContentSigner(*make_certificate(tmp_path / "asked", responder=responder))
        signer.sign(encode_image(PIXELS, "png"), "bag-1")
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_changed_image_is_noticed(signer: ContentSigner) -> None:
    signed = bytearray(signer.sign(encode_image(PIXELS, "png"), "bag-1"))
    signed[signed.index(b"IDAT") + 40] ^= 1
    results = c2pa.Reader("image/png", io.BytesIO(bytes(signed))).get_validation_results()
    failures = {each["code"] for each in results["activeManifest"]["failure"]}
    assert "assertion.dataHash.mismatch" in failures


def test_what_cannot_be_signed_is_an_error(signer: ContentSigner) -> None:
    for data in (b"GIF89a" + bytes(40), encode_image(PIXELS, "png")[:60]):
        with pytest.raises(StoreError):
            signer.sign(data, "bag-1")


def test_what_cannot_sign_is_refused_at_once_and_not_shown(tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path / "good")
    other, other_key = make_certificate(tmp_path / "other")
    locked = make_certificate(tmp_path / "locked", password=b"secret")
    noise = tmp_path / "noise.pem"
    noise.write_bytes(bytes(range(256)))
    huge = tmp_path / "huge.pem"
    huge.write_bytes(bytes(2 << 20))
    cases = [
        ((chain, other_key), "is not the key of the certificate"),
        ((other, key), "is not the key of the certificate"),
        ((key, chain), "no certificate"),
        ((chain, chain), "no private key"),
        ((chain, noise), "no private key"),
        ((noise, key), "no certificate"),
        ((tmp_path / "missing", key), "is not a file"),
        ((chain, tmp_path), "is not a file"),
        ((chain, huge), "larger than 1 MiB"),
        (locked, "has a password"),
        (make_certificate(tmp_path / "expired", days=(-30, -1)), "not today"),
        (make_certificate(tmp_path / "future", days=(1, 30)), "not today"),
        (make_certificate(tmp_path / "curve", curve=ec.SECP256K1()), "does not sign with"),
        (
            make_certificate(tmp_path / "server", purpose=ExtendedKeyUsageOID.SERVER_AUTH),
            "C2PA cannot sign with",
        ),
    ]
    for files, problem in cases:
        with pytest.raises(RecipeError, match=f"^--c2pa: .*{problem}") as caught:
            open_signer(*files)
        shown = f"{caught.value}{caught.value.__cause__}"
        assert not any(line in shown for line in key.read_text().splitlines()[1:-1])


def test_without_the_extra_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "discl.export.signing")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(RunError, match=r"needs the package c2pa: pip install 'discl\[c2pa\]'"):
        open_signer(tmp_path / "chain.pem", tmp_path / "key.pem")
