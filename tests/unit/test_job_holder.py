"""Where a mover runs and as whom: each case as a sentence about the claim and the pods that mount it."""

from typing import Any

import pytest
from job_world import UID, artifact, claim, mover_pod, pod, rules, to_file

from checkpoint_operator.api.artifact import CheckpointArtifact
from checkpoint_operator.api.errors import Reason
from checkpoint_operator.api.protocol import Failure, Operation
from checkpoint_operator.controller.config_jobs import JobRules
from checkpoint_operator.controller.jobs.gather import slim
from checkpoint_operator.controller.jobs.holder import Hold, Placement, assess, claim_names

RULES = rules()
ALLOWS_ROOT = {"metadata": {"annotations": {"checkpoints.rlhf.dev/allow-root": "true"}}}


def decide(
    *pods: dict[str, Any],
    of: CheckpointArtifact | None = None,
    claims: dict[str, Any] | None = None,
    operation: Operation = Operation.UPLOAD,
    namespace: dict[str, Any] | None = None,
    account: dict[str, Any] | None = None,
    by: JobRules = RULES,
) -> Placement | Hold | Failure:
    found = {"dpo-output": claim(), "archive": claim("ReadWriteMany"), **(claims or {})}
    answer = assess(of or artifact(), operation, found, pods, namespace or {}, account, by)
    # What the gatherer keeps of a pod is all that is read of one.
    kept = [slim(each) for each in pods]
    assert assess(of or artifact(), operation, found, kept, namespace or {}, account, by) == answer
    return answer


def placed(*pods: dict[str, Any], **more: Any) -> Placement:
    decision = decide(*pods, **more)
    assert isinstance(decision, Placement), decision
    return decision


def held(*pods: dict[str, Any], **more: Any) -> Hold:
    decision = decide(*pods, **more)
    assert isinstance(decision, Hold), decision
    return decision


def failed(*pods: dict[str, Any], **more: Any) -> Failure:
    decision = decide(*pods, **more)
    assert isinstance(decision, Failure), decision
    return decision


# ---- the user


def test_with_nobody_at_the_claim_the_admins_default_user_runs_anywhere() -> None:
    place = placed()
    assert (place.run_as_user, place.run_as_group, place.fs_group) == (65532, 65532, None)
    assert (place.node, place.small_requests, place.tolerations) == (None, False, ())
    assert placed(by=rules(defaultUser=1234)).run_as_user == 1234


def test_the_containers_user_is_before_the_pods() -> None:
    place = placed(pod(pod_security={"runAsUser": 1000, "runAsGroup": 100}, container_security={"runAsUser": 2000}))
    assert (place.run_as_user, place.run_as_group) == (2000, 100)
    assert "trainer" in place.user_from


def test_what_the_kubelet_saw_is_used_where_the_spec_is_silent() -> None:
    place = placed(pod(seen={"uid": 3000, "gid": 300, "supplementalGroups": [300]}))
    assert (place.run_as_user, place.run_as_group) == (3000, 300)


def test_a_sidecar_that_does_not_mount_the_claim_says_nothing_about_it() -> None:
    assert placed(pod()).run_as_user == 65532


def test_the_artifact_is_before_every_pod() -> None:
    place = placed(pod(container_security={"runAsUser": 2000, "runAsGroup": 20}), of=artifact(mover={"runAsUser": 1111}))
    assert (place.run_as_user, place.run_as_group) == (1111, 65532)
    assert place.user_from == "spec.mover.runAsUser"


def test_a_training_that_has_ended_still_tells_whose_the_files_are() -> None:
    place = placed(pod(phase="Succeeded", container_security={"runAsUser": 2000}))
    assert place.run_as_user == 2000
    assert (place.node, place.small_requests) == (None, False), "it holds the volume no more"


