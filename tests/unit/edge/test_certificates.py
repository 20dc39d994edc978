"""What a client of the progress server verifies, with real handshakes in memory."""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from finetune_operator.progress_server import certificates
from finetune_operator.progress_server.certificates import Bundle

NAMES = ("progress.finetune-system.svc", "127.0.0.1")
NOW = datetime.now(UTC).replace(microsecond=0)


def handshake(bundle: Bundle, ca: bytes, name: str, folder: Path) -> None:
    """A TLS handshake of a client that trusts `ca` and expects `name`, as strict as Python can be."""
    (folder / "tls.crt").write_bytes(bundle.leaf)
    (folder / "tls.key").write_bytes(bundle.leaf_key)
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    client_context = ssl.create_default_context(cadata=ca.decode())
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass


@pytest.mark.parametrize("name", NAMES)
def test_client_with_the_ca_is_served_under_each_name(name: str, tmp_path: Path) -> None:
    bundle = certificates.new_bundle(NAMES, NOW)
    handshake(bundle, bundle.ca, name, tmp_path)


def test_renewed_leaf_is_trusted_by_a_client_that_read_the_ca_years_ago(tmp_path: Path) -> None:
    first = certificates.new_bundle(NAMES, NOW - timedelta(days=3000))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(first, first.ca, NAMES[0], tmp_path)
    second = certificates.renewed(first, NAMES, NOW)
    assert second.ca == first.ca
    assert second.leaf_key != first.leaf_key
    handshake(second, first.ca, NAMES[0], tmp_path)


def test_another_ca_is_not_trusted(tmp_path: Path) -> None:
    ours, theirs = certificates.new_bundle(NAMES, NOW), certificates.new_bundle(NAMES, NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(ours, theirs.ca, NAMES[0], tmp_path)


def test_ca_is_valid_for_ten_years_and_signs_nothing_but_leaves() -> None:
    ca = x509.load_pem_x509_certificate(certificates.new_bundle(NAMES, NOW).ca)
    assert ca.not_valid_after_utc - NOW == timedelta(days=3650)
    assert ca.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


@pytest.mark.parametrize(
    ("age", "names", "expected"),
    [
        (timedelta(days=29), NAMES, False),
        (timedelta(days=30), NAMES, True),
        (timedelta(0), NAMES[:1], False),
        (timedelta(0), (*NAMES, "new.example"), True),
    ],
    ids=["young", "30 days", "fewer names", "another name"],
)
def test_leaf_is_renewed_after_30_days_or_for_new_names(age: timedelta, names: tuple[str, ...], expected: bool) -> None:
    assert certificates.due(certificates.new_bundle(NAMES, NOW), names, NOW + age) is expected


@pytest.mark.parametrize("broken", [{}, {"ca.crt": "e30="}, {"tls.crt": "not base64!"}], ids=["empty", "json", "text"])
def test_foreign_secret_data_is_refused(broken: dict[str, str]) -> None:
    data = certificates.new_bundle(NAMES, NOW).to_data() | broken if broken else {}
    with pytest.raises((KeyError, ValueError)):
        Bundle.from_data(data)


def test_bundle_survives_the_secret() -> None:
    bundle = certificates.new_bundle(NAMES, NOW)
    assert Bundle.from_data(bundle.to_data()) == bundle
