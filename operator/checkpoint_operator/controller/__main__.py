"""``python -m checkpoint_operator.controller``: the operator."""

import sys

from checkpoint_operator.controller.main import main

sys.exit(main())
