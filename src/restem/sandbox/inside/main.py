"""Starts the harness. A file of its own, since Python compiles the file that it is told to run anew every time."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import harness

harness.main()
