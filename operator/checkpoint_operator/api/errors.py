"""The one table of everything that can go wrong: its code, its exit code, and whether trying again can help.

The library raises these reasons, the mover turns them into an exit code, the controller into a retry or a
verdict, and ``docs/failures.md`` is written from the same table.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum


class ErrorCode(StrEnum):
    """The library's stable codes (DESIGN §7); what client code may match on."""

    UNSUPPORTED = "RLHF050"
    UPLOAD = "RLHF051"
    DOWNLOAD = "RLHF052"
    METADATA = "RLHF053"
    NOT_FOUND = "RLHF054"
    EXISTS = "RLHF055"
    INTEGRITY = "RLHF056"
    SOURCE = "RLHF057"
    CREDENTIALS = "RLHF058"
    UNAVAILABLE = "RLHF059"


CODES: dict[ErrorCode, str] = {
    ErrorCode.UNSUPPORTED: "What was asked for cannot be done here: correct the URI or the name, or install the backend.",
    ErrorCode.UPLOAD: "An upload was refused for good, or ended by a bug: the message has the store's own words.",
    ErrorCode.DOWNLOAD: "A download or a verification was refused for good: the message has the words of the store or disk.",
    ErrorCode.METADATA: "A list, a look at the metadata or a deletion was refused for good: see the store's own words.",
    ErrorCode.NOT_FOUND: "No committed checkpoint, or no bucket, is there: list its parent, or create the bucket.",
    ErrorCode.EXISTS: "Somebody else's data is there, or being written: choose another place, or try again later.",
    ErrorCode.INTEGRITY: "Bytes are not what was written: upload the checkpoint again to another place, look at the store.",
    ErrorCode.SOURCE: "The source is missing, unreadable, empty, or was written to meanwhile: look at the named file.",
    ErrorCode.CREDENTIALS: "Keys are missing, wrong, or may not do this: give them the permissions of the backend's page.",
    ErrorCode.UNAVAILABLE: "The store does not answer, or not in time: the same call may succeed later.",
}
"""What each code means to whoever calls the library, and what to do; the reasons below say it more exactly."""


class ExitCode(IntEnum):
    """What the mover's exit says when its result was lost (DESIGN §5). Part of the mover protocol: never renumber."""

    DONE = 0
    NOT_READY = 10
    SOURCE_CHANGED = 20
    UNAVAILABLE = 21
    TARGET_BUSY = 22
    CONFIGURATION = 30
    CREDENTIALS = 31
    TARGET_CONFLICT = 32
    SOURCE_UNREADABLE = 33
    BUG = 70


class Retry(StrEnum):
    """What the controller does about a failure."""

    NEVER = "Never"
    """A human has to change something; trying again would give the same answer."""
    COUNTED = "Counted"
    """May pass by itself; after five attempts it is called Failed."""
    OUTAGE = "Outage"
    """The store is down: tried for ever, with a backoff up to ten minutes."""
    UNTIL_TIMEOUT = "UntilTimeout"
    """The source is not ready: no attempt is counted, ``readiness.timeoutSeconds`` ends it."""
    HELD = "Held"
    """Something around the mover has to change first (a claim, a node, a quota, an image). No attempt is counted, it is
    looked at again for ever: whoever mends it need not know of the artifacts that wait for it."""