def test_the_living_are_before_the_dead_and_writers_before_readers_and_the_newest_first() -> None:
    dead = pod("dead", phase="Succeeded", container_security={"runAsUser": 1}, started="2026-11-24T11:59:00Z")
    reader = pod("reader", read_only=True, container_security={"runAsUser": 2}, started="2026-11-24T11:58:00Z")
    old = pod("old", container_security={"runAsUser": 3}, started="2026-11-24T09:00:00Z")
    new = pod("new", container_security={"runAsUser": 4}, started="2026-11-24T10:00:00Z")
    starting = pod("starting", phase="Pending", container_security={"runAsUser": 5}, started="2026-11-24T11:59:30Z")
    assert placed(dead, reader, old, new, starting).run_as_user == 4
    assert placed(dead, reader, old, starting).run_as_user == 3
    assert placed(dead, reader, starting).run_as_user == 2
    assert placed(dead, starting).run_as_user == 5
    assert placed(dead).run_as_user == 1


def test_who_says_no_user_is_passed_over() -> None:
    assert placed(pod("silent"), pod("old", phase="Failed", container_security={"runAsUser": 7})).run_as_user == 7


def test_an_init_container_that_writes_counts_too() -> None:
    body = pod()
    [_, main] = body["spec"]["containers"]
    body["spec"]["containers"] = [{"name": "sidecar"}]
    body["spec"]["initContainers"] = [{**main, "securityContext": {"runAsUser": 2000}}]
    assert placed(body).run_as_user == 2000


def test_a_claim_that_is_mounted_read_only_by_the_volume_is_no_writers() -> None:
    body = pod("reader", container_security={"runAsUser": 2}, started="2026-11-24T11:59:00Z")
    body["spec"]["volumes"][1]["persistentVolumeClaim"]["readOnly"] = True
    assert placed(body, pod("writer", container_security={"runAsUser": 3})).run_as_user == 3


def test_a_mover_of_ours_tells_nothing_about_the_files() -> None:
    assert placed(mover_pod(container_security={"runAsUser": 2000})).run_as_user == 65532


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": {"checkpoints.rlhf.dev/artifact-uid": UID}},
        {"ownerReferences": [{"kind": "Job", "name": f"ckpt-{UID}-1", "controller": True}]},
        {
            "labels": {"checkpoints.rlhf.dev/artifact-uid": UID},
            "ownerReferences": [{"kind": "Job", "name": "mine", "controller": True}],
        },
        {
            "labels": {"checkpoints.rlhf.dev/artifact-uid": UID},
            "ownerReferences": [{"kind": "Job", "name": f"ckpt-{UID[:-1]}9-1", "controller": True}],
        },
        {
            "labels": {"checkpoints.rlhf.dev/artifact-uid": UID},
            "ownerReferences": [{"kind": "ReplicaSet", "name": f"ckpt-{UID}-1", "controller": True}],
        },
        {
            "labels": {"checkpoints.rlhf.dev/artifact-uid": UID},
            "ownerReferences": [{"kind": "Job", "name": f"ckpt-{UID}-1"}],
        },
    ],
)
def test_a_label_or_a_name_alone_makes_no_mover(metadata: dict[str, Any]) -> None:
    assert placed(pod(container_security={"runAsUser": 2000}, metadata=metadata)).run_as_user == 2000


def test_the_user_of_the_mover_before_is_remembered_when_nobody_is_there_any_more() -> None:
    before = artifact(status={"mover": {"kind": "Job", "name": "ckpt-x-1", "runAsUser": 2000}})
    assert placed(of=before).run_as_user == 2000
    assert placed(pod(container_security={"runAsUser": 3000}), of=before).run_as_user == 3000


def test_a_deletion_in_a_claim_runs_as_who_stored_there_whoever_mounts_it_now() -> None:
    before = artifact(target=to_file(), status={"mover": {"kind": "Job", "name": "ckpt-x-1", "runAsUser": 2000}})
    reader = pod("evaluation", "archive", container_security={"runAsUser": 3000})
    assert placed(reader, of=before, operation=Operation.DELETE).run_as_user == 2000


