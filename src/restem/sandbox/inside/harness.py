# ruff: noqa: SIM105, SIM115 - it imports as little as it can, and its streams stay open
"""The process that lives in a sandbox: it takes orders from outside, and runs each test of a program in a child of its own.

It holds no secret: expected results stay outside, and what a program writes or returns is judged there. Orders (marshalled,
since they come from outside) and reports (JSON) stand behind their length, on standard input and output. Nothing of restem is
imported; `main.py` starts it by its path.

    load   the program and its limits
    run    it as a script: text in, text out
    call   one of its functions (or a method of its class Solution) with plain arguments
    serve  it in a child that stays, and `ask` that child to call its functions
"""

import _signal  # `signal`, `json` and `struct` cost milliseconds each
import builtins
import marshal
import os
import select
import sys
import time
from _json import encode_basestring_ascii

import confine

EXCEPTION, MEMORY, FORBIDDEN, NO_ENTRY = 70, 71, 72, 73  # exit codes of a child; the reasons that they stand for bind nobody
_NAMES = {EXCEPTION: "crash", MEMORY: "memory", FORBIDDEN: "forbidden", NO_ENTRY: "no_entry"}
_STDERR = 64 << 10
_TICK = 0.02

# What APPS puts in front of every program, by name; only what a program mentions is imported.
_MODULES = [
    "sys",
    "time",
    "itertools",
    "collections",
    "math",
    "fractions",
    "random",
    "heapq",
    "bisect",
    "string",
    "re",
    "functools",
    "operator",
    "copy",
]
_FROM = {
    "itertools": "accumulate product permutations combinations",
    "collections": "Counter OrderedDict deque defaultdict ChainMap",
    "functools": "lru_cache reduce cmp_to_key",
    "math": "sqrt sin cos tan ceil fabs floor gcd exp log log2",
    "heapq": "heappush heappop heapify heappushpop heapreplace merge nlargest nsmallest",
    "typing": "List Tuple Dict Set Optional Any Union",
}


def main():
    settings = receive()
    give_up_rights(settings)
    answer({"ready": True})
    program, server = None, None
    while (order := receive()) is not None:
        if server is not None and order["op"] != "ask":
            server.end()
            server = None
        if order["op"] == "load":
            program = Program(order["source"], order["limits"], order["preamble"], settings)
            answer({"ok": True})
        elif order["op"] == "run":
            answer(run(program, order["stdin"]))
        elif order["op"] == "call":
            answer(call(program, order["entry"], order["arguments"]))
        elif order["op"] == "serve":
            server = Server(program)
            answer(server.started())
        elif order["op"] == "ask":
            answer(server.ask(order["request"]))
    if server is not None:
        server.end()


def give_up_rights(settings):
    confine.hide_memory()
    if settings["rung"] != "strict":  # there, the launcher sees to it
        confine.die_with_parent()
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
        confine.hide_memory()  # a change of user shows it again
        if settings["rung"] != "strict":
            confine.die_with_parent()
    elif os.geteuid() == 0:
        confine.drop_capabilities()
    confine.no_new_privileges()
    if settings["rung"] == "landlock":
        confine.landlock(settings["readable"], settings["devices"])


def receive():
    head = _read_exactly(0, 8)
    return None if head is None else marshal.loads(_read_exactly(0, int.from_bytes(head, "little")))


def answer(report):
    """A flat dict of texts and numbers, as JSON: what comes out is read by a parser that is safe with anything."""
    text = "{" + ", ".join(f"{encode_basestring_ascii(key)}: {_json_of(value)}" for key, value in report.items()) + "}"
    _write_all(1, len(text).to_bytes(8, "little") + text.encode("ascii"))


def _json_of(value):
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _read_exactly(descriptor, size):
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_all(descriptor, data):
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


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


# --- children ----------------------------------------------------------------------------------------------------------------


class Child:
    """A fork of this process in which the program runs: its output is read here, up to a limit, until it ends or is ended."""

    def __init__(self, program, body, stdin=b""):
        limits = program.limits
        self.limits, self.began = limits, time.monotonic()
        source = os.memfd_create("stdin") if hasattr(os, "memfd_create") else _spool(stdin)
        if hasattr(os, "memfd_create"):
            _write_all(source, stdin)
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
        self.status, self.usage, self.is_over = None, None, False

    def follow(self, deadline, until=None):
        """Read until the child ends, or `until()` holds; return why it was stopped, or None."""
        while self.status is None:
            if until is not None and until():
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            if self.open:
                events = self.poll.poll(1000 * min(left, _TICK))
                if not events and self._has_ended():
                    break
                for descriptor, _ in events:
                    if self._take(descriptor) == "too much":
                        return "output"
            elif not self._has_ended():
                time.sleep(min(left, 0.001))
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
        for descriptor in (self.out, self.err, self.results, self.requests):
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
        return {"status": status, "seconds": seconds, "cpu": cpu, "code": code, "note": note, "peak_kb": self.usage.ru_maxrss}


