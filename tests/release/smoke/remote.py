"""The extra `remote`: an `Amulet` over a server; its address is the first argument."""

from __future__ import annotations

import sys

from amulet import Amulet

amulet = Amulet.connect(sys.argv[1])
found = amulet.compare("What is tea?", "Talk like a pirate.", max_new_tokens=16)
print(found)
assert found.plain.text != found.steered.text
assert found.steered.trace is not None
