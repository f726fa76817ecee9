# SPDX-License-Identifier: Apache-2.0
"""Reading, fitting and writing weights files. Nothing in a file is ever executed."""

from pyvseg.checkpoints.load import KeyMap, load_into, map_keys
from pyvseg.checkpoints.read import read, read_metadata
from pyvseg.checkpoints.systems import guess_system
from pyvseg.checkpoints.write import write

__all__ = ["KeyMap", "guess_system", "load_into", "map_keys", "read", "read_metadata", "write"]
