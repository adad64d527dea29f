"""As much of the hub's HTTP interface as a snapshot download needs, over the files of a folder."""

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
REPOSITORY = "somebody/tiny-vit"


def serve(folder: Path) -> ThreadingHTTPServer:
    """A server on a free loopback port; the caller runs and stops it."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = self.path.split("?")[0]
            api, resolve = f"/api/models/{REPOSITORY}", f"/{REPOSITORY}/resolve/"
            name = path.rsplit("/", 1)[-1]
            if path.startswith(f"{api}/revision/") and name in ("main", COMMIT):
                siblings = [{"rfilename": file} for file in files]
                info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False}
                self.reply(200, json.dumps(info).encode(), with_body, {})
            elif path.startswith(f"{api}/tree/"):
                tree = [
                    {"type": "file", "path": file, "size": len(body), "oid": "0" * 40}
                    for file, body in files.items()
                ]
                self.reply(200, json.dumps(tree).encode(), with_body, {})
            elif (
                path.startswith(resolve)
                and (file := path.removeprefix(resolve).partition("/")[2]) in files
            ):
                etag = hashlib.sha256(files[file]).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                self.reply(200, files[file], with_body, headers)
            else:
                code = {} if path.startswith(api) else {"X-Error-Code": "RepoNotFound"}
                self.reply(404, b"{}", with_body, code)

        def reply(self, status, body, with_body, headers):
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments):
            print(self.path, file=sys.stderr)

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)
