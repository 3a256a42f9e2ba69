# ruff: noqa: SIM115 - it imports as little as it can, and its streams stay open
"""A program in a child of the harness: what it is given, what it may use, and how it ended.

What a newcomer would get wrong: everything up to `confine.seccomp()` in `_become` is ours, everything behind it the program's.
The exit codes are reasons that bind nobody: a program that lies about them is judged by its output all the same.
"""

import _signal  # `signal` costs milliseconds
import builtins
import os
import select
import sys
import time

import confine

EXCEPTION, MEMORY, FORBIDDEN = 70, 71, 72
_NAMES = {EXCEPTION: "crash", MEMORY: "memory", FORBIDDEN: "forbidden"}
_STDERR = 64 << 10
_TICK = 0.02

# What APPS puts in front of every program, by name; only what a program mentions is imported.
_MODULES = (
    *("sys", "time", "itertools", "collections", "math", "fractions", "random"),
    *("heapq", "bisect", "string", "re", "functools", "operator", "copy"),
)
_FROM = {
    "itertools": "accumulate product permutations combinations",
    "collections": "Counter OrderedDict deque defaultdict ChainMap",
    "functools": "lru_cache reduce cmp_to_key",
    "math": "sqrt sin cos tan ceil fabs floor gcd exp log log2",
    "heapq": "heappush heappop heapify heappushpop heapreplace merge nlargest nsmallest",
    "typing": "List Tuple Dict Set Optional Any Union",
}


class Program:
    def __init__(self, source, limits, preamble, settings):
        self.source, self.limits, self.preamble, self.settings = source, limits, preamble, settings

    def execute(self, name):
        """In the child: run the source as a module of this name; return its names."""
        module = type(sys)(name)
        module.__dict__["__builtins__"] = builtins
        sys.modules[name] = module
        if self.preamble:
            add_preamble(self.source, module.__dict__)
        exec(compile(self.source, "solution.py", "exec", dont_inherit=True), module.__dict__)
        return module.__dict__


def add_preamble(source, names):
    for module in _MODULES:
        if module in source:
            names[module] = __import__(module)
    for module, wanted in _FROM.items():
        for name in wanted.split():
            if name in source:
                names[name] = getattr(__import__(module), name)


