"""Running programs that a model wrote: they are hostile until proven otherwise.

A ladder of three rungs, chosen by trying what must fail (`ladder.py`), never by the presence of a tool:

    strict    bubblewrap: own file tree, processes, network and user; then seccomp and resource limits
    landlock  no privileges needed, works in containers: Landlock for files, seccomp for everything else, resource limits
    plain     resource limits and a clean environment only: not a sandbox; used when it is asked for by name

Whatever the rung, the judge is outside: expected results never enter, and only builtin data comes out (`inside/plain.py`).
"""

from restem.sandbox.ladder import Rungs, choose, examine
from restem.sandbox.launch import RUNGS, Box, BoxLost, Rung
from restem.sandbox.limits import Limits, slowness

__all__ = ["RUNGS", "Box", "BoxLost", "Limits", "Rung", "Rungs", "choose", "examine", "slowness"]
