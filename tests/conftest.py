"""Lets the tests import what lies in the repository's root, from whatever folder pytest is called."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
