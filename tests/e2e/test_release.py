"""The operator comes, goes and changes; artifacts, their movers and their data do not mind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

from release import NAME, NAMESPACE, Release
from space import Space
from watching import Body

MIB = 1 << 20
SLOW = {"maxBytesPerSecond": MIB}
CRD = "checkpointartifacts.checkpoints.rlhf.dev"


def under_way(space: Space, *names: str) -> None:
    """A training whose artifacts are being moved, and will be for some time."""
    space.claim("output")
    space.train({"run": {"model.bin": 24 * MIB}}, *(space.artifact(name, "run", mover=SLOW) for name in names))
    for name in names:
        space.sends(name)


def started_once(space: Space, *names: str) -> None:
    """Each mover that was under way has ended well, and was the only one."""
    for name in names:
        status = space.ready(name)
        assert (status["launches"], status["attempts"]) == (1, 1), name
        assert len(space.movers(name)) == 1, name


def custom_resource(space: Space) -> Body:
    body: Body = json.loads(space.kubectl("get", "crd", CRD, "-o", "json").stdout)
    return body


def test_helm_test_passes(release: Release) -> None:
    assert "Phase:          Succeeded" in release.run("test", NAME, "--timeout=100s").stdout


def test_an_operator_that_is_killed_starts_no_mover_twice_and_loses_none(space: Space, release: Release) -> None:
    names = ("a", "b", "c", "d")
    under_way(space, *names)
    release.restart()
    started_once(space, *names)


def test_an_uninstall_leaves_artifacts_and_data_and_a_new_install_takes_them_over(space: Space, release: Release) -> None:
    under_way(space, "running")
    space.submit(space.artifact("stored", "run"), space.artifact("waiting", "none", claim="missing"))
    space.ready("stored")
    space.waits("waiting", "ClaimNotFound")
    before = space.objects("stored")
    uid = custom_resource(space)["metadata"]["uid"]
    try:
        release.run("uninstall", NAME, "--wait", "--timeout=100s")
        left: subprocess.CompletedProcess[str] = release.kubectl("get", "deployments,jobs,configmaps,sa", "-o", "name")
        assert NAME not in left.stdout
        assert space.kubectl("get", "ckpt", "-o", "name").stdout.count("\n") == 3
        space.kubectl("delete", "ckpt", "stored", "--timeout=30s")
        assert space.objects("stored") == before
    finally:
        release.install()
    started_once(space, "running")
    assert custom_resource(space)["metadata"]["uid"] == uid
    space.kubectl("delete", "ckpt", "waiting", "--timeout=30s")


def test_an_upgrade_and_a_rollback_keep_what_is_under_way_and_the_custom_resource(space: Space, release: Release) -> None:
    release.install(release.package("0.0.9"), **release.image(release.place.earlier_image))
    uid = custom_resource(space)["metadata"]["uid"]
    under_way(space, "upgraded")
    release.install()
    assert "0.1.0" in release.run("list").stdout
    space.submit(space.artifact("rolled-back", "run", mover=SLOW))
    space.sends("rolled-back")
    release.run("rollback", NAME, "--wait", "--timeout=100s")
    assert "0.0.9" in release.run("list").stdout
    started_once(space, "upgraded", "rolled-back")
    assert custom_resource(space)["metadata"]["uid"] == uid
    release.install()


def test_an_operator_for_listed_namespaces_serves_those_and_has_no_right_elsewhere(
    new_space: Callable[[str], Space], release: Release
) -> None:
    served, other = new_space("-listed"), new_space("-other")
    release.install(watchNamespaces=[served.name])
    try:
        for space in (other, served):
            space.claim("output")
            space.train({"run": "sample"}, space.artifact("mine", "run"))
        served.ready("mine")
        assert "status" not in json.loads(other.kubectl("get", "ckpt", "mine", "-o", "json").stdout)
        account = f"--as=system:serviceaccount:{NAMESPACE}:{NAME}"
        for space, answer in ((served, "yes"), (other, "no")):
            assert space.kubectl("auth", "can-i", "create", "jobs", account, check=False).stdout.strip() == answer
    finally:
        release.install()
    other.ready("mine")
