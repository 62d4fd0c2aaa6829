"""Exit codes with which a worker ends itself, of sysexits.h."""

from __future__ import annotations

EXIT_BROKEN = 70  # EX_SOFTWARE: what it holds may be in any state
EXIT_STUCK = 75  # EX_TEMPFAIL: native code that nothing can stop
