#!/usr/bin/env python3
"""How long a new request waits while slow clients hold connections: ./serve on 127.0.0.1:PORT.

    dev/bench/serve_slow.py PORT [--clients 500] [--requests 300]

Each kind of slow client in turn: none; idle connections; clients that send a byte of a request's
head each second; the same with its body; clients that ask for two answers and never read. Meanwhile
requests for /health are sent, each on a connection of its own. Prints their times, from before
connect() to the last byte of the answer, and what became of the slow clients.
"""

import argparse
import collections
import resource
import select
import socket
import threading
import time

HEAD = "GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + "x" * 2000
BODY = ("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4000\r\n\r\n{")
WHOLE = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
# name, what is sent at once, whether a byte follows each second
KINDS = [("none", None, False), ("idle", "", False), ("head", HEAD[:40], True),
         ("body", BODY, True), ("no reader", WHOLE * 2, False)]


def request_seconds(port):
    begin = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 30) as s:
        s.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := s.recv(4096):
            answer += piece
    found = answer.split(b"\r\n", 1)[0].decode()
    if not found.startswith("HTTP/1.1 200"):
        raise SystemExit(f"error: /health: found {found!r}, expected 200")
    return time.perf_counter() - begin


def drip(clients, stop):
    """A byte from each client each second, spread over the second."""
    while not stop.is_set():
        for i, s in enumerate(clients):
            try:
                s.send(b"x")
            except OSError:
                pass  # the server has closed it
            if i % 10 == 9:
                time.sleep(10 / len(clients))


def outcomes(clients):
    """What the server answered by now: counts of status lines, of closed and of silent ones."""
    counts = collections.Counter()
    for s in clients:
        s.setblocking(False)
        try:
            answer = s.recv(4096)
        except BlockingIOError:
            counts["no answer yet"] += 1
        except OSError:
            counts["reset"] += 1
        else:
            line = answer.split(b"\r\n", 1)[0].decode(errors="replace")
            counts[line.removeprefix("HTTP/1.1 ") or "closed"] += 1
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--requests", type=int, default=300)
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, args.clients + 100), hard))
    print(f"{args.clients} slow clients; milliseconds of {args.requests} new requests")
    print(f"{'slow clients':14}{'median':>8}{'p99':>8}{'max':>8}  what became of them")
    for name, first, drips in KINDS:
        clients = []
        for _ in range(args.clients if first is not None else 0):
            clients.append(socket.create_connection(("127.0.0.1", args.port), 30))
            if first:
                clients[-1].sendall(first.encode())
        stop = threading.Event()
        if drips:
            threading.Thread(target=drip, args=(clients, stop), daemon=True).start()
            time.sleep(1)
        times = []
        for _ in range(args.requests):
            times.append(request_seconds(args.port) * 1000)
            time.sleep(.02)
        if drips:  # until the server's deadline, 10 seconds, is over
            select.select(clients[-1:], [], [], 15)
            time.sleep(.5)
        stop.set()
        times.sort()
        at = [times[int(len(times) * q)] for q in (.5, .99)] + [times[-1]]
        print(f"{name:14}" + "".join(f"{t:8.2f}" for t in at) + "  " + outcomes(clients))
        for s in clients:
            s.close()
        time.sleep(.5)


if __name__ == "__main__":
    main()
