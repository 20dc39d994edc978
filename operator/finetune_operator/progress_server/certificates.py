"""The progress server's own CA and leaf certificate, one for all replicas, kept in a Secret of the operator's namespace.

A stock callback reads the CA once a process and fails in silence when it no longer fits, so the CA outlives every job
(ten years) and only the leaf is renewed, every 30 days of its 90. The Secret is made by POST: of two replicas that start
together one wins, and the other serves what the winner made. Renewal is fenced by resourceVersion in the same way.
"""

import asyncio
import base64
import ipaddress
import logging
import ssl
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..kube import SECRETS, AlreadyExists, ApiError, Conflict, Kube, NotFound, Unreachable

CA_VALID: Final = timedelta(days=3650)
LEAF_VALID: Final = timedelta(days=90)
LEAF_RENEWED_AFTER: Final = timedelta(days=30)
CHECK_SECONDS: Final = 3600.0
"""How often the Secret is read again: well within the 60 days that a renewed leaf's predecessor is still valid."""

_BACKDATED = timedelta(minutes=5)
"""Clocks of nodes differ."""

logger = logging.getLogger(__name__)


class UnusableSecret(RuntimeError):
    """The Secret exists and holds no certificates of ours."""


class Bundle(NamedTuple):
    """The four files of the Secret, PEM."""

    ca: bytes
    ca_key: bytes
    leaf: bytes
    leaf_key: bytes

    def to_data(self) -> dict[str, str]:
        """`data` of the Secret."""
        return {key: base64.b64encode(pem).decode() for key, pem in zip(_KEYS, self, strict=True)}

    @classmethod
    def from_data(cls, data: dict[str, str]) -> "Bundle":
        """Reads `data` of the Secret; KeyError or ValueError when it is not ours."""
        bundle = cls(*(base64.b64decode(data[key], validate=True) for key in _KEYS))
        for pem in (bundle.ca, bundle.leaf):
            x509.load_pem_x509_certificate(pem)
        return bundle


_KEYS = ("ca.crt", "ca.key", "tls.crt", "tls.key")


def new_bundle(names: Sequence[str], now: datetime) -> Bundle:
    """A CA and a leaf for these DNS names or addresses, the first of which names it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "finetune-operator progress CA")])
    ca = (
        _builder(subject, subject, key, now, CA_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    unsigned = Bundle(_pem(ca), _key_pem(key), b"", b"")
    return renewed(unsigned, names, now)


def renewed(bundle: Bundle, names: Sequence[str], now: datetime) -> Bundle:
    """The same CA with a new leaf."""
    ca = x509.load_pem_x509_certificate(bundle.ca)
    ca_key = serialization.load_pem_private_key(bundle.ca_key, None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ValueError("ca.key is no elliptic-curve key")
    key = ec.generate_private_key(ec.SECP256R1())
    # A common name has at most 64 characters and nobody reads it: clients match the alternative names.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    leaf = (
        _builder(subject, ca.subject, key, now, LEAF_VALID)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return Bundle(bundle.ca, bundle.ca_key, _pem(leaf), _key_pem(key))


def due(bundle: Bundle, names: Sequence[str], now: datetime) -> bool:
    """Whether the leaf is older than 30 days or was made for other names."""
    leaf = x509.load_pem_x509_certificate(bundle.leaf)
    held = set(leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    return now >= leaf.not_valid_before_utc + LEAF_RENEWED_AFTER or not {_general_name(name) for name in names} <= held


class Certificates:
    """What the server presents now. `await load()` once before serving, then run `keep_fresh()` beside it."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        secret: str,
        names: Sequence[str],
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        """The listener's context; a renewed leaf is loaded into it and serves the handshakes that follow."""
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._kube = kube
        self._ref = SECRETS(namespace, secret)
        self._names = tuple(names)
        self._now = now
        self._served: Bundle | None = None

    def ca_pem(self) -> str:
        """The CA that training pods trust, for their ConfigMap."""
        if self._served is None:
            raise RuntimeError("certificates are not loaded yet")
        return self._served.ca.decode()

    async def load(self) -> None:
        """Reads the Secret, or makes it, renews a leaf that is due, and serves the result.

        Raises:
            UnusableSecret: it holds something else.
            ApiError, Unreachable: from the API server.
        """
        secret = await self._read_or_create()
        bundle = self._parse(secret)
        if due(bundle, self._names, self._now()):
            bundle = self._parse(await self._renew(secret, bundle))
        if bundle != self._served:
            self._serve(bundle)

    async def keep_fresh(self, every_seconds: float = CHECK_SECONDS) -> None:
        """Follows the Secret until cancelled; what goes wrong is logged and tried again."""
        while True:
            await asyncio.sleep(every_seconds)
            try:
                await self.load()
            except (ApiError, Unreachable, UnusableSecret) as error:
                logger.warning("the progress server keeps its present certificate: %s", error)

    async def _read_or_create(self) -> dict[str, Any]:
        try:
            return await self._kube.get(self._ref)
        except NotFound:
            pass
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": self._ref.name, "labels": {"app.kubernetes.io/managed-by": "finetune-operator"}},
            "type": "kubernetes.io/tls",
            "data": new_bundle(self._names, self._now()).to_data(),
        }
        try:
            return await self._kube.create(self._ref, body)
        except AlreadyExists:  # the other replica was first
            return await self._kube.get(self._ref)

    async def _renew(self, secret: dict[str, Any], bundle: Bundle) -> dict[str, Any]:
        body = secret | {"data": renewed(bundle, self._names, self._now()).to_data()}
        try:
            return await self._kube.update(self._ref, body)
        except Conflict:  # the other replica was first
            return await self._kube.get(self._ref)

    def _parse(self, secret: dict[str, Any]) -> Bundle:
        try:
            return Bundle.from_data(secret.get("data") or {})
        except (KeyError, ValueError) as error:
            raise UnusableSecret(
                f"Secret {self._ref.namespace}/{self._ref.name} does not hold {', '.join(_KEYS)} ({error}): "
                "delete it, and a new CA is made; jobs that run now stop reporting until they are restarted"
            ) from None

    def _serve(self, bundle: Bundle) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the ssl module reads files only
            chain, key = Path(folder, "tls.crt"), Path(folder, "tls.key")
            chain.write_bytes(bundle.leaf)
            key.touch(mode=0o600)
            key.write_bytes(bundle.leaf_key)
            self.context.load_cert_chain(chain, key)
        self._served = bundle


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, valid: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
