"""What is looked up before a start is shared for a moment, but never with an artifact that is younger than the answer."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, cast

from job_world import artifact

from checkpoint_operator.controller.jobs.gather import Gatherer
from checkpoint_operator.controller.kube import Kube


class Asked:
    """A cluster that counts how often it is asked for a claim."""

    def __init__(self) -> None:
        self.times = 0

    async def get_claim(self, namespace: str, name: str) -> dict[str, Any]:
        self.times += 1
        return {"asked": self.times}

    async def get_namespace(self, name: str) -> dict[str, Any]:
        return {}


def created(at: float) -> Any:
    made = artifact()
    return made.replace(metadata=made.metadata.replace(creation_timestamp=datetime.fromtimestamp(at, UTC)))


async def test_artifacts_that_were_there_before_share_one_answer() -> None:
    asked = Asked()
    gather = Gatherer(cast(Kube, asked))
    old = created(time.time() - 60)
    assert [await gather.claim(old, "output") for _ in range(3)] == [{"asked": 1}] * 3


async def test_an_artifact_of_this_second_gets_an_answer_of_its_own() -> None:
    asked = Asked()
    gather = Gatherer(cast(Kube, asked))
    await gather.claim(created(time.time() - 60), "output")
    assert await gather.claim(created(int(time.time())), "output") == {"asked": 2}
