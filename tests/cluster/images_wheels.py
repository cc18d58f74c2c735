# SPDX-License-Identifier: Apache-2.0
"""Serves a folder of wheels on this machine's loopback, over TLS and to whoever knows the password.

    python tests/cluster/images_wheels.py FOLDER CERTIFICATE KEY USER:PASSWORD PORT_FILE

An image that could be built from it has used both of its build secrets: pip's settings, which hold
the password, and the bundle with the certificate's authority. The port is written to PORT_FILE
once it is open.
"""

from __future__ import annotations

import base64
import functools
import hmac
import http.server
import ssl
import sys
from pathlib import Path


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Lists and sends files of a folder, after the password."""

    protocol_version = "HTTP/1.1"
    timeout = 60

    def __init__(self, *args: object, credentials: str, **more: object) -> None:
        self.expected = "Basic " + base64.b64encode(credentials.encode()).decode()
        super().__init__(*args, **more)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if hmac.compare_digest(self.headers.get("Authorization", ""), self.expected):
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="wheels"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a build asks hundreds of times."""


def main(folder: str, certificate: str, key: str, credentials: str, port_file: str) -> None:
    """Serve until killed."""
    handler = functools.partial(Guarded, directory=folder, credentials=credentials)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    opened = Path(port_file)
    partial = opened.with_suffix(".new")
    partial.write_text(f"{server.server_port}\n")
    partial.rename(opened)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
