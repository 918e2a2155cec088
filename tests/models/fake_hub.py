"""A hub on this machine: the few routes of Hugging Face's that a download needs, with one repository of files."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT, OLDER_COMMIT = "1" * 40, "2" * 40


class Hub:
    """Repositories by name; `org/gated` is there for others, and any other name is none."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """files: of the branch main; the tag v1 has the same, with another commit"""
        self.files = dict(files)
        self.revisions = {"main": COMMIT, "v1": OLDER_COMMIT, COMMIT: COMMIT, OLDER_COMMIT: OLDER_COMMIT}
        self.asked: list[str] = []  # files that were downloaded
        self.url = ""

    def reply(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers, body."""
        parts = path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        org, name, route, revision, *rest = [*parts[2 if api else 0 :], "", "", "", ""]
        repo = f"{org}/{name}"
        if repo == "org/gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to org/gated is restricted."}, b""
        if repo != "org/model":
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.revisions.get(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api:
            value = self._tree() if route == "tree" else self._info(repo, commit)
            return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
        return self._file("/".join(filter(None, rest)), commit)

    def _info(self, repo: str, commit: str) -> object:
        return {"_id": "0", "id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in self.files]}

    def _tree(self) -> object:
        return [
            {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}
            for path, data in self.files.items()
        ]

    def _file(self, path: str, commit: str) -> tuple[int, Mapping[str, str], bytes]:
        data = self.files.get(path)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.reply(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if "/resolve/" in self.path:
                    hub.asked.append(self.path.split("/", 5)[-1])

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
