"""`bear serve`."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from bear_grpc.cli.settings import Assignments, ConfigFile, parse_assignments, report_problems
from bear_grpc.hangups import Hangups
from bear_grpc.types import SandboxMode


class Auth(StrEnum):
    """Values of the setting `auth`."""

    OFF = "off"
    KEYS = "keys"


class Sharing(StrEnum):
    """Values of the setting `prefix_sharing`."""

    TENANT = "tenant"
    ALL = "all"
    OFF = "off"


def serve(
    listen: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADDRESS",
            help="HOST:PORT or unix:PATH to listen on; repeatable. Default: 127.0.0.1:50051.",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Speak TLS over TCP, with this certificate (PEM) and --tls-key."),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate's private key (PEM).")
    ] = None,
    tls_client_ca: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Take only clients with a certificate signed by these (PEM)."),
    ] = None,
    insecure_public: Annotated[
        bool,
        typer.Option(
            "--insecure-public",
            help="Serve other machines even without TLS, or without asking for keys.",
        ),
    ] = False,
    load: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Load this model at start; repeatable.")
    ] = None,
    models_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where models are kept.")] = None,
    state_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where keys and what else must last are kept.")
    ] = None,
    auth: Annotated[
        Auth | None, typer.Option(help="keys: nobody calls without an API key. Default: off.")
    ] = None,
    allow_path: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="`bear register` may take files from here; repeatable."),
    ] = None,
    prefix_sharing: Annotated[
        Sharing | None,
        typer.Option(help="Between whose requests prefixes in the KV cache are shared. Default: tenant."),
    ] = None,
    step_target_ms: Annotated[
        float | None,
        typer.Option(metavar="MS", help="Longest step while text streams. Default: from measured times."),
    ] = None,
    sandbox: Annotated[
        SandboxMode | None,
        typer.Option(
            help="Of workers: as far as the kernel has it, no worker without all of it, none. Default: auto."
        ),
    ] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Run the server until it is told to stop. SIGHUP reloads the settings."""
    with Hangups() as hangups:  # first of all: the imports take a good part of a second
        # gRPC's own lines would stand beside ours; read when grpc is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from bear_grpc.config import ConfigError, Settings, find_file, read_settings
        from bear_grpc.serving import serve as run_server

        flags = {
            "listen": listen or None,  # an option not given comes as an empty list
            "tls.certificate": tls_cert,
            "tls.key": tls_key,
            "tls.client_ca": tls_client_ca,
            "insecure_public": insecure_public or None,
            "load": load or None,
            "models_dir": models_dir,
            "state_dir": state_dir,
            "auth": auth.value if auth else None,
            "allow_path": allow_path or None,
            "prefix_sharing": prefix_sharing.value if prefix_sharing else None,
            "step_target_ms": step_target_ms,
            "sandbox": sandbox,
        }
        texts = parse_assignments(assignments)

        def read() -> Settings:
            return read_settings(find_file(config), flags, texts=texts)

        try:
            settings = read()
        except ConfigError as error:
            raise report_problems(error) from None
        raise typer.Exit(run_server(settings.config, lambda: read().config, hangups))
