"""./serve as a process of its own, for the scripts of this folder."""

import contextlib
import subprocess
import time
import urllib.request


@contextlib.contextmanager
def serving(command, port, **options):
    """The server that `command` starts on `port`, ready, until the block ends."""
    server = subprocess.Popen([*command, "--port", str(port)], **options)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert server.poll() is None, f"{command[0]} has ended"
                time.sleep(.1)
        else:
            raise TimeoutError(f"{command[0]} was not ready within a minute")
        yield server
    finally:
        server.terminate()
        server.wait()
