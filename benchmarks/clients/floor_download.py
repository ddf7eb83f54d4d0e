"""No client, but what is left of one: ``ENDPOINT CA KEY SIZE DESTINATION``, the least that a download in Python can cost.

Ranges of one object over TLS, hashed and written, in as many threads as ours has, with nothing but the standard library:
no signature, no retry, no manifest, nothing synced, and each range hashed for itself, where a file's hash has an order.
"""

import hashlib
import os
import socket
import ssl
import sys
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit

THREADS = min(6, max(3, (os.cpu_count() or 1) + 1))
RANGE = 8 << 20

endpoint, ca, key, size, destination = sys.argv[1:]
url = urlsplit(endpoint)
tls = ssl.create_default_context(cafile=ca)
target = os.open(destination, os.O_WRONLY | os.O_CREAT)
starts: SimpleQueue[int] = SimpleQueue()
for start in range(0, int(size), RANGE):
    starts.put(start)


def work() -> None:
    plain = socket.create_connection((url.hostname, url.port))
    with tls.wrap_socket(plain, server_hostname=url.hostname) as stream:
        buffer, digest = memoryview(bytearray(RANGE)), hashlib.sha256()
        while True:
            try:
                start = starts.get_nowait()
            except Empty:
                return
            asked = f"GET /{key} HTTP/1.1\r\nHost: {url.netloc}\r\nRange: bytes={start}-{start + RANGE - 1}\r\n\r\n"
            stream.sendall(asked.encode())
            got = stream.recv_into(buffer)
            head = bytes(buffer[:got]).index(b"\r\n\r\n") + 4
            buffer[: got - head] = buffer[head:got]
            got -= head
            while got < RANGE:
                got += stream.recv_into(buffer[got:]) or sys.exit("the answer ended early")
            digest.update(buffer)
            os.pwrite(target, buffer, start)


with ThreadPoolExecutor(THREADS) as pool:
    for future in [pool.submit(work) for _ in range(THREADS)]:
        future.result()
