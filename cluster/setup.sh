#!/bin/sh
# Make .venv with everything dpo-ray needs: `cluster/setup.sh cpu` or `cluster/setup.sh gpu`. Called by the Makefile; may be run
# again at any time. Needs Python 3.11 to 3.13 with pip. Packages come from the indexes that pip is configured for.
set -eu
extra=${1:-cpu}
cd "$(dirname "$0")/.."
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

case $extra in cpu | gpu) ;; *) die "got EXTRA=$extra; expected cpu or gpu" ;; esac
python=
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then python=$candidate; break; fi
done
[ -n "$python" ] || die "found no Python 3.11 to 3.13 (tried ${PYTHON:-python3, python3.13, python3.12, python3.11}); name one with PYTHON=/path/to/python3.12"
"$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip; install it (Debian: apt install python3-pip)"

# --without-pip: Debian's python3 lacks ensurepip. pip of the outside installs into the environment.
[ -x .venv/bin/python ] || "$python" -m venv --without-pip .venv
pip() { "$python" -m pip --python .venv/bin/python "$@"; }
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
echo "setup: environment .venv ($extra, $("$python" --version))"
pip install --quiet uv || die "pip could not install uv; is the package index reachable?"

torch=$(sed -n 's/^ *"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
overrides=
if [ "$extra" = cpu ] && [ "$(uname -s)" = Linux ]; then
    # The CPU build of torch is on PyTorch's own index, unless pip is configured to find it elsewhere. PyPI has only CUDA builds.
    pip install --quiet "torch==$torch+cpu" 2>/dev/null ||
        pip install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ||
        die "found no torch $torch+cpu, neither with pip's indexes and find-links nor at https://download.pytorch.org/whl/cpu"
    overrides="--override cluster/cpu-overrides.txt"
fi

# uv does not read pip's configuration: hand over the index and the find-links.
index=$(pip config get global.index-url 2>/dev/null || true)
links=${PIP_FIND_LINKS:-$(pip config get global.find-links 2>/dev/null || true)}
[ -z "${PIP_INDEX_URL:-$index}" ] || export UV_DEFAULT_INDEX="${PIP_INDEX_URL:-$index}"
[ -z "$links" ] || export UV_FIND_LINKS="$links"
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="$PIP_CERT"
# shellcheck disable=SC2086  # the overrides are two words or none
.venv/bin/uv pip install --quiet --python .venv/bin/python $overrides --editable ".[$extra,dev]" ||
    die "uv could not install the packages of pyproject.toml; its message is above"
.venv/bin/python -c 'import ray, torch, transformers' || die "the installed packages do not import; remove .venv and run again"
