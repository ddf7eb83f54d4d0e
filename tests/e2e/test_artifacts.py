"""A training's checkpoint reaches its store: what users see of it, and what its mover may."""

from __future__ import annotations

import hashlib
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from space import TRAINER, Space, digests, sample_digests

MIB = 1 << 20


def test_a_training_job_says_saved_and_its_checkpoint_is_in_the_bucket_byte_for_byte(space: Space) -> None:
    space.claim("output")
    space.train({"run/checkpoint-2": "sample"}, space.artifact("dpo", "run/checkpoint-2", training={"jobName": "dpo"}))
    status = space.ready("dpo")

    objects = space.objects("dpo")
    manifest = objects.pop(".metadata.json")
    assert digests(objects) == sample_digests()
    assert status["manifestDigest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    assert (status["launches"], status["attempts"]) == (1, 1)

    table = space.kubectl("get", "ckpt").stdout
    assert re.search(r"NAME +TYPE +PHASE +PROGRESS +SIZE +JOB +STEP +LOSS +AGE\n", table), table
    assert re.search(r"\ndpo +checkpoint +Ready +100% +60Ki +dpo +\d* +\S* *\d+s", table), table
    assert f"s3://checkpoints/{space.name}/dpo" in space.kubectl("get", "ckpt", "-o", "wide").stdout
    assert "Committed" in space.kubectl("get", "events", "--field-selector=involvedObject.name=dpo").stdout
    space.without_jobs("dpo")


def test_a_mover_has_no_token_and_runs_as_whom_wrote_the_files_with_nothing_else(space: Space) -> None:
    space.claim("output")
    space.train({"run": "sample"}, space.artifact("plain", "run"))
    space.ready("plain")

    [pod] = space.movers("plain")
    spec, [container] = pod["spec"], pod["spec"]["containers"]
    assert spec["serviceAccountName"] == "default"
    assert {volume["name"] for volume in spec["volumes"]} == {"source", "credentials", "tmp"}, "no token among them"
    assert spec["securityContext"]["runAsUser"] == TRAINER, "its files have mode 0600"
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["name"]: mount.get("readOnly", False) for mount in container["volumeMounts"]} == {
        "source": True,
        "credentials": True,
        "tmp": False,
    }

    def may(verb: str, kind: str) -> bool:
        who = f"--as=system:serviceaccount:{space.name}:trainer"
        return space.kubectl("auth", "can-i", verb, kind, who, check=False).stdout.strip() == "yes"

    assert may("create", "checkpointartifacts.checkpoints.rlhf.dev")
    assert not may("get", "checkpointartifacts.checkpoints.rlhf.dev")
    assert not may("delete", "checkpointartifacts.checkpoints.rlhf.dev")
    assert not may("get", "secrets")


def test_who_watches_sees_the_bytes_move(space: Space) -> None:
    space.claim("output")
    artifact = space.artifact("large", "run", mover={"maxBytesPerSecond": 4 * MIB})
    with watched(space) as lines:
        space.train({"run": {"model.bin": 24 * MIB}}, artifact)
        space.ready("large")
        space.until("checkpointartifacts", lambda _: any("Ready" in line for line in lines), "kubectl to print it")
    seen = [int(found[1]) for line in lines if (found := re.search(r"Uploading +(\d+)%", line))]
    assert seen == sorted(seen)
    assert any(0 < percent < 100 for percent in seen), lines
    assert re.search(r"Ready +100% +24Mi", lines[-1]), lines


@contextmanager
def watched(space: Space) -> Iterator[list[str]]:
    """What `kubectl get ckpt -w` prints meanwhile, as somebody at a terminal sees it."""
    cluster = space.place.cluster
    process = subprocess.Popen(
        [cluster.kubectl, f"--kubeconfig={cluster.kubeconfig}", "--namespace", space.name, "get", "ckpt", "--watch"],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []
    assert process.stdout is not None
    stream = process.stdout
    reader = threading.Thread(target=lambda: lines.extend(iter(stream.readline, "")), daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        stream.close()


def test_a_file_target_lies_in_a_second_claim_and_only_that_one_is_written_to(space: Space) -> None:
    space.claim("output")
    space.claim("archive")
    target = {"uri": "file:///kept/dpo", "persistentVolumeClaim": {"claimName": "archive"}}
    space.train({"run": "sample"}, space.artifact("local", "run", target=target))
    status = space.ready("local")
    assert status["storageURI"] == "file:///kept/dpo"

    stored = space.digests("archive")
    assert f"sha256:{stored.pop('kept/dpo/.metadata.json')}" == status["manifestDigest"]
    assert stored == {f"kept/dpo/{name}": digest for name, digest in sample_digests().items()}
    [pod] = space.movers("local")
    mounts = {mount["name"]: mount.get("readOnly", False) for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    assert (mounts["source"], mounts["target"]) == (True, False)


def test_files_that_nobody_tells_the_owner_of_are_named_and_a_user_in_the_spec_cures_it(space: Space) -> None:
    space.claim("output")
    space.train({"run": "sample"})
    space.forget_training()
    space.submit(space.artifact("private", "run"))
    message = space.waits("private", "SourceUnreadable", phase="Failed")
    assert re.search(rf"'\S+'.*{TRAINER}.*0?600", message), message
    assert "runAsUser" in message, "it says what to do"

    space.patch("private", mover={"runAsUser": TRAINER})
    space.ready("private")


def test_a_volume_that_is_mounted_on_one_node_has_its_mover_there(space: Space) -> None:
    *_, node = space.place.nodes
    space.claim("output")
    # The training goes on after it has saved, and keeps the volume.
    space.train({"run": "sample"}, space.artifact("pinned", "run"), node=node, hold=True)
    space.ready("pinned")
    [pod] = space.movers("pinned")
    assert pod["spec"]["nodeName"] == node
    required = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"] == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    ], "and not by chance"


def test_a_claim_for_one_pod_alone_is_waited_for_and_its_holder_is_named(space: Space) -> None:
    space.claim("output", mode="ReadWriteOncePod")
    space.train({"run": "sample"}, space.artifact("alone", "run"), hold=True)
    assert "pod 'training-" in space.waits("alone", "ClaimInUse")
    space.end_training()
    space.ready("alone")
