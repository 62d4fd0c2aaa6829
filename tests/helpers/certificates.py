"""Certificates for tests: an authority, and files that a server reads."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bear_grpc.client import Tls


class Authority:
    """Signs certificates, and writes them to files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        folder.mkdir(exist_ok=True)
        self._ca.cert_pem.write_to_path(str(self.file))

    @property
    def pem(self) -> bytes:
        return self._ca.cert_pem.bytes()

    def server(self, name: str = "server", *, expires: datetime.datetime | None = None) -> dict[str, Path]:
        """Files of a certificate for this machine, named as in the table `[tls]`, over older ones."""
        issued = self._ca.issue_cert("localhost", "127.0.0.1", not_after=expires)
        chain = b"".join(pem.bytes() for pem in issued.cert_chain_pems)
        return self._write(name, chain, issued.private_key_pem.bytes())

    def client(self, *uris: str, dns: tuple[str, ...] = ()) -> Tls:
        """For a client with a certificate of these names."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(name) for name in dns]
        signer = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a client")]))
            .issuer_name(x509.load_pem_x509_certificate(self.pem).subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        pem = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Tls(ca=self.file, certificate=pem, key=secret)

    @staticmethod
    def encrypt(file: Path) -> None:
        """Puts a passphrase on a private key."""
        key = serialization.load_pem_private_key(file.read_bytes(), None)
        lock = serialization.BestAvailableEncryption(b"secret")
        form = serialization.PrivateFormat.PKCS8
        file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, lock))

    def _write(self, name: str, certificate: bytes, key: bytes) -> dict[str, Path]:
        files = {"certificate": self._folder / f"{name}.pem", "key": self._folder / f"{name}.key"}
        for kind, content in (("certificate", certificate), ("key", key)):
            files[kind].write_bytes(content)
        return files


def serial_of(certificate: bytes | Path) -> int:
    """The number that tells a certificate, the first of a PEM file or one in DER, from every other one."""
    if isinstance(certificate, Path):
        return x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number
    return x509.load_der_x509_certificate(certificate).serial_number


def shown_by(address: str, ca: Path) -> int:
    """The number of the certificate that a server shows to a connection of now. Blocks."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as bare,
        context.wrap_socket(bare, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
    assert shown is not None
    return serial_of(shown)
