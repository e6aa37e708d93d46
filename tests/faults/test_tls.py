"""Redis over TLS: one URL configures ledger, broker and result backend.

A server that is not trusted is refused with a short error."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from resilience.errors import StoreUntrusted
from resilience.store import Store
from rlm_tasks.diagnosis.doctor import examine
from rlm_tasks.testing import embedded
from tests.faults.conftest import Cell, cell
from tests.faults.proxy import TlsProxy
from tests.integration.conftest import client_of, environment_of


@dataclass(frozen=True)
class Secured:
    """A port with TLS in front of the server, and a folder of certificates.

    The folder has a trusted authority, an unknown one (`stranger.pem`) and a client certificate."""

    port: int
    folder: Path

    def url(
        self,
        options: str = "ssl_ca_certs={0}/ca.pem&ssl_certfile={0}/client.pem",
        host: str = "127.0.0.1",
    ) -> str:
        """Return a URL with these options; the default options satisfy the server."""
        return f"rediss://{host}:{self.port}/0?{options.format(self.folder)}"


@pytest.fixture(scope="module")
def secured(server: embedded.Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A TLS port whose certificate is for 127.0.0.1; it requires a client certificate."""
    folder, authority = tmp_path_factory.mktemp("certificates"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "stranger.pem"))
    authority.issue_cert("worker@example.com").private_key_and_cert_chain_pem.write_to_path(
        str(folder / "client.pem")
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    proxy = TlsProxy(server.port, context)
    yield Secured(proxy.port, folder)
    proxy.close()


@pytest.fixture
def over_tls(server: embedded.Server, secured: Secured, tmp_path: Path) -> Iterator[Cell]:
    with cell(server, "tls", tmp_path, tmp_path / "worker.log", RLM_REDIS_URL=secured.url()) as own:
        yield own


def test_one_url_is_enough_for_a_job_over_tls(over_tls: Cell) -> None:
    over_tls.worker()

    over_tls.check(over_tls.submit())

    findings = {each.check: each for each in examine(over_tls.client, over_tls.client.app)}
    assert findings["tls"].found == "RLM_REDIS_URL: encrypted, and certificates are verified"
    assert findings["broker"].state == "ok"


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("127.0.0.1", "ssl_ca_certs={0}/stranger.pem&ssl_certfile={0}/client.pem"),
        ("127.0.0.1", "ssl_certfile={0}/client.pem"),
        ("localhost", "ssl_ca_certs={0}/ca.pem&ssl_certfile={0}/client.pem"),
    ],
    ids=["unknown authority", "the system's authorities", "wrong host name"],
)
def test_an_untrusted_server_is_refused(secured: Secured, host: str, options: str) -> None:
    with (
        client_of(environment_of(secured.url(options, host), "untrusted")) as client,
        pytest.raises(
            StoreUntrusted,
            match=r"is not trusted \(.*; see its certificate,"
            r" and port and ssl_ca_certs in RLM_REDIS_URL",
        ),
    ):
        client.submit(operation="echo", items=[1])


def test_a_url_whose_scheme_does_not_fit_the_port_is_told_so(
    server: embedded.Server, secured: Secured
) -> None:
    plain, wanted = secured.url("").partition("?")[0].replace("rediss", "redis"), server.url
    with pytest.raises(StoreUntrusted, match="speaks only TLS on this port; write rediss://"):
        Store(plain).check()
    with pytest.raises(StoreUntrusted, match="speaks no TLS on this port; write its port for TLS"):
        Store(wanted.replace("redis", "rediss", 1)).check()


@pytest.mark.parametrize(
    "options", ["ssl_check_hostname=false&ssl_ca_certs={0}/ca.pem", "ssl_cert_reqs=none"]
)
def test_url_options_turn_verification_off(secured: Secured, options: str) -> None:
    url = secured.url(f"{options}&ssl_certfile={{0}}/client.pem", "localhost")
    with client_of(environment_of(url, "careless")) as client:
        client.check()
        assert client.queues()["careless.normal"].depth == 0


def test_a_worker_that_does_not_trust_redis_ends_without_a_traceback(secured: Secured) -> None:
    url = secured.url("ssl_ca_certs={0}/stranger.pem").replace("rediss://", "rediss://:hush@")
    worker = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "rlm_tasks", "worker"],
        env={**os.environ, **environment_of(url, "untrusted")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    output = worker.stdout + worker.stderr

    assert worker.returncode == 1
    assert "Error: Redis at rediss://:***@127.0.0.1" in output
    assert "CERTIFICATE_VERIFY_FAILED" in output
    assert "Traceback" not in output
    assert "hush" not in output