def _spool(stdin):
    import tempfile

    file = tempfile.TemporaryFile()
    file.write(stdin)
    file.seek(0)
    return os.dup(file.fileno())


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
        code = FORBIDDEN if isinstance(error, PermissionError) else getattr(error, "restem_code", EXCEPTION)
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


# --- what is done with a program ---------------------------------------------------------------------------------------------


def run(program, stdin):
    child = Child(program, lambda results, requests: program.execute("__main__"), stdin.encode("utf-8", "surrogateescape"))
    stopped = child.follow(child.began + program.limits["wall_s"])
    output = child.kept[child.out].decode("utf-8", "replace")
    return {**child.report(stopped), "stdout": output}


def call(program, entry, arguments):
    import plain

    def body(results, requests):
        value = find(program.execute("solution"), entry)(*plain.decode(arguments))
        _write_all(results, plain.encode(value).encode())

    child = Child(program, body)
    stopped = child.follow(child.began + program.limits["wall_s"])
    value = child.kept[child.results].decode("utf-8", "replace")
    return {**child.report(stopped), "value": value}


def find(names, entry):
    """A function of the program, or a method of a fresh `Solution`."""
    if callable(names.get(entry)):
        return names[entry]
    solution = names.get("Solution")
    if solution is not None and hasattr(solution, entry):
        return getattr(solution(), entry)
    error = NameError(f"there is no function {entry!r}")
    error.restem_code = NO_ENTRY
    raise error


class Server:
    """A child that has run the program and calls its functions when asked. One time limit for all that it does."""

    def __init__(self, program):
        import plain  # noqa: F401 - here once, and not in the child, whose path has lost this folder

        self.program = program
        self.child = Child(program, lambda results, requests: serve(program, results, requests))
        self.deadline = self.child.began + program.limits["wall_s"]

    def started(self):
        return self._next()

    def ask(self, request):
        if self.child.is_over:
            return {"status": "crash", "note": "the program has ended"}
        self.child.kept[self.child.results].clear()
        try:
            _write_all(self.child.requests, (request + "\n").encode())
        except BrokenPipeError:
            pass
        return self._next()

    def _next(self):
        kept = self.child.kept[self.child.results]
        stopped = self.child.follow(self.deadline, until=lambda: kept.endswith(b"\n"))
        if kept.endswith(b"\n"):
            return {"status": "ok", "value": kept.decode("utf-8", "replace")}
        report = self.child.report(stopped)
        if report["status"] == "ok":
            report |= {"status": "crash", "note": "the program ended before it was told to"}
        return report

    def end(self):
        self.child.end()


def serve(program, results, requests):
    import plain

    names = program.execute("solution")
    objects, numbers = [], {}

    def keep(value):
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        kind = "class" if isinstance(value, type) else "function" if callable(value) else "iterator"
        if kind == "iterator" and not hasattr(value, "__next__"):
            kind = "object"
        return plain.Reference(numbers[id(value)], kind)

    def fetch(number, kind):
        return objects[number]

    def do(request):
        what, *rest = plain.decode(request, fetch)
        if what == "names":
            return {name: names[name] for name in rest[0] if name in names and not isinstance(names[name], type(sys))}
        if what == "call":
            function, args, kwargs = rest
            return function(*args, **kwargs), args
        if what == "attribute":
            return getattr(rest[0], rest[1])
        if what == "list":
            return [item for item, _ in zip(rest[0], range(plain.MOST_ITEMS), strict=False)]
        return {"text": str, "length": len, "item": lambda value, key: value[key]}[what](*rest)

    reader = open(requests, encoding="utf-8")
    _write_all(results, b"ready\n")
    for request in reader:
        try:
            line = plain.encode(("value", do(request)), keep)
        except MemoryError:
            raise
        except BaseException as error:
            try:
                text = str(error)[:300]
            except BaseException:
                text = ""
            bases = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
            line = plain.encode(("error", bases, type(error).__name__, text), keep)
        _write_all(results, line.encode() + b"\n")
