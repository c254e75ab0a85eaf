"""What `--teacher_workers` saves: 64 diagnoses at an endpoint that takes 200 ms for a reply."""

import json
import random
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer  # noqa: E402

from PIL import Image  # noqa: E402

import teacher  # noqa: E402

CASES, LATENCY = 64, 0.2
PATCH = (
    '<answer>{"error_classification": "spatial", '
    '"evidence_patch": {"content": "look there", "key_frames": [3]}}</answer>'
)
PAYLOAD = json.dumps(
    {
        "choices": [{"message": {"role": "assistant", "content": PATCH}}],
        "usage": {"total_tokens": 7},
    }
).encode()


class Slow(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(LATENCY)
        self.send_response(200)
        self.send_header("content-length", str(len(PAYLOAD)))
        self.end_headers()
        self.wfile.write(PAYLOAD)

    def log_message(self, *_):
        pass


class Noise:
    """A 16-frame clip of 448 x 224 pixels."""

    fps = 2.0

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def __len__(self):
        return 16

    def seconds(self, index):
        return index / self.fps

    def frame(self, index):
        return Image.frombytes("L", (64, 32), self.rng.randbytes(2048)).resize((448, 224))


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    cases = [teacher.Case(str(k), "?", [], "x", "hm", Noise(k)) for k in range(CASES)]
    seconds = {}
    for workers in (1, 8, 16):
        began = time.perf_counter()
        chat = teacher.remote(url, "m", workers=workers)
        patches = teacher.diagnose(cases, chat, lambda patch, case: None)
        seconds[workers] = time.perf_counter() - began
        assert all(isinstance(patch, teacher.EvidencePatch) for patch in patches)
        print(
            f"  {workers:2} workers {seconds[workers]:6.2f} s, "
            f"{seconds[1] / seconds[workers]:5.2f} times as fast as one by one",
            flush=True,
        )