def test_a_deletion_in_a_store_needs_nobodys_files_and_so_no_root() -> None:
    before = artifact(status={"mover": {"kind": "Job", "name": "ckpt-x-1", "runAsUser": 0}})
    assert placed(of=before, operation=Operation.DELETE).run_as_user == 65532
    into_claim = artifact(target=to_file(), status={"mover": {"kind": "Job", "name": "ckpt-x-1", "runAsUser": 0}})
    assert failed(of=into_claim, operation=Operation.DELETE).reason is Reason.SOURCE_UNREADABLE
    assert placed(of=into_claim, operation=Operation.DELETE, namespace=ALLOWS_ROOT).run_as_user == 0


@pytest.mark.parametrize("garbage", ["1000", -1, True, 2**31, 1.5, None, {"uid": 1}])
def test_what_is_no_user_is_no_user(garbage: Any) -> None:
    assert placed(pod(seen={"uid": garbage})).run_as_user == 65532


# ---- root


@pytest.mark.parametrize(
    "root",
    [
        pod(container_security={"runAsUser": 0}),
        pod(pod_security={"runAsUser": 0}),
        pod(seen={"uid": 0, "gid": 0}),
    ],
)
def test_files_of_root_are_refused_with_what_to_do_unless_the_admin_opted_the_namespace_in(root: dict[str, Any]) -> None:
    failure = failed(root)
    assert failure.reason is Reason.SOURCE_UNREADABLE
    for way_out in ("spec.mover.runAsUser", "checkpoints.rlhf.dev/allow-root=true", "trainer"):
        assert way_out in failure.message
    assert placed(root, namespace=ALLOWS_ROOT).run_as_user == 0
    assert placed(root, of=artifact(mover={"runAsUser": 1000})).run_as_user == 1000


@pytest.mark.parametrize("value", ["True", "yes", "", "false"])
def test_only_the_word_true_lets_root_in(value: str) -> None:
    namespace = {"metadata": {"annotations": {"checkpoints.rlhf.dev/allow-root": value}}}
    assert failed(pod(container_security={"runAsUser": 0}), namespace=namespace).reason is Reason.SOURCE_UNREADABLE


def test_the_root_group_is_never_given() -> None:
    place = placed(pod(pod_security={"runAsUser": 1000, "runAsGroup": 0, "fsGroup": 0, "supplementalGroups": [0, 5]}))
    assert place.run_as_group == 65532
    assert place.supplemental_groups == (5,)
    assert place.fs_group is None


# ---- groups


def test_of_a_pod_with_lists_of_any_length_no_more_is_taken_than_a_mover_may_have() -> None:
    """Whoever may create a pod decides how long they are, up to a megabyte; the operator must not stand still for them."""
    many = [{"key": f"k{number}", "operator": "Exists"} for number in range(5000)]
    place = placed(pod(tolerations=many, pod_security={"runAsUser": 1000, "supplementalGroups": list(range(1, 5000))}))
    assert place.tolerations == tuple(many[:64])
    assert place.supplemental_groups == tuple(range(1, 33))


def test_an_fs_group_is_repeated_while_its_holder_runs_and_is_a_supplemental_group_otherwise() -> None:
    security = {"runAsUser": 1000, "runAsGroup": 100, "fsGroup": 2000, "supplementalGroups": [3000]}
    place = placed(pod(pod_security=security))
    assert (place.fs_group, place.supplemental_groups, place.run_as_group) == (2000, (3000,), 100)
    place = placed(pod(pod_security=security, phase="Succeeded"))
    assert (place.fs_group, place.supplemental_groups) == (None, (2000, 3000))


def test_two_holders_of_two_minds_cause_no_chgrp() -> None:
    one, other = pod("a", pod_security={"runAsUser": 1, "fsGroup": 2000}), pod("b", pod_security={"fsGroup": 2001})
    place = placed(one, other)
    assert (place.fs_group, place.supplemental_groups) == (None, (2000, 2001))
    assert placed(one, pod("c")).fs_group is None


