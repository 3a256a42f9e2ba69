"""The process that lives in a sandbox: it takes orders from outside, and runs each test of a program in a child of its own.

It holds no secret: expected results stay outside, and what a program writes or returns is judged there. Orders (marshalled,
since they come from outside) and reports (JSON) stand behind their length, on standard input and output. Nothing of restem is
imported; `main.py` starts it by its path.

    load   the program and its limits
    run    it as a script: text in, text out
    call   one of its functions (or a method of its class Solution) with plain arguments
    serve  it in a child that stays, and `ask` that child to call its functions
"""

import marshal
import os
from _json import encode_basestring_ascii  # `json` costs milliseconds

import confine
from child import Child, Program, write_all


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
            from served import Server

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
    write_all(1, len(text).to_bytes(8, "little") + text.encode("ascii"))


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


def run(program, stdin):
    child = Child(program, lambda results, requests: program.execute("__main__"), stdin.encode("utf-8", "surrogateescape"))
    stopped = child.follow(child.began + program.limits["wall_s"])
    output = child.kept[child.out].decode("utf-8", "replace")
    return {**child.report(stopped), "stdout": output}


def call(program, entry, arguments):
    import plain

    def body(results, requests):
        value = find(program.execute("solution"), entry)(*plain.decode(arguments))
        write_all(results, plain.encode(value).encode())

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
    raise NameError(f"there is no function {entry!r}")
