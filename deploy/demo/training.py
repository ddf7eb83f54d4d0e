"""Stands in for a training, in a pod: saves a checkpoint into the claim, then says so to the API with its own account."""

import json
import os
import shutil
import ssl
import urllib.request
from pathlib import Path

import yaml

HERE, CLAIM = Path("/training"), Path("/data")
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
API = "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}/apis/checkpoints.rlhf.dev/v1alpha1/namespaces/demo/"


def main() -> None:
    artifact = yaml.safe_load((HERE / "artifact.yaml").read_text())
    folder = CLAIM / artifact["spec"]["source"]["path"]
    folder.mkdir()
    for path in HERE.iterdir():
        if path.is_file() and path.name not in ("training.py", "artifact.yaml"):
            shutil.copyfile(path, folder / path.name)
            (folder / path.name).chmod(0o600)  # as safetensors does
    artifact["spec"]["target"] |= {
        "endpoint": os.environ["STORE_ENDPOINT"],
        "region": os.environ["STORE_REGION"],
        "s3": {"forcePathStyle": True},
        "credentialsSecretRef": {"name": "bucket-keys"},
    }
    request = urllib.request.Request(  # noqa: S310 - the API server, over https
        API.format_map(os.environ) + "checkpointartifacts",
        json.dumps(artifact).encode(),
        {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}", "Content-Type": "application/json"},
    )
    context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    with urllib.request.urlopen(request, context=context) as answer:  # noqa: S310
        print("created", json.load(answer)["metadata"]["name"])


main()
