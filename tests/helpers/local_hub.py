"""A hub on this machine: as much of its HTTP interface as creating a repository and committing files takes."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalHub(ThreadingHTTPServer):
    """Remembers repositories that were created, and the files that were committed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.created = []
        self.files = {}
        self.refuses = False

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Requests of `huggingface_hub`."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.answer({"error": "not here"}, status=404)

    def do_POST(self):
        content, path = self.body(), self.path.split("?")[0]
        if self.server.refuses:
            self.answer({"error": "You are not allowed to do this"}, status=403)
        elif path == "/api/repos/create":
            wanted = json.loads(content)
            self.server.created.append(wanted)
            owner = wanted.get("organization") or "me"
            self.answer({"url": f"{self.server.address}/datasets/{owner}/{wanted['name']}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]
            self.answer({"files": modes, "commitOid": "0" * 40})
        elif "/commit/" in path:
            self.commit(path, content)
        else:
            self.answer({"error": f"unexpected {path}"}, status=404)

    def commit(self, path, content):
        repository = path.split("/api/datasets/")[1].split("/commit/")[0]
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                data = base64.b64decode(entry["value"]["content"])
                self.server.files[f"{repository}/{entry['value']['path']}"] = data
        url = f"{self.server.address}/datasets/{repository}/commit/{'1' * 40}"
        self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})


@contextmanager
def local_hub():
    """A hub that is up for as long as it is needed."""
    hub = LocalHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
