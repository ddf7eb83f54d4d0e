"""What is generated from the code is committed as the code would write it."""

from pathlib import Path

import generate
import pytest

FILES = dict(generate.generated())


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(generate.ROOT)) for path in FILES])
def test_a_generated_file_is_up_to_date(path: Path) -> None:
    assert path.read_text() == FILES[path], "run `make generate` and commit the outcome"
