"""Each trouble that a mover can have, on a real node: what the artifact says meanwhile, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable

from release import NAME, Release
from space import Space, Store, condition
from watching import Body

MIB = 1 << 20
# The operator looks at a mover's log each five seconds, so a transfer has to last for some of these.
SLOW = {"maxBytesPerSecond": MIB}
FILES = {f"part-{number:02}.bin": MIB for number in range(32)}


def test_a_mover_without_enough_memory_is_said_to_be_and_more_memory_in_the_spec_cures_it(space: Space) -> None:
    space.claim("output")
    tiny = {"resources": {"requests": {"memory": "16Mi"}, "limits": {"memory": "24Mi"}}}
    space.train({"run": "sample"}, space.artifact("hungry", "run", mover=tiny))
    assert "OOMKilled" in space.waits("hungry", "OutOfMemory")
    space.patch("hungry", mover={"resources": {"limits": {"memory": "256Mi"}}})
    assert space.ready("hungry")["launches"] == 2


def test_an_image_that_cannot_be_pulled_is_waited_for_with_the_nodes_words(space: Space, release: Release) -> None:
    """The admin's mistake: the operator runs, and what it names as the movers' image is not there."""
    space.claim("output")
    config = json.loads(release.kubectl("get", "configmap", NAME, "-o", "json").stdout)
    jobs = config["data"]["jobs.yaml"]
    wrong = f"{space.place.host_address}:1/none:1"  # nobody listens there, so it is refused at once
    with_wrong = "\n".join(
        f"image: {wrong}" if line.startswith("image:") else line.replace("Never", "IfNotPresent")
        if line.startswith("imagePullPolicy:") else line
        for line in jobs.splitlines()
    )  # fmt: skip

    def configure(text: str) -> None:
        release.kubectl("patch", "configmap", NAME, "--type=merge", "-p", json.dumps({"data": {"jobs.yaml": text}}))
        release.restart()

    try:
        configure(with_wrong)
        space.train({"run": "sample"}, space.artifact("stuck", "run"))
        assert wrong in space.waits("stuck", "ImagePullFailed")
    finally:
        configure(jobs)
    space.retry("stuck")  # its Job has the image of its first day
    status = space.ready("stuck")
    assert status["attempts"] == 1, "what never ran was no attempt"


def test_a_quota_that_refuses_job_or_pod_is_waited_for_and_it_goes_on_when_it_is_raised(space: Space) -> None:
    def quota(**hard: str) -> None:
        spec = {"hard": {"count/jobs.batch": "50", "pods": "50", **hard}}
        space.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "team"}, "spec": spec})

        def counts(found: dict[str, Body]) -> bool:
            return bool(found.get("team", {}).get("status", {}).get("hard") == spec["hard"])

        space.until("resourcequotas", counts, "it to count")

    space.claim("output")
    space.train({"run": "sample"})
    quota(**{"count/jobs.batch": "1"})
    space.submit(space.artifact("refused", "run"))
    assert "exceeded quota: team" in space.waits("refused", "QuotaExceeded")

    quota(pods="0")
    space.retry("refused")
    assert "describe job" in space.waits("refused", "PodRefused")

    quota()
    status = space.ready("refused")
    assert status["attempts"] == 1, "what never ran was no attempt"


def test_a_mover_that_no_node_takes_has_the_schedulers_words_and_another_spec_cures_it(space: Space) -> None:
    space.claim("output")
    space.train({"run": "sample"})
    # Not while the training runs: then its node is the only one, whatever the spec says.
    space.submit(space.artifact("nowhere", "run", mover={"nodeSelector": {"disk": "none"}}))
    message = space.waits("nowhere", "Unschedulable")
    assert "didn't match Pod's node affinity/selector" in message
    space.patch("nowhere", mover={"nodeSelector": None})
    status = space.ready("nowhere")
    assert status["attempts"] == 1, "what never ran was no attempt"


def test_a_pod_that_somebody_deletes_is_replaced_and_what_it_had_stored_is_not_sent_again(
    space: Space, store: Store
) -> None:
    space.claim("output")
    space.train({"run": FILES}, space.artifact("shot", "run", mover=SLOW))
    space.sends("shot", 4 * MIB)
    pod = space.mover("shot")["metadata"]["name"]
    space.kubectl("delete", "pod", pod)
    space.waits("shot", "PodLost")
    kept = sum(len(content) for content in space.objects("shot").values())
    assert kept >= 4 * MIB
    sent = store.wire.forwarded
    space.patch("shot", mover=None)  # a changed spec is tried at once
    assert space.ready("shot")["launches"] == 2
    assert store.wire.forwarded - sent < len(FILES) * MIB - kept + MIB, "headers, and not one file twice"


def test_an_outage_of_the_store_is_waited_out_and_a_request_ends_the_wait(space: Space, store: Store) -> None:
    space.claim("output")
    files = dict(list(FILES.items())[:16])
    space.train({"run": files}, space.artifact("patient", "run", mover=SLOW))
    space.sends("patient", 4 * MIB)
    store.wire.cut()
    space.waits("patient", "StoreUnavailable")
    status = space.status("patient", lambda status: "nextRetryTime" in status, "the time of the next try")
    assert status["attempts"] == 0, "an outage counts for nothing"
    kept = sum(len(content) for content in space.objects("patient").values())
    assert kept >= 4 * MIB

    store.wire.mend()
    sent = store.wire.forwarded
    space.retry("patient")
    space.ready("patient")
    assert started(space, "patient") < status["nextRetryTime"], "it did not wait for its time"
    assert store.wire.forwarded - sent < len(files) * MIB - kept + MIB, "headers, and not one file twice"


def started(space: Space, name: str) -> str:
    """When the last mover of an artifact was made."""
    return max(str(pod["metadata"]["creationTimestamp"]) for pod in space.movers(name))


def test_a_suspended_artifact_stops_its_mover_and_goes_on_from_there(space: Space) -> None:
    space.claim("output")
    space.train({"run": {"model.bin": 32 * MIB}}, space.artifact("paused", "run", mover=SLOW))
    space.sends("paused")
    space.patch("paused", suspend=True)
    space.phase("paused", "Suspended")
    space.without_jobs("paused")
    space.patch("paused", suspend=False, mover=None)
    status = space.ready("paused")
    assert (status["launches"], status["attempts"]) == (2, 1), "to be suspended is no failure"


def test_a_claim_that_comes_later_is_waited_for(space: Space) -> None:
    space.submit(space.artifact("early", "run"))
    assert "'output'" in space.waits("early", "ClaimNotFound")
    assert condition(space.phase("early", "Waiting"), "Stalled").get("status") != "True"
    space.claim("output")
    space.train({"run": "sample"})
    space.retry("early")
    space.ready("early")


def test_an_endpoint_that_the_admin_did_not_list_is_never_called(space: Space) -> None:
    space.claim("output")
    elsewhere = space.artifact("elsewhere", "run")
    elsewhere["spec"]["target"]["endpoint"] = f"http://{space.place.host_address}:9"
    inside = space.artifact("inside", "run")
    inside["spec"]["target"]["endpoint"] = "http://169.254.169.254"
    space.submit(elsewhere, inside)
    for name in ("elsewhere", "inside"):
        space.waits(name, "EndpointNotAllowed", phase="Failed")
        assert space.phase(name, "Failed")["launches"] == 0


def test_two_namespaces_know_nothing_of_each_other(new_space: Callable[[str], Space]) -> None:
    """The same name, the same URI: only the keys of one's own namespace are used, and what is there stays."""
    mine, theirs = new_space("-a"), new_space("-b")
    mine.claim("output")
    mine.train({"run": "sample"}, mine.artifact("shared", "run"))
    mine.ready("shared")
    before = mine.objects("shared")
    theirs.claim("output")
    other = theirs.artifact("shared", "run", deletionPolicy="Delete")
    other["spec"]["target"]["uri"] = f"s3://checkpoints/{mine.name}/shared"
    theirs.train({"run": {"model.bin": MIB}}, other)
    theirs.waits("shared", "TargetExists", phase="Failed")
    theirs.kubectl("delete", "ckpt", "shared", "--timeout=60s")
    assert mine.objects("shared") == before
