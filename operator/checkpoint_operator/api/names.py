"""Every name that other software can see, in one place: renaming one of these breaks installations."""

GROUP = "checkpoints.rlhf.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "CheckpointArtifact"
PLURAL = "checkpointartifacts"
SINGULAR = "checkpointartifact"
SHORT_NAME = "ckpt"

FINALIZER = f"{GROUP}/data"
FOREGROUND_DELETION = "foregroundDeletion"
"""The garbage collector's own finalizer (``kubectl delete --cascade=foreground``)."""

# A new value asks for another try of a Failed artifact; the last value that was acted upon is in the status.
ANNOTATION_RETRY = f"{GROUP}/retry"
# "true" lets a deletion finish although its data could not be removed.
ANNOTATION_ABANDON_DATA = f"{GROUP}/abandon-data"

# On a ServiceAccount, "true": movers may run as it. Else whoever may create artifacts had every identity of the namespace.
ANNOTATION_ALLOW_MOVER = f"{GROUP}/allow-mover"
# On a Namespace, "true": the admin lets movers run as root there, where the checkpoints belong to root.
ANNOTATION_ALLOW_ROOT = f"{GROUP}/allow-root"

LABEL_ARTIFACT_UID = f"{GROUP}/artifact-uid"
LABEL_ARTIFACT_NAME = f"{GROUP}/artifact-name"

CREDENTIALS_DIRECTORY = "/var/run/checkpoint/credentials"
"""Where the Secret is mounted in a mover's pod; its keys are the SDKs' own variable names (DESIGN §5)."""

ANNOTATION_CRD_VERSION = f"{GROUP}/crd-version"
"""On the CRD: the version that brought it, so that no older one replaces it."""

MARKER_NAME = ".metadata.json"
"""The object beside the files that says what they are (DESIGN §6)."""

PROBE_PREFIX = ".probe-"
"""Names of the objects with which an endpoint is asked once whether it honours conditional writes."""

ENV_PLAN = "CHECKPOINT_PLAN"
"""The variable that hands the mover its plan, one JSON document."""

PLAN_MAX_BYTES = 96 * 1024
"""Above this the kernel's limit of 128 KiB for one environment string comes near."""

ENV_TERMINATION_MESSAGE = "CHECKPOINT_TERMINATION_MESSAGE"
"""Where the mover writes its result once more (the pod's terminationMessagePath)."""

ENV_EXIT_WITH_PARENT = "CHECKPOINT_EXIT_WITH_PARENT"
"""Set where the mover is a child of the operator: the end of its standard input is the operator's death."""


def mover_name(uid: str, launch: int) -> str:
    """The deterministic name of an artifact's n-th mover: whoever starts it twice meets the first."""
    return f"{mover_prefix(uid)}{launch}"


def mover_prefix(uid: str) -> str:
    """What the names of all movers of one artifact begin with."""
    return f"ckpt-{uid}-"
