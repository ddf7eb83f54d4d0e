"""Downloads one artifact with the library: ``ours_download.py URI DESTINATION``, with TargetOptions in BENCH_OPTIONS."""

import os
import sys

from checkpoint_operator.storage import StorageManager, TargetOptions

options = TargetOptions.model_validate_json(os.environ["BENCH_OPTIONS"])
StorageManager(options).download(sys.argv[1], sys.argv[2])