class Reason(StrEnum):
    """Why something failed, as a Kubernetes reason (PascalCase); the key into :data:`FAILURES`."""

    NOT_READY = "NotReady"
    SOURCE_CHANGED = "SourceChanged"
    STORE_UNAVAILABLE = "StoreUnavailable"
    TARGET_BUSY = "TargetBusy"
    EARLIER_MOVER_NOT_GONE = "EarlierMoverNotGone"
    INVALID_SPEC = "InvalidSpec"
    UNSUPPORTED_URI = "UnsupportedURI"
    BACKEND_NOT_INSTALLED = "BackendNotInstalled"
    CLAIM_NOT_SERVED = "ClaimNotServed"
    TARGET_NOT_ALLOWED = "TargetNotAllowed"
    SECRET_NOT_SUPPORTED = "CredentialsSecretNotSupported"  # noqa: S105 - a reason's name
    CONDITIONAL_WRITES_UNSUPPORTED = "ConditionalWritesUnsupported"
    BUCKET_NOT_FOUND = "BucketNotFound"
    UNSUPPORTED_NAME = "UnsupportedName"
    REQUEST_REJECTED = "RequestRejected"
    CREDENTIALS_MISSING = "CredentialsMissing"
    CREDENTIALS_REFUSED = "CredentialsRefused"
    TARGET_EXISTS = "TargetExists"
    TARGET_NOT_EMPTY = "TargetNotEmpty"
    DESTINATION_EXISTS = "DestinationExists"
    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_EMPTY = "SourceEmpty"
    SOURCE_UNREADABLE = "SourceUnreadable"
    SOURCE_UNSUPPORTED = "SourceUnsupported"
    NOT_FOUND = "NotFound"
    INTEGRITY_MISMATCH = "IntegrityMismatch"
    INTERNAL = "InternalError"
    MOVER_KILLED = "MoverKilled"
    NO_PROGRESS = "NoProgress"
    ENDPOINT_NOT_ALLOWED = "EndpointNotAllowed"
    MOVER_OPTION_NOT_ALLOWED = "MoverOptionNotAllowed"
    SERVICE_ACCOUNT_NOT_ALLOWED = "ServiceAccountNotAllowed"
    CLAIM_NOT_FOUND = "ClaimNotFound"
    CLAIM_PENDING = "ClaimPending"
    CLAIM_LOST = "ClaimLost"
    CLAIM_DELETING = "ClaimDeleting"
    CLAIM_IN_USE = "ClaimInUse"
    CLAIM_UNSUITABLE = "ClaimUnsuitable"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    QUOTA_EXCEEDED = "QuotaExceeded"
    POD_REFUSED = "PodRefused"
    MOVER_NOT_STARTED = "MoverNotStarted"
    OUT_OF_MEMORY = "OutOfMemory"
    POD_LOST = "PodLost"
    MOVER_DISRUPTED = "MoverDisrupted"


@dataclass(frozen=True)
class FailureClass:
    """How one reason is treated everywhere.

    ``code`` is the library's code, ``exit_code`` the mover's, ``help`` the way out in one sentence for the docs.
    """

    code: ErrorCode
    exit_code: ExitCode
    retry: Retry
    help: str


_C, _X, _R = ErrorCode, ExitCode, Retry

