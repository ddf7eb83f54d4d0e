"""``python -m checkpoint_operator.mover``: how both executors start a mover."""

import os
import sys

# A mover starts once for each artifact, and pydantic would look through every installed package for plugins first.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from checkpoint_operator.mover.main import main

sys.exit(main())