def test_an_fs_group_of_the_targets_holder_does_not_touch_the_source() -> None:
    reader = pod("evaluation", "archive", pod_security={"fsGroup": 2000})
    place = placed(reader, of=artifact(target=to_file()))
    assert (place.fs_group, place.supplemental_groups) == (None, (2000,))


def test_the_holders_selinux_level_is_kept_so_that_nothing_is_relabelled_under_it() -> None:
    assert placed(pod(pod_security={"seLinuxOptions": {"level": "s0:c1,c2", "type": "spc_t"}})).selinux_level == "s0:c1,c2"
    assert placed(pod(phase="Failed", pod_security={"seLinuxOptions": {"level": "s0:c1,c2"}})).selinux_level is None


# ---- the node


def test_a_volume_of_one_node_pins_the_mover_there_with_the_holders_tolerations_and_small_requests() -> None:
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    lost = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    place = placed(pod(tolerations=[gpu, lost]))
    assert (place.node, place.small_requests, place.tolerations) == ("node-a", True, (gpu,))


def test_a_shared_volume_pins_nobody() -> None:
    for modes in (["ReadWriteMany"], ["ReadWriteOnce", "ReadWriteMany"], ["ReadOnlyMany"]):
        place = placed(pod(container_security={"runAsUser": 5}), claims={"dpo-output": claim(*modes)})
        assert (place.node, place.small_requests, place.run_as_user) == (None, False, 5)


def test_a_volume_that_many_may_only_read_while_one_writes_pins_as_well() -> None:
    assert placed(pod(), claims={"dpo-output": claim("ReadWriteOnce", "ReadOnlyMany")}).node == "node-a"


def test_what_the_volume_can_do_is_before_what_was_asked_for() -> None:
    body = claim("ReadWriteOnce")
    body["status"]["accessModes"] = ["ReadWriteMany"]
    assert placed(pod(), claims={"dpo-output": body}).node is None


def test_a_holder_that_has_no_node_yet_pins_nobody() -> None:
    assert placed(pod(phase="Pending", node=None)).node is None


def test_a_holder_that_is_being_stopped_still_holds_the_volume() -> None:
    assert placed(pod(metadata={"deletionTimestamp": "2026-11-24T12:00:00Z"})).node == "node-a"


def test_another_mover_holds_the_volume_like_anybody() -> None:
    assert placed(mover_pod(node="node-b")).node == "node-b"


def test_of_several_nodes_the_writers_is_the_one() -> None:
    assert placed(pod("a", node="node-a", read_only=True), pod("b", node="node-b")).node == "node-b"


def test_pods_at_other_claims_do_not_matter() -> None:
    assert placed(pod(claim="other", container_security={"runAsUser": 0})) == placed()


def test_source_and_target_on_two_nodes_wait_and_say_who_holds_them() -> None:
    both = (pod("trainer", node="node-a"), pod("evaluation", "archive", node="node-b"))
    hold = held(*both, of=artifact(target=to_file()), claims={"archive": claim()})
    assert hold.reason is Reason.CLAIM_IN_USE
    for word in ("trainer", "node-a", "evaluation", "node-b"):
        assert word in hold.message


def test_the_targets_holder_pins_too() -> None:
    place = placed(pod("evaluation", "archive", node="node-b"), of=artifact(target=to_file()), claims={"archive": claim()})
    assert place.node == "node-b"


@pytest.mark.parametrize("holder", [pod(), pod(phase="Pending", node=None), mover_pod("trainer")])
def test_a_claim_for_one_pod_alone_waits_for_its_holder_by_name(holder: dict[str, Any]) -> None:
    hold = held(holder, claims={"dpo-output": claim("ReadWriteOncePod")})
    assert hold.reason is Reason.CLAIM_IN_USE
    assert "trainer" in hold.message


