"""A headless Chromium, spoken to over a pipe in its DevTools protocol; no driver is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 100) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):  # where Chromium looks for its pipes
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; a context manager.

    Attributes:
      events: what the page has told, [(method, parameters)].
    """

    def __init__(self, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        flags = (
            "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
            " --disable-background-networking --disable-component-update --disable-sync"
            f" --remote-debugging-pipe --user-data-dir={folder}"
        ).split()
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START, str(theirs_in), str(theirs_out), find(), *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._read, self._write = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self._rest = b""
        self._number, self._session = 0, None
        self.events: deque = deque()
        target = self.say("Target.createTarget", url="about:blank")["targetId"]
        attached = self.say("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.say(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._session = None
        self._send("Browser.close", {})
        self._process.wait(SECONDS)
        self._read.close()
        self._write.close()

    def say(self, method, **parameters):
        """What a method of the protocol gives."""
        number = self._send(method, parameters)
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            if "method" in message:
                self.events.append((message["method"], message["params"]))

    def _send(self, method, parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        return self._number

    def _next(self):
        while b"\0" not in self._rest:
            part = os.read(self._read.fileno(), 2**20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        """Loads a page, and waits until it has loaded."""
        self.say("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({address!r}) && document.readyState == 'complete'")

    def run(self, script):
        """What an expression of JavaScript gives, awaited."""
        found = self.say(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script):
        """Waits until an expression is true."""
        end = time.monotonic() + SECONDS
        while not self.run(script):
            assert time.monotonic() < end, f"waited in vain for {script}: {self.text()}"
            time.sleep(0.05)

    def text(self):
        """The page's text."""
        return self.run("document.body.innerText")

    def choose(self, selector, *files):
        """Gives files to an input, as a person's dialog does."""
        root = self.say("DOM.getDocument")["root"]["nodeId"]
        node = self.say("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.say("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, x, y, *files):
        """Drops files onto a place of the page."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.say("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key, code):
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.say("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def prefer(self, scheme, width=1000, height=900):
        """Light or dark, and the size of the window in pixels."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.say("Emulation.setEmulatedMedia", features=features)
        self.say(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def picture(self):
        """A PNG of the window."""
        return base64.b64decode(self.say("Page.captureScreenshot", format="png")["data"])
