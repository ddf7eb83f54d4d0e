"""What kopf is told to watch: of Jobs and pods only ours, chosen on the server."""

import pytest
from kopf._cogs.structs.references import Resource

from checkpoint_operator.controller.handlers import settings


@pytest.mark.parametrize(
    ("group", "plural", "selectors"),
    [
        ("batch", "jobs", ["checkpoints.rlhf.dev/artifact-uid"]),
        ("", "pods", ["checkpoints.rlhf.dev/artifact-uid"]),
        ("checkpoints.rlhf.dev", "checkpointartifacts", []),
    ],
)
def test_the_server_is_asked_for_our_jobs_and_pods_alone(group: str, plural: str, selectors: list[str]) -> None:
    resource = Resource(group=group, version="v1", plural=plural, namespaced=True, preferred=True)
    assert settings().watching.label_selectors.collect(resource) == selectors
