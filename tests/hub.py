"""A hub on loopback: what huggingface_hub's client asks of the real one to download files of a dataset or a model.
Two servers, as in the world: the hub answers with the facts of a file and a redirect, the store sends its bytes. Both
write down every request, and can be told to misbehave. No test itself: tests/test_cached_fineweb.py, test_public.py"""

import collections
import hashlib
import http.server
import json
import re
import socket
import struct
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Request = collections.namedtuple("Request", "server method path headers sent")  # sent: bytes of the body


class Hub:
    """files: {path on the hub: bytes}. faults: {file name: [what to do at its next requests]}, each one of
    ("hub", status) or ("store", status[, headers])      an HTTP error
    ("cut", n) or ("reset", n)                           n bytes, then the connection ends, properly or not
    ("bytes", data)                                      other bytes, of the same length
    ("hang", n)                                          n bytes, then silence
    ("whole",)                                           ignore a Range"""

    def __init__(self, files):
        self.files, self.faults, self.requests = files, collections.defaultdict(list), []
        self.checksums, self.commit, self.sizes = True, COMMIT, {}  # sizes: lies
        self.lock, self.quit = threading.Lock(), threading.Event()
        self.hub, self.store = self.serve("hub"), self.serve("store")

    def serve(self, kind):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_HEAD = do_GET = lambda handler: self.answer(kind, handler)
            log_message = lambda *_: None

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.handle_error = True, lambda *_: None  # clients that hang up are part of the game
        threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return server

    def url(self, server=None):
        return "http://127.0.0.1:%d" % (server or self.hub).server_address[1]

    def close(self):
        self.quit.set()
        for server in (self.hub, self.store):
            server.shutdown()
            server.server_close()

    def asked(self, server="", name=""):
        """The requests so far, if asked so to one of the servers or for one file."""
        with self.lock:
            return [r for r in self.requests if server in ("", r.server) and r.path.endswith(name)]

    def fault(self, kinds, name):
        with self.lock:
            waiting = self.faults[name]
            return waiting.pop(0) if waiting and waiting[0][0] in kinds else ("", 0)

    def answer(self, kind, handler):
        path = handler.path.split("?")[0]
        path = path[path.index("/", 8):] if path.startswith("http://") else path  # this server is used as a proxy
        sent = self.answer_hub(handler, path) if kind == "hub" else self.answer_store(handler, path)
        if path.startswith("/api/"):  # the client asks for more than files, depending on where it runs
            return
        with self.lock:
            headers = {key.lower(): value for key, value in handler.headers.items()}
            self.requests.append(Request(kind, handler.command, path, headers, sent))

    def reply(self, handler, status, headers=(), body=b""):
        handler.send_response(status)
        for key, value in dict({"Content-Length": len(body)}, **dict(headers)).items():
            handler.send_header(key, str(value))
        handler.end_headers()
        if handler.command == "HEAD":
            return 0
        handler.wfile.write(body)
        return len(body)

    def answer_hub(self, handler, path):
        kind, *rest = self.fault(("hub",), path.rsplit("/", 1)[-1])
        if kind:
            return self.reply(handler, *rest)
        if path.startswith("/api/models/"):
            return self.answer_model(handler, path.removeprefix("/api/models"))
        repo, _, tail = path.partition("/resolve/")
        file = f"{repo}/{tail.partition('/')[2]}"
        if file not in self.files:
            return self.reply(handler, 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        data = self.files[file]
        headers = {"X-Linked-Size": self.sizes.get(file, len(data)), "Location": self.url(self.store) + file,
                   "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest() if self.checksums else "0" * 32}"',
                   "X-Xet-Hash": "ab" * 32, "Link": f'<{self.url()}/xet-token>; rel="xet-auth"'}
        if self.commit:
            headers["X-Repo-Commit"] = self.commit
        return self.reply(handler, 302, headers)

    def answer_model(self, handler, path):
        """What a model's repository holds: its facts, or its files alone."""
        repo, way = re.fullmatch(r"(/[^/]+/[^/]+)(?:/(revision|tree)/[^/]+)?", path).groups()
        names = [name.removeprefix(f"{repo}/") for name in sorted(self.files) if name.startswith(f"{repo}/")]
        if not names:
            return self.reply(handler, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        facts = dict(id=repo[1:], sha=self.commit, siblings=[dict(rfilename=name) for name in names])
        if way == "tree":
            facts = [dict(type="file", path=name, size=len(self.files[f"{repo}/{name}"]), oid="0") for name in names]
        return self.reply(handler, 200, {"Content-Type": "application/json"}, json.dumps(facts).encode())

    def answer_store(self, handler, path):
        kind, *rest = self.fault(("store", "cut", "reset", "bytes", "hang", "whole"), path.rsplit("/", 1)[-1])
        if kind == "store":
            return self.reply(handler, *rest)
        data = rest[0] if kind == "bytes" else self.files[path]
        asked, start = handler.headers.get("Range"), 0
        if asked and kind != "whole":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(data):
                return self.reply(handler, 416)
        body = data[start:]
        if kind not in ("cut", "reset", "hang"):
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            return self.reply(handler, 206 if start else 200, headers, body)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:rest[0]])
        handler.wfile.flush()
        if kind == "hang":
            self.quit.wait(60)
        if kind == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        return rest[0]
