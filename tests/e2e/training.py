"""What a training does at its end, as a program for a pod: write checkpoints, say so through the API, perhaps train on.

Its one argument is JSON: ``saves`` maps a folder of the volume at /data to what it shall hold ("sample", or names and
sizes), ``artifacts`` are the objects to create, ``hold`` says whether to stay and keep the volume.
"""

import json
import os
import shutil
import signal
import ssl
import sys
import urllib.request
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "/apis/checkpoints.rlhf.dev/v1alpha1/namespaces/{}/checkpointartifacts"


def save(folder: Path, wanted: str | dict[str, int]) -> None:
    """``wanted``: "sample", or the sizes of files by their names."""
    folder.mkdir(parents=True)
    if isinstance(wanted, str):
        for path in Path("/sample").iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    else:
        for name, size in wanted.items():
            with (folder / name).open("wb") as stream:
                for start in range(0, size, 1 << 20):
                    stream.write(os.urandom(min(1 << 20, size - start)))
    for path in folder.iterdir():
        path.chmod(0o600)  # as safetensors leaves its files


def create(body: dict[str, object]) -> None:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    namespace = (ACCOUNT / "namespace").read_text()
    request = urllib.request.Request(
        f"https://{host}:{port}{API.format(namespace)}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"},
    )
    context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310 - the API server, over https
        print(answer.status, json.load(answer)["metadata"]["name"], flush=True)


def main() -> None:
    task = json.loads(sys.argv[1])
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for folder, wanted in task["saves"].items():
        save(Path("/data") / folder, wanted)
    for body in task["artifacts"]:
        create(body)
    if task["hold"]:
        signal.sigwait(signals)


main()
