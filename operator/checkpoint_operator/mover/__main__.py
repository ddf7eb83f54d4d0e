"""``python -m checkpoint_operator.mover``: how both executors start a mover."""

import gc
import sys

# A mover starts once for each artifact, and nothing that an import makes is ever garbage: do not look for it, now or later.
gc.disable()

from checkpoint_operator.mover.main import main  # noqa: E402

gc.freeze()
gc.enable()

sys.exit(main())
