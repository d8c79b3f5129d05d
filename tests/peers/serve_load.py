"""Loads a server for some minutes: many streams at once, mixed lengths, a tenth of the clients going away.

Fails where an answer is an error other than 429, a stream breaks off, a program was compiled under load, or a seeded
reply differs from the same request alone. Prints requests/s, tokens/s, and percentiles of the time to the first token
and between tokens, as the clients see them. Standard library only.

Try:  python tests/peers/serve_load.py --workdir runs/x --seconds 120
"""

import argparse
import collections
import http.client
import json
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import threading
import time

WORDS = ("the history of a small island where people read books and sail boats in every kind of weather until a "
         "stranger comes with news from the other side of the sea and asks them what they would like to know").split()


def request(rng: random.Random, longest: int) -> dict:
    """Returns a request of at most `longest` tokens, whatever the tokenizer; half of them are greedy."""
    letters = rng.choice([4, 40, longest // 4, longest // 2])
    return {"prompt": " ".join(rng.choices(WORDS, k=letters))[:letters], "max_tokens": rng.randint(1, longest // 8),
            "temperature": rng.choice([0, 0, 0.7, 1.0]), "top_p": 0.95, "seed": rng.randrange(2**31), "stream": True,
            "stop": rng.choice([[], ["\n\n"]])}


class Reply:
    """What one request got: status, text, when each event came (s from the start), whether it came to its end."""

    def __init__(self, port: int, body: dict, leave_after: int = 0):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        start, self.body, self.times, self.text, self.ended = time.monotonic(), body, [], "", False
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        self.status, self.left = response.status, False
        if self.status != 200:
            self.retry_s, self.text = float(response.headers.get("Retry-After", 0)), response.read().decode()
        while self.status == 200 and (line := response.readline()):
            if line == b"data: [DONE]\n":
                self.ended = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    self.text = event["error"]["message"]
                    break
                self.text += event["choices"][0]["text"]
                self.times.append(time.monotonic() - start)
                if len(self.times) == leave_after:
                    self.left = True
                    break
        connection.close()


def client(port: int, seed: int, end: float, longest: int, replies: list):
    """Sends one request after another until `end`."""
    rng = random.Random(seed)
    while time.monotonic() < end:
        body = request(rng, longest)
        leave_after = rng.randint(1, 8) if rng.random() < 0.1 else 0
        try:
            replies.append(Reply(port, body, leave_after))
        except (OSError, http.client.HTTPException, ValueError) as error:
            replies.append(error)
        if getattr(replies[-1], "status", 200) == 429:
            time.sleep(replies[-1].retry_s)


def metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    return float(re.search(rf"^fm_jax_{name} (.+)$", connection.getresponse().read().decode(), re.MULTILINE)[1])


def percentiles(values) -> str:
    ordered = sorted(values)
    at = lambda share: ordered[min(int(share * len(ordered)), len(ordered) - 1)]
    return "  ".join(f"p{round(100 * p)} {at(p):.3f} s" for p in (0.5, 0.9, 0.99)) if ordered else "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--alone", type=int, default=16, help="finished requests that are sent again, one by one")
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "fm_jax.serve", "--workdir", args.workdir, "--port", "0", f"--slots={args.slots}",
         f"--max_length={args.max_length}"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        begin = time.monotonic()
        while not (line := re.search(r"http://127.0.0.1:(\d+)/v1", server.stdout.readline())):
            if server.poll() is not None:
                sys.exit("the server did not start")
        port = int(line[1])
        print(f"started in {time.monotonic() - begin:.0f} s", flush=True)
        begin, replies = time.monotonic(), []
        threads = [threading.Thread(target=client, args=(port, i, begin + args.seconds, args.max_length, replies))
                   for i in range(args.streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spent = time.monotonic() - begin
        kinds = collections.Counter(
            type(r).__name__ if isinstance(r, Exception) else str(r.status) if r.status != 200 else
            "whole" if r.ended else "left" if r.left else "broken" for r in replies)
        whole = [r for r in replies if not isinstance(r, Exception) and r.ended]
        tokens, requests = metric(port, "generated_tokens_total"), len(whole)
        print(f"{args.streams} streams for {spent:.0f} s: " + ", ".join(f"{n} {k}" for k, n in sorted(kinds.items())))
        print(f"requests/s {requests / spent:.2f}   tokens/s {tokens / spent:.1f}")
        print(f"time to first token   {percentiles(r.times[0] for r in whole)}")
        print(f"between tokens        "
              f"{percentiles(b - a for r in whole for a, b in zip(r.times, r.times[1:]))}")
        different = [r.body for r in random.Random(0).sample(whole, min(args.alone, len(whole)))
                     if Reply(port, r.body).text != r.text]
        time.sleep(1)
        compiles, running = metric(port, "compiles_total"), metric(port, "requests_running")
        print(f"sent again alone: {min(args.alone, len(whole))}, of which {len(different)} differ   "
              f"compiled under load: {compiles:.0f}   slots still held: {running:.0f}")
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        bad = set(kinds) - {"whole", "left", "429"}
        if bad or different or compiles or running or code or not whole:
            sys.exit(f"FAILED: {bad or ''} {different[:1] or ''} exit {code}")
        print("passed")
    finally:
        server.kill()


if __name__ == "__main__":
    main()