class Child:
    """A fork of this process in which the program runs: its output is read here, up to a limit, until it ends or is ended."""

    def __init__(self, program, body, stdin=b""):
        limits = program.limits
        self.limits, self.began = limits, time.monotonic()
        source = os.memfd_create("stdin")
        write_all(source, stdin)
        os.lseek(source, 0, os.SEEK_SET)
        pipes = [os.pipe() for _ in range(4)]  # output, errors, results, requests
        self.pid = os.fork()
        if not self.pid:
            try:
                _become(program, body, source, pipes)
            finally:
                os._exit(EXCEPTION)
        os.close(source)
        for read, write in pipes[:3]:
            os.close(write)
            os.set_blocking(read, False)
        os.close(pipes[3][0])
        self.out, self.err, self.results = (read for read, _ in pipes[:3])
        self.requests = pipes[3][1]
        self.kept = {self.out: bytearray(), self.err: bytearray(), self.results: bytearray()}
        self.most = {self.out: limits["output_kb"] << 10, self.err: _STDERR, self.results: limits["output_kb"] << 10}
        self.poll = select.poll()
        for descriptor in self.kept:
            self.poll.register(descriptor, select.POLLIN)
        self.open = set(self.kept)
        self.ended = _open_process(self.pid)
        if self.ended is not None:
            self.poll.register(self.ended, select.POLLIN)
        self.status, self.usage, self.is_over = None, None, False

    def follow(self, deadline, until=None):
        """Read until the child ends, or `until()` holds; return why it was stopped, or None."""
        while self.status is None:
            if until is not None and until():
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            tick = left if self.ended is not None else min(left, _TICK if self.open else 0.001)
            events = self.poll.poll(1000 * tick)
            if not events or (self.ended, select.POLLIN) in events:
                self._has_ended()
            for descriptor, _ in events:
                if descriptor != self.ended and self._take(descriptor) == "too much":
                    return "output"
        for descriptor in list(self.open):  # what an orphan may hold open is not waited for
            while self._take(descriptor) == "more":
                pass
        return None

    def _take(self, descriptor):
        try:
            part = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return "nothing"
        if not part:
            self.poll.unregister(descriptor)
            self.open.discard(descriptor)
            return "end"
        kept = self.kept[descriptor]
        kept += part
        if len(kept) > self.most[descriptor]:
            if descriptor == self.err:
                del kept[: -self.most[descriptor]]
            else:
                return "too much"
        return "more"

    def _has_ended(self, flags=os.WNOHANG):
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, flags)
            if pid:
                self.status, self.usage = status, usage
        return self.status is not None

    def end(self):
        if self.is_over:
            return
        self.is_over = True
        if self.status is None:
            os.kill(self.pid, _signal.SIGKILL)
            self._has_ended(0)
        for descriptor in (self.out, self.err, self.results, self.requests, self.ended):
            if descriptor is not None:
                os.close(descriptor)

    def report(self, stopped):
        """How it went; the child is over after this."""
        if self.status is None and stopped is None:
            self._has_ended(0)
        seconds = time.monotonic() - self.began
        self.end()
        cpu = self.usage.ru_utime + self.usage.ru_stime
        code = os.waitstatus_to_exitcode(self.status)
        if stopped is None and code in (-_signal.SIGXCPU, -_signal.SIGKILL) and cpu > self.limits["time_s"]:
            stopped = "timeout"
        if stopped is None and code == -_signal.SIGXFSZ:
            stopped = "output"
        status = stopped or ("ok" if code == 0 else _NAMES.get(code, "crash"))
        note = "" if status == "ok" else _last_line(self.kept[self.err]) or (f"killed by signal {-code}" if code < 0 else "")
        return {"status": status, "seconds": seconds, "cpu": cpu, "code": code, "note": note}


def _open_process(pid):
    """A descriptor that can be read once the process has ended; None on kernels before 5.3, which are asked instead."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _last_line(err):
    lines = [line for line in bytes(err).decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _become(program, body, source, pipes):
    """In the child: the descriptors, the limits, the program, the end."""
    results, requests = os.dup(pipes[2][1]), os.dup(pipes[3][0])
    os.dup2(source, 0)
    os.dup2(pipes[0][1], 1)
    os.dup2(pipes[1][1], 2)
    keep = sorted((results, requests))
    os.closerange(3, keep[0])
    os.closerange(keep[0] + 1, keep[1])
    os.closerange(keep[1] + 1, 256)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["solution.py"]
    builtins.exit = builtins.quit = sys.exit  # -S leaves them out
    del sys.path[0]  # this folder
    if program.settings["site"]:
        sys.path.append(program.settings["site"])
    sys.setrecursionlimit(100_000)
    limits = program.limits
    confine.limit(
        memory_mb=limits["memory_mb"],
        cpu_s=int(limits["time_s"]) + 2,
        file_kb=limits["file_kb"],
        open_files=32,
        threads=limits["processes"] if program.settings["counts_threads"] else None,
        stack_mb=64,
    )
    if program.settings["rung"] != "plain":
        confine.seccomp()
    code = 0
    try:
        body(results, requests)
    except SystemExit:
        pass
    except MemoryError:
        code = MEMORY
    except BaseException as error:
        code = FORBIDDEN if isinstance(error, PermissionError) else EXCEPTION
        try:
            text = str(error)
        except BaseException:
            text = ""
        print(f"{type(error).__name__}: {text}"[:2000], file=sys.__stderr__)
    os._exit(_finish() or code)


def _finish():
    """What an interpreter does at its end: wait for threads, run what was registered, flush."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):
            if stream is not None and hasattr(stream, "flush"):
                stream.flush()
    except MemoryError:
        return MEMORY
    except BaseException:
        return 0
    return 0


def write_all(descriptor, data):
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
