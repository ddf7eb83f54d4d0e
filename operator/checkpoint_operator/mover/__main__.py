"""``python -m checkpoint_operator.mover``: how both executors start a mover."""

import sys

from checkpoint_operator.mover.main import main

sys.exit(main())
