# ruff: noqa: SIM105, SIM115 - it imports as little as it can, and its streams stay open
"""A child that stays: it has run the program, and calls its functions when the asserts outside ask for it.

Requests and answers are lines of `plain` text. What is no data is kept here and travels as a number.
"""

import sys

import plain
from child import Child, write_all


class Server:
    """A child that has run the program and calls its functions when asked. One time limit for all that it does."""

    def __init__(self, program):
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
            write_all(self.child.requests, (request + "\n").encode())
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
    write_all(results, b"ready\n")
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
        write_all(results, line.encode() + b"\n")
