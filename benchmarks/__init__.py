"""Speed and memory; each module is a script, ``python -m benchmarks.NAME`` in a clone with phi4edge installed.

Where the clone has no compiled part of its own, the installed package is the one to measure: the clone goes to the
end of the path, which it is first in with ``python -m``.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if not [*(_ROOT / "phi4edge").glob("_core*.so"), *(_ROOT / "phi4edge").glob("_core*.pyd")]:
    sys.path = [*(path for path in sys.path if Path(path or ".").resolve() != _ROOT), str(_ROOT)]
