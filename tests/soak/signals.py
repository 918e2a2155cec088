"""Signals at random moments: `python -m tests.soak.signals --rounds N --seed S`.

Each round starts a server on the same port, asks it for answers, stops and continues it, and ends it: by SIGTERM, once
or twice, or by SIGKILL, at any moment from its start on. It must end in time with a status that says how; every answer
is whole and right, or breaks off with an error; and the port is free for the next round.
"""

import argparse
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from hybrid_cache.api.server.ending import SECOND_S

PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()")
START_S = 60.0
SLACK_S = 3.0  # of a machine with other things to do
NUMBERS = 2  # different prompts
LENGTHS = (4, 40, 200)  # tokens of answers


@dataclass
class Asked:
    """One request on a thread of its own: what came of it."""

    url: str
    length: int
    number: int
    stream: bool
    text: str = ""
    outcome: str = "no end"
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        body = {"prompt": f"Count from {self.number}:", "max_tokens": self.length, "ignore_eos": True}
        body |= {"stream": self.stream, "temperature": 1.0, "seed": self.number}
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as reply:
                if reply.status_code != 200:
                    self.outcome = str(reply.status_code)
                elif self.stream:
                    self._read_events(reply)
                else:
                    self.text, self.outcome = json.loads(reply.read())["choices"][0]["text"], "whole"
        except httpx.TransportError:
            self.outcome = "connection lost"

    def _read_events(self, reply: httpx.Response) -> None:
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                self.outcome = "whole"
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.outcome = event["error"]["code"]
                else:
                    self.text += event["choices"][0]["text"] if event["choices"] else ""

    def violation(self, whole: str) -> str | None:
        """whole: the right answer"""
        if self.outcome not in ("whole", "503", "server_unavailable", "connection lost"):
            return f"a request ended with {self.outcome}"
        if self.outcome == "whole" and self.text != whole:
            return f"a whole answer is {self.text!r}, not {whole!r}"
        if not whole.startswith(self.text.rstrip("\ufffd")):
            return f"an answer began with {self.text!r}, not like {whole!r}"
        return None


class Soak:
    """All rounds on one port."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self._port = taken.getsockname()[1]
        self._url = f"http://127.0.0.1:{self._port}"
        self._right: dict[tuple[int, int], str] = {}  # length and number -> the answer of an undisturbed server
        self.seen: Counter[str] = Counter()
        self.violations: list[str] = []

    def learn(self) -> None:
        """Asks a server that nobody disturbs."""
        with self._start(30) as process:
            self._until_ready(process)
            asked = [Asked(self._url, length, number, False) for length in LENGTHS for number in range(NUMBERS)]
            for each in asked:
                each.thread.join(120)
                self._right[each.length, each.number] = each.text
                if each.outcome != "whole":
                    self.violations.append(f"undisturbed: {each.outcome}")
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(60)) != 0:
                self.violations.append(f"undisturbed: status {code}")

    def round(self) -> None:
        rng, drain_s = self._rng, self._rng.choice([0.0, 0.5, 20.0])
        with self._start(drain_s) as process:
            try:
                early = rng.random() < 0.2
                if early:
                    time.sleep(rng.uniform(0, 3))
                else:
                    self._until_ready(process)
                asked = [] if early else [self._ask() for _ in range(rng.randrange(1, 8))]
                time.sleep(rng.choice([0.1, 1.0, 3.0]) * rng.random())
                if rng.random() < 0.5:
                    process.send_signal(signal.SIGSTOP)
                    time.sleep(rng.uniform(0, 1))
                    if rng.random() < 0.5:  # some signals come while it is stopped
                        threading.Timer(0.3, process.send_signal, (signal.SIGCONT,)).start()
                    else:
                        process.send_signal(signal.SIGCONT)
                self._end(process, drain_s, asked, early=early)
            finally:
                process.kill()

    def _end(self, process: "subprocess.Popen[bytes]", drain_s: float, asked: list[Asked], *, early: bool) -> None:
        how = self._rng.choice(["SIGTERM", "SIGTERM", "SIGTERM twice", "SIGINT", "SIGKILL"])
        number = signal.Signals[how.split()[0]]
        before = [each for each in asked if each.text]
        process.send_signal(number)
        within = 0.0 if number is signal.SIGKILL else drain_s + 5
        if how.endswith("twice"):
            time.sleep(self._rng.uniform(0, 1))
            process.send_signal(number)
            within = SECOND_S
        begin = time.monotonic()
        try:
            code = process.wait(within + SLACK_S + 5)
        except subprocess.TimeoutExpired:
            self.violations.append(f"{how}: still there after {time.monotonic() - begin:.1f} s, drain {drain_s} s")
            return
        seconds = time.monotonic() - begin
        for each in asked:
            each.thread.join(20)
            self.seen[each.outcome] += 1
            if problem := each.violation(self._right[each.length, each.number]):
                self.violations.append(f"{how}: {problem}")
        self.seen[f"{how}{' while it starts' if early else ''}: {code}"] += 1
        allowed = {-9} if number is signal.SIGKILL else {0, 1, 130, -2, -15} if early or "twice" in how else {0}
        if code not in allowed:
            self.violations.append(f"{how}: status {code}, drain {drain_s} s")
        if seconds > within + SLACK_S:
            self.violations.append(f"{how}: {seconds:.1f} s to the end, {within} allowed")
        if drain_s == 20 and code == 0 and how in ("SIGTERM", "SIGINT") and any(a.outcome != "whole" for a in before):
            self.violations.append(f"{how}: an answer that had begun was cut")

    def _start(self, drain_s: float) -> "subprocess.Popen[bytes]":
        command = [*PROGRAM, "serve", "--port", str(self._port), "--budget", "32MiB", "--threads", "1"]
        return subprocess.Popen([*command, "--drain-timeout", str(drain_s)], stderr=subprocess.DEVNULL)

    def _until_ready(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{self._url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        process.kill()
        raise AssertionError(f"the server is not ready, status {process.poll()}")

    def _ask(self) -> Asked:
        rng = self._rng
        return Asked(self._url, rng.choice(LENGTHS), rng.randrange(NUMBERS), rng.random() < 0.7)


def run(rounds: int, seed: int) -> list[str]:
    """-> what should not have happened."""
    soak, begin = Soak(seed), time.monotonic()
    soak.learn()
    for _ in range(rounds):
        soak.round()
    seen = ", ".join(f"{what} x{count}" for what, count in sorted(soak.seen.items()))
    print(f"signals: {rounds} rounds, seed {seed}, {time.monotonic() - begin:.0f} s: {seen}")
    for violation in soak.violations:
        print(f"VIOLATION {violation}")
    return soak.violations


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(bool(run(given.rounds, given.seed)))