def test_a_claim_for_one_pod_alone_is_taken_when_its_holder_has_ended() -> None:
    place = placed(pod(phase="Succeeded", seen={"uid": 9}), claims={"dpo-output": claim("ReadWriteOncePod")})
    assert (place.run_as_user, place.node) == (9, None)


# ---- the claims


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, Reason.CLAIM_NOT_FOUND),
        (claim(phase="Pending"), Reason.CLAIM_PENDING),
        (claim(phase="Lost"), Reason.CLAIM_LOST),
        (claim(deleted=True), Reason.CLAIM_DELETING),
        ({}, Reason.CLAIM_PENDING),
    ],
)
def test_a_source_that_cannot_be_mounted_waits_with_its_reason(body: Any, reason: Reason) -> None:
    hold = held(claims={"dpo-output": body})
    assert hold.reason is reason
    assert "'dpo-output'" in hold.message


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, Reason.CLAIM_NOT_FOUND),
        (claim(phase="Lost"), Reason.CLAIM_LOST),
        (claim(deleted=True), Reason.CLAIM_DELETING),
    ],
)
def test_a_target_claim_that_cannot_be_mounted_waits_with_its_reason(body: Any, reason: Reason) -> None:
    hold = held(of=artifact(target=to_file()), claims={"archive": body})
    assert hold.reason is reason
    assert "'archive'" in hold.message


def test_a_target_claim_that_waits_for_its_first_consumer_gets_it() -> None:
    placed(of=artifact(target=to_file()), claims={"archive": claim(phase="Pending")})


def test_a_source_that_is_the_target_too_is_still_empty_while_it_is_pending() -> None:
    hold = held(of=artifact(target=to_file("dpo-output")), claims={"dpo-output": claim(phase="Pending")})
    assert hold.reason is Reason.CLAIM_PENDING


def test_a_target_that_can_only_be_read_and_a_volume_without_files_are_refused() -> None:
    only_read = failed(of=artifact(target=to_file()), claims={"archive": claim("ReadOnlyMany")})
    block = failed(claims={"dpo-output": claim(volumeMode="Block")})
    assert only_read.reason is block.reason is Reason.CLAIM_UNSUITABLE


def test_a_deletion_needs_the_source_no_more() -> None:
    assert claim_names(artifact(), Operation.DELETE) == ()
    assert claim_names(artifact(target=to_file()), Operation.DELETE) == ("archive",)
    assert claim_names(artifact(target=to_file("dpo-output")), Operation.UPLOAD) == ("dpo-output",)
    assert claim_names(artifact(target=to_file()), Operation.UPLOAD) == ("dpo-output", "archive")
    placed(operation=Operation.DELETE, claims={"dpo-output": None})


# ---- the ServiceAccount


@pytest.mark.parametrize(
    ("account", "allowed"),
    [
        ({"metadata": {"annotations": {"checkpoints.rlhf.dev/allow-mover": "true"}}}, True),
        ({"metadata": {"annotations": {"checkpoints.rlhf.dev/allow-mover": "false"}}}, False),
        ({"metadata": {"annotations": {}}}, False),
        ({"metadata": {"labels": {"checkpoints.rlhf.dev/allow-mover": "true"}}}, False),
        ({}, False),
        (None, False),
    ],
)
def test_a_service_account_has_to_allow_movers_itself(account: Any, allowed: bool) -> None:
    for of, by in ((artifact(mover={"serviceAccountName": "m"}), RULES), (artifact(), rules(serviceAccountName="m"))):
        decision = decide(of=of, by=by, account=account)
        assert isinstance(decision, Placement) is allowed
        if isinstance(decision, Failure):
            assert decision.reason is Reason.SERVICE_ACCOUNT_NOT_ALLOWED
            assert "'m'" in decision.message
            assert "checkpoints.rlhf.dev/allow-mover=true" in decision.message


def test_without_a_named_account_none_is_asked_for() -> None:
    placed(account=None)
