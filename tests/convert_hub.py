# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A Hub on 127.0.0.1: as much of its interface as downloads by huggingface_hub use."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


COMMIT = "1" * 40


@contextmanager
def serve_hub(repositories, gated=()):
    """Serves folders by repository id, each with the one revision "main".

    Yields the address and the list of requested paths, with methods.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            path = unquote(self.path.split("?")[0])
            requests.append((self.command, path))
            parts = path.strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo_id = "/".join(parts[2:4] if is_api else parts[:2])
            rest = parts[4:] if is_api else parts[2:]
            if repo_id not in repositories:
                return self.error(401, "RepoNotFound")
            if repo_id in gated:
                return self.error(403, "GatedRepo")
            if len(rest) < 2 or rest[1] not in ("main", COMMIT):
                return self.error(404, "RevisionNotFound")
            folder = repositories[repo_id]
            if is_api:
                files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
                if rest[0] == "tree":
                    tree = [
                        {"type": "file", "path": name, "size": p.stat().st_size, "oid": COMMIT}
                        for name, p in files.items()
                    ]
                    return self.reply(json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
                info = {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
                info["siblings"] = [{"rfilename": name} for name in files]
                return self.reply(json.dumps(info).encode(), {"Content-Type": "application/json"}, with_body)
            file = folder.joinpath(*rest[2:])
            if not file.is_file():
                return self.error(404, "EntryNotFound")
            content = file.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self.reply(content, headers, with_body)

        def error(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def reply(self, content, headers, with_body):
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