FAILURES: dict[Reason, FailureClass] = {
    Reason.NOT_READY: FailureClass(
        _C.SOURCE, _X.NOT_READY, _R.UNTIL_TIMEOUT, "Wait for the training, or raise readiness.timeoutSeconds."
    ),
    Reason.SOURCE_CHANGED: FailureClass(
        _C.SOURCE,
        _X.SOURCE_CHANGED,
        _R.COUNTED,
        "Create the CheckpointArtifact only after the framework has saved; do not write into the folder afterwards.",
    ),
    Reason.STORE_UNAVAILABLE: FailureClass(
        _C.UNAVAILABLE, _X.UNAVAILABLE, _R.OUTAGE, "Nothing to do: it goes on by itself when the store answers again."
    ),
    Reason.TARGET_BUSY: FailureClass(
        _C.EXISTS,
        _X.TARGET_BUSY,
        _R.COUNTED,
        "Another artifact is writing to, or deleting, this URI. Wait, choose another URI, or use layout Unique.",
    ),
    Reason.EARLIER_MOVER_NOT_GONE: FailureClass(
        _C.EXISTS,
        _X.TARGET_BUSY,
        _R.HELD,
        "An earlier mover of this artifact may still be running: it goes on when that one is gone. In the library, pass "
        "force=True once it is gone.",
    ),
    Reason.INVALID_SPEC: FailureClass(
        _C.UNSUPPORTED, _X.CONFIGURATION, _R.NEVER, "Correct the field that the message names."
    ),
    Reason.UNSUPPORTED_URI: FailureClass(
        _C.UNSUPPORTED, _X.CONFIGURATION, _R.NEVER, "Use file:///path, s3://bucket/prefix, gs://… or azure://…."
    ),
    Reason.BACKEND_NOT_INSTALLED: FailureClass(
        _C.UNSUPPORTED, _X.CONFIGURATION, _R.NEVER, "Install the extra that the message names."
    ),
    Reason.CLAIM_NOT_SERVED: FailureClass(
        _C.UNSUPPORTED,
        _X.CONFIGURATION,
        _R.NEVER,
        "Ask the admin to list the claim in the file of `inline_config`.",
    ),
    Reason.TARGET_NOT_ALLOWED: FailureClass(
        _C.UNSUPPORTED, _X.CONFIGURATION, _R.NEVER, "Use a target that the admin allowed for this claim."
    ),
    Reason.SECRET_NOT_SUPPORTED: FailureClass(
        _C.UNSUPPORTED,
        _X.CONFIGURATION,
        _R.NEVER,
        "Remove target.credentialsSecretRef: the Inline executor uses the admin's credential profiles.",
    ),
    Reason.CONDITIONAL_WRITES_UNSUPPORTED: FailureClass(
        _C.UNSUPPORTED,
        _X.CONFIGURATION,
        _R.NEVER,
        "The store ignores If-None-Match or If-Match. Use layout Unique, or a store that honours them.",
    ),
    Reason.BUCKET_NOT_FOUND: FailureClass(
        _C.NOT_FOUND, _X.CONFIGURATION, _R.NEVER, "Create the bucket, or correct target.uri."
    ),
    Reason.UNSUPPORTED_NAME: FailureClass(
        _C.UNSUPPORTED, _X.SOURCE_UNREADABLE, _R.NEVER, "Rename the file, or leave it out with source.exclude."
    ),
    Reason.REQUEST_REJECTED: FailureClass(
        _C.UPLOAD,
        _X.CONFIGURATION,
        _R.NEVER,
        "The store refuses this request for good; its own words are in the message.",
    ),
    Reason.CREDENTIALS_MISSING: FailureClass(
        _C.CREDENTIALS,
        _X.CREDENTIALS,
        _R.NEVER,
        "Name a Secret in target.credentialsSecretRef, or an identity (docs/jobs.md).",
    ),
    Reason.CREDENTIALS_REFUSED: FailureClass(
        _C.CREDENTIALS, _X.CREDENTIALS, _R.NEVER, "Check the keys, and what they may do with this bucket and prefix."
    ),
    Reason.TARGET_EXISTS: FailureClass(
        _C.EXISTS, _X.TARGET_CONFLICT, _R.NEVER, "Another checkpoint is stored there. Choose another URI."
    ),
    Reason.TARGET_NOT_EMPTY: FailureClass(
        _C.EXISTS, _X.TARGET_CONFLICT, _R.NEVER, "Objects that are no checkpoint of ours lie there. Choose another URI."
    ),
    Reason.DESTINATION_EXISTS: FailureClass(
        _C.EXISTS, _X.TARGET_CONFLICT, _R.NEVER, "Download into a folder that does not exist yet."
    ),
    Reason.SOURCE_NOT_FOUND: FailureClass(
        _C.SOURCE, _X.SOURCE_UNREADABLE, _R.NEVER, "Correct source.path: it is relative to the root of the claim."
    ),
    Reason.SOURCE_EMPTY: FailureClass(
        _C.SOURCE, _X.SOURCE_UNREADABLE, _R.NEVER, "Correct source.path, source.include or source.exclude."
    ),
    Reason.SOURCE_UNREADABLE: FailureClass(
        _C.SOURCE, _X.SOURCE_UNREADABLE, _R.NEVER, "Let the mover run as the owner of the files, or chmod them."
    ),
    Reason.SOURCE_UNSUPPORTED: FailureClass(
        _C.SOURCE,
        _X.SOURCE_UNREADABLE,
        _R.NEVER,
        "Remove the link or special file, or leave it out with source.exclude.",
    ),
    Reason.NOT_FOUND: FailureClass(
        _C.NOT_FOUND, _X.CONFIGURATION, _R.NEVER, "No committed checkpoint lies at that URI; list its parent."
    ),
    Reason.INTEGRITY_MISMATCH: FailureClass(
        _C.INTEGRITY, _X.BUG, _R.COUNTED, "The store or the disk gave back other bytes than were written."
    ),
    Reason.INTERNAL: FailureClass(_C.UPLOAD, _X.BUG, _R.COUNTED, "A bug: please report it with the mover's log."),
    Reason.MOVER_KILLED: FailureClass(
        _C.UPLOAD,
        _X.BUG,
        _R.COUNTED,
        "Killed, often for memory: give the operator, whose limit it shares, more.",
    ),
    Reason.NO_PROGRESS: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.COUNTED,
        "The mover stood still for too long; look at the volume and the store.",
    ),
    Reason.ENDPOINT_NOT_ALLOWED: FailureClass(
        _C.UNSUPPORTED,
        _X.CONFIGURATION,
        _R.NEVER,
        "Use an endpoint that the admin listed (`allowedEndpoints`), or ask the admin to list this one.",
    ),
    Reason.MOVER_OPTION_NOT_ALLOWED: FailureClass(
        _C.UNSUPPORTED,
        _X.CONFIGURATION,
        _R.NEVER,
        "Change the field of spec.mover that the message names, or ask the admin for a wider bound.",
    ),
    Reason.SERVICE_ACCOUNT_NOT_ALLOWED: FailureClass(
        _C.CREDENTIALS,
        _X.CREDENTIALS,
        _R.NEVER,
        "Let its owner annotate the ServiceAccount with `checkpoints.rlhf.dev/allow-mover=true`, or use another one.",
    ),
    Reason.CLAIM_NOT_FOUND: FailureClass(
        _C.SOURCE,
        _X.UNAVAILABLE,
        _R.HELD,
        "Create the claim; where the name is wrong, create a new CheckpointArtifact with the right one.",
    ),
    Reason.CLAIM_PENDING: FailureClass(
        _C.SOURCE,
        _X.UNAVAILABLE,
        _R.HELD,
        "No volume is bound to the claim yet: let the pod that writes the checkpoint start.",
    ),
    Reason.CLAIM_LOST: FailureClass(
        _C.SOURCE, _X.UNAVAILABLE, _R.HELD, "The claim's volume is gone: bring it back, or delete the artifact."
    ),
    Reason.CLAIM_DELETING: FailureClass(
        _C.SOURCE,
        _X.UNAVAILABLE,
        _R.HELD,
        "The claim is being deleted, and no new pod may mount it: delete the artifact, or restore the claim.",
    ),
    Reason.CLAIM_IN_USE: FailureClass(
        _C.SOURCE,
        _X.UNAVAILABLE,
        _R.HELD,
        "Another pod holds the claim and it cannot be shared; it goes on by itself when the pod that is named has ended.",
    ),
    Reason.CLAIM_UNSUITABLE: FailureClass(
        _C.SOURCE,
        _X.CONFIGURATION,
        _R.NEVER,
        "Use a claim with a file system, and for file:// targets one that may be written to.",
    ),
    Reason.UNSCHEDULABLE: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "No node takes the mover's pod: look at nodes, taints, spec.mover.nodeSelector, tolerations and resources.",
    ),
    Reason.IMAGE_PULL_FAILED: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "The node cannot pull the mover's image: ask the admin to look at `image` and at `imagePullSecrets`.",
    ),
    Reason.QUOTA_EXCEEDED: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "The namespace's quota has no room for the mover: raise it, or lower spec.mover.resources.",
    ),
    Reason.POD_REFUSED: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "The cluster refuses the mover's pod (quota, Pod Security, a webhook): `kubectl describe job` names the rule.",
    ),
    Reason.MOVER_NOT_STARTED: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "The pod is on its node and does not start: `kubectl describe pod` says why (a Secret that is missing, a volume).",
    ),
    Reason.OUT_OF_MEMORY: FailureClass(
        _C.UPLOAD, _X.BUG, _R.COUNTED, "Raise spec.mover.resources.limits.memory; what was stored is not sent again."
    ),
    Reason.POD_LOST: FailureClass(
        _C.UPLOAD, _X.BUG, _R.COUNTED, "Somebody deleted the mover's pod or Job; the next one goes on where it was."
    ),
    Reason.MOVER_DISRUPTED: FailureClass(
        _C.UNAVAILABLE,
        _X.UNAVAILABLE,
        _R.HELD,
        "Its node was drained or lost, or the pod was preempted; the next mover goes on where it was.",
    ),
}

_BY_EXIT_CODE: dict[int, Reason] = {
    ExitCode.NOT_READY: Reason.NOT_READY,
    ExitCode.SOURCE_CHANGED: Reason.SOURCE_CHANGED,
    ExitCode.UNAVAILABLE: Reason.STORE_UNAVAILABLE,
    ExitCode.TARGET_BUSY: Reason.TARGET_BUSY,
    ExitCode.CONFIGURATION: Reason.INVALID_SPEC,
    ExitCode.CREDENTIALS: Reason.CREDENTIALS_REFUSED,
    ExitCode.TARGET_CONFLICT: Reason.TARGET_EXISTS,
    ExitCode.SOURCE_UNREADABLE: Reason.SOURCE_UNREADABLE,
}


def reason_for_exit(exit_code: int) -> Reason:
    """The most general reason behind an exit code, for a mover whose result was lost.

    Negative codes are signals, as :mod:`subprocess` reports them; 128 + n is how shells and containers say it.
    """
    if exit_code < 0 or exit_code > 128:
        return Reason.MOVER_KILLED
    return _BY_EXIT_CODE.get(exit_code, Reason.INTERNAL)
